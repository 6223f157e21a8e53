"""The tests of benchmark.py; no test asserts a time."""

import re

import benchmark
import numpy as np
import pytest
from helpers import PYTHON, RNG, ROOT, example, needs_dask, needs_mpi, run

import fpnl


@pytest.mark.slow
def test_the_benchmark_runs(monkeypatch, capfd, slice_of_mnist):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    small = f"--data {slice_of_mnist} --hidden 24 16 --batch 128"
    benchmark.arithmetic(n=1000)
    benchmark.step(small)
    benchmark.noise(small, steps=(0, 1), batches=2)
    benchmark.scaling(small, batches=(32, 64), widths=(16, 32))
    benchmark.memory(f"{small} --epochs 0.1")
    benchmark.slopes(ROOT, small, rounds=1)
    benchmark.against(ROOT, *small.split(), "--epochs", "0.1", rounds=1)
    out = capfd.readouterr().out
    for row, count in [
        (r"(?:add|subtract|multiply|divide) .* +(?!0\.00)\d+\.\d\d", 13),
        (r" +[01] +1 +(?:no|yes) +0\.00 +(?!0\.00)\d.*", 4),  # no noise with blocks of 1
        (r"(?:the main job|--importance 0.*) +[\d.]+ +1\.00.*", 3),
        (r"(?:32|64|128) (?:emulated|flags)(?:, cv)?(?: +[\d.]+){2} +(?!0\.000)\d\.\d{3}", 12),
        (r"of the (?:clock|CPU)(?: +[\d.]+){2} +(?!0\.000)\d\.\d{3}", 2),
    ]:
        assert len(re.findall(f"(?m)^{row}$", out)) == count, row
    shares = re.findall(r"(?m)^  \w.* ms +([\d.]+) % .* ms +([\d.]+) %$", out)
    assert len(shares) == 10 and np.array(shares, float).sum(axis=0) == pytest.approx(100, abs=1)
    assert 20 < float(re.search(r"peak memory (\d+) MB", out)[1]) < 1000


def test_an_unknown_section_is_one_clear_error():
    done = run("docs/benchmark.py", "steps", program=PYTHON, check=False)
    says = "expected sections, of arithmetic, step, noise, scaling, memory, engines, slopes, against, found steps"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"benchmark.py: error: {says}\n")


@pytest.mark.slow
@needs_mpi
@needs_dask
def test_the_benchmark_runs_the_engines(monkeypatch, capfd, slice_of_mnist):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    benchmark.engines(f"--data {slice_of_mnist} --hidden 24 16 --epochs 60", batches=(64, 256))
    out, errors = capfd.readouterr()
    assert errors == "" and len(re.findall(r"(?m)^(?:threads|mpi|dask) +[12](?: +(?!0\.0\b)\d+\.\d){3}$", out)) == 6
    there, back = (int(size.replace(",", "")) for size in re.findall(r"256: (.*) bytes .* step, (.*) back", out)[0])
    expected = 4 * (785 * 24 + 25 * 16 + 17 * 10) + 128 * (4 * 784 + 1 + 50)  # weights; images, labels, signs
    assert 0 < there - expected < 5000 and 0 < back - 256 * 8 * 50 < 5000  # outputs and slopes


def test_the_benchmark_counts_every_multiplication(monkeypatch):
    """Against the shapes that NumPy is given, in a network of four layers."""

    class Counted(np.ndarray):
        met, __array_priority__ = 0, 1  # which np.concatenate keeps

        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            inputs = [np.asarray(a) for a in inputs]
            options = {name: np.asarray(v) if isinstance(v, Counted) else v for name, v in options.items()}
            result = getattr(ufunc, method)(*inputs, **options, **({"out": tuple(map(np.asarray, out))} if out else {}))
            Counted.met += result.size * inputs[0].shape[-1] if ufunc is np.matmul else 0
            return out[0] if out else np.asarray(result).view(Counted)

    sizes, n = (12, 18, 10, 12, 5), 6
    params, x, labels = example(sizes, n=n)
    network, blocks = fpnl._network, fpnl._blocks

    def counted(*args, **net):
        params, x, *more = network(*args, **net)
        return [[a.view(Counted) for a in layer] for layer in params], x.view(Counted), *more

    monkeypatch.setattr(fpnl, "_network", counted)
    monkeypatch.setattr(fpnl, "_blocks", lambda *args: blocks(*args).view(Counted))
    for control_variate in (False, True):
        Counted.met = 0
        fpnl.es_gradient(params, x, labels, RNG(0), block=4, control_variate=control_variate)
        assert 2 * Counted.met == n * benchmark.multiplications(sizes, 4, control_variate)
