"""The tests of benchmark.py; no test asserts a time."""

import math
import re
import subprocess
import sys

import benchmark
import numpy as np
import pytest

import fpnl
from test_fpnl import RNG, ROOT, example, needs_dask, needs_mpi


@pytest.mark.slow
def test_the_benchmark_runs(monkeypatch, capsys, slice_of_mnist):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    benchmark.arithmetic(n=1000)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 13 and all(float(row.split()[-1]) > 0 for row in rows)
    small = f"--data {slice_of_mnist} --hidden 24 16 --batch 128"
    benchmark.step(small)
    benchmark.noise(small, steps=(0, 1), batches=2)
    benchmark.scaling(small, batches=(32, 64), widths=(16, 32))
    benchmark.memory(f"{small} --epochs 0.1")
    out = capsys.readouterr().out
    parts = [float(row.split()[-1]) for row in out.splitlines() if re.fullmatch(r"  \w.* \d+\.\d", row)]
    assert len(parts) == 8 and sum(parts) == pytest.approx(100, abs=1)
    assert len(re.findall(r"(?m)^ +[01] +1 +(?:no|yes) +0\.00 +[1-9\d.]+", out)) == 4  # none with blocks of 1
    assert len(re.findall(r"(?m)^ *(?:512|1024) +\d+ .*(?: +[\d.]+ +[\d.]+x){8}$", out)) == 4
    assert 20 < float(re.search(r"peak memory (\d+) MB", out)[1]) < 1000


def test_an_unknown_section_is_one_clear_error():
    done = subprocess.run([sys.executable, "docs/benchmark.py", "steps"], cwd=ROOT, capture_output=True, text=True)
    says = "benchmark.py: error: expected sections, of arithmetic, step, noise, scaling, memory, engines, found steps\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)


@pytest.mark.slow
@needs_mpi
@needs_dask
def test_the_benchmark_runs_the_engines(monkeypatch, capfd, slice_of_mnist):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    benchmark.engines(f"--data {slice_of_mnist} --hidden 24 16", batches=(64, 256))
    out, errors = capfd.readouterr()
    rows = re.findall(r"(?m)^(?:processes|mpi|dask) .*", out)
    times = [float(value) for row in rows for value in row.split()[2:]]
    assert len(times) == 12 and min(times) > 0 and errors == ""


def test_the_benchmark_counts_every_multiplication():
    """Against the shapes that NumPy is given, in a network of four layers."""

    class Counted(np.ndarray):
        met, __array_priority__ = 0, 1  # which np.concatenate keeps

        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            plain = [np.asarray(a) for a in inputs]
            options = {name: np.asarray(v) if isinstance(v, Counted) else v for name, v in options.items()}
            if ufunc is np.matmul:
                Counted.met += math.prod(np.broadcast_shapes(plain[0].shape[:-2], plain[1].shape[:-2])) * (
                    plain[0].shape[-2] * plain[0].shape[-1] * plain[1].shape[-1]
                )
            if out is not None:
                getattr(ufunc, method)(*plain, out=tuple(np.asarray(a) for a in out), **options)
                return out[0]
            result = getattr(ufunc, method)(*plain, **options)
            return result.view(Counted) if isinstance(result, np.ndarray) else result

    sizes, n = (12, 16, 8, 12, 5), 6
    params, x, labels = example(sizes, n=n)
    counted = [(W.view(Counted), b.view(Counted)) for W, b in params]
    for control_variate in (False, True):
        Counted.met = 0
        fpnl.es_gradient(counted, x.view(Counted), labels, RNG(0), block=4, control_variate=control_variate)
        assert 2 * Counted.met == n * benchmark.multiplications(sizes, 4, control_variate)
