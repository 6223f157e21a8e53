"""The tests of controls.py."""

import argparse
import functools
import json
import pickle
import re
import statistics

import controls
import numpy as np
import pytest
from helpers import (
    PYTHON,
    RNG,
    ROOT,
    WITH_MPI,
    assert_same_bits,
    example,
    needs_hardware,
    needs_mpi,
    run,
    slow,
    write_slice,
)

import data
import fpnl
import train

CONTROLS = [*PYTHON, "examples/controls.py"]
SIZES = (12, 10, 9, 5)
NETS = {  # network of each method, as fpnl takes it
    "backprop": {"ftz": True, "transfer": np.positive},
    "relu": {"ftz": True, "transfer": controls.rectify},
    "deadzone": {"ftz": True, "transfer": None},
}
NETS |= dict.fromkeys(["es", "prediction"], NETS["deadzone"])
DERIVATIVES = "backprop", "relu", "deadzone"


def settings(**options):
    defaults = {name: default for name, (default, *_) in train.OPTIONS.items()}
    return argparse.Namespace(**train.FIXED | defaults | {"sizes": SIZES} | options)


def gradient(method, params, x, labels, net=None, **options):
    """Of the mean loss, with the network of the method or another, and the losses."""
    run = getattr(train if method == "es" else controls, method)(settings(**options), net or NETS[method])
    return run(params, x, labels, RNG(2), weights=np.full(len(x), 1 / len(x), "f"), return_losses=True)


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
@pytest.mark.parametrize("method", DERIVATIVES)
def test_the_gradient_is_the_derivative(method, smoothing):
    params, x, labels = example(SIZES, n=2)
    grads, losses = gradient(method, params, x, labels, smoothing=smoothing)
    targets = (1 - smoothing) * np.eye(SIZES[-1])[labels] + smoothing / SIZES[-1]

    def loss_of(params):
        logits = fpnl.forward(params, x, **NETS[method])
        of_each = [fpnl.cross_entropy(logits, np.full(len(x), label)) for label in range(SIZES[-1])]
        return np.mean(np.sum(of_each * targets.T, axis=0))

    assert_is_the_derivative(grads, params, loss_of)
    assert np.mean(losses) == pytest.approx(loss_of(params), rel=1e-5)


@pytest.mark.parametrize("method", ["es", "prediction"])
def test_smoothed_labels_reach_what_is_measured(method):
    """The last layer's gradient is that of the smoothed loss, to a part in a hundred: there, ES has no noise."""
    params, x, labels = example(SIZES, n=3)
    found, exact = (gradient(name, params, x, labels, smoothing=0.3, sigma=1e-3)[0] for name in (method, "deadzone"))
    np.testing.assert_allclose(found[-1][0], exact[-1][0], atol=1e-2 * np.abs(exact[-1][0]).max())


