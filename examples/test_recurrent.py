"""The tests of recurrent.py."""

import argparse
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import recurrent
from test_controls import cells

import data
import fpnl
from test_fpnl import RNG, ROOT, assert_same_bits, needs_hardware

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
    """The network with weights of its own for each row: features and memory after each, and the logits."""
    plus, over, times = (fpnl.add, fpnl.divide, fpnl.multiply) if ftz else (np.add, np.divide, np.multiply)
    S, R = fpnl.SCALE, np.float32(2.0**121)
    m, fs, ms = np.zeros((len(x), len(of_rows[0][2][0])), np.float32), [], []
    for ((W, b), (U, c), _), row in zip(of_rows, np.split(x, len(of_rows), axis=1)):
        fs.append(over(plus(np.hstack([row, m * R]) @ W, b), S))
        m = over(plus(np.hstack([fs[-1] * S, m * R]) @ U, c), R)
        ms.append(m)
    V, d = of_rows[-1][2]
    return fs, ms, times(over(plus((m * R) @ V, d), S), S)


@pytest.mark.parametrize("ftz", [True, False, pytest.param("hardware", marks=needs_hardware)])
def test_forward_is_the_formula(small, ftz):
    params, x, _ = small
    fs, ms, logits = recurrent.forward(params, x, ftz)
    expected = literally([params] * 3, x, ftz)
    for found, wanted in zip([*fs, *ms, logits], [*expected[0], *expected[1], expected[2]], strict=True):
        assert_same_bits(found, wanted)
    assert np.mean(np.equal(fs, 0)) > 0.05 if ftz else np.all(fs)


