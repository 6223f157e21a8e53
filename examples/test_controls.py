"""The tests of controls.py."""

import argparse
import functools
import json
import pickle
import re

import controls
import numpy as np
import pytest
from helpers import PYTHON, RNG, ROOT, WITH_MPI, assert_same_bits, example, needs_hardware, needs_mpi, run, write_slice

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

    slope = sum(map(np.vdot, fpnl.leaves(grads), fpnl.leaves(direction)))
    assert (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=0.01)


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


def test_es_measures_the_loss_of_smoothed_labels():
    """The last layer's gradient is that of this loss, to a part in a hundred: there, ES has no noise."""
    params, x, labels = example(SIZES, n=3)
    found, exact = (gradient(name, params, x, labels, smoothing=0.3, sigma=1e-3)[0] for name in ("es", "deadzone"))
    np.testing.assert_allclose(found[-1][0], exact[-1][0], atol=1e-2 * np.abs(exact[-1][0]).max())


@pytest.mark.parametrize(("batch", "networks"), [(64, 1), (65, 2)])
def test_dropout_is_the_network_without_some_of_its_units(batch, networks):
    """A batch has a network for every 64 images; what it leaves out has no weights to the next layer, what is left has
    larger ones. The losses are those of these networks, the gradient their derivative."""
    params, x, labels = example(SIZES, n=2)
    for _, b in params:
        b += RNG(3).uniform(-0.1, 0.1, len(b)).astype(np.float32)

    def thinned(method, weights, key, dropout=0.4):
        how = settings(dropout=dropout, batch=batch)
        gradient = getattr(controls, method)(how, NETS[method])
        return train.thinned(gradient, how)(params, x, labels, RNG(key), weights=weights, return_losses=True)

    def kept_of(key, **how):
        """Of each image, the inputs of each layer that have weights: others have no derivative in a linear network."""
        of_images = [thinned("backprop", alone, key, **how)[0] for alone in np.eye(2, dtype=np.float32)]
        return [[dW.any(axis=1) for dW, _ in grads] for grads in of_images]

    def losses_of(params, kept, net):
        logits = []
        for i, of_image in enumerate(kept):
            gains = [units[:, None] * np.float32(1 / units.mean()) for units in of_image]
            thin = [(W * gain, b) for (W, b), gain in zip(params, gains)]
            logits.append(fpnl.forward(thin, x[i : i + 1], **net))
        return fpnl.cross_entropy(np.concatenate(logits), labels)

    weights, different = np.float32([0.3, 0.7]), set()
    for key in range(3):
        kept = kept_of(key)
        assert [[units.sum() for units in of_image] for of_image in kept] == 2 * [[12, 6, 5]]
        different |= {(*np.concatenate(of_image),) for of_image in kept}
        for method in DERIVATIVES:
            grads, losses = thinned(method, weights, key)
            expected = functools.partial(losses_of, kept=kept, net=NETS[method])
            assert_is_the_derivative(grads, params, lambda params, of=expected: np.vdot(weights, of(params)))
            np.testing.assert_allclose(losses, expected(params), rtol=1e-5)
    assert len(different) == 3 * networks
    assert [units.sum() for units in kept_of(0, dropout=0.99)[0]] == [12, 1, 1]  # but one unit at least


def test_backprop_is_blind_to_underflow():
    """With the flush, the derivative is the linear network's, at other outputs: straight through; every bias learns."""
    params, x, labels = example(SIZES, n=30)
    grads, _ = gradient("backprop", params, x, labels, net=NETS["deadzone"])
    delta = controls.softmax_error(fpnl.forward(params, x), labels) / 30
    np.testing.assert_allclose(grads[0][0], x.T @ (delta @ params[2][0].T @ params[1][0].T), atol=1e-6)
    assert all(db.any() for _, db in grads)


def test_the_prediction_is_the_chain_rule_along_measured_movements():
    """The derivative of a unit is h(z + s) - h(z - s) over 2 s, s = sigma |a|. That of the loss along an output is that
    of softmax, however large sigma is: these add up to 0, and leave no reason to move all logits alike. No slope has
    noise, and the first layer's biases learn alone."""
    params, x, labels = example(SIZES, n=6)
    params[0][1][:] = RNG(1).uniform(-0.1, 0.1, SIZES[1])
    how = {"sigma": 0.5, "smoothing": 0.3}
    outputs, slopes = controls.predicted(settings(**how), params, x, labels)
    above = controls.softmax_error(outputs[-1], labels, 0.3)
    for l, a in reversed([*enumerate([x, *outputs[:-1]])]):
        z = a @ params[l][0] + params[l][1]
        np.testing.assert_allclose(outputs[l], controls.dead_zone(z), atol=1e-5)
        shift = np.float32(0.5) * np.sqrt(np.square(a).sum(axis=1, keepdims=True) + (l == 0))
        moved = controls.dead_zone(z + shift) - controls.dead_zone(z - shift)
        expected = above * moved / np.maximum(2 * shift, fpnl.TINY)
        np.testing.assert_allclose(slopes[l], expected, atol=1e-4)
        assert np.abs(expected).max() > 0.01
        above = slopes[l] @ params[l][0].T
    grads, _ = gradient("prediction", params, x, labels, **how)
    assert [bool(db.any()) for _, db in grads] == [True, False, False]


