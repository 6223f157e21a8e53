"""The tests of recurrent.py."""

import argparse
import functools
import json
import re

import controls
import numpy as np
import pytest
import recurrent
from helpers import PYTHON, RNG, ROOT, WITH_MPI, assert_same_bits, needs_hardware, needs_mpi, run
from test_controls import accuracies, assert_is_the_derivative, cells

import data
import fpnl
import train

DEFAULTS = {name: default for name, (default, *_) in recurrent.SETTINGS.items()}
HOW = argparse.Namespace(delta=(0.25, 1.0), block=(2, 3))


@pytest.fixture
def small(monkeypatch):
    """Weights of 5 features and 4 memory units, all of which matter, and six images of three rows of four pixels."""
    monkeypatch.setattr(recurrent, "PIXELS", 4)
    rng = RNG(3)
    params = recurrent.init(rng, 5, 4)
    params[0][0][4:] = 0.3 * rng.standard_normal((4, 5))
    for _, bias in params:
        bias += rng.standard_normal(len(bias), np.float32) / 4
    return params, rng.uniform(0, 1, (6, 12)).astype(np.float32), rng.integers(0, 10, 6)


def literally(of_rows, x, ftz=True):
    """The network with weights of its own for each row: f S and m R after each, and the logits."""
    plus, over, times = (fpnl.add, fpnl.divide, fpnl.multiply) if ftz else (np.add, np.divide, np.multiply)
    S, R = fpnl.SCALE, np.float32(2.0**121)
    m, fs, ms = np.zeros((len(x), len(of_rows[0][2][0])), np.float32), [], []
    for ((W, b), (U, c), _), row in zip(of_rows, np.split(x, len(of_rows), axis=1)):
        fs.append(over(plus(np.hstack([row, m * R]) @ W, b), S))
        m = over(plus(np.hstack([fs[-1] * S, m * R]) @ U, c), R)
        ms.append(m)
    V, d = of_rows[-1][2]
    return np.stack(fs) * S, np.stack(ms) * R, times(over(plus((m * R) @ V, d), S), S)


@pytest.mark.parametrize("ftz", [True, False, pytest.param("hardware", marks=needs_hardware)])
def test_forward_is_the_formula(small, ftz):
    """So is the faster one; to the bit where subnormals, which have fewer digits, are flushed."""
    params, x, _ = small
    networks = recurrent.forward(params, x, ftz), recurrent.unrolled(params, x, ftz), literally([params] * 3, x, ftz)
    for found, fast, expected in zip(*networks, strict=True):
        assert_same_bits(found, expected)
        np.testing.assert_allclose(fast, expected, rtol=1e-5, atol=1e-6)
        if ftz:
            assert_same_bits(fast, expected)
    assert np.mean(networks[0][0] == 0) > 0.05 if ftz else np.all(networks[0][0])


@pytest.mark.parametrize("ftz", [True, False])
def test_slopes_are_those_of_literal_mutation(small, ftz):
    """Each member is a network whose weights are mutated at one step of time; the sums of p are what is predicted."""
    params, x, labels = small
    inputs, slopes, _ = recurrent.es(HOW, params, x, labels, RNG(4), ftz)
    _, predicted, _ = recurrent.es(HOW, params, x, labels, RNG(4), ftz, members=False)
    rng, units, checked = RNG(4), [5, 4], 0
    signs = [2 * rng.integers(0, 2, (3, 6, n)) - 1 for n in units]
    for l, step, i in np.ndindex(2, 3, 6):
        a = np.append(inputs[l][step, i], 1)
        size, delta, k = np.linalg.norm(a), HOW.delta[l], HOW.block[l]
        for J in np.split(np.arange(units[l]), range(k, units[l], k)):
            L, h = [], []
            for mirror in (1, -1):
                of_rows = [[(A.copy(), b.copy()) for A, b in params] for _ in range(3)]
                W, b = of_rows[step][l]
                mutation = np.outer(a / size, mirror * delta / size * signs[l][step, i, J])
                W[:, J] += mutation[:-1]
                b[J] += mutation[-1]
                *states, logits = literally(of_rows, x[i : i + 1], ftz)
                L.append(fpnl.cross_entropy(logits, labels[i : i + 1])[0])
                h.append(states[l][step][0, J])
            c, twice = h[0] - h[1], 2 * delta * signs[l][step, i, J]
            p = predicted[l][step, i, J] * twice
            expected = (p + (L[0] - L[1] - p.sum()) * (c != 0)) / twice
            np.testing.assert_allclose(slopes[l][step, i, J], expected, rtol=1e-3, atol=1e-3)
            checked += len(J)
    assert checked == 3 * 6 * 9 and all(np.any(s) for s in slopes)


def test_backprop_through_time_is_the_derivative(small):
    """Of sum_i w_i L_i, in two tasks."""
    params, x, labels = small
    weights = np.float32([0.3, 0.1, 0, 0.2, 1, 2])
    of_task = functools.partial(recurrent.weighted, functools.partial(recurrent.backprop, HOW))
    grads, losses = controls.in_tasks(of_task, 4, params, x, labels, RNG(4), weights, return_losses=True)

    def losses_of(params):
        return fpnl.cross_entropy(recurrent.unrolled(params, x, None)[2], labels)

    assert_is_the_derivative(grads, params, lambda params: weights @ losses_of(params))
    np.testing.assert_allclose(losses, losses_of(params), rtol=1e-5)