def test_dropout_is_the_network_without_some_of_its_units():
    """What a gradient is given, where its results go, and that they are the derivative: whatever is left out has no
    weights to the next layer, what is left has larger ones."""
    params, x, labels = example(SIZES, n=2)
    weights, given, left = np.float32([0.3, 0.7]), [], set()

    def ones(params, x, labels, rng, weights, return_losses):
        given.append((params, x, labels, weights))
        return [tuple(map(np.ones_like, layer)) for layer in params], np.zeros(len(x), "f")

    def thinned(gradient, key, **others):
        how = settings(**{"dropout": 0.4, "batch": 64} | others)
        return train.thinned(gradient, how)(params, x, labels, RNG(key), weights=weights, return_losses=True)

    for key in range(3):
        whole, _ = thinned(ones, key)
        kept = [np.flatnonzero(W.any(axis=1)) for W, _ in whole] + [np.arange(SIZES[-1])]
        left.add((*kept[1], *kept[2]))
        assert [len(units) for units in kept] == [12, 6, 5, 5]
        thin, *rows = given[-1]
        for found, expected in zip(rows, (x, labels, weights), strict=True):
            np.testing.assert_array_equal(found, expected)
        gains = [np.float32(n / len(units)) for n, units in zip(SIZES, kept)]
        for l, (W, b) in enumerate(params):
            np.testing.assert_array_equal(thin[l][0], W[kept[l]][:, kept[l + 1]] * gains[l])
            np.testing.assert_array_equal(thin[l][1], b[kept[l + 1]])
            np.testing.assert_array_equal(np.flatnonzero(whole[l][1]), kept[l + 1])
        masks = [np.isin(np.arange(n), units)[:, None] * gain for n, units, gain in zip(SIZES, kept, gains)]
        for method in DERIVATIVES:
            grads, losses = thinned(getattr(controls, method)(settings(), NETS[method]), key)

            def losses_of(params, net=NETS[method], masks=masks):
                masked = [(W * mask, b) for (W, b), mask in zip(params, masks)]
                return fpnl.cross_entropy(fpnl.forward(masked, x, **net), labels)

            assert_is_the_derivative(grads, params, lambda params, of=losses_of: np.vdot(weights, of(params)))
            np.testing.assert_allclose(losses, losses_of(params), rtol=1e-5)
    assert len(left) == 3
    whole, _ = thinned(ones, 0, batch=65)  # which are two networks
    np.testing.assert_array_equal(whole[-1][1], 2)
    for i, (_, *rows) in enumerate(given[-2:]):
        for found, expected in zip(rows, (x, labels, weights), strict=True):
            np.testing.assert_array_equal(found, expected[i : i + 1])
    whole, _ = thinned(ones, 0, dropout=0.99)  # but one unit at least
    assert [np.count_nonzero(W.any(axis=1)) for W, _ in whole] == [12, 1, 1]


def test_backprop_is_blind_to_underflow():
    """With the flush, the derivative is the linear network's, at other outputs: straight through; every bias learns."""
    params, x, labels = example(SIZES, n=30)
    grads = []
    for net in (NETS["deadzone"], NETS["backprop"]):
        o = fpnl.forward(params, x, **net)
        p = np.exp(o) / np.exp(o).sum(axis=1, keepdims=True) - np.eye(5, dtype=np.float32)[labels]
        grads.append(gradient("backprop", params, x, labels, net)[0])
        np.testing.assert_allclose(grads[-1][0][0], x.T @ (p / 30 @ params[2][0].T @ params[1][0].T), atol=1e-6)
        assert all(db.any() for _, db in grads[-1])
    assert not np.array_equal(grads[0][0][0], grads[1][0][0])
    for method in ("deadzone", "prediction"):
        assert [bool(db.any()) for _, db in gradient(method, params, x, labels)[0]] == [True, False, False]


def test_the_prediction_is_the_control_variate_without_its_rest():
    """Its slopes along the logits are those of softmax, as far as they move; below, h(z + s) - h(z - s) over 2 s and
    the chain rule. Where ES measures over a small interval, it finds the same along the logits, whatever the signs."""
    params, x, labels = example(SIZES, n=6)
    outputs, slopes = controls.predicted(settings(sigma=0.05), params, x, labels)
    signs = fpnl.mutation_signs(RNG(0), params, len(x))
    es_outputs, es_slopes = fpnl.es_slopes(params, x, labels, signs, sigma=0.001, block=1)
    near = controls.predicted(settings(sigma=0.001), params, x, labels)[1][-1]
    np.testing.assert_allclose(near, es_slopes[-1], atol=2e-3)
    assert np.count_nonzero(near) == np.count_nonzero(es_slopes[-1]) > 10
    for h, es_h in zip(outputs, es_outputs, strict=True):
        np.testing.assert_allclose(h, es_h, atol=1e-5)
    for l, a in enumerate([x, outputs[0]]):
        z = a @ params[l][0] + params[l][1] * (l == 0)
        shift = np.float32(0.05) * np.sqrt(np.square(a).sum(axis=1, keepdims=True) + (l == 0))
        moved = controls.dead_zone(z + shift) - controls.dead_zone(z - shift)
        expected = slopes[l + 1] @ params[l + 1][0].T * moved / np.maximum(2 * shift, fpnl.TINY)
        np.testing.assert_allclose(slopes[l], expected, atol=1e-4)
        assert np.abs(slopes[l]).max() > 0.01


