"""What several files of tests use: bits, small networks and data sets, and programs, each in a process of its own."""

import contextlib
import gzip
import importlib.util
import itertools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fpnl

ROOT = pathlib.Path(__file__).resolve().parent.parent
RNG = np.random.default_rng
IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
slow = pytest.mark.slow


def bits(x):
    """float32 as uint32, with one value for all NaNs."""
    x = np.asarray(x)
    assert x.dtype == np.float32
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


def assert_same_bits(found, expected):
    """Of arrays, or of lists of them, nested in any way."""
    for a, b in zip(fpnl.leaves(found), fpnl.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b), strict=True)


# On Linux x86-64, where the switch is verified, its absence is a failure and not a skip.
HARDWARE = (platform.system(), platform.machine()) == ("Linux", "x86_64")
with contextlib.suppress(RuntimeError), fpnl.hardware_ftz():
    HARDWARE = True
needs_hardware = pytest.mark.skipif(not HARDWARE, reason="fpnl cannot switch this CPU to flush-to-zero")
hardware = pytest.param("hardware", marks=needs_hardware)


def example(sizes=(12, 10, 9, 5), n=6, seed=0):
    """A network, and examples of it: params, x, labels."""
    rng = RNG(seed)
    return fpnl.init(rng, sizes), rng.random((n, sizes[0]), dtype=np.float32), rng.integers(0, sizes[-1], n)


def idx(array, code=0x08):
    """The content of an IDX file."""
    array = np.asarray(array, {0x08: ">u1", 0x0D: ">f4", 0x0B: ">i2"}[code])
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_set(folder, train=60, test=20, spelling="{}-idx{}-ubyte", end="", classes=10):
    """A small data set, and what `data.load` should make of it."""
    folder.mkdir(exist_ok=True)
    rng, arrays = RNG(1), []
    for part, n in (("train", train), ("t10k", test)):
        x, y = rng.integers(0, 256, (n, 4, 5)), rng.permutation(np.arange(n) % classes)
        for kind, a in (("images", x), ("labels", y)):
            content = gzip.compress(idx(a)) if end else idx(a)
            (folder / (f"{part}-" + spelling.format(kind, a.ndim) + end)).write_bytes(content)
        arrays += [x.reshape(n, -1), y]
    return arrays


def write_slice(mnist, folder, train, test):
    """Of MNIST, the first images of both sets, as files."""
    for part, n, x, y in (("train", train, *mnist[:2]), ("t10k", test, *mnist[2:])):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(x[:n].reshape(n, 28, 28)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y[:n]))
    return folder


# --- Programs ------------------------------------------------------------------------------------------

DEFAULTS = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
PYTHON = [sys.executable, "-u"]
TRAIN = [*PYTHON, "train.py"]
# Started as the README says. On one machine: three MPI processes, two dask workers.
MPIEXEC = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
WITH_MPI = [MPIEXEC, *"-n 3 -genv MPIR_CVAR_NOLOCAL 1".split(), *PYTHON, "-m", "mpi4py.futures"]
MPI = [*WITH_MPI, "train.py", "--engine", "mpi"]
DASK = [*TRAIN, *"--engine dask --workers 2".split()]
needs_mpi = pytest.mark.skipif(not (MPIEXEC and importlib.util.find_spec("mpi4py")), reason="pip install mpi4py mpich")
needs_dask = pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="pip install distributed")
ENGINES = [pytest.param(e, marks=[needs, slow]) for e, needs in ((MPI, needs_mpi), (DASK, needs_dask))]


def start(*arguments, program=TRAIN, lines=0, **how):
    """A program of the project that goes on, when it has told so many lines: subprocess.Popen, its streams pipes."""
    child = subprocess.Popen([*map(str, [*program, *arguments])], **DEFAULTS | how)
    for _ in range(lines):
        child.stdout.readline()
    return child


def run(*arguments, program=TRAIN, check=True, timeout=300, **how):
    """The same to its end; with `check`, it must succeed and have no errors to tell."""
    done = subprocess.run([*map(str, [*program, *arguments])], timeout=timeout, **DEFAULTS | how)
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


def run_program(folder, code, *arguments, program=PYTHON, **how):
    """A program of one's own, mine.py in a folder of one's own, which imports what the project has."""
    (folder / "mine.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return run(*arguments, program=[*program, folder / "mine.py"], cwd=folder, env=environment, **how)


def family(pid):
    """A process and all that descend from it, as Linux has them."""
    yield pid
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text("utf-8").split():
            yield from family(int(child))


def log_of(path):
    """Comments and header of a log, and its rows as lists of numbers."""
    lines = path.read_text("utf-8").splitlines()
    return lines[:3], [[float(value) for value in line.split(",")] for line in lines[3:]]


def result(done):
    """Accuracies of the last line."""
    line = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"result: train (\d\.\d{4}) (?:test|validation) (\d\.\d{4}) seconds \d+", line)
    assert found, line
    return tuple(map(float, found.groups()))


def in_steps(monkeypatch, act):
    """In each step of train.py in this process, `act` gets its number, from 1 on, and the gradients."""
    count, plain = itertools.count(1), fpnl.es_gradient

    def es_gradient(*args, **how):
        grads, losses = plain(*args, **how)
        act(next(count), grads)
        return grads, losses

    monkeypatch.setattr(fpnl, "es_gradient", es_gradient)


def saved(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_same_run(found, expected):
    """Two files have the same step, weights and moments."""
    a, b = saved(found), saved(expected)
    assert a.keys() == b.keys() and a["step"] == b["step"] and len(a) > 20
    for key in a.keys() - {"settings", "step", "seconds"}:
        assert_same_bits(a[key], b[key])