@pytest.mark.parametrize("ftz", [True, False])
def test_unrolled_is_the_same_in_other_units(small, ftz):
    params, x, _ = small
    fs, ms, logits = recurrent.forward(params, x, ftz)
    (_, _, (f, m)), o = recurrent.unrolled(params, x, ftz)
    for found, expected in ((f, np.stack(fs) * fpnl.SCALE), (m, np.stack(ms) * recurrent.R), (o, logits)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ftz", [True, False])
def test_slopes_are_those_of_literal_mutation(small, ftz):
    """Each member is a network whose weights are mutated at one step of time; the sums of p are what is predicted."""
    params, x, labels = small
    inputs, slopes = recurrent.es(HOW, params, x, labels, RNG(4), ftz)
    _, predicted = recurrent.es(HOW, params, x, labels, RNG(4), ftz, members=False)
    rng, units = RNG(4), [5, 4]
    signs = [2 * rng.integers(0, 2, (3, 6, n)) - 1 for n in units]
    scales, checked = (fpnl.SCALE, recurrent.R), 0
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
                h.append(states[l][step][0, J] * scales[l])
            c, twice = h[0] - h[1], 2 * delta * signs[l][step, i, J]
            p = predicted[l][step, i, J] * twice
            expected = (p + (L[0] - L[1] - p.sum()) * (c != 0)) / twice
            np.testing.assert_allclose(slopes[l][step, i, J], expected, rtol=1e-3, atol=1e-3)
            checked += len(J)
    assert checked == 3 * 6 * 9 and all(np.any(s) for s in slopes)


def test_backprop_through_time_is_the_derivative(small):
    params, x, labels = small
    inputs, slopes = recurrent.backprop(HOW, params, x, labels, None)
    columns = [(a.reshape(-1, a.shape[-1]), s.reshape(-1, s.shape[-1])) for a, s in zip(inputs, slopes)]
    grads = [(a.T @ s, s.sum(axis=0)) for a, s in columns]
    direction = [[RNG(5).standard_normal(a.shape, np.float32) for a in layer] for layer in params]

    def loss_at(t):
        moved = [[a + np.float32(t) * d for a, d in zip(*layers)] for layers in zip(params, direction)]
        return fpnl.cross_entropy(recurrent.unrolled(moved, x, None)[1], labels).sum()

    slope = sum(np.vdot(g, d) for layers in zip(grads, direction) for g, d in zip(*layers))
    assert (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=0.01)


def test_the_network_begins_as_a_rotation():
    (W, b), (U, c), (V, d) = recurrent.init(RNG(0), 64, 32)
    assert W.shape == (28 + 32, 64) and U.shape == (64 + 32, 32) and V.shape == (32, 10)
    np.testing.assert_allclose(U[64:] @ U[64:].T, np.eye(32), atol=1e-5)
    assert not (np.any(W[28:]) or np.any(c) or np.any(d)) and b.std() == pytest.approx(0.5, rel=0.4)


def test_a_short_training_beats_the_same_without_flush(small, monkeypatch, tmp_path):
    """Whether the first pixels of two rows are alike, which no linear function of them says of more than three in
    four: ES learns it where the flush is, and does not where it is off."""
    rng = RNG(6)
    x = rng.uniform(0, 1, (2000, 8)).astype(np.float32)
    x[:, ::4] = rng.integers(0, 2, (2000, 2))
    y = np.uint8(x[:, 0] == x[:, 4])
    monkeypatch.setattr(recurrent, "sets", lambda validation: (x[:1500], y[:1500], x[1500:], y[1500:]))
    defaults = {name: default for name, (default, *_) in recurrent.SETTINGS.items()}
    chosen = {"features": 16, "memory": 8, "epochs": 30, "batch": 50, "block": (4, 4), "lr": 1e-2}
    how = argparse.Namespace(**defaults | chosen, validation=0, reports=2, seed=0)
    found = {row: recurrent.learn(row, how, tmp_path, map)[1] for row in ("es", "es-off")}
    assert found["es"] > 0.95 and found["es-off"] < 0.8


@pytest.mark.parametrize("document", ["README.md", "docs/RESULTS.md"])
def test_the_published_table_is_that_of_the_published_logs(document):
    """And the settings of the logs are those of now."""
    text = (ROOT / document).read_text().replace("*", "")
    for row, (says, *_) in recurrent.ROWS.items():
        assert f"| {says} | {cells(f'recurrent/{row}')} |" in text
        of_row = {name: default for name, (default, *_) in recurrent.SETTINGS.items()} | recurrent.ROWS[row][3]
        for seed in range(3):
            head = (ROOT / f"docs/runs/recurrent/{row}-{seed}.csv").read_text().partition("\n")[0]
            assert json.loads(head[2:]).items() >= json.loads(json.dumps(of_row | {"seed": seed})).items()


def test_the_published_weights_are_those_of_a_published_run(mnist):
    params = recurrent.load_weights(ROOT / "docs/recurrent.npz")
    log = (ROOT / "docs/runs/recurrent/es-0.csv").read_text().splitlines()
    found = fpnl.accuracy(recurrent.forward(params, data.pixels(mnist[2]))[2], mnist[3])
    assert found == pytest.approx(float(log[-1].split(",")[4]), abs=2e-4)


@pytest.mark.slow
def test_the_command_prints_a_table_and_workers_do_not_matter(tmp_path):
    """The log begins with what it takes to repeat it."""
    weights = []
    for workers in ("1", "2"):
        command = [sys.executable, "examples/recurrent.py", tmp_path / workers, "--rows", "es", "--seeds", "1"]
        command += ["--epochs", "0.02", "--reports", "1", "--workers", workers]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert re.search(r"accuracy in percent, 1 seeds +train +test\nES.* ± 0\.00 +\S+ ± 0\.00\n$", done.stdout)
        head = (tmp_path / workers / "es-0.csv").read_text().partition("\n")[0]
        assert json.loads(head[2:])["epochs"] == 0.02
        weights.append(itertools.chain.from_iterable(recurrent.load_weights(tmp_path / workers / "es-0.npz")))
    for found, expected in zip(*weights, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch", "70000"], "--batch: expected at most the 60000 training images, found 70000"),
        (["--validation", "59600"], "--batch: expected at most the 400 training images, found 512"),
        (["--lr", "-1"], "--lr"),
    ],
)
def test_bad_options_are_one_line(options, says, tmp_path):
    command = [sys.executable, "examples/recurrent.py", tmp_path / "runs", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