@pytest.mark.parametrize("row", controls.ROWS)
def test_what_is_mapped_travels_and_the_bits_are_the_same(row):
    params, x, labels = example(SIZES, n=20)
    _, method, transfer, _ = controls.ROWS[row]
    run = method(settings(task=1), {"ftz": True, "transfer": transfer})
    how, lists = {"weights": np.full(20, 0.05, "f"), "return_losses": True}, []

    def elsewhere(function, tasks):
        lists.append(len(tasks))
        return [*map(*pickle.loads(pickle.dumps((function, tasks))))]

    expected = run(params, x, labels, RNG(0), **how)
    assert_same_bits(run(params, x, labels, RNG(0), workers=3, map_tasks=elsewhere, **how), expected)
    assert lists == [3]


@pytest.mark.slow
@needs_mpi
def test_workers_of_mpi_know_the_controls(slice_of_mnist, tmp_path):
    options = f"--rows deadzone --seeds 1 --epochs 0.2 --reports 1 --data {slice_of_mnist} --engine".split()
    for engine, program in (("threads", PYTHON), ("mpi", WITH_MPI)):
        run("examples/controls.py", tmp_path / engine, *options, engine, program=program)
    assert_same_bits(*(data.load_weights(tmp_path / engine / "deadzone-0.npz")[0] for engine in ("mpi", "threads")))


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
    folder, runs = write_slice(mnist, tmp_path, 1000, 500), tmp_path / "runs"
    options = f"--seeds 2 --epochs 1 --batch 256 --reports 1 --workers 1 --data {folder} --validation 100".split()
    done = run(runs, *options, program=CONTROLS)
    assert re.match(rf"22 runs, at most about \d+ minutes; logs and weights go to {runs}\n", done.stdout)
    assert done.stdout.count("logits that differ between the emulation and the CPU's flags: 0 of 1000") == 2
    head, *table = done.stdout.partition("\naccuracy in percent, 2 seeds")[2].splitlines()
    assert "validation" in head and len(table) == len(controls.ROWS) + 3
    assert all(re.search(r"\d+\.\d\d ± +\d+\.\d\d +\d+\.\d\d ± +\d+\.\d\d", row) for row in table)
    ends = [f"-{seed}.{end}" for seed in (0, 1) for end in ("csv", "npz")]
    expected = {name + end for name in controls.ROWS for end in ends} | {"scale-0.csv", "scale-1.csv"}
    assert {path.name for path in runs.iterdir()} == expected
    for name, (_, method, transfer, _) in controls.ROWS.items():
        s = data.load_weights(runs / f"{name}-1.npz")[1]["settings"]
        network = transfer.__name__ if transfer else "underflow"
        assert (s["method"], s["network"], s["seed"], s["validation"]) == (method.__name__, network, 1, 100)


@pytest.mark.slow
def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path):
    for options, says in (
        ([], "the following arguments are required: folder"),
        ([tmp_path / "runs", "--rows", "sgd"], "argument --rows: invalid choice: 'sgd'"),
        ([tmp_path / "runs", "--seed", 3], "expected other options than --seed, --log, --save, --resume, --evaluate"),
        ([tmp_path / "runs", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([tmp_path / "runs", "--data", tmp_path / "no"], "no: expected a folder with the four files of MNIST"),
    ):
        done = run(*options, program=CONTROLS, check=False)
        assert says in done.stderr and (done.returncode, done.stderr.count("\n"), [*tmp_path.iterdir()]) == (2, 1, [])


def accuracies(name):
    """Train and test accuracy in percent, [seeds, 2]: the last lines of the logs of a row of a published table."""
    last = [log.read_text("utf-8").splitlines()[-1] for log in sorted(ROOT.glob(f"docs/runs/{name}-[0-9].csv"))]
    return 100 * np.array([line.split(",")[3:5] for line in last], float)


def cells(name):
    return " | ".join(f"{c.mean():.2f} ± {c.std(ddof=1):.2f}" for c in accuracies(name).T)


def test_the_published_tables_are_those_of_the_published_logs():
    readme, results = ((ROOT / path).read_text("utf-8").replace("*", "") for path in ("README.md", "docs/RESULTS.md"))
    others = [f"{log.parent.name}/{log.stem[:-2]}" for log in ROOT.glob("docs/runs/[bdf]*/*-1.csv")]
    assert len(others) == 29 and all(f"| {cells(name)} |" in readme for name in controls.ROWS)
    for name in [*controls.ROWS, *others]:
        assert f"| {cells(name)} |" in results, (name, cells(name))
    for one, other in (("es-all", "es"), ("es-cv", "es"), ("es-cv", "es-all")):  # of the same seeds
        differences = (accuracies(one) - accuracies(other)).T
        found = [f"{d.mean():.3f} ± {d.std(ddof=1):.3f} ({d.std(ddof=1) / len(d) ** 0.5:.3f})" for d in differences]
        assert f"| {' | '.join(found)} |" in results, (one, other, found)


def test_the_published_weights_are_those_of_the_main_job(mnist):
    """Its settings as they are now, and the accuracy that its log ends with."""
    params, arrays = data.load_weights(ROOT / "docs/weights.npz")
    log = (ROOT / "docs/runs/es-0.csv").read_text("utf-8").splitlines()
    defaults = json.loads(json.dumps({name: default for name, (default, *_) in train.OPTIONS.items()}))
    assert arrays["settings"] == json.loads(log[0][1:]) and arrays.keys() == {"settings"}
    assert all(value == defaults.get(name, value) for name, value in arrays["settings"].items())
    network = functools.partial(fpnl.forward, params)
    found = [100 * controls.accuracy(network, x, y) for x, y in zip(mnist[::2], mnist[1::2])]
    assert found == pytest.approx(accuracies("es")[0], abs=2e-2)