def test_the_update_is_clipped_and_has_three_rates(small):
    """Adam's first step is the rate times a sign, whatever the gradient is; its first moment, a tenth of that."""
    params, m, v = small[0], train.zeros(small[0]), train.zeros(small[0])
    before, grads = ([[f(a) for a in layer] for layer in params] for f in (np.copy, np.ones_like))
    recurrent.update(0.25, params, grads, m, v, 1, 0.01, 0.5)
    assert sum(np.vdot(a, a) for a in fpnl.leaves(m)) == pytest.approx(0.1**2, rel=1e-4)
    for (W, b), (V, d), few in zip(before, params, (4, 5, 4)):  # rows: below them are weights of the memory before
        for found, expected in ((d, b - 0.01), (V[:few], 0.995 * W[:few] - 0.01), (V[few:], W[few:] - 0.0025)):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_network_begins_as_a_rotation():
    (W, b), (U, c), (V, d) = recurrent.init(RNG(0), 64, 32)
    assert W.shape == (28 + 32, 64) and U.shape == (64 + 32, 32) and V.shape == (32, 10)
    np.testing.assert_allclose(U[64:] @ U[64:].T, np.eye(32), atol=1e-5)
    assert not (np.any(W[28:]) or np.any(c) or np.any(d)) and b.std() == pytest.approx(0.5, rel=0.4)


@pytest.mark.slow
def test_a_short_training_beats_the_same_without_flush(small):
    """Whether the first pixels of two rows are alike, which no linear function of them says of more than three in
    four: ES learns it where the flush is, and does not where it is off."""
    rng = RNG(6)
    x = rng.uniform(0, 1, (2000, 8)).astype(np.float32)
    x[:, ::4] = rng.integers(0, 2, (2000, 2))
    y = np.uint8(x[:, 0] == x[:, 4])
    chosen = {"features": 16, "memory": 8, "epochs": 30, "batch": 50, "block": (4, 4), "lr": 1e-2}
    args, found = argparse.Namespace(**DEFAULTS | chosen), {}
    for row in ("es", "es-off"):
        run = recurrent.begin(row, 1, args, (x[:1500], y[:1500], x[1500:], y[1500:]))  # ES does not from every start
        assert all(map(np.isfinite, train.steps(run)))
        found[row] = train.score(run, 2, map)[1]
    assert found["es"] > 0.95 and found["es-off"] < 0.8


def test_the_published_table_is_that_of_the_published_logs():
    """And the settings of the logs are those of now, one by an older name."""
    text = (ROOT / "docs/RESULTS.md").read_text("utf-8").replace("*", "")
    for row, (says, *_) in recurrent.ROWS.items():
        assert f"| {says} | {cells(f'recurrent/{row}')} |" in text
        for seed in range(3):
            log = (ROOT / f"docs/runs/recurrent/{row}-{seed}.csv").read_text("utf-8").partition("\n")[0]
            expected = json.loads(json.dumps(DEFAULTS | recurrent.ROWS[row][3] | {"seed": seed}))
            assert json.loads(log[2:].replace('"decay"', '"weight_decay"')).items() >= expected.items()


def test_the_published_weights_are_those_of_a_published_run(mnist):
    logits = recurrent.forward(recurrent.load_weights(ROOT / "docs/recurrent.npz"), data.pixels(mnist[2]))[2]
    assert 100 * np.mean(logits.argmax(axis=1) == mnist[3]) == pytest.approx(accuracies("recurrent/es")[0, 1], abs=2e-2)


@pytest.mark.slow
@needs_mpi
def test_the_command_prints_a_table_and_workers_do_not_matter(tmp_path):
    """Threads, or processes elsewhere. The log begins with what it takes to repeat it."""
    for engine, program in {"threads": PYTHON, "mpi": WITH_MPI}.items():
        command = f"examples/recurrent.py {tmp_path / engine} --engine {engine} --rows es tanh --seeds 1 --epochs 0.02"
        done = run(*command.split(), program=program)
        assert re.search(r"1 seeds +train +test\nES.* ± 0\.00 +\S+ ± 0\.00\ntanh.* ± 0.00 +\S+ ± 0.00\n$", done.stdout)
        assert json.loads((tmp_path / engine / "es-0.csv").read_text("utf-8").splitlines()[0][2:])["epochs"] == 0.02
    for row in ("es", "tanh"):
        assert_same_bits(*(recurrent.load_weights(tmp_path / name / f"{row}-0.npz") for name in ("threads", "mpi")))


@pytest.mark.slow
def test_bad_options_are_one_line(tmp_path):
    for options, says in (
        ("--batch 70000", "--batch: expected at most the 60000 training images, found 70000"),
        ("--validation 59600", "--batch: expected at most the 400 training images, found 512"),
        ("--lr -1", "--lr"),
        ("--data nowhere", "nowhere: expected a folder with the four files"),
    ):
        done = run("examples/recurrent.py", tmp_path / "runs", *options.split(), program=PYTHON, check=False)
        assert says in done.stderr and (done.returncode, done.stderr.count("\n"), [*tmp_path.iterdir()]) == (2, 1, [])
