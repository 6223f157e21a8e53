"""The tests of gates.py."""

import concurrent.futures
import re
import sys

import controls
import gates
import numpy as np
import pytest
from helpers import PYTHON, RNG, run

import fpnl
import train

MESSAGE_AND_BELIEF = ["identity", "dead zone", "ReLU", "ESP", "sigmoid", "tanh"]


def gates_case(unit, sizes=(64, 5, 4, 10), n=40):
    """A network of examples/gates.py in float64, as its functions take it, and its loss against a change of weights."""
    x, labels = RNG(5).uniform(0, 1, (n, sizes[0])), RNG(6).integers(0, sizes[-1], n)
    theta = controls.flattened(fpnl.init(RNG(4), sizes)).astype(np.float64)
    params = controls.as_params(theta + 0.05 * RNG(7).standard_normal(len(theta)), sizes)  # biases that are not 0

    def loss(change):
        return loss_of(unit, controls.as_params(controls.flattened(params) + change, sizes), x, labels)

    return params, x, labels, loss


def loss_of(unit, params, x, labels):
    logits = gates.backprop(unit, params, x, labels)[0][-1]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels])


@pytest.mark.parametrize("unit", MESSAGE_AND_BELIEF)
def test_gradient_and_hessian_are_the_derivatives_of_the_loss(unit):
    params, x, labels, loss = gates_case(unit)
    slope, H = gates.gradient(unit, params, x, labels), gates.hessian(unit, params, x, labels)
    np.testing.assert_allclose(H, H.T, rtol=0, atol=1e-14)
    for u, v in RNG(8).standard_normal((5, 2, len(H))) / 100:
        assert (loss(1e-4 * u) - loss(-1e-4 * u)) / 2e-4 == pytest.approx(slope @ u, rel=1e-5)
        a, b = 1e-3 * u, 1e-3 * v
        double = loss(a + b) - loss(a - b) - loss(b - a) + loss(-a - b)
        assert double / 4e-6 == pytest.approx(u @ H @ v, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("unit", ["dead zone", "ReLU"])
def test_hessian_holds_the_gates(unit):
    """1e-6 from a jump or kink in every unit of the first layer: differences are wild if they step across it."""
    params, x, labels, _ = gates_case(unit)
    (W1, b1), *_ = params
    b1 += (0.5 if unit == "dead zone" else 0) + 1e-6 - (x[0] @ W1 + b1)
    theta, sizes = controls.flattened(params), (64, 5, 4, 10)

    def slope_at(theta):
        return gates.gradient(unit, controls.as_params(theta, sizes), x, labels)

    def differences(step):
        return np.array([slope_at(theta + e) - slope_at(theta - e) for e in step * np.eye(len(theta))]) / (2 * step)

    H, fine, coarse = gates.hessian(unit, params, x, labels), differences(1e-7), differences(1e-5)
    np.testing.assert_allclose(H, fine, rtol=0, atol=1e-6 * np.abs(H).max())
    assert np.abs(H - coarse).max() > 10 * np.abs(H).max()


def test_hessian_is_symmetric_where_a_gate_is_undecided():
    """A black image and no biases: z = 0, where ReLU is shut, also for steps along the imaginary axis."""
    params, x, labels, _ = gates_case("ReLU")
    for _, b in params:
        b[...] = 0
    x[0] = 0
    H = gates.hessian("ReLU", params, x, labels)
    np.testing.assert_allclose(H, H.T, rtol=0, atol=1e-14)


def test_beta_is_a_choice_of_scale(monkeypatch):
    """The paper's beta: W1 and the hidden biases times beta, and the last W divided by it, do what it does."""
    ((W1, b1), (W2, b2), (W3, b3)), x, labels, loss = gates_case("ESP")
    found = loss_of("ESP", [(3 * W1, 3 * b1), (W2, 3 * b2), (W3 / 3, b3)], x, labels)
    monkeypatch.setitem(gates.GATES, "ESP", lambda z: gates.belief(3 * z))
    assert found == pytest.approx(loss(0), rel=1e-12)


@pytest.mark.parametrize("unit", MESSAGE_AND_BELIEF)
def test_backprop_and_es_train_one_network(unit):
    """What backprop differentiates is what fpnl computes; its gradient is what ES estimates of it."""
    params, x, labels, _ = gates_case(unit, n=4)
    params, x = [tuple(a.astype(np.float32) for a in layer) for layer in params], x.astype(np.float32)
    transfer, slope = gates.transfer(unit), gates.gradient(unit, params, x, labels)
    loss = fpnl.cross_entropy(fpnl.forward(params, x, transfer=transfer), labels).mean()
    assert loss_of(unit, params, x, labels) == pytest.approx(loss, rel=1e-5)
    options = {"control_variate": True, "transfer": transfer}
    estimates = [controls.flattened(fpnl.es_gradient(params, x, labels, RNG(seed), **options)) for seed in range(200)]
    mean = np.mean(estimates, axis=0)
    cosine = mean @ slope / np.linalg.norm(mean) / np.linalg.norm(slope)
    assert cosine > (0.8 if unit in ("dead zone", "ReLU") else 0.999)  # ES sees their jumps and kinks


@pytest.mark.parametrize("method", ["ES", "backprop"])
def test_the_loop_gets_the_gradient(method):
    """The first step of train.py's loop, whose update keeps the gradient, and its loss."""
    params, x, labels, loss = gates_case("tanh", n=300)  # in several tasks
    x, kept = x.astype(np.float32), []
    options = {"seed": 1, "epochs": 1, "batch": 300, "block": 1, "sigma": 0.01, "lr": 0, "weight_decay": 0}
    run = gates.start("tanh", method, (5, 4), (x, labels, x, labels), **options)
    run.params = [tuple(a.astype(np.float32) for a in layer) for layer in params]
    run.update = lambda p, g, *others: kept.append(controls.flattened(g))
    losses = [*train.steps(run)]
    expected = gates.gradient("tanh", params, x, labels)
    np.testing.assert_allclose(kept, [expected], atol=1e-3)
    assert np.allclose(kept, expected, atol=1e-5) == (method == "backprop")
    assert losses == pytest.approx([loss(0), loss(0)], rel=1e-5)


def test_pools_by_area():
    edges = np.arange(9) * 2.5
    overlap = np.minimum(edges[1:, None], np.arange(1, 21)) - np.maximum(edges[:-1, None], np.arange(20))
    A = np.pad(np.maximum(overlap, 0) / 2.5, ((0, 0), (4, 4)))  # [8, 28]
    x = RNG(0).uniform(0, 1, (3, 784))
    expected = [(A @ image @ A.T).ravel() for image in x.reshape(3, 28, 28)]
    np.testing.assert_allclose(gates.pooled(x), expected, rtol=1e-12)


@pytest.mark.slow
def test_runs(slice_of_mnist, tmp_path, monkeypatch, capsys):
    for name, value in {"SMALL_IMAGES": 50, "SMALL_STEPS": 10, "LOOKS": 2}.items():
        monkeypatch.setattr(gates, name, value)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda: concurrent.futures.ThreadPoolExecutor(1))
    options = f"--seeds 1 --epochs 0.5 --width 16 --data {slice_of_mnist} --log {tmp_path / 'g'}"
    monkeypatch.setattr(sys, "argv", ["gates.py", *options.split()])
    gates.main()
    head, *table = capsys.readouterr().out.splitlines()
    assert re.split("  +", head.strip()) == gates.UNITS
    assert all(len(re.findall(r"±| -(?= |$)", line)) == 7 for line in table)  # a cell a unit, "-" if it has none
    assert [line.count("±") for line in table] == [7, 6] + 10 * [6]
    rows = [line.split(",") for line in (tmp_path / "g").read_text("utf-8").splitlines()[2:]]
    found = {(unit, int(seed), measure, float(at)): float(value) for unit, seed, measure, at, value in rows}
    assert len(found) == len(rows)
    for unit in MESSAGE_AND_BELIEF:
        es, backprop = found[unit, 0, "ES test %", 0.5], found[unit, 0, "backprop test %", 0.5]
        assert es == pytest.approx(backprop, abs=10) and es > 30
        # The same added to all columns of the last W, or to all of its b, changes no loss: 6 exact zeros of 415.
        assert found[unit, 0, "gamma 1e-06 %", 0] > 100 * 6 / 415 - 1e-3
        assert found[unit, 0, "loss", 10] < found[unit, 0, "loss", 0]
    losses = next(line for line in table if line.startswith("loss"))  # the last ones
    expected = [found.get((unit, 0, "loss", 10)) for unit in gates.UNITS]
    assert re.findall(r"([\d.]+) ± 0|-", losses) == ["" if loss is None else f"{loss:.4g}" for loss in expected]
    signal = {unit: found[unit, 0, "signal 10 layers", 9] for unit in MESSAGE_AND_BELIEF}
    assert signal["sigmoid"] < 1e-6 < signal["ESP"] < signal["ReLU"] < signal["tanh"] < signal["identity"]


@pytest.mark.slow
def test_bad_input_ends_in_one_line(tmp_path):
    for options, says in (
        (["--seeds", "0"], "expected --seeds"),
        (["--epochs", "inf"], "a finite --epochs > 0 and --validation >= 0, found --epochs inf"),
        (["--data", tmp_path / "no"], "expected a folder"),
        (["--validation", "59900"], "256 of them to train on"),
    ):
        done = run("examples/gates.py", *options, program=PYTHON, check=False)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
