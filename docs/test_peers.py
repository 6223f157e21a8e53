"""Tests of what peers.py has of its own; of evosax and evotorch, it looks at the network itself, before it trains."""

import itertools
import re

import numpy as np
import peers
import pytest
from helpers import PYTHON, RNG, ROOT, needs_hardware, run

import data
import fpnl


def test_a_framework_that_flushes_one_that_does_not_and_one_with_another_network(capsys, monkeypatch):
    def flushing(z):
        return fpnl.divide(z, fpnl.SCALE) * fpnl.SCALE

    def gradual(z):
        return z / fpnl.SCALE * fpnl.SCALE

    assert peers.flush_of("a", flushing, np.asarray) is flushing
    assert peers.flush_of("b", gradual, np.asarray) is peers.controls.dead_zone
    assert capsys.readouterr().out == "a: z / S * S flushes\nb: z / S * S does not flush: a mask\n"
    with pytest.raises(RuntimeError, match="c: expected the outputs of fpnl.forward, found others"):
        peers.flush_of("c", flushing, lambda a: np.float32(2) * a)


@needs_hardware
@pytest.mark.parametrize("draw", [peers.random_signs, peers.gaussians])
def test_population_es_is_the_estimate_of_the_textbook(draw, monkeypatch):
    """One step, the mutations known: the gradient that AdamW gets is the mean of (L(w + sigma e) - L(w - sigma e)) e
    over the pairs, over 2 sigma."""
    monkeypatch.setattr(fpnl, "SIZES", (6, 5, 3))
    monkeypatch.setattr(peers.fpnl, "init", lambda rng, init=fpnl.init: init(RNG(4), fpnl.SIZES))
    drawn, given = [], []
    sets = RNG(1).integers(0, 256, (20, 6), dtype=np.uint8), RNG(2).integers(0, 3, 20)
    noise = [draw(RNG(i), 53) for i in range(6)]
    monkeypatch.setattr(fpnl, "adamw", lambda w, g, m, v, *how: given.append((g.copy(), how)))
    monkeypatch.setattr(data, "cores", lambda: 2)
    loop = peers.population(lambda rng, n: drawn.append(n) or noise[len(drawn) - 1], sets, 3, 12, 0.05, 0.1, 0.3, 16, 2)
    params = next(loop)()
    images = RNG(3).integers(0, 20, 16)
    x, y, w = sets[0][images] / np.float32(255), sets[1][images], peers.controls.flattened(params)

    def loss(w):
        logits = fpnl.forward(peers.controls.as_params(w.astype(np.float32), fpnl.SIZES), x)
        return float(fpnl.cross_entropy(logits, y).mean())

    expected = np.mean([(loss(w + 0.05 * e) - loss(w - 0.05 * e)) * e for e in noise], axis=0) / 0.1
    [(found, how)] = given
    assert drawn == [53] * 6 and how == (1, pytest.approx(0.05), 0.3)  # half of the rate, after half of the steps
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_random_signs_are_signs():
    signs = peers.random_signs(RNG(0), 10007)
    assert signs.dtype == np.float32 and set(signs) == {-1, 1} and abs(signs.mean()) < 0.04


@needs_hardware
def test_the_clock_counts_steps_alone(monkeypatch):
    """Each step takes a second, the evaluation none; the first two are not counted, and a trainer may end."""
    params, now = fpnl.init(RNG(0), (4, 3)), [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])

    def steps(n):
        for _ in range(n) if n else itertools.count():
            now[0] += 1
            yield lambda: params

    images, rows = RNG(1).integers(0, 256, (50, 4), dtype=np.uint8), []
    labels = fpnl.forward(params, images / np.float32(255)).argmax(axis=1)
    found = peers.race(steps(None), 10, images, labels, lambda *row: rows.append(row))
    assert found == rows and rows[-1] == (10, 1.0) and rows[0] == (1, 1.0)
    assert peers.race(steps(5), 10, images, 1 - labels, lambda *row: None)[-1] == (3, 0.0)


BACKPROP = "deadzone", "deadzone-long", "deadzone-some"
IN_RUNS = [name for name in peers.PEERS if name not in (*BACKPROP, "open-es-hour")]
RACES = {"runs": IN_RUNS, "runs/hour": ["main", "open-es-hour"], "runs/race": ["main", *BACKPROP]}


@pytest.mark.parametrize(("folder", "raced"), RACES.items())
def test_the_published_race_is_that_of_the_published_logs(folder, raced):
    """Mean seconds to each accuracy, their ratio to those of the main job, and the mean of the last accuracies."""
    text, base = (ROOT / "docs/RESULTS.md").read_text("utf-8"), None
    for name in raced:
        paths = (ROOT / "docs" / folder).glob(f"peers-{name}-[0-9].csv")  # of one seed, or of some
        logs = [np.genfromtxt(path, delimiter=",", names=True, skip_header=2) for path in paths]
        reached = [[min(log["seconds"][log["test"] >= mark], default=np.inf) for mark in peers.MARKS] for log in logs]
        at = np.mean(reached, axis=0).tolist()
        base, end = base or at, np.mean([log["seconds"][-1] for log in logs])
        least = [("" if t < np.inf else "> ", min(t, end)) for t in at]
        cells = [f"{more}{t:.1f} ({more}{t / b:.3g}x)" for (more, t), b in zip(least, base)]
        row = " | ".join([*cells, f"{100 * np.mean([log['test'][-1] for log in logs]):.2f}"]).replace(" (1x)", "")
        assert re.search(rf"\| {peers.PEERS[name][0]}[^|]* \| {re.escape(row)} \|\n", text), (name, row)


@pytest.mark.slow
@needs_hardware
def test_the_command(tmp_path):
    options = "--peers main signs --members 4 --sigma 0.01 0.02 --seconds 0.5 --validation 1000".split()
    done = run("docs/peers.py", tmp_path, *options, program=PYTHON)
    rows = [re.sub(r" +", " ", row) for row in done.stdout.splitlines()]
    assert [row.split(",")[0] for row in rows if " after " in row][1:] == ["population ES"] * 2
    assert rows[-3].startswith("the main job ")
    assert "sigma 0.02" in rows[-1] and rows[-1].count("> 0.5") == len(peers.MARKS)
    assert {path.name for path in tmp_path.iterdir()} == {"peers-main-0.csv", "peers-signs-0.csv"}
    assert "\nseconds,validation\n" in (tmp_path / "peers-main-0.csv").read_text("utf-8")
    done = run("docs/peers.py", tmp_path, *options, "--members", 3, program=PYTHON, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
