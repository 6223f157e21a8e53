"""The tests of controls.py."""

import json
import re
import statistics
import subprocess
import sys

import controls
import numpy as np
import pytest

import data
import fpnl
import train
from test_fpnl import RNG, ROOT, example, needs_hardware, write_slice

SIZES = (12, 10, 9, 5)
NETS = {  # network of each method, as fpnl takes it
    "backprop": {"ftz": True, "transfer": np.positive},
    "relu": {"ftz": True, "transfer": controls.rectify},
    "deadzone": {"ftz": True, "transfer": None},
}


def settings(method, **options):
    return train.Settings(0, SIZES[0], SIZES[-1], method, "on", hidden=SIZES[1:-1], **options)


def gradient(method, net, params, x, labels, **options):
    inputs, slopes = getattr(controls, method)(settings(method, **options), net, params, x, labels, None)
    return [(g[:-1], g[-1]) for g in (a @ s.T / len(x) for a, s in zip(inputs, slopes))]


def assert_is_the_derivative(grads, params, loss_of):
    """Against central differences, along a random direction of all the weights; within the dead zones, where the
    network is differentiable, the step is too small for a unit to cross a threshold."""
    rng = RNG(1)
    direction = [[rng.standard_normal(a.shape, dtype=np.float32) for a in layer] for layer in params]

    def loss_at(t):
        return float(loss_of([[a + np.float32(t) * d for a, d in zip(*layers)] for layers in zip(params, direction)]))

    slope = sum(np.vdot(g, d) for layers in zip(grads, direction) for g, d in zip(*layers))
    assert (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize("method", NETS)
def test_the_gradient_is_the_derivative(method, smoothing):
    params, x, labels = example(SIZES, n=2)
    grads = gradient(method, NETS[method], params, x, labels, smoothing=smoothing)
    targets = (1 - smoothing) * np.eye(SIZES[-1])[labels] + smoothing / SIZES[-1]

    def loss_of(params):
        logits = fpnl.forward(params, x, **NETS[method])
        of_each = [fpnl.cross_entropy(logits, np.full(len(x), label)) for label in range(SIZES[-1])]
        return np.mean(np.sum(of_each * targets.T, axis=0))

    assert_is_the_derivative(grads, params, loss_of)


@pytest.mark.parametrize("method", ["es", "prediction"])
def test_smoothed_labels_reach_what_is_measured(method):
    """The last layer's slopes are those of the smoothed loss, to a part in a hundred: there, ES has no noise."""
    params, x, labels = example(SIZES, n=3)
    how, signs = settings(method, smoothing=0.3, sigma=1e-3), fpnl.mutation_signs(RNG(2), params, 3)
    measure = train.es if method == "es" else controls.prediction
    _, slopes = measure(how, NETS["deadzone"], params, x, labels, signs)
    _, exact = controls.deadzone(how, NETS["deadzone"], params, x, labels, signs)
    np.testing.assert_allclose(slopes[-1], exact[-1], atol=1e-2)


def test_dropout_is_the_network_without_some_of_its_units():
    """What a method is given, where its results go, and that they are the derivative: whatever is left out has no
    weights to the next layer, what is left has larger ones."""
    params, x, labels = example(SIZES, n=2)
    signs, given, left = fpnl.mutation_signs(RNG(2), params, 2), [], set()

    def ones(settings, net, params, x, labels, signs):
        given.append((params, x, signs))
        return [np.ones((len(W) + 1, 2), "f") for W, _ in params], [np.ones((len(b), 2), "f") for _, b in params]

    def thinned(method, key, net=None):
        return train.thinned(method, key, settings("es", dropout=0.4), net, params, x, labels, signs)

    for key in range(3):
        inputs, slopes = thinned(ones, key)
        kept = [np.flatnonzero(a[:-1].all(axis=1)) for a in inputs] + [np.arange(SIZES[-1])]
        left.add((*kept[1], *kept[2]))
        assert [len(units) for units in kept] == [12, 6, 6, 5]
        thin, pixels, own = given[-1]
        np.testing.assert_array_equal(pixels, x)
        places = np.concatenate([units + end for units, end in zip(kept[1:], (0, 10, 19))])
        np.testing.assert_array_equal(own, signs[:, places])
        gains = [np.float32(n / len(units)) for n, units in zip(SIZES, kept)]
        for l, (W, b) in enumerate(params):
            np.testing.assert_array_equal(thin[l][0], W[kept[l]][:, kept[l + 1]] * gains[l])
            np.testing.assert_array_equal(thin[l][1], b[kept[l + 1]])
            np.testing.assert_array_equal(np.flatnonzero(slopes[l].any(axis=1)), kept[l + 1])
        masks = [np.isin(np.arange(n), units)[:, None] * gain for n, units, gain in zip(SIZES, kept, gains)]
        for method, net in NETS.items():
            grads = [a @ s.T / 2 for a, s in zip(*thinned(getattr(controls, method), key, net))]

            def loss_of(params, net=net, masks=masks):
                return fpnl.loss(fpnl.forward([(W * mask, b) for (W, b), mask in zip(params, masks)], x, **net), labels)

            assert_is_the_derivative([(g[:-1], g[-1]) for g in grads], params, loss_of)
    assert len(left) == 3


def test_backprop_is_blind_to_underflow():
    """With the flush, the derivative is the linear network's, at other outputs: straight through; every bias learns."""
    params, x, labels = example(SIZES, n=30)
    grads = []
    for net in (NETS["deadzone"], NETS["backprop"]):
        o = fpnl.forward(params, x, **net)
        p = np.exp(o) / np.exp(o).sum(axis=1, keepdims=True) - np.eye(5, dtype=np.float32)[labels]
        grads.append(gradient("backprop", net, params, x, labels))
        np.testing.assert_allclose(grads[-1][0][0], x.T @ (p / 30 @ params[2][0].T @ params[1][0].T), atol=1e-6)
        assert all(db.any() for _, db in grads[-1])
    assert not np.array_equal(grads[0][0][0], grads[1][0][0])
    assert [bool(db.any()) for _, db in gradient("deadzone", NETS["deadzone"], params, x, labels)] == [
        True,
        False,
        False,
    ]


def test_the_prediction_is_the_control_variate_without_its_rest():
    """Its logits' slopes are those of ES, whatever the signs; below, h(z + s) - h(z - s) over 2 s and the chain rule.
    With blocks of 1 in a network of one hidden layer, ES with the control variate measures that and a rest."""
    params, x, labels = example(SIZES, n=6)
    given = settings("prediction", sigma=0.05, block=1)
    inputs, slopes = controls.prediction(given, NETS["deadzone"], params, x, labels, None)
    signs = fpnl.mutation_signs(RNG(0), params, len(x))
    es_inputs, es_slopes = train.es(given, NETS["deadzone"], params, x, labels, signs)
    np.testing.assert_allclose(slopes[-1], es_slopes[-1], atol=1e-5)
    for a, b in zip(inputs, es_inputs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for l in (0, 1):
        z = params[l][0].T @ inputs[l][:-1] + inputs[l][-1] * params[l][1][:, None]
        shift = np.float32(0.05) * np.linalg.norm(inputs[l], axis=0)
        moved = controls.dead_zone(z + shift) - controls.dead_zone(z - shift)
        expected = params[l + 1][0] @ slopes[l + 1] * moved / np.maximum(2 * shift, fpnl.TINY)
        np.testing.assert_allclose(slopes[l], expected, atol=1e-4)
        assert np.abs(slopes[l]).max() > 0.01


@pytest.mark.slow
def test_the_controls_train(slice_of_mnist, tmp_path):
    """Softmax regression and the linear network learn the same; the ReLU network, from the same start, more; so does
    what sees the dead zone. From the printed table."""
    rows = "linear logistic prediction blind deadzone relu".split()
    options = f"--seeds 1 --epochs 4 --batch 100 --weight-decay 0 --reports 1 --data {slice_of_mnist} --rows".split()
    command = [sys.executable, "examples/controls.py", tmp_path / "runs", *options, *rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = re.findall(r"(?m)^\w.*? +\d+\.\d\d ± 0\.00 +(\d+\.\d\d) ± 0\.00", done.stdout)
    linear, logistic, prediction, blind, deadzone, relu = map(float, found)
    assert 84 < linear < 90 and 80 < logistic < 90
    assert min(prediction, deadzone, relu) > max(linear, logistic, blind) + 1


@pytest.mark.slow
@needs_hardware
def test_the_comparison_says_what_it_takes_and_keeps_its_runs(mnist, tmp_path):
    folder = write_slice(mnist, tmp_path, 1000, 500)
    options = f"--seeds 2 --epochs 1 --reports 1 --workers 1 --data {folder} --validation 100".split()
    command = [sys.executable, "examples/controls.py", tmp_path / "runs", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, *printed = done.stdout.splitlines()
    assert re.fullmatch(rf"22 runs, at most about \d+ minutes; logs and weights go to {tmp_path}/runs", first)
    assert done.stdout.count("logits that differ between the emulation and the CPU's flags: 0 of 1000") == 2
    start = next(i for i, line in enumerate(printed) if line.startswith("accuracy in percent, 2 seeds"))
    assert "validation" in printed[start] and len(printed[start + 1 :]) == len(controls.ROWS) + 3
    assert all(re.search(r"\d+\.\d\d ± +\d+\.\d\d +\d+\.\d\d ± +\d+\.\d\d", row) for row in printed[start + 1 :])
    files = {path.name for path in (tmp_path / "runs").iterdir()}
    ends = [f"-{seed}.{end}" for seed in (0, 1) for end in ("csv", "npz")]
    assert files == {name + end for name in controls.ROWS for end in ends} | {"scale-0.csv", "scale-1.csv"}
    assert all('"validation": 100' in (tmp_path / "runs" / f"{name}-0.csv").read_text() for name in controls.ROWS)
    params, arrays = data.load_weights(tmp_path / "runs" / "relu-1.npz")
    assert arrays["settings"]["method"] == "relu" and len(params) == 3
    command = [sys.executable, "train.py", "--evaluate", tmp_path / "runs" / "relu-1.npz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "expected weights of ES, found those of relu" in done.stderr


def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path):
    for options, says in (
        ([], "the following arguments are required: folder"),
        ([tmp_path / "runs", "--rows", "sgd"], "argument --rows: invalid choice: 'sgd'"),
        ([tmp_path / "runs", "--seed", 3], "expected other options than --seed, --log, --save, --resume, --evaluate"),
        ([tmp_path / "runs", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([tmp_path / "runs", "--data", tmp_path / "no"], "no: expected a folder with the four files of MNIST"),
    ):
        command = [sys.executable, "examples/controls.py", *map(str, options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "runs").exists()


def cells(name):
    """Of a row of a published table: mean and standard deviation of the last lines of three seeds' logs."""
    last = [(ROOT / f"docs/runs/{name}-{seed}.csv").read_text().splitlines()[-1].split(",") for seed in range(3)]
    columns = [[100 * float(line[i]) for line in last] for i in (3, 4)]
    return " | ".join(f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns)


@pytest.mark.parametrize("document", ["README.md", "docs/RESULTS.md"])
def test_the_published_table_is_that_of_the_published_logs(document):
    text = (ROOT / document).read_text().replace("*", "")
    best = ["best/es", "best/prediction", "best/deadzone", "best/relu"] if document == "docs/RESULTS.md" else []
    for name in [*controls.ROWS, *best]:
        assert f"| {cells(name)} |" in text, (name, cells(name))


def test_the_published_weights_are_those_of_the_main_job(mnist):
    """Its settings as they are now, and the accuracy that its log ends with."""
    params, arrays = data.load_weights(ROOT / "docs/weights.npz")
    log = (ROOT / "docs/runs/es-0.csv").read_text().splitlines()
    settings = train.Settings(**arrays["settings"] | {"hidden": (*arrays["settings"]["hidden"],)})
    assert arrays["settings"] == json.loads(log[0][1:]) and arrays.keys() == {"settings"}
    assert all(getattr(settings, name) == field.default for name, field in train.OPTIONS.items())
    accuracies = [fpnl.accuracy(fpnl.forward(params, data.pixels(x)), y) for x, y in zip(mnist[::2], mnist[1::2])]
    assert accuracies == pytest.approx([float(value) for value in log[-1].split(",")[3:5]], abs=2e-4)