def test_the_prediction_has_no_reason_to_move_all_logits():
    """Where all of them live, which leaves the loss as it is; slopes over the intervals of ES do have one."""
    params, x, labels = example(SIZES, n=20)
    params[-1] = np.float32(5) + params[-1][0], params[-1][1]
    (*_, o), (*_, slopes) = controls.predicted(settings(sigma=0.5), params, x, labels)
    _, (*_, es_slopes) = fpnl.es_slopes(params, x, labels, fpnl.mutation_signs(RNG(0), params, 20), sigma=0.5)
    live = np.all(np.abs(o) > 3, axis=1)
    left, es_left = (np.abs(s[live].sum(axis=1)).max() for s in (slopes, es_slopes))
    assert live.sum() > 10 and left < 2e-3 < 0.02 < es_left, (live.sum(), left, es_left)


@pytest.mark.parametrize("row", controls.ROWS)
def test_what_is_mapped_travels_and_the_bits_are_the_same(row):
    params, x, labels = example(SIZES, n=20)
    _, method, transfer, _ = controls.ROWS[row]
    run = method(settings(task=1), {"ftz": True, "transfer": transfer})
    how, lists = {"weights": np.full(20, 0.05, "f"), "return_losses": True}, []

    def elsewhere(function, tasks):
        lists.append(len(tasks))
        return [*map(*pickle.loads(pickle.dumps((function, tasks))))]

    expected, losses = run(params, x, labels, RNG(0), **how)
    found, same = run(params, x, labels, RNG(0), workers=3, map_tasks=elsewhere, **how)
    assert_same_bits([*found, (same,)], [*expected, (losses,)])
    assert lists == [3]


@slow
@needs_mpi
def test_workers_of_mpi_know_the_controls(slice_of_mnist, tmp_path):
    for engine, program in (("threads", PYTHON), ("mpi", WITH_MPI)):
        options = "--rows deadzone prediction --seeds 1 --epochs 0.2 --reports 1 --engine".split()
        run("examples/controls.py", tmp_path / engine, *options, engine, "--data", slice_of_mnist, program=program)
    for row in ("deadzone", "prediction"):
        found, expected = (data.load_weights(tmp_path / engine / f"{row}-0.npz")[0] for engine in ("mpi", "threads"))
        assert_same_bits(found, expected)


@pytest.mark.slow
def test_the_controls_train(slice_of_mnist, tmp_path):
    """Softmax regression and the linear network learn the same; the ReLU network, from the same start, more; so does
    what sees the dead zone. From the printed table."""
    rows = "linear logistic prediction blind deadzone relu".split()
    options = f"--seeds 1 --epochs 4 --batch 100 --weight-decay 0 --reports 1 --data {slice_of_mnist} --rows".split()
    done = run(tmp_path / "runs", *options, *rows, program=CONTROLS)
    found = re.findall(r"(?m)^\w.*? +\d+\.\d\d ± 0\.00 +(\d+\.\d\d) ± 0\.00", done.stdout)
    linear, logistic, prediction, blind, deadzone, relu = map(float, found)
    assert 84 < linear < 90 and 80 < logistic < 90
    assert min(prediction, deadzone, relu) > max(linear, logistic, blind) + 1


@pytest.mark.slow
@needs_hardware
def test_the_comparison_says_what_it_takes_and_keeps_its_runs(mnist, tmp_path):
    folder = write_slice(mnist, tmp_path, 1000, 500)
    options = f"--seeds 2 --epochs 1 --batch 256 --reports 1 --workers 1 --data {folder} --validation 100".split()
    done = run(tmp_path / "runs", *options, program=CONTROLS)
    first, *printed = done.stdout.splitlines()
    assert re.fullmatch(rf"22 runs, at most about \d+ minutes; logs and weights go to {tmp_path}/runs", first)
    assert done.stdout.count("logits that differ between the emulation and the CPU's flags: 0 of 1000") == 2
    start = next(i for i, line in enumerate(printed) if line.startswith("accuracy in percent, 2 seeds"))
    assert "validation" in printed[start] and len(printed[start + 1 :]) == len(controls.ROWS) + 3
    assert all(re.search(r"\d+\.\d\d ± +\d+\.\d\d +\d+\.\d\d ± +\d+\.\d\d", row) for row in printed[start + 1 :])
    files = {path.name for path in (tmp_path / "runs").iterdir()}
    ends = [f"-{seed}.{end}" for seed in (0, 1) for end in ("csv", "npz")]
    assert files == {name + end for name in controls.ROWS for end in ends} | {"scale-0.csv", "scale-1.csv"}
    assert all(
        '"validation": 100' in (tmp_path / "runs" / f"{name}-0.csv").read_text("utf-8") for name in controls.ROWS
    )
    params, arrays = data.load_weights(tmp_path / "runs" / "relu-1.npz")
    assert arrays["settings"]["method"] == "relu" and len(params) == 3
    done = run("--evaluate", tmp_path / "runs" / "relu-1.npz", check=False)
    assert done.returncode == 2 and "expected weights of fpnl's network, found one with rectify" in done.stderr


def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path):
    for options, says in (
        ([], "the following arguments are required: folder"),
        ([tmp_path / "runs", "--rows", "sgd"], "argument --rows: invalid choice: 'sgd'"),
        ([tmp_path / "runs", "--seed", 3], "expected other options than --seed, --log, --save, --resume, --evaluate"),
        ([tmp_path / "runs", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([tmp_path / "runs", "--data", tmp_path / "no"], "no: expected a folder with the four files of MNIST"),
    ):
        done = run(*options, program=CONTROLS, check=False)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "runs").exists()


def cells(name):
    """Of a row of a published table: mean and standard deviation of the last lines of three seeds' logs."""
    last = [(ROOT / f"docs/runs/{name}-{seed}.csv").read_text("utf-8").splitlines()[-1].split(",") for seed in range(3)]
    columns = [[100 * float(line[i]) for line in last] for i in (3, 4)]
    return " | ".join(f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns)


@pytest.mark.parametrize("document", ["README.md", "docs/RESULTS.md"])
def test_the_published_table_is_that_of_the_published_logs(document):
    text = (ROOT / document).read_text("utf-8").replace("*", "")
    others = [f"best/{name}" for name in ("es", "prediction", "deadzone", "relu")]
    others += [f"fashion/{name}" for name in ("es", "es-cv", "prediction")]
    for name in [*controls.ROWS, *(others if document == "docs/RESULTS.md" else [])]:
        assert f"| {cells(name)} |" in text, (name, cells(name))


def test_the_published_weights_are_those_of_the_main_job(mnist):
    """Its settings as they are now, and the accuracy that its log ends with."""
    params, arrays = data.load_weights(ROOT / "docs/weights.npz")
    log = (ROOT / "docs/runs/es-0.csv").read_text("utf-8").splitlines()
    defaults = json.loads(json.dumps({name: default for name, (default, *_) in train.OPTIONS.items()}))
    assert arrays["settings"] == json.loads(log[0][1:]) and arrays.keys() == {"settings"}
    assert all(value == defaults.get(name, value) for name, value in arrays["settings"].items())
    network = functools.partial(fpnl.forward, params)
    accuracies = [controls.accuracy(network, x, y) for x, y in zip(mnist[::2], mnist[1::2])]
    assert accuracies == pytest.approx([float(value) for value in log[-1].split(",")[3:5]], abs=2e-4)
