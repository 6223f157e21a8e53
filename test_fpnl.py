"""The tests of fpnl.py, train.py and data.py; those of docs/ and examples/ are there.

`python -m pytest` leaves out the long ones, `python -m pytest -m slow` runs those. Bits are compared as uint32, NaNs by
class; no test asserts a time.
"""

import builtins
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import platform
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

import data
import fpnl

ROOT = pathlib.Path(__file__).resolve().parent
RNG = np.random.default_rng


def bits(x):
    """float32 as uint32, with one value for all NaNs."""
    x = np.asarray(x)
    assert x.dtype == np.float32
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(bits(found), bits(expected), strict=True)


def assert_same_params(found, expected):
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert_same_bits(a, b)


def has_hardware():
    try:
        with fpnl.hardware_ftz():
            return True
    except RuntimeError:
        return False


# On Linux x86-64, where the switch is verified, its absence is a failure and not a skip.
HARDWARE = has_hardware() or (platform.system(), platform.machine()) == ("Linux", "x86_64")
needs_hardware = pytest.mark.skipif(not HARDWARE, reason="fpnl cannot switch this CPU to flush-to-zero")


# --- Flush-to-zero arithmetic: vectors and oracles ---------------------------------------------------

OPS = ("add", "subtract", "multiply", "divide")
MODES = list(itertools.product((False, True), repeat=2))  # FTZ, DAZ
CPU_TININESS = "before" if platform.machine().lower() in ("aarch64", "arm64") else "after"
THIS_CPUS_MODES = MODES if CPU_TININESS == "after" else [(False, False), (True, True)]  # Arm: both at once
TINY = fpnl.TINY
ONE_FLAG = "this CPU switches FTZ and DAZ only together"
all_ops = pytest.mark.parametrize("op", OPS)
all_modes = pytest.mark.parametrize(("ftz", "daz"), MODES)


def from_bits(x):
    return np.asarray(x, np.uint32).view(np.float32)


def ldexp(significand, exponent):
    return np.ldexp(np.float64(significand), exponent).astype(np.float32)


SPECIAL = [
    *(0x00000000, 0x00000001, 0x00000002, 0x00400000, 0x007FFFFE, 0x007FFFFF),  # 0 and subnormals
    *(0x00800000, 0x00800001, 0x00800002, 0x00FFFFFF, 0x01000000, 0x01000001),  # from TINY on
    *(0x01200000, 0x014CCCCD, 0x00333333),  # 2.5, 1.6 and 0.4 TINY
    *(0x1F800000, 0x20000000, 0x33800000),  # 2^-64, 2^-63, 2^-24
    *(0x3EFFFFFF, 0x3F000000, 0x3F000001, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x40400000),  # around 1/2 and 1; 3
    *(0x01000000, 0x7DFFFFFF, 0x7E000000, 0x7E000001, 0x7E800000),  # 2^-125, around 2^125, 2^126
    *(0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001),  # largest, inf, NaN, signalling NaN
    *ldexp([55831 << 8, 601 << 14], [-149, -24]).view(np.uint32),  # their product is a tie: see GOLDEN
]


@functools.cache
def grid():
    """Every pair of special values, of either sign."""
    values = np.array(SPECIAL, np.uint32)
    a, b = np.meshgrid(*[from_bits(np.concatenate([values, values | 0x80000000]))] * 2)
    return a.ravel(), b.ravel()


@functools.cache
def directed(n=200_000):
    """Pairs whose product, quotient or sum is at the threshold, many of them where the naive mask is wrong."""
    rng = RNG(1)
    # a * b: A has m bits, B 24, and A B is the last product below 2^(m+23) (1 - 2^-25), or a neighbour.
    m = rng.integers(2, 25, n)
    m[: n // 2] = 24
    A = rng.integers(1 << (m - 1), 1 << m)
    B = ((1 << (m + 23)) - (1 << (m - 2)) - 1) // A + rng.choice([0, 0, 0, -1, 1], n)
    e = rng.integers(-149, -m + 1)
    e[n // 2 :: 2] = -149  # the factor is subnormal, unless m = 24
    products = ldexp(A, e), ldexp(B, -149 - m - e)
    # a / b: (1 - 2^-24) 2^k / 2^(k + 126), every k; and a = b TINY, or some steps away from it.
    k = np.tile(np.arange(-125, 2), 4)
    ones = ldexp((1 << 24) - 1, k - 24), ldexp(1, k + 126)
    b = from_bits(rng.integers(0x3F800000, 0x7F800000, n, dtype=np.uint32))
    near = from_bits((b * TINY).view(np.uint32) + rng.integers(-2, 3, n).astype(np.uint32))
    # a + b: all but cancels.
    a = rng.integers(0x00800000, 0x0C000000, n, dtype=np.uint32)
    sums = from_bits(a), from_bits(a + rng.integers(-1000, 1001, n).astype(np.uint32))
    a, b = (np.concatenate(x) for x in zip(products, products[::-1], ones, (near, b), sums, strict=True))
    return [from_bits(x.view(np.uint32) | rng.integers(0, 2, x.size, dtype=np.uint32) << 31) for x in (a, b)]


@functools.cache
def random(n=1 << 21):
    """Random bit patterns; then random ones whose product or quotient is within 2^+-4 of TINY."""
    rng = RNG(2)
    a, b, c, d = (rng.integers(0, 1 << 32, n, dtype=np.uint32) for _ in range(4))
    exponent = c >> 23 & 0xFF
    near = rng.integers(-4, 5, n)
    for_product = np.clip(128 - exponent + near, 0, 254).astype(np.uint32)
    for_quotient = np.clip(exponent + 126 + near, 0, 254).astype(np.uint32)
    d = d & 0x807FFFFF | np.where(np.arange(n) % 2, for_product, for_quotient) << 23
    return from_bits(np.concatenate([a, c])), from_bits(np.concatenate([b, d]))


@functools.cache
def some(n=20_000):
    """The grid and a sample of the others, for the slower tests."""
    pick = RNG(3).integers
    pairs = [[x[i] for x in v] for v in (directed(), random()) for i in [pick(0, len(v[0]), n)]]
    return [np.concatenate(x) for x in zip(grid(), *pairs, strict=True)]


@functools.cache
def scaling():
    """[1/4, 1) over 2^125, by either operation: all 2^23 significands in the two binades around 1/2."""
    return np.arange(0x3E800000, 0x3F800000, dtype=np.uint32).view(np.float32)


@contextlib.contextmanager
def cpu_mode(ftz, daz):
    """fpnl.hardware_ftz, skipping the test where FTZ and DAZ are one flag."""
    if (ftz, daz) not in THIS_CPUS_MODES:
        pytest.skip(ONE_FLAG)
    with fpnl.hardware_ftz(daz, ftz):
        yield


def on_the_cpu(op, a, b, ftz, daz):
    """The operation with the CPU in that mode."""
    with np.errstate(all="ignore"), cpu_mode(ftz, daz):
        return getattr(np, op)(a, b)


def emulated(op, a, b, ftz, daz):
    if ftz:
        return getattr(fpnl, op)(a, b, daz=daz, tininess=CPU_TININESS)
    with np.errstate(all="ignore"):
        return getattr(np, op)(*map(fpnl.flush, (a, b))) if daz else getattr(np, op)(a, b)


def naive(op, a, b):
    """The mask that suggests itself."""
    with np.errstate(all="ignore"):
        r = getattr(np, op)(fpnl.flush(a), fpnl.flush(b))
        return np.where(np.abs(r) < TINY, 0 * r, r)


def softfloat(op, a, b, daz, tininess):
    """Berkeley SoftFloat, flushing what is subnormal or raises the underflow flag."""
    soft = pytest.importorskip("softfloatpy", reason="needs softfloatpy: pip install softfloatpy")
    function = getattr(soft, {"add": "f32_add", "subtract": "f32_sub", "multiply": "f32_mul", "divide": "f32_div"}[op])
    soft.set_tininess_mode(getattr(soft.TininessMode, f"{tininess.upper()}_ROUNDING"))
    soft.set_rounding_mode(soft.RoundingMode.NEAR_EVEN)
    none, underflow = soft.ExceptionFlag(0), soft.ExceptionFlag.UNDERFLOW

    def operands(x):
        x = x.view(np.uint32)
        x = np.where((x & 0x7FFFFFFF) < 0x00800000, x & 0x80000000, x) if daz else x
        return [soft.Float32.from_bytes(v.to_bytes(4, "big")) for v in x.tolist()]

    found, flags = bytearray(), []
    for x, y in zip(operands(a), operands(b), strict=True):
        soft.set_exception_flags(none)
        found += function(x, y).to_bytes()
        flags.append(soft.test_exception_flags(underflow))
    r = np.frombuffer(found, ">u4").astype(np.uint32)
    tiny = np.array(flags) | ((r & 0x7FFFFFFF) < 0x00800000)
    return from_bits(np.where(tiny, r & 0x80000000, r))


# --- Flush-to-zero arithmetic: bits -------------------------------------------------------------------


@needs_hardware
@all_modes
@all_ops
@pytest.mark.parametrize("vectors", [grid, directed, random])
def test_bits_of_the_cpu(vectors, op, ftz, daz):
    """The claim: emulated and on the CPU, four operations, four settings of its flags."""
    assert_same_bits(emulated(op, *vectors(), ftz, daz), on_the_cpu(op, *vectors(), ftz, daz))


@needs_hardware
@all_modes
@pytest.mark.parametrize(("op", "exponent"), [("divide", 125), ("multiply", -125)])
def test_scaling_of_every_significand_has_the_bits_of_the_cpu(op, exponent, ftz, daz):
    """The network's own operation, exhaustively at the exponents that decide."""
    x, scale = scaling(), np.float32(2.0**exponent)
    found = emulated(op, x, scale, ftz, daz)
    assert_same_bits(found, on_the_cpu(op, x, scale, ftz, daz))
    if ftz:
        np.testing.assert_array_equal(found != 0, x >= 0.5)


@needs_hardware
def test_the_naive_mask_fails():
    """So these vectors can fail: flushing the rounded result is wrong where it rounded up to TINY."""
    with np.errstate(all="ignore"):
        a, b = (fpnl.flush(x).astype(np.float64) for x in directed())
        product = np.abs(a * b)
    hit = (product >= 2.0**-126 - 2.0**-150) & (product < 2.0**-126 - 2.0**-151)
    wrong = {op: bits(naive(op, *directed())) != bits(on_the_cpu(op, *directed(), True, True)) for op in OPS}
    assert hit.sum() >= 10_000
    assert wrong["multiply"][hit].all()
    assert not wrong["multiply"][~hit].any() or CPU_TININESS == "before"
    assert wrong["divide"].any()
    assert not wrong["add"].any()
    assert not wrong["subtract"].any()
    x = scaling()
    wrong = bits(naive("divide", x, fpnl.SCALE)) != bits(on_the_cpu("divide", x, fpnl.SCALE, True, True))
    assert x[wrong].tolist() == [0.5 - 2.0**-25]


@pytest.mark.parametrize("tininess", ["after", "before"])
@pytest.mark.parametrize("daz", [True, False])
@all_ops
@pytest.mark.parametrize("vectors", [pytest.param(functools.partial(directed, 60_000), marks=pytest.mark.slow), some])
def test_bits_of_softfloat(vectors, op, daz, tininess):
    """An independent implementation, and the proof for AArch64's rule."""
    found = getattr(fpnl, op)(*vectors(), daz=daz, tininess=tininess)
    assert_same_bits(found, softfloat(op, *vectors(), daz, tininess))


SUB, LARGEST_SUB, T, NAN, INF, MINUS = 0x00000001, 0x007FFFFF, 0x00800000, 0x7FC00000, 0x7F800000, 0x80000000
GOLDEN = [  # op, a, b, expected with DAZ ("after", "before"), without DAZ ("after", "before")
    # (1 - 2^-24) TINY = TINY - 2^-150 has 24 bits, so it is tiny; IEEE rounds this tie to even, to TINY.
    ("multiply", 0x3F7FFFFF, T, 0, 0, 0, 0),
    # 55831 * 601 = 2^25 - 1, so the product is (2^25 - 1) 2^-151 = TINY - 2^-151: 25 bits, a tie that rounds to TINY.
    ("multiply", *ldexp([55831 << 8, 601 << 14], [-149, -24]).view(np.uint32), T, 0, T, 0),
    # The float32 below 1/2, over 2^125: TINY - 2^-150 again; 1/2 itself gives TINY.
    ("divide", 0x3EFFFFFF, 0x7E000000, 0, 0, 0, 0),
    ("multiply", 0x3EFFFFFF, 0x01000000, 0, 0, 0, 0),
    ("divide", 0x3F000000, 0x7E000000, T, T, T, T),
    ("divide", MINUS | 0x3EFFFFFF, 0x7E000000, *[MINUS] * 4),
    # The sign is that of the true result: -1.5 TINY + TINY = -TINY/2; it is +0 only where the sum is exactly 0.
    ("add", MINUS | 0x00C00000, T, *[MINUS] * 4),
    ("subtract", 0x00C00000, 0x00C00000, 0, 0, 0, 0),
    ("add", MINUS | SUB, MINUS | SUB, *[MINUS] * 4),
    # TINY - 2^-149 + 2^-149: operands flushed, 0; operands read, TINY.
    ("add", LARGEST_SUB, SUB, 0, 0, T, T),
    ("add", T, MINUS | SUB, T, T, 0, 0),
    ("subtract", T, SUB, T, T, 0, 0),
    # 2^-149 * 2^125 = 2^-24, unless it is read as 0.
    ("multiply", SUB, 0x7E000000, 0, 0, 0x33800000, 0x33800000),
    ("divide", SUB, SUB, NAN, NAN, 0x3F800000, 0x3F800000),
    ("divide", SUB, 0, NAN, NAN, INF, INF),
    ("divide", 0x3F800000, MINUS | LARGEST_SUB, *[MINUS | INF] * 2, *[0xFE800001] * 2),  # 2^126 (1 + 2^-23)
    ("multiply", SUB, INF, NAN, NAN, INF, INF),
    ("multiply", 0, MINUS | 0x3F800000, *[MINUS] * 4),
]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row[0]}-{row[1]:08x}-{row[2]:08x}")
def test_golden_values(row):
    """By hand, without another implementation."""
    op, a, b, *expected = row
    assert_same_bits(getattr(fpnl, op)(from_bits(a), from_bits(b)), from_bits(expected[0])[()])  # the defaults
    for (daz, tininess), value in zip(itertools.product((True, False), ("after", "before")), expected, strict=True):
        assert_same_bits(
            getattr(fpnl, op)(from_bits(a), from_bits(b), daz=daz, tininess=tininess), from_bits(value)[()]
        )


@pytest.mark.parametrize("tininess", ["after", "before"])
@pytest.mark.parametrize("daz", [True, False])
@all_ops
def test_bits_do_not_depend_on_the_neighbours(op, daz, tininess):
    """Pairs alone and by threes, as in a large array, wherever that is cut into chunks."""
    function = functools.partial(getattr(fpnl, op), daz=daz, tininess=tininess)
    for (a, b), n in [(grid(), 1), (directed(), 1), (directed(), 3)]:
        expected, pick = function(a, b), RNG(n).permutation(a.size)[: n * 1000].reshape(-1, n)
        assert_same_bits(np.array([function(a[i], b[i]) for i in pick]), expected[pick])


def test_products_of_a_gpu():
    """mul.rn.ftz.f32 on an NVIDIA H200, where the two rules differ and elsewhere: it flushes after rounding."""
    rows = (ROOT / "docs" / "golden" / "nvidia-mul-ftz.csv").read_text("utf-8").split("a,b,product\n")[1].split()
    a, b, product = from_bits([[int(value, 16) for value in row.split(",")] for row in rows]).T
    for mode in [(False, False), *[(True, True)] * HARDWARE]:
        with fpnl.hardware_ftz(*mode) if HARDWARE else contextlib.nullcontext():
            after, before = (fpnl.multiply(a, b, tininess=tininess) for tininess in ("after", "before"))
        assert_same_bits(after, product)
        assert len(rows) == 512 and np.sum(bits(before) != bits(product)) == 45


@pytest.mark.parametrize("mode", [np.array, iter])
def test_flush_touches_nothing_but_subnormals(mode):
    """Raw bits, payloads of NaNs included; arrays and scalars."""
    x = random()[0][: 1 << 20] if mode is np.array else grid()[0]
    magnitude = x.view(np.uint32) & 0x7FFFFFFF
    expected = np.where(magnitude < 0x00800000, x.view(np.uint32) & 0x80000000, x.view(np.uint32))
    found = fpnl.flush(x) if mode is np.array else np.array([fpnl.flush(v) for v in x])
    np.testing.assert_array_equal(found.view(np.uint32), expected)


# --- Flush-to-zero arithmetic: the interface ------------------------------------------------------------


@all_ops
def test_scalars_empty_arrays_and_broadcasting(op):
    """Shapes and types as NumPy's."""
    function, plain = getattr(fpnl, op), getattr(np, op)
    x = RNG(4).standard_normal((300, 1, 400), dtype=np.float32)  # over a chunk
    y = RNG(5).standard_normal((3, 1), dtype=np.float32)
    for a, b in [
        (x, y),
        (x.T, y),
        (x[::-2, :, ::3], y[0, 0]),
        (y[1], x),
        (x[:0], y),
        (y[:0], y[:0]),
        (y[0, 0], y[1, 0]),
    ]:
        assert type(function(a, b)) is type(plain(a, b))
        assert_same_bits(function(a, b), plain(a, b))
    assert type(function(np.ones((), np.float32), np.ones((), np.float32))) is np.float32


@all_ops
def test_anything_but_float32_is_a_type_error(op):
    """No silent conversion: a float64, or a Python number, would change the physics."""
    function, good = getattr(fpnl, op), np.ones(3, np.float32)
    for bad in (
        1.0,
        1,
        None,
        [1.0],
        np.float64(1),
        good.astype(np.float64),
        good.astype(np.float16),
    ):
        with pytest.raises(TypeError, match="expected float32"):
            function(good, bad)
        with pytest.raises(TypeError, match="expected float32"):
            function(bad, good)
        with pytest.raises(TypeError, match="expected float32"):
            fpnl.flush(bad)


@all_ops
def test_wrong_values_are_value_errors(op):
    function, good = getattr(fpnl, op), np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"tininess: expected one of \('after', 'before'\), found 'during'"):
        function(good, good, tininess="during")
    for daz in ("off", "no", 2, 1, 0.0, None):
        with pytest.raises(ValueError, match=r"daz: expected one of \(True, False\), found"):
            function(good, good, daz=daz)
    with pytest.raises(ValueError, match="broadcast"):
        function(good, good[:2])


# --- Flush-to-zero arithmetic: the CPU's mode ----------------------------------------------------------

HALF_TINY, HALF, TWO = (np.full(2, x, np.float32) for x in (2.0**-127, 0.5, 2))
TINIES = np.full(2, TINY)


def flags():
    """FTZ and DAZ as this thread's arithmetic shows them: TINY / 2, and subnormal * 2."""
    return tuple(not x.view(np.uint32).any() for x in (TINIES * HALF, HALF_TINY * TWO))


def environment():
    """This thread's floating-point environment, byte for byte."""
    read, *_ = fpnl._fpu_control()
    read(env := (ctypes.c_uint32 * 8)())
    return bytes(env)


@needs_hardware
@all_modes
def test_the_cpu_enters_a_mode_and_returns(ftz, daz):
    """From any mode into any other, an exception or none; exactly what was there comes back."""
    flags()  # some exceptions are noted in the environment, and stay
    start = environment()
    with cpu_mode(ftz, daz):
        assert flags() == (ftz, daz)
        outer = environment()
        for one, other in itertools.product(THIS_CPUS_MODES, repeat=2):
            with fpnl.hardware_ftz(ftz=one[0], daz=one[1]):
                assert flags() == one
            assert environment() == outer
            with pytest.raises(ZeroDivisionError), fpnl.hardware_ftz(ftz=one[0], daz=one[1]):
                with fpnl.hardware_ftz(ftz=other[0], daz=other[1]):
                    assert flags() == other
                assert flags() == one
                raise ZeroDivisionError
            assert environment() == outer
        assert flags() == (ftz, daz)
    assert environment() == start
    assert flags() == (False, False)


@needs_hardware
def test_other_threads_keep_their_mode():
    """Threads that run already, in either direction, and those that start later."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(flags).result() == (False, False)
        with fpnl.hardware_ftz():
            assert pool.submit(flags).result() == (False, False)
        context = fpnl.hardware_ftz()
        pool.submit(context.__enter__).result()
        assert (flags(), pool.submit(flags).result()) == ((False, False), (True, True))
        pool.submit(context.__exit__, None, None, None).result()
        assert pool.submit(flags).result() == (False, False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(flags).result() == (False, False)


@needs_hardware
@all_modes
@all_ops
@pytest.mark.parametrize("vectors", [grid, *(pytest.param(v, marks=pytest.mark.slow) for v in (directed, random))])
def test_emulation_on_a_cpu_that_flushes_already(vectors, op, ftz, daz):
    """Another library may have switched this thread's flags on: the bits are the same."""
    for own, tininess in itertools.product((True, False), ("after", "before")):
        function = functools.partial(getattr(fpnl, op), daz=own, tininess=tininess)
        with cpu_mode(ftz, daz):
            found, by_scale, flushed = (
                function(*vectors()),
                function(vectors()[0], fpnl.SCALE),
                fpnl.flush(vectors()[0]),
            )
            alone = [function(x, y) for x, y in zip(*[v[:1000] for v in vectors()], strict=True)]
        assert_same_bits(found, function(*vectors()))
        assert_same_bits(by_scale, function(vectors()[0], fpnl.SCALE))
        assert_same_bits(flushed, fpnl.flush(vectors()[0]))
        assert_same_bits(np.array(alone), found[:1000])


CHILD = """
import ctypes, itertools, sys
libm, env, mode = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)(), int(sys.argv[1], 16)
libm.fegetenv(env)
env[7] |= mode
libm.fesetenv(env)
import numpy as np, fpnl
a, b = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(2, -1)
for op, daz, tininess in itertools.product(sys.argv[2:], (True, False), ("after", "before")):
    sys.stdout.buffer.write(getattr(fpnl, op)(a, b, daz=daz, tininess=tininess).tobytes())
libm.fegetenv(env)
assert env[7] & mode == mode
"""


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="sets the mode of Linux x86-64 by hand"
)
@pytest.mark.parametrize("mode", ["8000", "0040", "8040"])
def test_emulation_when_numpy_is_imported_into_a_process_that_flushes(mode):
    """FTZ, DAZ and both, set before NumPy and fpnl are imported."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode, *OPS], input=np.stack(some()).tobytes(), stdout=subprocess.PIPE, check=True
    )
    found = np.frombuffer(done.stdout, np.float32).reshape(-1, len(some()[0]))
    cases = itertools.product(OPS, (True, False), ("after", "before"))
    for row, (op, daz, tininess) in zip(found, cases, strict=True):
        assert_same_bits(row, getattr(fpnl, op)(*some(), daz=daz, tininess=tininess))


@pytest.fixture
def forget_the_platform():
    known = fpnl._fpu_control, fpnl._look_at_the_effect
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


@pytest.mark.parametrize(("system", "machine"), [("Plan9", "x86_64"), ("Linux", "riscv64"), ("", "")])
def test_an_unknown_platform_is_a_runtime_error(forget_the_platform, monkeypatch, system, machine):
    """But only where the CPU is to be switched: the emulation goes on."""
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RuntimeError, match=f"unknown platform {system} {machine}"), fpnl.hardware_ftz():
        pytest.fail("inside")
    params, x, labels = example()
    with pytest.raises(RuntimeError, match="unknown platform"):
        fpnl.es_gradient(params, x, labels, RNG(0), ftz="hardware")
    assert fpnl.multiply(TINY, np.float32(0.5)) == 0
    fpnl.es_gradient(params, x, labels, RNG(0))


@needs_hardware
def test_other_words_and_libraries_are_a_runtime_error(forget_the_platform, monkeypatch):
    """A 32-bit process; a C library of another name."""
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "sizeof", lambda _: 4)
        with pytest.raises(RuntimeError, match="unknown platform"), fpnl.hardware_ftz():
            pytest.fail("inside")
    for key, (_, *where) in fpnl._FENV.items():
        monkeypatch.setitem(fpnl._FENV, key, ("libnowhere.so", *where))
    with pytest.raises(RuntimeError, match="unknown platform"), fpnl.hardware_ftz():
        pytest.fail("inside")


@needs_hardware
@pytest.mark.parametrize("daz", [True, False])
def test_flags_without_effect_are_a_runtime_error(forget_the_platform, monkeypatch, daz):
    """An emulator or instrumenting tool that takes the write and computes on; a CPU with one flag for both."""
    read, write, register, bits = fpnl._fpu_control()
    before, one_flag = environment(), ((0, 0, bits[2], bits[2]) if daz else (0, 0, bits[3], bits[3]))
    for control in ((read, lambda env: None, register, bits), (read, write, register, one_flag)):
        fpnl._look_at_the_effect.cache_clear()
        monkeypatch.setattr(fpnl, "_fpu_control", lambda control=control: control)
        with pytest.raises(RuntimeError, match="unknown platform.*after setting them"), fpnl.hardware_ftz(daz):
            pytest.fail("inside")
        monkeypatch.undo()
        assert environment() == before


@needs_hardware
def test_the_effect_is_looked_at_once_for_each_mode(forget_the_platform, monkeypatch):
    switched, switch = [], fpnl._switch
    monkeypatch.setattr(fpnl, "_switch", lambda *mode: switched.append(mode) or switch(*mode))
    for _ in range(3):
        for daz, ftz in [(True, True), (False, False)]:
            with fpnl.hardware_ftz(daz, ftz):
                assert flags() == (ftz, daz)
    assert switched == [(True, True)] * 2 + [(False, False)] * 2 + [(True, True), (False, False)] * 2


def test_a_flag_is_true_or_false_and_the_mode_no_decorator():
    """Any other string would be taken for true; the body of a decorated generator would run outside of the mode."""
    for bad in ("off", "no", 2, 1, 0.0, None):
        for name in ("daz", "ftz"):
            with pytest.raises(ValueError, match=rf"{name}: expected one of \(True, False\), found {bad!r}"):
                fpnl.hardware_ftz(**{name: bad})
    fpnl.hardware_ftz(np.True_, np.False_)
    with pytest.raises(ValueError, match=r"daz: expected one of \(True, False\), found <function"):
        fpnl.hardware_ftz(flags)
    with pytest.raises(TypeError, match="not callable"):
        fpnl.hardware_ftz()(flags)


@pytest.mark.parametrize("compute", [emulated, pytest.param(on_the_cpu, marks=needs_hardware)])
def test_the_posts_examples(compute):
    """Addition is not associative under FTZ; multiplication not distributive under FTZ without DAZ."""

    def ops(ftz, daz):
        return [lambda x, y, op=op: compute(op, x, y, ftz, daz) for op in ("add", "multiply")]

    # In multiples of 2^-149, TINY being 2^23: 2.5 TINY, -1.6 TINY and TINY are 20971520, -13421773 and 8388608.
    a, b, c = (np.float32(x) * TINY for x in (2.5, -1.6, 1))
    for ftz, daz, left, right in [
        (False, False, 20971520 - 13421773 + 8388608, 20971520 - 13421773 + 8388608),
        (True, False, 8388608, 20971520),  # 0.9 TINY is flushed; -0.6 TINY is flushed
        (True, True, 8388608, 20971520),
    ]:
        if compute is on_the_cpu and (ftz, daz) not in THIS_CPUS_MODES:
            continue  # AArch64 has no FTZ without DAZ
        add, _ = ops(ftz, daz)
        assert_same_bits(add(add(a, b), c), ldexp(left, -149))
        assert_same_bits(add(add(b, c), a), ldexp(right, -149))
    # 0.4 TINY and 0.5 TINY are the subnormals 3355443 and 4194304 times 2^-149; 1 / TINY is 2^126.
    a, b, c = from_bits(3355443)[()], from_bits(4194304)[()], 1 / TINY
    for ftz, daz, left, right in [
        (False, False, 3355443 + 4194304, 3355443 + 4194304),
        (True, False, 0, 3355443 + 4194304),
        (True, True, 0, 0),  # DAZ takes both operands for 0, on either side
    ]:
        if compute is on_the_cpu and (ftz, daz) not in THIS_CPUS_MODES:
            continue
        add, multiply = ops(ftz, daz)
        assert_same_bits(multiply(add(a, b), c), ldexp(left, -23))
        assert_same_bits(add(multiply(a, c), multiply(b, c)), ldexp(right, -23))


# --- The network ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(mnist):
    """Weights after 60 steps of ES on MNIST."""
    params = fpnl.init(RNG(0))
    moments = [[[np.zeros_like(a) for a in layer] for layer in params] for _ in range(2)]
    for step in range(60):
        rows = slice(step * 128, (step + 1) * 128)
        grads = fpnl.es_gradient(params, data.pixels(mnist[0][rows]), mnist[1][rows], RNG(step), control_variate=True)
        fpnl.adamw(params, grads, *moments, step + 1, lr=1e-3)
    return params


def example(sizes=(12, 10, 9, 5), n=6, seed=0):
    rng = np.random.default_rng(seed)
    return fpnl.init(rng, sizes), rng.random((n, sizes[0]), dtype=np.float32), rng.integers(0, sizes[-1], n)


@pytest.mark.parametrize("sizes", [(784, 512, 512, 10), (3, 2), (5, 4, 3), (4, 6, 5, 7, 2)])
def test_init_is_he_normal_float32_with_zero_biases(sizes):
    params = fpnl.init(np.random.default_rng(1), sizes)
    assert [W.shape for W, b in params] == list(itertools.pairwise(sizes))
    assert all(a.dtype == np.float32 for layer in params for a in layer)
    assert all(b.shape == W.shape[1:] and not b.any() for W, b in params)
    assert all(W.std() == pytest.approx(np.sqrt(2 / len(W)), rel=3 / np.sqrt(2 * W.size)) for W, b in params)
    assert_same_params(params, fpnl.init(np.random.default_rng(1), sizes))


def test_init_refuses_what_is_no_network():
    for sizes in [(), (5,), (5, 0)]:
        with pytest.raises(ValueError, match="at least two positive widths"):
            fpnl.init(np.random.default_rng(0), sizes)
    with pytest.raises(TypeError, match="rng: expected a numpy.random.Generator, found 0"):
        fpnl.init(0)


@pytest.mark.parametrize("sizes", [(9, 4), (9, 8, 4), (9, 8, 7, 4), (9, 8, 7, 6, 4)])
@pytest.mark.parametrize("exponent", [124, 125, 127])
@pytest.mark.parametrize("ftz", [True, pytest.param("hardware", marks=needs_hardware)])
def test_forward_is_a_chain_of_dead_zones(sizes, exponent, ftz):
    """Weights, inputs and biases in quarters: every sum is exact, so exact fractions are the reference."""
    rng = np.random.default_rng(2)
    params = [
        (rng.integers(-3, 4, (i, o)) / np.float32(4), rng.integers(-4, 5, o) / np.float32(4))
        for i, o in itertools.pairwise(sizes)
    ]
    params = [(W.astype(np.float32), b.astype(np.float32)) for W, b in params]
    x = (rng.integers(0, 5, (20, sizes[0])) / 4 * 2.0 ** (exponent - 125)).astype(np.float32)

    def t(z):
        return np.where(np.abs(z) >= 2.0 ** (exponent - 126), z, 0)  # float64: exact here

    (W, b), *later = [(W.astype(np.float64), b.astype(np.float64)) for W, b in params]
    h = t(x @ W + b)
    for W, b in later:
        h = t(t(h @ W) + t(b))
    found = fpnl.forward(params, x, ftz, np.float32(2.0**exponent))
    assert_same_bits(found + np.float32(0), (h + 0.0).astype(np.float32))
    assert (h == 0).any() and (h != 0).any()


def test_forward_is_the_formula_of_the_post():
    params, x, _ = example((784, 64, 32, 10), n=50)
    (W1, b1), (W2, b2), (W3, b3) = params
    S, add, div, mul = fpnl.SCALE, fpnl.add, fpnl.divide, fpnl.multiply
    h1 = div(add(x @ W1, b1), S)
    h2 = add((h1 * S) @ W2 / S, div(b2, S))
    o = mul(add((h2 * S) @ W3 / S, div(b3, S)), S)
    assert_same_bits(fpnl.forward(params, x), o)
    for found, h in zip(fpnl.activations(params, x), (h1, h2, o / S), strict=True):
        assert_same_bits(found, h * S)
        assert np.all((h == 0) | (np.abs(h) >= fpnl.TINY)) and 0.1 < np.mean(h == 0) < 0.9  # nothing is subnormal


def test_forward_is_linear_without_the_flush_only():
    """f(x) - f(0) doubles with x in the linear network; with the flush it does not, far from it."""
    params, x, _ = example((30, 20, 20, 4), n=40)
    for ftz, linear in ((False, True), (True, False), ("hardware", False)):
        if ftz == "hardware" and not HARDWARE:
            continue
        f = functools.partial(fpnl.forward, params, ftz=ftz)
        error = np.abs(f(2 * x) - 2 * f(x) + f(0 * x)).max()
        assert (error < 1e-5) == linear, (ftz, error)


@needs_hardware
@pytest.mark.parametrize("seed", [0, 1])
def test_forward_on_the_cpus_own_flags_has_the_same_bits(seed, mnist, trained):
    """All 10,000 test images, initial and trained weights: the claim this project stands on."""
    x = data.pixels(mnist[2])
    for params in (fpnl.init(np.random.default_rng(seed)), trained):
        assert_same_bits(fpnl.forward(params, x), fpnl.forward(params, x, ftz="hardware"))


def test_later_products_are_the_literal_ones_of_subnormals():
    """Up to the rounding of every partial sum to a multiple of 2^-149, half of one each."""
    params, x, _ = example((40, 30, 20), n=25)
    W = params[1][0] / np.float32(8)  # sums around 2^-126, many of them subnormal
    h1, h2 = fpnl.activations([params[0], (W, params[1][1])], x, ftz=False)
    literal, rescaled = h1 / fpnl.SCALE @ W, h2 / fpnl.SCALE
    subnormal = (np.abs(rescaled) < fpnl.TINY) & (rescaled != 0)
    assert subnormal.sum() > 100
    error = np.abs(literal.astype(np.float64) - rescaled.astype(np.float64))
    assert np.all(error <= (len(W) + 1) * 2.0**-149)


def test_later_biases_are_inert_below_a_half():
    params, x, labels = example((20, 16, 12, 5), n=30)
    rng = np.random.default_rng(3)
    signs = [np.where(rng.random(len(b)) < 0.5, np.float32(-1), np.float32(1)) for _, b in params[1:]]
    below = [params[0], *((W, s * np.float32(0.49999997)) for (W, _), s in zip(params[1:], signs))]
    at = [params[0], *((W, s * np.float32(0.5)) for (W, _), s in zip(params[1:], signs))]
    assert_same_bits(fpnl.forward(below, x) + np.float32(0), fpnl.forward(params, x) + np.float32(0))  # but for -0
    assert not np.array_equal(fpnl.forward(at, x), fpnl.forward(params, x))
    gradient = functools.partial(fpnl.es_gradient, x=x, labels=labels)
    grads = gradient(below, rng=np.random.default_rng(4))
    assert_same_params(grads, gradient(params, rng=np.random.default_rng(4)))  # ES sees no difference,
    assert all(not db.any() for _, db in grads[1:]) and grads[0][1].all()  # and leaves them alone


def test_float32_throughout():
    params, x, labels = example()
    for ftz in (True, False):
        assert fpnl.forward(params, x, ftz).dtype == np.float32
        assert {a.dtype for layer in fpnl.es_gradient(params, x, labels, RNG(0), ftz=ftz) for a in layer} == {
            np.dtype("f4")
        }


def test_a_network_that_does_not_fit_is_refused():
    """The ES's arguments: test_bad_arguments_are_one_clear_error_before_any_work."""
    params, x, _ = example()
    wide = [(W.astype(np.float64), b) for W, b in params]
    for function in (fpnl.forward, fpnl.activations):
        for bad in ((wide, x), (params, x.astype(np.float64)), (params, x.tolist())):
            with pytest.raises(TypeError, match="expected float32 .*, found"):
                function(*bad)
        for bad in ((params, x[:, :-1]), (params, x[0]), (params[::-1], x), ([(W, b[:-1]) for W, b in params], x)):
            with pytest.raises(ValueError, match=r"layer \d: expected W \[.*, n\], b \[n\], n > 0, found"):
                function(*bad)
        for ftz in ("no", "off", 2, 1, None, np.ones(2)):
            with pytest.raises(ValueError, match=r"ftz: expected one of \(True, False, 'hardware'\), found"):
                function(params, x, ftz)
        with pytest.raises(TypeError, match="scale: expected float32"):
            function(params, x, scale=2.0**125)
        with pytest.raises(TypeError, match="transfer's result: expected float32 .*, found float64"):
            function(params, x, transfer=lambda z: z.astype(np.float64))
        for scale in (0, 0.5, 3, np.inf, np.nan):
            with pytest.raises(ValueError, match="scale: expected a power of two"):
                function(params, x, scale=np.float32(scale))


def test_cross_entropy():
    logits = np.array([[2, 1, 0], [0, 1e4, 0], [-1e4, 1, 0]], np.float32)
    labels = np.array([0, 1, 2])
    p = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    found = fpnl.cross_entropy(logits, labels)
    assert found == pytest.approx([-np.log(p[0]), 0, np.log(1 + np.e)], rel=1e-6) and found.dtype == np.float32
    before = logits.copy()
    stacked = np.stack([logits, 2 * logits])  # leading axes share the labels
    assert_same_bits(fpnl.cross_entropy(stacked, labels)[1], fpnl.cross_entropy(2 * logits, labels))
    assert_same_bits(logits, before)


def test_smoothed_labels():
    """Cross-entropy against labels of which a share is spread over all classes."""
    logits, labels = RNG(0).normal(0, 3, (2, 7, 5)).astype(np.float32), RNG(1).integers(0, 5, 7)
    log_p = logits - np.log(np.exp(logits.astype(float)).sum(axis=-1, keepdims=True))
    for share in (0, 0.25, 1):
        targets = (1 - share) * np.eye(5)[labels] + share / 5
        found = fpnl.cross_entropy(logits, labels, smoothing=share)
        np.testing.assert_allclose(found, -(targets * log_p).sum(axis=-1), rtol=1e-5)
        assert found.dtype == np.float32
    for share in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="smoothing: expected a share from 0 to 1, found"):
            fpnl.cross_entropy(logits, labels, smoothing=share)


def test_labels_are_integers_a_row_and_in_range():
    """(n, 1) does not broadcast silently to a wrong number, floats do not end in an IndexError."""
    logits = RNG(0).standard_normal((4, 3), dtype=np.float32)
    for kind, found, labels in [
        (ValueError, r"labels: expected shape \(4,\), found shape \(4, 1\)", np.zeros((4, 1), int)),
        (ValueError, r"labels: expected shape \(4,\), found shape \(3,\)", np.zeros(3, int)),
        (TypeError, "labels: expected integers, found float64", np.zeros(4)),
        (TypeError, "labels: expected integers, found bool", np.zeros(4, bool)),
        (ValueError, r"labels: expected all in \[0, 3\), found \[0 1 2 3\]", np.arange(4)),
        (ValueError, r"labels: expected all in \[0, 3\), found \[-1  0  1  2\]", np.arange(4) - 1),
    ]:
        with pytest.raises(kind, match=found):
            fpnl.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"logits: expected \[..., n, classes\], n >= 1, found shape \(0, 3\)"):
        fpnl.cross_entropy(logits[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match=r"logits: expected \[..., n, classes\], n >= 1, found shape \(3,\)"):
        fpnl.cross_entropy(logits[0], 1)
    with pytest.raises(TypeError, match="logits: expected float32 .*, found float64"):
        fpnl.cross_entropy(logits.astype(np.float64), np.zeros(4, int))
    fpnl.cross_entropy(logits, [0, 1, 2, 2])


# --- The ES gradient --------------------------------------------------------------------------------


def accuracy(logits, labels):
    return np.mean(logits.argmax(axis=1) == labels)


def relu(z):
    return np.maximum(z, np.float32(0))


NETWORKS = [
    {},
    {"ftz": False},
    pytest.param({"ftz": "hardware"}, marks=needs_hardware),
    pytest.param({"scale": np.float32(2.0**127)}, marks=pytest.mark.slow),
    {"transfer": np.tanh},
]


def assert_close_params(found, expected):
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("sizes", [(6, 4), (12, 9, 5), (12, 10, 9, 5), (6, 8, 7, 9, 4)])
@pytest.mark.parametrize("block", [1, 3, 64, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 4))])
@pytest.mark.parametrize("control_variate", [False, True])
def test_fast_members_are_literally_mutated_networks(sizes, block, control_variate, network):
    """`es_gradient` against `es_gradient_plain`: a batch of 1, and of 7 in tasks of 3 or in one, with weights."""
    params, x, labels = example(sizes, n=7, seed=len(sizes))
    x *= network.get("scale", fpnl.SCALE) / fpnl.SCALE  # with the dead zone
    for n, sigma in ((1, 0.2), (7, 0.05)):
        arguments = {"sigma": sigma, "block": block, "control_variate": control_variate, **network}
        for task, weights in ((3, None), (128, np.linspace(0, 0.5, n, dtype=np.float32)[::-1])):
            plain = fpnl.es_gradient_plain(params, x[:n], labels[:n], RNG(5), weights=weights, **arguments)
            fast = fpnl.es_gradient(params, x[:n], labels[:n], RNG(5), weights=weights, task=task, **arguments)
            assert_close_params(fast, plain)
            assert all(dW.any() for dW, _ in fast) == (n > 1 or weights is None)


@pytest.mark.slow
def test_fast_members_of_the_real_network(mnist):
    """784-512-512-10, one image, 1,300 literally mutated networks. Where a sum is at the threshold but for its
    rounding, a unit lives in one of the two and not in the other: that may move the estimate of a few units."""
    params, x, labels = fpnl.init(RNG(0)), data.pixels(mnist[2][:1]), mnist[3][:1]
    for control_variate in (False, True):
        plain, fast = (
            function(params, x, labels, RNG(1), control_variate=control_variate)
            for function in (fpnl.es_gradient_plain, fpnl.es_gradient)
        )
        for (dW, _), (dW_fast, _) in zip(plain, fast):
            assert dW.any()
            same = np.all(np.abs(dW - dW_fast) <= 1e-4 * np.abs(dW).max(), axis=0)
            assert same.mean() > 0.95


@pytest.mark.parametrize("control_variate", [False, True])
def test_no_mutation_along_an_input_of_zero_has_an_effect(control_variate):
    """Where all outputs of a layer are 0, the slopes of the next are; also if sigma passes the threshold."""
    params, x, labels = example((12, 10, 9, 5), n=4)
    x[1] = 0  # and b1 = 0
    options = {"sigma": 3.0, "block": 2, "control_variate": control_variate}
    plain, fast = (f(params, x, labels, RNG(0), **options) for f in (fpnl.es_gradient_plain, fpnl.es_gradient))
    assert_close_params(fast, plain)
    outputs, slopes = fpnl.es_slopes(params, x, labels, fpnl.mutation_signs(RNG(0), params, 4), **options)
    assert not outputs[0][1].any() and not slopes[1][1].any() and slopes[0][1].any()
    assert slopes[1][0].any()


@needs_hardware
def test_the_fast_path_flushes_by_the_cpu_if_asked_to(monkeypatch):
    """The bits are the same either way, so only this tells."""
    entered, enter = [], fpnl.hardware_ftz.__enter__
    monkeypatch.setattr(fpnl.hardware_ftz, "__enter__", lambda self: entered.append(self.mode) or enter(self))
    params, x, labels = example(n=3)
    for ftz, used in (("hardware", True), (True, False), (False, False)):
        entered.clear()
        fpnl.es_gradient(params, x, labels, RNG(0), ftz=ftz)
        assert ((True, True) in entered) == used and (False, False) in entered


def test_another_transfer():
    """An ordinary network: its logits, its biases, and, with small mutations of one unit each, its derivative."""
    params, x, labels = example((12, 10, 9, 5))
    for _, b in params:
        b += np.linspace(-0.3, 0.3, len(b), dtype=np.float32)
    (W1, b1), (W2, b2), (W3, b3) = params
    h1 = np.tanh(x @ W1 + b1)
    h2 = np.tanh(h1 @ W2 + b2)
    logits = h2 @ W3 + b3
    for found, expected in zip(fpnl.activations(params, x, transfer=np.tanh), (h1, h2, logits), strict=True):
        assert_same_bits(found, expected)
    assert_same_bits(fpnl.forward(params, x, transfer=np.tanh), logits)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    delta = (p - np.eye(5)[labels]) / len(x)
    for (dW, db), (W, _), a in zip(
        fpnl.es_gradient(params, x, labels, RNG(0), 0.05, 1, transfer=np.tanh)[::-1], params[::-1], (h2, h1, x)
    ):
        np.testing.assert_allclose(dW, a.T @ delta, atol=1e-3)
        np.testing.assert_allclose(db, delta.sum(axis=0), atol=1e-3)
        delta = delta @ W.T * (1 - a**2)


class Falsy:
    """A transfer that an `if` would take for none."""

    def __call__(self, z):
        return np.tanh(z)

    def __len__(self):
        return 0


def test_a_transfer_is_one_whatever_its_truth():
    params, x, labels = example()
    for function in (fpnl.es_gradient, fpnl.es_gradient_plain):
        found, expected = (function(params, x, labels, RNG(0), transfer=t) for t in (Falsy(), np.tanh))
        assert_same_params(found, expected)


def test_signs_are_independent_fair_coins():
    params = [(None, range(width)) for width in (200, 91, 10)]
    signs = fpnl.mutation_signs(RNG(0), params, 1003)
    assert signs.shape == (1003, 301) and signs.dtype == np.int8 and set(np.unique(signs)) == {-1, 1}
    for pairs in (signs, signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1], signs[:, 8:] * signs[:, :-8]):
        assert abs(pairs.mean()) < 4 / np.sqrt(pairs.size)
    assert not np.array_equal(signs, fpnl.mutation_signs(RNG(1), params, 1003))


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_generators_state_decides_the_signs(n, kind):
    """Not its ancestry, and whatever the size of the batch: it advances, and one that was pickled goes on alike."""
    params, x, labels = example((12, 40, 9, 5), n)
    rng, same = (np.random.Generator(kind(3)) for _ in range(2))
    first, second = (fpnl.es_gradient(params, x, labels, rng) for _ in range(2))
    assert not np.array_equal(first[0][0], second[0][0])
    assert_same_params(fpnl.es_gradient(params, x, labels, same), first)
    assert_same_params(fpnl.es_gradient(params, x, labels, pickle.loads(pickle.dumps(same))), second)
    fpnl.mutation_signs(same, params, n)
    assert same.bit_generator.random_raw() == rng.bit_generator.random_raw()
    alone = fpnl.mutation_signs(np.random.Generator(kind(3)), params, n)
    np.testing.assert_array_equal(alone[:1], fpnl.mutation_signs(np.random.Generator(kind(3)), params, 1))


@pytest.mark.parametrize("ftz", [True, pytest.param("hardware", marks=needs_hardware)])
@pytest.mark.parametrize("exponent", [125, *(pytest.param(e, marks=pytest.mark.slow) for e in (127, 64))])
def test_the_dead_zone_is_the_scaling_of_the_network(ftz, exponent):
    """In units of 1/S, for all significands in the binades around the threshold and both signs."""
    scale = np.float32(2.0**exponent)
    t = fpnl._network([(np.ones((1, 1), np.float32), np.zeros(1, np.float32))], np.ones((1, 1), "f"), ftz, scale)[2][0]
    for x in (scaling(), -scaling(), grid()[0]):
        x = x[np.isfinite(x) & (np.abs(x) < 4)] * np.float32(2.0 ** (exponent - 125))
        expected = fpnl.divide(x, scale) * scale
        assert_same_bits(t(x.copy()), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_its_formula_whatever_the_memory_order(smoothing):
    """-sum_c y_c log softmax(o)_c; the logits stay as they are."""
    logits, labels = 5 * RNG(0).standard_normal((3, 2, 7, 10), np.float32), RNG(1).integers(0, 10, 7)
    o, y = logits.astype(float), np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    expected = np.log(np.exp(o).sum(axis=-1)) - (y * o).sum(axis=-1)
    found = fpnl.cross_entropy(logits, labels, smoothing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for order in itertools.permutations(range(4)):
        moved = np.ascontiguousarray(logits.transpose(order)).transpose(np.argsort(order))
        before = moved.copy()
        assert_same_bits(fpnl.cross_entropy(moved, labels, smoothing), found)
        assert_same_bits(moved, before)


def test_large_logits_do_not_overflow():
    params, x, labels = example()
    params[-1][0][:] *= 100
    assert np.abs(fpnl.forward(params, x)).max() > 100  # exp(100) is beyond float32
    for layer in fpnl.es_gradient(params, x, labels, RNG(0)):
        assert all(np.isfinite(a).all() for a in layer)


def test_later_biases_act_where_nothing_flushes():
    """Then they have gradients; with the flush, one that does not flush is refused."""
    params, x, labels = example((12, 10, 9, 5))
    params = [params[0]] + [(W, np.linspace(-1.5, 1.5, len(b), dtype=np.float32)) for W, b in params[1:]]
    for network in ({"ftz": False}, {"transfer": np.tanh}):
        plain, fast = (
            function(params, x, labels, RNG(6), block=4, **network)
            for function in (fpnl.es_gradient_plain, fpnl.es_gradient)
        )
        assert_close_params(fast, plain)
        assert all(db.any() for _, db in fast)
    functions = fpnl.es_gradient, fpnl.es_gradient_plain
    refused = functools.partial(pytest.raises, ValueError, match=r"later biases: expected \|b\| < S TINY")
    for function, ftz in itertools.product(functions, [True, *["hardware"] * HARDWARE]):
        with refused():
            function(params, x, labels, RNG(6), ftz=ftz)
    half = [params[0], *((W, np.full_like(b, 0.5)) for W, b in params[1:])]
    below = [params[0], *((W, np.full_like(b, 0.49999997)) for W, b in params[1:])]
    with refused():
        fpnl.es_gradient(half, x, labels, RNG(0))
    with refused():
        fpnl.es_gradient(below, x, labels, RNG(0), scale=np.float32(2.0**124))
    fpnl.es_gradient(below, x, labels, RNG(0))
    fpnl.es_gradient(half, x, labels, RNG(0), scale=np.float32(2.0**126))


@pytest.mark.parametrize("transfer", [None, relu, np.tanh], ids=["dead zone", "ReLU", "tanh"])
@pytest.mark.parametrize("control_variate", [False, True])
def test_what_the_slopes_estimate(control_variate, transfer, monkeypatch):
    """The code in float64, one image with each of the 2^8 patterns of signs of two layers: to 1e-12, the mean of a
    unit's slopes is (L(z_j + sigma |a|) - L(z_j - sigma |a|)) / (2 sigma |a|), averaged over the signs of its block's
    other units, all others at their base. That is written out here."""
    fpnl.cross_entropy(np.zeros((1, 2), np.float32), [0])  # looks at the CPU, once, in float32
    monkeypatch.setattr(fpnl, "float32", np.float64)
    params, x, labels = example((5, 4, 4, 4, 4), n=1, seed=8)
    params, x = [(W.astype(float), b + RNG(1).normal(0, 0.1, b.shape)) for W, b in params], x.astype(float)
    patterns = np.array(list(itertools.product((-1, 1), repeat=4)))
    signs = np.hstack([np.tile(patterns, (16, 1)), np.repeat(patterns, 16, axis=0), np.ones((256, 8), int)])
    options = {"sigma": 0.1, "block": 4, "control_variate": control_variate, "transfer": transfer}
    options["scale"] = np.float64(fpnl.SCALE)
    _, slopes = fpnl.es_slopes(params, x.repeat(256, axis=0), labels.repeat(256), signs, **options)

    def outputs(moved, shifts):
        """Inputs of each layer and the logits, where the sums of one layer are shifted."""
        a = [x[0]]
        for l, (W, b) in enumerate(params):
            z = a[-1] @ W + b * (l == 0 or transfer is not None) + (shifts if l == moved else 0)
            a.append(z * (np.abs(z) >= 0.5) if transfer is None else z if l == 3 else transfer(z))
        return a

    def loss(moved, shifts):
        logits = outputs(moved, shifts)[-1]
        return np.log(np.exp(logits).sum()) - logits[labels[0]]

    for l, a in enumerate(outputs(None, 0)[:-1]):
        shift = 0.1 * np.sqrt(a @ a + (l == 0 or transfer is not None))
        for j, unit in enumerate(np.eye(4)):
            others = patterns * (1 - unit) * (l < 2)  # in the last two layers, a block is a unit
            differences = [loss(l, shift * (e + unit)) - loss(l, shift * (e - unit)) for e in others]
            assert slopes[l][:, j].mean() == pytest.approx(np.mean(differences) / (2 * shift), rel=0, abs=1e-12)
        assert np.abs(slopes[l]).max() > 0.01 and (l >= 2 or slopes[l].std(axis=0).max() > 1e-3)


def test_the_control_variate_takes_the_noise_of_a_block_away():
    """The same signs with and without it, where the prediction is good, in a network without the flush."""
    params, x, labels = example((20, 32, 32, 5), n=1, seed=1)
    exact = fpnl.es_gradient(params, x, labels, RNG(0), block=1, ftz=False)[0][0]
    for seed in range(5):
        errors = [
            np.linalg.norm(fpnl.es_gradient(params, x, labels, RNG(seed), **options)[0][0] - exact)
            for options in ({"ftz": False}, {"ftz": False, "control_variate": True})
        ]
        assert errors[1] < errors[0] / 20


def backwards(function, tasks):
    return [function(task) for task in reversed(tasks)][::-1]


def test_whatever_maps_the_bits_are_the_same():
    """More than two tasks, by every kind of map; the generator advances here, not where a task goes."""
    params, x, labels = example(n=67)
    gradient = functools.partial(fpnl.es_gradient, params, x, labels, block=3, control_variate=True)
    rng = RNG(0)
    expected = gradient(rng), gradient(rng)
    with (
        concurrent.futures.ThreadPoolExecutor(3) as threads,
        concurrent.futures.ProcessPoolExecutor(2) as processes,
        multiprocessing.get_context("spawn").Pool(2) as pool,
    ):
        for its_map, workers in itertools.product((threads.map, processes.map, pool.map, pool.imap), (None, 2, 5)):
            rng = RNG(0)
            for grads in expected:
                assert_same_params(gradient(rng, map_tasks=its_map, workers=workers), grads)
    assert_same_params(gradient(RNG(0), map_tasks=backwards), expected[0])


@needs_hardware
def test_threads_of_a_pool_that_began_while_another_flushed():
    """They flush for life; what is mapped does not, a function of the user's own neither, and AdamW in them."""
    params, x, labels = example(n=67)
    gradient = functools.partial(fpnl.es_gradient, params, x, labels, control_variate=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with fpnl.hardware_ftz():
            barrier = threading.Barrier(2)
            assert [*pool.map(lambda _: barrier.wait(10) in (0, 1), range(2))] == [True, True]
        assert [*pool.map(lambda _: barrier.wait(10) in (0, 1) and flags(), range(2))] == [(True, True)] * 2
        assert_same_params(gradient(RNG(0), map_tasks=pool.map), gradient(RNG(0)))
        assert fpnl.mapped(flags, [{}, {}], map_tasks=pool.map) == [(False, False)] * 2
        state = [np.full(3, 2.0**e, np.float32) for e in (-120, -63, -130, -140)]
        expected = [a.copy() for a in state]
        fpnl.adamw(*expected, step=1, lr=1e-3)
        pool.submit(fpnl.adamw, *state, step=1, lr=1e-3).result()
        for a, b in zip(state, expected):
            assert_same_bits(a, b)


def test_work_is_cut_into_equal_tasks_and_a_list_for_each_worker():
    """The weights of the network travel once a list, no example twice, and whoever gets a list needs fpnl alone."""
    params, x, labels = example((12, 40, 9, 5), n=70)
    lists = []

    def its_map(function, these):
        lists.append(pickle.loads(pickle.dumps(these)))
        assert pickle.loads(pickle.dumps(function)).func.__module__ == "fpnl"
        return map(function, these)

    for workers, expected in ((None, [1] * 6), (1, [6]), (2, [3, 3]), (4, [1, 2, 1, 2]), (9, [1] * 6)):
        fpnl.es_gradient(params, x, labels, RNG(0), task=16, workers=workers, map_tasks=its_map)
        found = lists.pop()
        assert [len(tasks) for tasks in found] == expected
        tasks = list(itertools.chain(*found))
        assert [len(task["x"]) for task in tasks] == [12, 12, 12, 12, 11, 11]
        np.testing.assert_array_equal(np.concatenate([task["x"] for task in tasks]), x)
        weights = sum(a.nbytes for a in fpnl.leaves(params))
        assert sum(len(pickle.dumps(each)) for each in found) < x.nbytes + 70 * 100 + len(found) * (weights + 2000)


@pytest.mark.parametrize(("n", "task", "sizes"), [(3, 1, [1, 1, 1]), (1, 1, [1]), (5, 2, [2, 1, 1, 1]), (16, 32, [16])])
def test_no_task_is_empty(n, task, sizes):
    params, x, labels = example(n=n)
    found = []
    its_map = lambda f, lists: found.extend(lists) or map(f, lists)  # noqa: E731
    fpnl.es_gradient(params, x, labels, RNG(0), task=task, map_tasks=its_map)
    assert [len(one["x"]) for (one,) in found] == sizes


def test_an_error_of_a_worker_is_raised():
    def its_map(function, lists):
        raise ZeroDivisionError("of a worker")

    with pytest.raises(ZeroDivisionError, match="of a worker"):
        fpnl.es_gradient(*example(), RNG(0), map_tasks=its_map)


def elsewhere(tree, offset, order="C"):
    """The same arrays in another order, at an address that is so many bytes past a multiple of 64."""
    if not isinstance(tree, np.ndarray):
        return [elsewhere(a, offset, order) for a in tree]
    raw = np.zeros(tree.nbytes + 128, np.uint8)
    raw = raw[-raw.ctypes.data % 64 + offset :][: tree.nbytes]
    raw[:] = np.frombuffer(tree.tobytes(order), np.uint8)
    return np.ndarray(tree.shape, tree.dtype, raw, order=order)


@pytest.mark.parametrize(("offset", "order"), [(1, "C"), (4, "C"), (33, "C"), (0, "F"), (2, "F")])
@pytest.mark.parametrize("sizes", [(784, 512, 512, 10), (37, 33, 17, 5)])
def test_bits_depend_on_values_and_not_on_where_they_are(sizes, offset, order):
    """As a network's messages bring them: BLAS takes other kernels for arrays that NumPy has to copy."""
    params, x, labels = example(sizes, n=3)
    signs = fpnl.mutation_signs(RNG(1), params, 3)

    def found(params, x, signs):
        grads = fpnl.es_gradient(params, x, labels, RNG(1), control_variate=True, weights=x[:, 0])
        results = [*fpnl.es_slopes(params, x, labels, signs), fpnl.forward(params, x)]
        if sizes[0] < 100:
            results += [fpnl.es_gradient_plain(params, x, labels, RNG(1)), fpnl.activations(params, x)]
        return fpnl.leaves([grads, *results])

    moved = (elsewhere(a, offset, order) for a in (params, x, signs))
    for a, b in zip(found(*moved), found(params, x, signs), strict=True):
        assert_same_bits(a, b)


def test_the_losses_come_from_the_pass_that_is_made_anyway():
    params, x, labels = example((12, 10, 9, 5), n=9)
    for losses, network in ((fpnl.cross_entropy, {}), (margin, {"transfer": np.tanh})):
        how = {"losses": losses, "task": 4, **network}
        grads, found = fpnl.es_gradient(params, x, labels, RNG(0), return_losses=True, **how)
        assert found.dtype == np.float32 and found.shape == (9,)
        np.testing.assert_allclose(found, losses(fpnl.forward(params, x, **network), labels), rtol=1e-5, atol=1e-6)
        assert_same_params(grads, fpnl.es_gradient(params, x, labels, RNG(0), **how))


def test_weights_are_of_the_examples():
    """The gradient of sum_i w_i L_i: linear in w, and w = 1 / n if none are given."""
    params, x, labels = example((12, 10, 9, 5), n=5)
    whole = fpnl.es_gradient(params, x, labels, RNG(0))
    assert_same_params(fpnl.es_gradient(params, x, labels, RNG(0), weights=np.full(5, 0.2, np.float32)), whole)
    units = [fpnl.es_gradient(params, x, labels, RNG(0), weights=w) for w in np.eye(5, dtype=np.float32)]
    expected = [[sum(parts) / 5 for parts in zip(*layers)] for layers in zip(*units)]
    for found, other in zip(fpnl.leaves(whole), fpnl.leaves(expected)):
        np.testing.assert_allclose(found, other, atol=1e-6)


def test_gradient_from_slopes_is_the_chain_rule_of_what_is_measured():
    """Of a function that knows the derivative of a linear network, cut and mapped like ES; some biases act, or all."""
    params, x, labels = example((12, 10, 5), n=7)
    (W1, b1), (W2, b2) = params

    def slopes(params, x, labels, signs):
        h = x @ W1 + b1
        o = h @ W2 + b2
        return [h, o], [o @ W2.T, o]  # of |o|^2 / 2

    signs, weights = np.zeros((7, 0)), RNG(0).random(7, np.float32)
    lists = []
    how = {"task": 3, "workers": 2, "map_tasks": lambda f, these: lists.extend(these) or map(f, these)}
    first, _ = fpnl.gradient_from_slopes(slopes, params, x, labels, signs, weights, 1)
    grads, logits = fpnl.gradient_from_slopes(slopes, params, x, labels, signs, weights, 2, **how)
    assert first[0][1].any() and not first[1][1].any()
    h = x @ W1 + b1
    np.testing.assert_allclose(logits, h @ W2 + b2, atol=1e-5)
    delta = logits * weights[:, None]
    expected = [(x.T @ (delta @ W2.T), (delta @ W2.T).sum(axis=0)), (h.T @ delta, delta.sum(axis=0))]
    for a, b in zip(fpnl.leaves(grads), fpnl.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [len(task["labels"]) for tasks in lists for task in tasks] == [2, 2, 2, 1] and len(lists) == 2


def squared(outputs, targets):
    return np.square(outputs - targets).sum(axis=-1)


def margin(logits, labels):
    """Multi-class hinge loss, which overwrites its logits."""
    right = np.take_along_axis(logits, np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1)), axis=-1)
    logits -= right - np.float32(1)
    return np.maximum(logits, 0, out=logits).sum(axis=-1) - np.float32(1)


def test_other_losses():
    """Regression, whose labels are rows of targets, and a margin loss: fast against plain, and a known derivative."""
    params, x, labels = example((12, 10, 9, 5), n=7)
    targets = RNG(1).standard_normal((7, 5), dtype=np.float32)
    for losses, ys in ((squared, targets), (margin, labels)):
        options = {"losses": losses, "block": 3, "control_variate": True}
        plain, fast = (f(params, x, ys, RNG(2), **options) for f in (fpnl.es_gradient_plain, fpnl.es_gradient))
        assert_close_params(fast, plain)
        assert fast[0][0].any()
    ((dW, db),) = fpnl.es_gradient(params[:1], x, targets.repeat(2, axis=1), RNG(3), losses=squared, ftz=False)
    delta = 2 * (x @ params[0][0] - targets.repeat(2, axis=1)) / 7
    np.testing.assert_allclose(dW, x.T @ delta, atol=1e-3)
    np.testing.assert_allclose(db, delta.sum(axis=0), atol=1e-3)


def test_memory_stays_bounded():
    """1,000 classes and blocks of 1: the logits of all members at once would take 128 MB."""
    params, x, labels = example((20, 300, 1000), n=16)
    tracemalloc.start()
    fpnl.es_gradient(params, x, labels, RNG(0), block=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.parametrize("options", [{}, {"control_variate": True}], ids=str)
def test_gradient_of_a_linear_layer_is_the_analytic_one(options):
    """One layer without the flush: softmax regression, whose gradient is x^T (p - y) / n. Fixes sign and scale."""
    params, x, labels = example((20, 6), n=40)
    z = x.astype(np.float64) @ params[0][0]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    p[np.arange(40), labels] -= 1
    ((dW, db),) = fpnl.es_gradient(params, x, labels, RNG(0), sigma=0.01, ftz=False, **options)
    np.testing.assert_allclose(dW, x.T @ p / 40, atol=2e-4)
    np.testing.assert_allclose(db, p.mean(axis=0), atol=2e-4)


def test_descent_descends():
    params, x, labels = example((20, 16, 16, 4), n=64)
    before = fpnl.cross_entropy(fpnl.forward(params, x), labels).mean()
    for step in range(20):
        for layer, grads in zip(params, fpnl.es_gradient(params, x, labels, RNG(step), block=4)):
            for a, g in zip(layer, grads):
                a -= np.float32(0.1) * g
    assert fpnl.cross_entropy(fpnl.forward(params, x), labels).mean() < 0.9 * before


def test_bad_arguments_are_one_clear_error_before_any_work():
    """Of all three forms; the generator and the weights are what they were."""
    params, x, labels = example()
    before, calls = [[a.copy() for a in layer] for layer in params], []
    wide = [(W.astype(np.float64), b) for W, b in params]
    cases = [
        (TypeError, "rng: expected a numpy.random.Generator, found RandomState", {"rng": np.random.RandomState(0)}),
        (TypeError, "rng: expected a numpy.random.Generator, found 0", {"rng": 0}),
        (TypeError, "W1: expected float32 .*, found float64", {"params": wide}),
        (TypeError, "x: expected float32 .*, found float64", {"x": x.astype(np.float64)}),
        (ValueError, r"layer 1: expected W \[11, n\]", {"x": x[:, 1:]}),
        (ValueError, r"layer 1: expected W \[shape \(12,\), n\]", {"x": x[0]}),
        (ValueError, r"params: expected \[\(W, b\), ...\]", {"params": []}),
        (ValueError, "labels: expected 0 >= 1 rows", {"x": x[:0], "labels": labels[:0]}),
        (ValueError, "labels: expected 6 >= 1 rows", {"labels": labels[1:]}),
        (ValueError, r"labels: expected shape \(6,\), found shape \(6, 1\)", {"labels": labels[:, None]}),
        (TypeError, "labels: expected integers, found float32", {"labels": labels.astype(np.float32)}),
        (ValueError, r"labels: expected all in \[0, 5\), found \[", {"labels": labels + 5}),
        (ValueError, r"labels: expected all in \[0, 5\), found \[", {"labels": labels - 5}),
        *((ValueError, "sigma: expected finite, >= 2", {"sigma": v}) for v in (0, -1, 2.0**-127, np.inf, np.nan, "1")),
        *((ValueError, "block: expected an integer >= 1, found", {"block": v}) for v in (0, -1, 1.5, "8", None)),
        *((ValueError, "ftz: expected one of .True, False, 'hardware'.", {"ftz": v}) for v in ("off", 2, 1, 0.0, None)),
        *((TypeError, "scale: expected float32", {"scale": v}) for v in (2.0**125, 1, None)),
        *((ValueError, "scale: expected a power of two", {"scale": np.float32(v)}) for v in (0, 0.5, 3, np.inf, -2)),
        (TypeError, "transfer's result: expected float32 .*, found <U6", {"transfer": "tanh"}),
        (TypeError, "transfer's result: expected float32 .*, found float64", {"transfer": lambda z: z.astype(float)}),
        (TypeError, "transfer's result: expected float32", {"transfer": np.ones((1, 1), np.float32)}),
        (ValueError, "transfer: expected a result of its argument's shape", {"transfer": lambda z: z[0]}),
        (TypeError, "result of losses: expected float32", {"losses": lambda o, y: calls.append(1) or o.sum(-1, float)}),
        (ValueError, "losses: expected .* for logits", {"losses": lambda o, y: o}),
        (TypeError, "jitter", {"jitter": 0.1}),
        (TypeError, "weights: expected float32 .*, found float64", {"weights": np.ones(6)}),
        (
            ValueError,
            r"weights: expected 6 finite numbers >= 0, found \[1. 1. 1. 1. 1.\]",
            {"weights": np.ones(5, "f")},
        ),
        *(
            (ValueError, "weights: expected 6 finite numbers >= 0", {"weights": np.array([1, 1, 1, w, 1, 1], "f")})
            for w in (-1e-9, np.inf, np.nan)
        ),
        (ValueError, "layer 1: .*, n > 0, found", {"params": [(params[0][0][:, :0], params[0][1][:0])]}),
        *((ValueError, "control_variate: expected one of", {"control_variate": v}) for v in ("off", 2, 1, 0.0, None)),
    ]
    for kind, says, change in cases:
        rng = RNG(0)
        arguments = {"params": params, "x": x, "labels": labels, "rng": rng} | change
        for function in (fpnl.es_gradient, fpnl.es_gradient_plain):
            with pytest.raises(kind, match=says):
                function(**arguments)
        if not change.keys() & {"rng", "weights"}:
            assert rng.bit_generator.state == RNG(0).bit_generator.state
            signs = fpnl.mutation_signs(RNG(0), params, len(x))
            with pytest.raises(kind, match=says):
                fpnl.es_slopes(**{name: value for name, value in arguments.items() if name != "rng"}, signs=signs)
    assert len(calls) == 3  # one look at what it returns
    for change in ({"task": 0}, {"task": 1.5}, {"workers": 0}, {"workers": "2"}):
        rng = RNG(0)
        with pytest.raises(ValueError, match=f"{[*change][0]}: expected an integer >= 1, found"):
            fpnl.es_gradient(params, x, labels, rng, **change)
        assert rng.bit_generator.state == RNG(0).bit_generator.state
    with pytest.raises(ValueError, match=r"signs: expected shape \(6, 24\)"):
        fpnl.es_slopes(params, x, labels, fpnl.mutation_signs(RNG(0), params, 5))
    with pytest.raises(ValueError, match=r"signs: expected shape \(6, 24\) of -1 and \+1"):
        fpnl.es_slopes(params, x, labels, np.zeros((6, 24), np.int8))
    assert_same_params(params, before)


class Other:
    """An array of another library, which NumPy may read, or may not: `refuses` is what it raises then."""

    def __init__(self, array, refuses=None):
        self.array, self.refuses = array, refuses

    def __array__(self, dtype=None, copy=None):
        if self.refuses:
            raise self.refuses
        return np.array(self.array, dtype)

    def __len__(self):
        return len(self.array)


KINDS = {  # of the same values
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "subclass": lambda a: a.view(np.recarray),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "Fortran": np.asfortranarray,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "another library's": Other,
}


def calls(kind):
    """Every public function that takes arrays, each of them of that kind: name -> function."""
    params, x, labels = example(n=7)
    signs, weights = fpnl.mutation_signs(RNG(1), params, 7), np.linspace(0, 1, 7, dtype=np.float32)
    logits, zero = fpnl.forward(params, x), [np.zeros_like(a) for a in fpnl.leaves(params)]
    given = [(kind(W), kind(b)) for W, b in params], kind(x), kind(labels)
    found = {op: functools.partial(getattr(fpnl, op), kind(x), kind(x[0])) for op in OPS}
    found |= {"flush": lambda: fpnl.flush(kind(x * TINY)), "forward": lambda: fpnl.forward(*given[:2])}
    found |= {"activations": lambda: fpnl.activations(*given[:2], ftz=False)}
    found |= {"cross_entropy": lambda: fpnl.cross_entropy(kind(logits), kind(labels))}
    found |= {"es_slopes": lambda: fpnl.es_slopes(*given, kind(signs))}
    found |= {f.__name__: functools.partial(f, *given, RNG(2), weights=kind(weights)) for f in GRADIENTS}

    def gradient_from_slopes():
        rows = given[1], kind(labels), kind(signs), kind(weights)
        return fpnl.gradient_from_slopes(fpnl.es_slopes, given[0], *rows, 1, task=3)

    def adamw():
        """Of the gradient alone: what is changed is not converted."""
        p, m, v = ([a.copy() for a in zero] for _ in range(3))
        fpnl.adamw(p, [kind(a) for a in fpnl.leaves(params)], m, v, step=1, lr=1.0)
        return [p, m, v]

    return found | {"gradient_from_slopes": gradient_from_slopes, "adamw": adamw}


GRADIENTS = fpnl.es_gradient, fpnl.es_gradient_plain


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_a_check_is_what_is_computed_with(kind):
    """Nothing is lost by what is converted: the same bits, in arrays of NumPy's own."""
    for (name, function), expected in zip(calls(KINDS[kind]).items(), calls(np.asarray).values(), strict=True):
        for a, b in zip(fpnl.leaves(function()), fpnl.leaves(expected()), strict=True):
            assert type(a) in (np.ndarray, np.float32), name
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (lambda a: np.ma.array(a, mask=a > a.mean()), "expected an array without a mask, found a masked one"),
        (lambda a: np.ma.array(a), "expected an array without a mask, found a masked one"),
        (lambda a: Other(a, RuntimeError("on the GPU")), "expected an array, found Other: on the GPU"),
        (lambda a: Other(a, TypeError("use .get()")), "expected an array, found Other: use .get()"),
    ],
    ids=["masked", "no mask", "with a gradient", "of a GPU"],
)
def test_what_would_lose_something_is_refused_by_name(kind, says):
    for name, function in calls(kind).items():
        with pytest.raises(TypeError, match=r"^\w+: " + re.escape(says)):
            pytest.fail(f"{name}: {function()}")


def test_each_argument_is_looked_at():
    """One masked array among ordinary ones, and arrays of no dimension, before any work."""
    params, x, labels = example(n=7)
    signs, weights = fpnl.mutation_signs(RNG(1), params, 7), np.ones(7, np.float32)
    good = {"params": params, "x": x, "labels": labels, "signs": signs, "weights": weights, "rng": None}
    masked = {name: np.ma.array(a) for name, a in good.items() if isinstance(a, np.ndarray)}
    masked["params"] = [*params[:2], (params[2][0], np.ma.array(params[2][1]))]
    scalars = {name: np.array(a.ravel()[0]) for name, a in good.items() if isinstance(a, np.ndarray)}
    scalars["params"] = [(np.array(W[0, 0]), np.array(b[0])) for W, b in params]
    for function, names in (
        (fpnl.forward, ["params", "x"]),
        (fpnl.activations, ["params", "x"]),
        (fpnl.es_slopes, ["params", "x", "labels", "signs"]),
        (fpnl.es_gradient, ["params", "x", "labels", "rng", "weights"]),
        (fpnl.es_gradient_plain, ["params", "x", "labels", "rng", "weights"]),
    ):
        for name in set(names) - {"rng"}:
            for change, error, says in ((masked, TypeError, "masked"), (scalars, ValueError, "expected .*, found")):
                rng = RNG(0)
                with pytest.raises(error, match=says):
                    function(**{n: rng if n == "rng" else good[n] for n in names} | {name: change[name]})
                assert rng.bit_generator.state == RNG(0).bit_generator.state


@pytest.mark.parametrize("place", [0, 2, 3])
def test_adamw_changes_arrays_of_numpys_own_alone(place):
    """p, m and v: no copy, which would be changed in their stead. Subclasses and strides share their memory."""
    state, says = [np.full((2, 3), 0.5, np.float32) for _ in range(4)], "p, m, v: expected NumPy's own arrays"
    expected = [a.copy() for a in state]
    fpnl.adamw(*expected, step=1, lr=0.1)
    for kind in (KINDS["matrix"], KINDS["subclass"]):
        found = [a.copy() for a in state]
        found[place] = kind(found[place])
        fpnl.adamw(*found, step=1, lr=0.1)
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(np.asarray(a), b)
    for kind, error in (
        (Other, ValueError),
        (KINDS["other byte order"], ValueError),
        (KINDS["read-only"], ValueError),
        (np.ma.array, TypeError),
    ):
        given = [a.copy() for a in state]
        given[place] = kind(given[place])
        with pytest.raises(error, match=says if error is ValueError else "masked"):
            fpnl.adamw(*given, step=1, lr=0.1)
        for a, b in zip(given, state):
            assert_same_bits(np.asarray(getattr(a, "array", a), np.float32), b)


def test_the_float_below_the_threshold_lives_in_later_layers_alone():
    """0.49999997 / S is divided in IEEE arithmetic there, and is rounded to TINY: so `forward` and `es_gradient_plain`.
    In the first layer it flushes, and `es_slopes` has one dead zone for all."""
    below, one = np.float32(0.49999997), np.ones((1, 1), np.float32)
    zero = np.zeros(1, np.float32)
    for ftz in (True, *["hardware"] * HARDWARE):
        first, later = [(one * below, zero), (one, zero)], [(one, zero), (one * below, zero)]
        assert [h.item() for h in fpnl.activations(first, one, ftz)] == [0, 0]
        assert [h.item() for h in fpnl.activations(later, one, ftz)] == [1, 0.5]
        outputs, _ = fpnl.es_slopes(later, one, [0], np.ones((1, 2), np.int8), ftz=ftz)
        assert [h.item() for h in outputs] == [1, 0]
    assert [h.item() for h in fpnl.activations(later, one, ftz=False)] == [1, 0.5]  # rounded there, too


def test_adamw_is_the_published_algorithm():
    rng = RNG(9)
    p, m, v = rng.standard_normal(100, dtype=np.float32), np.zeros(100, np.float32), np.zeros(100, np.float32)
    p_, m_, v_ = (a.astype(np.float64) for a in (p, m, v))
    for step in range(1, 30):
        g, lr = rng.standard_normal(100, dtype=np.float32), 0.01 / step
        fpnl.adamw(p, g, m, v, step, lr, weight_decay=0.3)
        m_ = 0.9 * m_ + 0.1 * g
        v_ = 0.999 * v_ + 0.001 * g.astype(np.float64) ** 2
        p_ = p_ - lr * 0.3 * p_ - lr * (m_ / (1 - 0.9**step)) / (np.sqrt(v_ / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(p, p_, rtol=1e-4, atol=1e-6)
    assert p.dtype == np.float32


@pytest.mark.parametrize("shape", [(1,), (3, 5), (300, 200), (0, 4), ()])
def test_adamw_is_in_place_whatever_the_layout(shape):
    """In chunks, which a large array has several of; transposed, strided and misaligned as in C order."""
    rng = RNG(1)
    state = [np.asarray(rng.random(shape, np.float32)) for _ in range(4)]
    expected = [a.copy() for a in state]
    fpnl.adamw(*expected, step=3, lr=0.1, weight_decay=0.2)
    assert not state[0].size or not np.array_equal(state[0], expected[0])

    def strided(a):
        whole = np.zeros((*shape[:-1], 3 * shape[-1]) if shape else 3, np.float32)
        view = whole[..., ::3] if shape else whole[1:2].reshape(())
        view[...] = a
        return view

    layouts = np.array, functools.partial(np.array, order="F"), strided, functools.partial(elsewhere, offset=1)
    for place, layout in itertools.product((slice(4), slice(1), slice(1, 2), slice(2, 4)), layouts):
        moved = [a.copy() for a in state]
        moved[place] = map(layout, moved[place])
        fpnl.adamw(*moved, step=3, lr=0.1, weight_decay=0.2)
        for found, one in zip(moved, expected):
            assert_same_bits(np.array(found), np.array(one))


def test_adamw_takes_what_es_gradient_returns():
    """Lists, nested alike, are updated in place as their arrays are one by one; on an error nothing is."""
    params, x, labels = example()
    grads = fpnl.es_gradient(params, x, labels, RNG(0))
    trees = [[[np.array(a) for a in layer] for layer in tree] for tree in (params, grads)]
    trees += [[[np.zeros_like(a) for a in layer] for layer in params] for _ in range(2)]
    alone = [[[a.copy() for a in layer] for layer in tree] for tree in trees]
    for _ in range(2):
        fpnl.adamw(*trees, step=1, lr=0.1, weight_decay=0.5)
        for layers in zip(*alone):
            for arrays in zip(*layers):
                fpnl.adamw(*arrays, step=1, lr=0.1, weight_decay=0.5)
    for found, expected in zip(trees, alone):
        assert_same_params(found, expected)
    assert not np.array_equal(trees[0][0][0], params[0][0])
    p, g, m, v = trees
    wide, short = [p[0], p[1], [p[2][0].astype(np.float64), p[2][1]]], p[:2]
    fixed = [a.copy() for a in v[2]]
    fixed[1].flags.writeable = False
    for kind, says, arguments in [
        (ValueError, "step: expected an integer >= 1, found 0", (p, g, m, v, 0, 0.1)),
        (ValueError, "step: expected an integer >= 1, found 1.5", (p, g, m, v, 1.5, 0.1)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, -0.1)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, np.nan)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, 1e300)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, 0.1, np.inf)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, 0.1, 0, 1.0)),
        (ValueError, "lr, weight_decay", (p, g, m, v, 1, 0.1, 0, 0.9, 0.999, 0.0)),
        (TypeError, "p: expected float32 .*, found float64", (wide, g, m, v, 1, 0.1)),
        (TypeError, "g: expected float32 .*, found float64", (p, wide, m, v, 1, 0.1)),
        (ValueError, "p, g, m, v: expected the same shapes", (p, g, m, short, 1, 0.1)),
        (ValueError, "p, g, m, v: expected the same shapes", (p, g[::-1], m, v, 1, 0.1)),
        (ValueError, "p, m, v: expected .* writable", (p, g, m, [*v[:2], fixed], 1, 0.1)),
        (ValueError, "p, m, v: expected NumPy's own", (np.float32(1), *[np.ones((), np.float32)] * 3, 1, 0.1)),
    ]:
        with pytest.raises(kind, match=says):
            fpnl.adamw(*arguments)
        for found, expected in zip(trees, alone):
            assert_same_params(found, expected)


# --- What nothing depends on ---------------------------------------------------------------------------


@functools.cache
def material():
    """Arguments, made once: a CPU that flushes would make others."""
    params, x, labels = example((12, 10, 9, 5), n=5)
    small = np.concatenate([grid()[0][:200], x.ravel() * TINY])
    state = [np.full(3, 2.0**e, np.float32) for e in (-120, -63, -130, -140)]
    return params, x, labels, small, (x[:, :5] * TINY).copy(), state


def everything():
    """Every public function of numbers, on small arguments: the bits of all results."""
    params, x, labels, small, logits, state = material()
    found, state = [fpnl.flush(small)], [a.copy() for a in state]
    for op, daz, tininess in itertools.product(OPS, (True, False), ("after", "before")):
        found.append(getattr(fpnl, op)(small, small[::-1], daz, tininess))
    for network in [{"ftz": ftz} for ftz in (True, False, *["hardware"] * HARDWARE)] + [{"transfer": np.tanh}]:
        found += [fpnl.forward(params, x, **network), *fpnl.activations(params, x, **network)]
        gradients = [f(params, x, labels, RNG(1), **network) for f in (fpnl.es_gradient, fpnl.es_gradient_plain)]
        found += itertools.chain(*itertools.chain(*gradients))
        signs = fpnl.mutation_signs(RNG(2), params, len(x))
        found += itertools.chain(*fpnl.es_slopes(params, x, labels, signs, control_variate=True, **network))
    found.append(fpnl.cross_entropy(logits, labels))
    fpnl.adamw(*state, step=1, lr=1e-3, weight_decay=0.1)
    return [bits(a) for a in found + state]


@needs_hardware
@all_modes
def test_bits_depend_on_the_arguments_alone(ftz, daz):
    """Another library may have switched this thread's flags on: they are as they were afterwards."""
    expected = everything()
    with cpu_mode(ftz, daz):
        found, mode = everything(), flags()
    assert mode == (ftz, daz)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("setting", ["raise", "warn", "ignore"])
def test_numpys_error_settings_change_nothing(setting):
    """A test suite sets np.seterr(all="raise")."""
    expected = everything()
    with np.errstate(all=setting):
        before = np.geterr()
        found = everything()
        assert np.geterr() == before
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_names_what_is_public_and_shadows_no_builtin():
    mine = {n for n, v in vars(fpnl).items() if n[0] != "_" and getattr(v, "__module__", None) == "fpnl"}
    assert mine | {"TINY", "SCALE", "SIZES"} == set(fpnl.__all__) and len(set(fpnl.__all__)) == len(fpnl.__all__)
    assert not set(fpnl.__all__) & set(dir(builtins))
    assert all(getattr(fpnl, name).__doc__ for name in mine)


def test_nothing_happens_at_import_and_no_global_generator_is_touched():
    unwanted = {"train", "data", "scipy", "pytest"}
    code = f"import sys, fpnl; print({unwanted} & {{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    params, x, labels = example()
    fpnl.es_gradient(params, x, labels, RNG(0))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_fpnl_alone_in_a_folder(tmp_path):
    """It needs NumPy 2, and says so."""
    shutil.copy(ROOT / "fpnl.py", tmp_path)
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    code = "import numpy as np, fpnl; print(fpnl.__file__, fpnl.forward(fpnl.init(np.random.default_rng(0)), X).shape)"
    done = run([sys.executable, "-c", code.replace("X", "np.ones((2, 784), 'f')")], check=True)
    assert done.stdout.split()[0] == str(tmp_path / "fpnl.py") and done.stdout.endswith("(2, 10)\n")
    done = run([sys.executable, "-c", "import numpy; numpy.__version__ = '1.26.4'; import fpnl"])
    assert done.stderr.splitlines()[-1] == "ImportError: fpnl: expected NumPy 2 or later, found 1.26.4"


def test_the_readmes_example(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[1]
    exec(example, {})
    flushed, linear = map(float, capsys.readouterr().out.split())
    assert flushed > 0.9 and linear < 0.75


# --- The data ---------------------------------------------------------------------------------------

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def idx(array, code=0x08):
    array = np.asarray(array, {0x08: ">u1", 0x0D: ">f4", 0x0B: ">i2"}[code])
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_set(folder, train=60, test=20, shape=(4, 5), spelling="{}-idx{}-ubyte", end=""):
    """A small data set, and what `load` should make of it."""
    folder.mkdir(exist_ok=True)
    rng, arrays = RNG(1), []
    for part, n in (("train", train), ("t10k", test)):
        for kind, dims, a in (
            ("images", 3, rng.integers(0, 256, (n, *shape))),
            ("labels", 1, rng.permutation(np.arange(n) % 10)),
        ):
            content = gzip.compress(idx(a)) if end else idx(a)
            (folder / (f"{part}-" + spelling.format(kind, dims) + end)).write_bytes(content)
            arrays.append(a.reshape(n, -1) if dims == 3 else a)
    return arrays


def test_embedded_mnist_is_the_published_one(mnist):
    for name, digest in SHA256.items():
        content = gzip.decompress((data.MNIST / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == digest, name
    assert [a.shape for a in mnist] == [(60000, 784), (60000,), (10000, 784), (10000,)]
    assert {a.dtype for a in mnist} == {np.dtype("u1")}
    assert mnist[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    x = data.pixels(mnist[2][:100])
    assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1


@pytest.mark.parametrize("spelling", ["{}-idx{}-ubyte", "{}.idx{}-ubyte"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_load_takes_either_spelling_gzipped_or_plain(tmp_path, spelling, end):
    expected = write_set(tmp_path, spelling=spelling, end=end)
    for folder in (tmp_path, str(tmp_path)):
        for found, array in zip(data.load(folder), expected, strict=True):
            assert np.array_equal(found, array)


def test_load_takes_float_images(tmp_path):
    write_set(tmp_path)
    images = RNG(2).random((60, 4, 5), dtype=np.float32)
    for part, n in (("train", 60), ("t10k", 20)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:n], 0x0D))
    x = data.load(tmp_path)[0]
    assert_same_bits(data.pixels(x), images.reshape(60, 20))


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
GOOD = idx(np.arange(1200).reshape(60, 4, 5) % 256)
ZIPPED = gzip.compress(GOOD)
NAN = np.full((60, 4, 5), 0.5)
NAN[3, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (IMAGES, b"", "starts with 00000803 or 00000d03 .hex., found nothing"),
        (IMAGES, b"<!DOCTYPE html>", "starts with 00000803 .*, found 3c21444f"),
        (IMAGES, GOOD[:-1], "expected 1200 bytes for shape .60, 4, 5., found 1199"),
        (IMAGES, GOOD + b"\0", "expected 1200 bytes for shape .60, 4, 5., found 1201"),
        (IMAGES, GOOD[:10], "starts with"),
        (IMAGES, b"\1" + GOOD[1:], "starts with .*, found 01000803"),
        (IMAGES, idx(np.zeros((60, 4, 5)), 0x0B), "of unsigned bytes or float32, .* found 00000b03$"),  # sound, int16
        (IMAGES, idx(np.zeros(60)), "of 3 dimensions, .* found 00000801$"),
        (IMAGES, idx(np.zeros((60, 4, 6))), "t10k-images.*expected images of .4, 6. as in train-images.*found .4, 5."),
        (IMAGES, idx(np.zeros((0, 4, 5))), "expected images, found shape .0, 4, 5."),
        (IMAGES, idx(np.zeros((59, 4, 5))), "train-labels.*expected 59 labels.*found 60"),
        (IMAGES, ZIPPED[:-9], "expected a gzip file, found a damaged one"),
        (IMAGES, ZIPPED[:40] + b"\0" + ZIPPED[41:], "expected a gzip file, found a damaged one"),
        (IMAGES, idx(NAN, 0x0D), r"expected float pixels in \[0, 1\], found nan"),
        (IMAGES, idx(NAN[4:], 0x0D), "train-labels.*expected 56 labels"),
        (IMAGES, idx(np.full((60, 4, 5), 1.5), 0x0D), r"expected float pixels in \[0, 1\], found 1.5 to 1.5"),
        (LABELS, idx(np.arange(20)), "expected labels 0 to 9 .unsigned bytes., .* found 0 to 19 .uint8."),
        (LABELS, idx(np.zeros(19)), "expected 20 labels, one for each image of t10k-images-idx3-ubyte, found 19"),
        (LABELS, idx(np.zeros(20), 0x0D), "expected labels 0 to 9 .unsigned bytes., .* found 0.0 to 0.0 .float32."),
        ("train-labels-idx1-ubyte", idx(np.full(60, 3)), "of two classes at least to train on, found 3 to 3 .uint8."),
        (LABELS, GOOD, "starts with 00000801 .*, found 00000803"),
    ],
)
def test_load_names_the_file_what_was_expected_and_what_was_found(tmp_path, name, content, says):
    write_set(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        data.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [2, 26, 47, 62])
def test_the_number_of_classes_comes_from_the_labels(tmp_path, call, classes):
    """As of EMNIST; the command takes it over, and what it saves has it."""
    folder = tmp_path / "set"
    write_set(folder, train=300, test=100)
    for part, n in (("train", 300), ("t10k", 100)):
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % classes))
    options = "--hidden 8 --batch 50 --epochs 1 --workers 1 --save".split()
    assert f"20-8-{classes} network" in call("--data", folder, *options, tmp_path / "w.npz")[1]
    weights = saved(tmp_path / "w.npz")
    assert weights["W2"].shape == (8, classes) and json.loads(str(weights["settings"]))["sizes"] == [20, 8, classes]
    table = call("--data", folder, "--evaluate", tmp_path / "w.npz")[1].splitlines()
    assert len(table) == classes + 2 and sum(int(cell) for row in table[1:-1] for cell in row.split("\t")[1:-1]) == 100


def test_a_missing_file_or_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder with the four files of MNIST, found none"):
        data.load(tmp_path / "nowhere")
    write_set(tmp_path)
    (tmp_path / LABELS).unlink()
    says = "expected an IDX file, one of t10k-labels-idx1-ubyte, .*idx1-ubyte.gz, found t10k-images-idx3-ubyte, train-"
    with pytest.raises(FileNotFoundError, match=says):
        data.load(tmp_path)
    (tmp_path / "kaggle").mkdir()
    with pytest.raises(FileNotFoundError, match="expected an IDX file, one of train-images.*, found nothing"):
        data.load(tmp_path / "kaggle")
    for name in ("train.csv", "test.csv"):
        (tmp_path / "kaggle" / name).write_text("label,pixel0")
    with pytest.raises(FileNotFoundError, match="expected an IDX file, one of .*, found test.csv, train.csv$"):
        data.load(tmp_path / "kaggle")


# --- The command ------------------------------------------------------------------------------------

TRAIN = [sys.executable, "-u", "train.py"]


def run(*arguments, check=True, program=TRAIN, **how):
    how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | how
    done = subprocess.run([*map(str, [*program, *arguments])], **how)
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


def run_program(folder, code, *arguments, program=(sys.executable,), **how):
    """A program of one's own, mine.py, that imports what the project has."""
    (folder / "mine.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return run(*arguments, program=[*program, folder / "mine.py"], cwd=folder, env=environment, **how)


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process, which is quicker -> exit status, standard output, errors."""
    import train

    def called(*arguments):
        status = 0
        try:
            train.main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return called


def saved(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def result(done):
    line = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"result: train (\d\.\d{4}) (test|validation) (\d\.\d{4}) seconds (\d+)", line)
    assert found, line
    return float(found[1]), float(found[3])


def write_slice(mnist, folder, train, test):
    for part, x, y in (("train", mnist[0][:train], mnist[1][:train]), ("t10k", mnist[2][:test], mnist[3][:test])):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(x.reshape(-1, 28, 28)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y))
    return folder


@pytest.mark.slow
def test_the_command_learns_what_no_linear_model_does(slice_of_mnist, tmp_path):
    """Against softmax regression on the same images, stopped where its test accuracy is best."""
    options = "--epochs 20 --batch 256 --block 8 --reports 1 --save".split()
    done = run("--data", slice_of_mnist, *options, tmp_path / "w.npz")
    train, test = result(done)
    train_x, train_y, test_x, test_y = data.load(slice_of_mnist)
    x, held = data.pixels(train_x), data.pixels(test_x)
    W, b = np.zeros((784, 10), np.float32), np.zeros(10, np.float32)
    state = [np.zeros_like(a) for a in (W, W, b, b)]
    best_train = best_test = 0
    for step in range(1, 401):
        logits = x @ W + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(x)), train_y] -= 1
        fpnl.adamw(W, x.T @ p / np.float32(len(x)), *state[:2], step, 1e-2)
        fpnl.adamw(b, p.mean(axis=0), *state[2:], step, 1e-2)
        if step % 20 == 0:
            best_train = max(best_train, accuracy(x @ W + b, train_y))
            best_test = max(best_test, accuracy(held @ W + b, test_y))
    assert best_train > 0.9 and best_test > 0.87  # the linear model is a fair one
    assert train > best_train and test > best_test + 0.01
    weights = saved(tmp_path / "w.npz")
    assert {k: v.shape for k, v in weights.items() if k[0] in "Wb"} == {
        "W1": (784, 512), "b1": (512,), "W2": (512, 512), "b2": (512,), "W3": (512, 10), "b3": (10,),
    }  # fmt: skip
    params = [(weights[f"W{i}"], weights[f"b{i}"]) for i in (1, 2, 3)]
    assert accuracy(fpnl.forward(params, held), test_y) == pytest.approx(test, abs=5e-5)
    assert accuracy(fpnl.forward(params, held, ftz=False), test_y) < best_test  # it is the underflow
    assert not weights["b2"].any() and not weights["b3"].any() and weights["b1"].any()


# mpi4py and distributed, started as the README says. On one machine: three MPI processes, two dask workers.
MPIEXEC = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
MPI = [MPIEXEC, *"-n 3 -genv MPIR_CVAR_NOLOCAL 1".split(), sys.executable]
MPI += "-u -m mpi4py.futures train.py --engine mpi".split()
DASK = [*TRAIN, *"--engine dask --workers 2".split()]
install = "pip install {}, for this test".format
needs_mpi = pytest.mark.skipif(not (MPIEXEC and importlib.util.find_spec("mpi4py")), reason=install("mpi4py mpich"))
needs_dask = pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason=install("distributed"))
ENGINES = [pytest.param(e, marks=[n, pytest.mark.slow]) for e, n in ((MPI, needs_mpi), (DASK, needs_dask))]

SHORT = "--epochs 0.15 --batch 300 --seed 3 --importance 0.5 --flush emulated --reports 1".split()
ODD = [*SHORT, *"--hidden 33 17 11 --batch 301 --smoothing 0.1 --control-variate --importance 0".split()]
DROPOUT = [*SHORT, *"--hidden 65 33 --batch 301 --dropout 0.1".split()]
all_runs = pytest.mark.parametrize("settings", [SHORT, ODD, DROPOUT], ids=["512-512", "33-17-11", "dropout"])


def assert_same_weights(path, expected):
    weights = saved(path)
    assert weights.keys() == expected.keys() and len(weights) > 20
    for key in weights.keys() - {"settings", "step", "seconds"}:
        assert_same_bits(weights[key], expected[key])


@functools.cache
def reference(folder, options):
    """The weights after these options, by one worker."""
    with tempfile.TemporaryDirectory() as place:
        run("--data", folder, "--workers", 1, *options, "--save", f"{place}/w.npz")
        return saved(f"{place}/w.npz")


@pytest.fixture(scope="session")
def short_run(slice_of_mnist):
    return reference(slice_of_mnist, tuple(SHORT))


@all_runs
@pytest.mark.parametrize(
    ("program", "options"),
    [
        (TRAIN, "--workers 2"),
        *(pytest.param(TRAIN, f"--workers {n}", marks=pytest.mark.slow) for n in (3, 7)),
        pytest.param(TRAIN, "--workers 1 --flush hardware", marks=needs_hardware),
        *(pytest.param(*engine.values, "", marks=engine.marks) for engine in ENGINES),
    ],
)
def test_same_seed_same_weights_whoever_computes_them(slice_of_mnist, tmp_path, settings, program, options):
    """At the size of the main job and at odd ones, whose tasks, pieces, masks and blocks do not come out even."""
    done = run("--data", slice_of_mnist, *settings, *options.split(), "--save", tmp_path / "w.npz", program=program)
    assert program is TRAIN or "2 workers" in done.stdout
    assert_same_weights(tmp_path / "w.npz", reference(slice_of_mnist, tuple(settings)))


@all_runs
def test_same_seed_same_weights_after_kill_9(slice_of_mnist, tmp_path, settings):
    code = """
import os, signal, sys, data, train

def save_weights(*args, step, save=data.save_weights, **others):
    save(*args, step=step, **others)
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)

data.save_weights = save_weights
train.main(sys.argv[1:])
"""
    path, options = tmp_path / "w.npz", ["--data", slice_of_mnist, *settings, "--reports", 5, "--save"]
    assert run_program(tmp_path, code, *options, path, check=False).returncode == -signal.SIGKILL
    assert int(saved(path)["step"]) == 2
    run("--data", slice_of_mnist, "--resume", path, "--save", path)
    assert_same_weights(path, reference(slice_of_mnist, tuple(settings)))


@pytest.mark.slow
def test_two_trainings_in_two_threads_do_not_meet(slice_of_mnist, short_run, tmp_path):
    """The same settings, and others, at the same time; the last gives BLAS its threads back."""
    common = ["--data", str(slice_of_mnist), *SHORT, "--quiet"]
    code = f"""
import concurrent.futures, numpy, train

def trained(seed, name, workers):
    args = train.parse_args({common!r} + ["--seed", seed, "--save", name, "--workers", workers])
    train.train(args, train.begin(args))

get, limit = train.blas()
limit(3)
with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(trained, "343", "abc", "221"))
print(get())
"""
    assert run_program(tmp_path, code).stdout.splitlines()[-1] == "3"
    other = reference(slice_of_mnist, (*SHORT, "--seed", 4))
    for name, expected in (("a", short_run), ("b", other), ("c", short_run)):
        assert_same_weights(tmp_path / name, expected)


def test_the_error_of_a_worker_is_told(slice_of_mnist, tmp_path):
    code = """
import functools, sys, fpnl, train

def losses(logits, labels):
    if logits.ndim == 4:
        raise ValueError("of a worker")
    return fpnl.cross_entropy(logits, labels)

def method(s, net):
    return functools.partial(fpnl.es_gradient, losses=losses, **net)

try:
    args = train.parse_args(sys.argv[1:])
    train.train(args, train.begin(args, method))
except ValueError as error:
    sys.exit(str(error))
"""
    done = run_program(tmp_path, code, "--data", slice_of_mnist, *SHORT, "--workers", "3", check=False)
    assert (done.returncode, done.stderr) == (1, "of a worker\n")


REACH = "--sigma 0.03,--importance 0.6,--dropout 0.2,--smoothing 0.1,--seed 4,--block 9,--lr 2e-3,--flush off".split(
    ","
)


@pytest.mark.parametrize("options", ["--control-variate", *REACH])
def test_options_reach_the_run(slice_of_mnist, tmp_path, call, options):
    one_step = (*SHORT, "--epochs", 0.03)
    assert call("--data", slice_of_mnist, *one_step, *options.split(), "--save", tmp_path / "w.npz")[0] == 0
    assert not np.array_equal(saved(tmp_path / "w.npz")["W1"], reference(slice_of_mnist, one_step)["W1"])


@pytest.fixture
def tiny_run(slice_of_mnist):
    """A run that has not begun, of a network whose probabilities are large and small; its weights stay as they are."""
    import train

    options = f"--data {slice_of_mnist} --hidden 24 16 --batch 200 --importance 0.3 --epochs 3"
    run = train.begin(train.parse_args(options.split()))
    for W, _ in run.params:
        W *= np.float32(2)
    run.update = lambda *_: None
    return run


def test_an_image_is_measured_with_a_probability_and_counts_the_more(tiny_run):
    """min(1, max(.05, N (1 - p))), here in float64; its weight is 1 / (q batch), and none is measured twice."""
    import train

    images, labels, *_ = tiny_run.sets
    p = np.exp(fpnl.forward(tiny_run.params, data.pixels(images)).astype(float))
    losses = -np.log(p[np.arange(len(labels)), labels] / p.sum(axis=1))
    q, given = np.clip(0.3 * (1 - np.exp(-losses)), 0.05, 1), []
    assert np.mean(q == 0.05) > 0.03 and np.mean(q > 0.25) > 0.3

    def gradient(params, x, y, rng, weights, return_losses):
        given.append((x, y, weights))
        return [[np.zeros_like(a) for a in layer] for layer in params], np.zeros(len(y))

    tiny_run.gradient, counts = gradient, np.zeros(len(labels))
    rows = {row.tobytes(): i for i, row in enumerate(data.pixels(images))}
    for step, loss in enumerate(train.steps(tiny_run)):
        epoch, place = divmod(step, 50)
        batch = RNG((0, train.ORDER, epoch)).permutation(len(labels))[200 * place :][:200]
        assert loss == pytest.approx(losses[batch].mean(), rel=1e-4)
        x, y, weights = given.pop()
        drawn = np.array([rows[row.tobytes()] for row in x])
        assert len({*drawn}) == len(drawn) and {*drawn} <= {*batch} and weights.dtype == np.float32
        np.testing.assert_array_equal(y, labels[drawn])
        np.testing.assert_allclose(weights, 1 / (200 * q[drawn]), rtol=1e-4)
        counts[drawn] += step < 150
    assert (step, tiny_run.step) == (150, 150)
    assert abs(counts.sum() - 3 * q.sum()) < 5 * np.sqrt(3 * np.sum(q * (1 - q)))
    often = q > np.median(q)
    assert counts[often].sum() / counts.sum() == pytest.approx(q[often].sum() / q.sum(), abs=0.03)


def test_without_importance_all_images_are_measured_and_es_tells_the_loss(tiny_run):
    import train

    tiny_run.settings.importance, tiny_run.outputs, es = 0.0, None, tiny_run.gradient
    weights = []
    tiny_run.gradient = lambda *rows, **how: weights.append(how["weights"]) or es(*rows, **how)
    batch = RNG((0, train.ORDER, 0)).permutation(10000)[:200]
    logits = fpnl.forward(tiny_run.params, data.pixels(tiny_run.sets[0][batch]))
    assert next(train.steps(tiny_run)) == pytest.approx(
        fpnl.cross_entropy(logits, tiny_run.sets[1][batch]).mean(), rel=1e-5
    )
    np.testing.assert_allclose(weights.pop(), np.full(200, 1 / 200), rtol=1e-6)


def test_a_step_in_which_nothing_is_drawn_is_a_step_of_adamw(tiny_run):
    """With a gradient of zeros: to skip it would be a bias."""
    import train

    tiny_run.settings.importance, tiny_run.settings.least, updates = 1e-9, 0.0, []
    tiny_run.gradient = None
    tiny_run.update = lambda params, grads, *how: updates.append((fpnl.leaves(grads), how))
    steps = train.steps(tiny_run)
    for _ in range(3):
        assert next(steps) > 0
    assert len(updates) == 2 and [how[2] for _, how in updates] == [1, 2]
    for grads, (m, v, _, lr, decay) in updates:
        assert [a.shape for a in grads] == [a.shape for a in fpnl.leaves(tiny_run.params)]
        assert not any(map(np.any, grads))
        assert (m, v, decay) == (tiny_run.m, tiny_run.v, 1.0) and 0 < lr <= 1e-3


def test_the_loss_of_the_weights_is_told_before_they_change(tiny_run):
    """Who stops there has the weights whose loss it was, and can go on as if there had been no stop."""
    import train

    tiny_run.update, before = fpnl.adamw, [a.copy() for a in fpnl.leaves(tiny_run.params)]
    loss, steps = next(train.steps(tiny_run)), train.steps(tiny_run)
    assert next(steps) == loss and tiny_run.step == 0
    assert_same_params([before], [fpnl.leaves(tiny_run.params)])
    assert next(steps) != loss and tiny_run.step == 1
    assert not np.array_equal(before[0], tiny_run.params[0][0])


@pytest.mark.parametrize(("share", "left"), [(0.3, (17, 11)), (0.99, (1, 1))])
@pytest.mark.parametrize(("n", "networks"), [(200, 4), (2, 2)])
def test_dropout_is_of_networks_without_some_units(tiny_run, share, left, n, networks):
    """One for every 64 images of the batch, with as many units as the share comes nearest to, but one at least."""
    import train

    tiny_run.settings.dropout, given = share, []

    def itself(params, x, labels, rng, weights, return_losses):
        given.append((params, x, rng.random()))
        return params, weights * labels

    x, labels, weights = data.pixels(tiny_run.sets[0][:n]), tiny_run.sets[1][:n], RNG(0).random(n, np.float32)
    thinned = train.thinned(itself, tiny_run.settings)
    grads, losses = thinned(tiny_run.params, x, labels, RNG(0), weights=weights, return_losses=True)
    shapes = [(784, left[0]), left, (left[1], 10)]
    assert [[W.shape for W, _ in params] for params, *_ in given] == [shapes] * networks
    assert_same_bits(np.concatenate([rows for _, rows, _ in given]), x)
    assert_same_bits(losses, weights * labels)
    assert len({draw for *_, draw in given}) == networks  # each has signs of its own
    for (W, _), (dW, _), shape, gain in zip(tiny_run.params, grads, shapes, (1, 24 / left[0], 16 / left[1])):
        found = dW / (W * np.float32(gain**2))  # in how many of the networks a weight is, by the chain rule
        np.testing.assert_allclose(found, found.round(), atol=1e-4)
        assert found.round().sum() == networks * np.prod(shape)


def test_report_and_validation(slice_of_mnist, tmp_path):
    done = run("--data", slice_of_mnist, "--validation", 7000, "--epochs", 0.2, "--batch", 100, "--reports", 3)
    title, header, *rows, last = done.stdout.splitlines()
    assert "784-512-512-10" in title and "669,706 weights" in title and "3,000 images" in title
    assert header.split() == ["epoch", "seconds", "loss", "train", "validation", "live", "units", "left"]
    assert [row.split()[0] for row in rows] == ["0.00", "0.07", "0.13", "0.20"]
    for row in rows:
        assert re.fullmatch(
            r" *\d+\.\d\d +\d+\.\d +\d+\.\d{4}  0\.\d{4} +0\.\d{4}   0\.\d\d 0\.\d\d 0\.\d\d +(\d+ s|\?)", row
        )
    assert last.startswith("result: train ") and " validation " in last and result(done)


@pytest.mark.slow
def test_until_test_stops_at_the_first_report_over_the_mark(slice_of_mnist, tmp_path):
    options = "--hidden 24 24 --batch 100 --epochs 2 --reports 5 --workers 1".split()
    command = ["--data", slice_of_mnist, *options, "--log", tmp_path / "w.csv"]
    run(*command)
    scores = [row.split(",")[4] for row in (tmp_path / "w.csv").read_text("utf-8").splitlines()[3:]]
    mark = scores[3]
    first = scores.index(next(score for score in scores if float(score) >= float(mark)))
    done = run(*command, "--until-test", mark, "--quiet")
    rows = (tmp_path / "w.csv").read_text("utf-8").splitlines()[3:]
    assert [row.split(",")[4] for row in rows] == scores[: first + 1] and first > 0
    assert result(done)[1] == pytest.approx(float(scores[first]), abs=5e-5)
    done = run(*command, "--epochs", 1.5, "--reports", 1, "--until-test", 1, check=False)
    assert len((tmp_path / "w.csv").read_text("utf-8").splitlines()) == 3 + 4  # twice an epoch, and to the end
    assert done.returncode == 1 and re.fullmatch(r"train.py: the accuracy ended at 0\.\d{4}, below 1\.0\n", done.stderr)


def test_a_preset_is_a_set_of_defaults(small, tmp_path, call):
    import train

    chosen = train.PRESETS["best"]
    args = vars(train.parse_args(["--preset", "best"]))
    assert {name: args[name] for name in chosen} == chosen
    default = vars(train.parse_args([]))
    assert any(default[name] != value for name, value in chosen.items()) and chosen.keys() <= train.OPTIONS.keys()
    args = vars(train.parse_args(["--preset", "best", "--epochs", "0.5"]))
    assert args["epochs"] == 0.5 and all(args[name] == chosen[name] for name in chosen if name != "epochs")
    call(*small, "--epochs", 0.1, "--save", tmp_path / "w.npz")
    status, _, errors = call("--resume", tmp_path / "w.npz", *small[:2], "--preset", "best")
    assert (
        status == 2 and errors.startswith("train.py: error: --epochs: expected 0.1 as in ") and errors.count("\n") == 1
    )


def test_no_epochs_evaluates_the_untrained_network(slice_of_mnist, tmp_path):
    done = run("--data", slice_of_mnist, "--epochs", 0, "--save", tmp_path / "w.npz", "--seed", 7)
    params = fpnl.init(np.random.default_rng((7, 0)))
    assert_same_bits(saved(tmp_path / "w.npz")["W2"], params[1][0])
    train_x, train_y, test_x, test_y = data.load(slice_of_mnist)
    expected = [accuracy(fpnl.forward(params, data.pixels(x)), y) for x, y in ((train_x, train_y), (test_x, test_y))]
    assert result(done) == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sigma", 0], "argument --sigma: expected a number from 1e-09 to 1e+09, found 0"),
        (["--sigma", "nan"], "argument --sigma: expected a number from 1e-09 to 1e+09, found nan"),
        (["--sigma", "big"], "argument --sigma: invalid float value: 'big'"),
        (["--block", 0], "argument --block: expected a number from 1 to 1e+06, found 0"),
        (["--batch", 0], "argument --batch: expected a number from 1 to 1e+06, found 0"),
        (["--batch", 60001], "--batch: expected at most the 60000 training images, found 60001"),
        (["--validation", 60000], "validation: expected all 10 classes before the last 60000, found 0"),
        (["--jitter", 0.1], "unrecognized arguments: --jitter 0.1"),
        (["--epochs", -1], "argument --epochs: expected a number from 0 to 1e+06, found -1"),
        (["--epochs", "inf"], "argument --epochs: expected a number from 0 to 1e+06, found inf"),
        (["--lr", "-0.1"], "argument --lr: expected a number from 0 to 1e+38, found -0.1"),
        (["--weight-decay", "x"], "argument --weight-decay: invalid float value: 'x'"),
        (["--workers", 0], "argument --workers: expected a number from 1 to 1e+06, found 0"),
        (["--log", "/"], "/: expected a file in a folder to write to, found none"),
        (["--seed", -1], "argument --seed: expected a number from 0 to 4.29497e+09, found -1"),
        (["--flush", "maybe"], "argument --flush: invalid choice: 'maybe'"),
        (["--data", "/nowhere"], "/nowhere: expected a folder with the four files of MNIST, found none"),
        (["--save", "/nowhere/w.npz"], "/nowhere/w.npz: expected a regular file in a folder to write to, found none"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--epochs", "1e308"], "argument --epochs: expected a number from 0 to 1e+06, found 1e308"),
        (["--reports", 10**9], "argument --reports: expected a number from 1 to 1e+06, found 1000000000"),
        (["--hidden", 10**19, 24], "argument --hidden: expected a number from 1 to 1e+06, found 10000000000000000000"),
        (["--sigma", "1e300"], "argument --sigma: expected a number from 1e-09 to 1e+09, found 1e300"),
        (["--log", "W", "--save", "W"], "expected another file to --log than to --save and --resume, found W"),
        (["--log", "../W", "--save", f"{ROOT.parent}/W"], "expected another file to --log than to --save"),
        (["--until-test", 96.7], "argument --until-test: expected a number from 0 to 1, found 96.7"),
        (["--engine", "mpi", "--workers", 2], "expected no --workers beside workers that are there, found 2"),
        (["--scheduler", "tcp://127.0.0.1:9"], "expected --engine dask beside --scheduler, and --evaluate beside"),
        ("--engine dask --scheduler a --workers 2".split(), "expected no --workers beside workers that are there"),
        (["--engine", "processes"], "argument --engine: invalid choice: 'processes'"),
        (["--save", "n" * 300], f"{os.strerror(errno.ENAMETOOLONG)}: '{'n' * 300}'"),
        (["--log", "n" * 300], f"{os.strerror(errno.ENAMETOOLONG)}: '{'n' * 300}'"),
        (["--save", ""], ".: expected a regular file in a folder to write to, found none"),
        (["--lr", "1e300"], "argument --lr: expected a number from 0 to 1e+38, found 1e300"),
        (["--data", "NAN"], r"train-images-idx3-ubyte: expected float pixels in [0, 1], found nan to nan"),
    ],
)
def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path, call, arguments, says):
    if arguments == ["--data", "NAN"]:
        write_set(tmp_path / "nan")
        (tmp_path / "nan" / IMAGES).write_bytes(idx(NAN, 0x0D))
        arguments = ["--data", tmp_path / "nan"]
    before = sorted(tmp_path.rglob("*"))
    status, out, errors = call("--save", tmp_path / "w.npz", *arguments)
    assert (status, out) == (2, "") and says in errors
    assert errors.startswith("train.py: error: ") and errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_log_repeats_the_rows(slice_of_mnist, tmp_path, call):
    _, out, _ = call("--data", slice_of_mnist, *SHORT, "--reports", 2, "--log", tmp_path / "log.csv")
    settings, comment, header, *rows = (tmp_path / "log.csv").read_text("utf-8").splitlines()
    settings = json.loads(settings.removeprefix("# "))
    assert comment.startswith("# Python ") and "NumPy" in comment
    assert (settings["sizes"], settings["method"], settings["seed"]) == ([784, 512, 512, 10], "es", 3)
    assert header == "epoch,seconds,loss,train,test,live1,live2,live3"
    printed = [line.split() for line in out.splitlines()[2:-1]]
    assert len(rows) == len(printed) == 3
    for row, line in zip(rows, printed):
        assert [float(v) for v in row.split(",")] == pytest.approx([float(v) for v in line[:8]], abs=0.051)


def test_the_workers_are_the_cores_that_it_may_use(tmp_path, monkeypatch):
    """By taskset and by the quota of a container, in either version of cgroups and of any parent."""
    nothing = tmp_path / "none"
    count = data.cores(nothing, nothing)
    if hasattr(os, "sched_setaffinity"):
        assert count == len(os.sched_getaffinity(0))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def cores(own, **files):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for name, text in files.items():
            path = folder / name.replace("__", ".").replace("_in_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "own").write_text(own)
        return data.cores(folder, folder / "own")

    assert cores("0::/\n", cpu__max="max 100000\n") == 8
    assert cores("0::/\n", cpu__max="200000 100000\n") == 2
    assert cores("0::/\n", cpu__max="150000 100000\n") == 2
    assert cores("0::/\n", cpu__max="1000 100000\n") == 1
    assert cores("0::/a/b\n", a_in_cpu__max="300000 100000\n", a_in_b_in_cpu__max="max 100000\n") == 3
    assert cores("0::/gone\n", cpu__max="300000 100000\n") == 3  # a container sees its own group as the top
    ours = {"cpu_in_cpu.cfs_quota_us": "250000\n", "cpu_in_cpu.cfs_period_us": "100000\n"}
    assert cores("4:cpu,cpuacct:/docker/1\n2:memory:/\n", **ours) == 3
    assert cores("4:cpu,cpuacct:/docker/1\n", **ours | {"cpu_in_cpu.cfs_quota_us": "-1\n"}) == 8
    deeper = {name.replace("cpu_in_", "cpu_in_docker_in_1_in_", 1): text for name, text in ours.items()}
    assert cores("4:cpu,cpuacct:/docker/1\n", **deeper) == 3


def test_blas_has_one_thread_in_a_run_and_as_many_as_before_after_it(slice_of_mnist, short_run, tmp_path):
    """Other numbers of threads give other bits, silently, so the library is asked: the variable proves nothing."""
    code = """
import importlib, os, runpy, sys
import numpy, train

get, limit = train.blas()
limit(3)
options = sys.argv[1:]
train.main([*options, "import"])
os.environ["OPENBLAS_NUM_THREADS"] = "1"
train.main([*options, "too late"])
importlib.reload(train).main([*options, "reload"])
sys.argv = ["train.py", *options, "run_path"]
runpy.run_path(train.__file__, run_name="__main__")
print(get())
"""
    done = run_program(tmp_path, code, "--data", slice_of_mnist, *SHORT, "--quiet", "--save")
    assert done.stdout.splitlines()[-1] == "3"
    for name in ("import", "too late", "reload", "run_path"):
        assert_same_weights(tmp_path / name, short_run)


NOBODY = type("ctypes", (), {"CDLL": lambda name: None})  # with what is to be asked


@pytest.mark.parametrize("first", [True, False])
def test_where_nobody_knows_blas_numpy_must_not_be_first(small, tmp_path, monkeypatch, call, first):
    """One line says what to do, and nothing is run; a command that came before NumPy has nothing to ask."""
    import train

    monkeypatch.setattr(train, "ctypes", NOBODY)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(train, "NUMPY_WAS_FIRST", first)
    status, out, errors = call(*small, "--epochs", 0, "--save", tmp_path / "w.npz")
    says = "expected threadpoolctl, or train.py imported before NumPy: more BLAS threads, other bits"
    assert (status, errors) == ((2, f"train.py: error: {says}\n") if first else (0, ""))
    assert (tmp_path / "w.npz").exists() == ("result: " in out) != first


def test_another_blas_is_asked_by_threadpoolctl(monkeypatch):
    pytest.importorskip("threadpoolctl")
    import train

    get, _ = train.blas()
    before = get()
    monkeypatch.setattr(train, "ctypes", NOBODY)
    its_get, its_limit = train.blas()
    for n in (2, 1, before):
        its_limit(n)
        assert its_get() == get() == n


def test_a_worker_with_other_bits_is_named_once(capsys):
    """In the results of the first call of the map, and by one bit."""
    import train

    params, x, labels = example(n=9)

    def others(work, lists):
        found = [*map(work, lists)]
        found[1][1][0][1][0].view(np.uint32)[0, 0] ^= 1  # of the slopes of its first task
        return found

    for its_map, says in ((map, 0), (others, 1)):
        its_map = train.compared(its_map)
        for _ in range(2):
            fpnl.es_gradient(params, x, labels, RNG(0), task=2, workers=3, map_tasks=its_map)
        errors = capsys.readouterr().err
        assert errors.count("computes other bits than this process") == errors.count("\n") == says
        assert not says or f"worker {platform.node()} computes" in errors


@pytest.mark.parametrize("lr", [0.3, 1, 1e9, 1e38])
@pytest.mark.parametrize("importance", [2, 0])
def test_a_run_that_falls_apart_says_so_and_keeps_the_last_good_state(small, tmp_path, lr, importance):
    """Of saves at every step; what NumPy would warn of does not stand before the error."""
    options = ["--lr", lr, "--importance", importance, "--reports", 600, "--save", tmp_path / "w.npz"]
    done = run(*small, *options, check=False)
    says = r"train.py: error: diverged: the loss is ([\d.]+(?:e\+\d+)?|inf|nan) after (\d+) steps: try a smaller --lr\n"
    assert done.returncode == 2 and (found := re.fullmatch(says, done.stderr)), done.stderr
    params, others = data.load_weights(tmp_path / "w.npz")
    x, labels, *_ = data.load(small[1])
    assert others["step"] == int(found[2]) - 1 == (lr == 0.3)
    assert fpnl.cross_entropy(fpnl.forward(params, data.pixels(x)), labels).mean() < 10 * np.log(10)


def test_the_network_of_a_run_has_a_name_in_its_file(small, tmp_path, call):
    """Weights of another are not taken for those of fpnl's."""
    import train

    path = tmp_path / "w.npz"
    args = train.parse_args([*map(str, small), "--epochs", "1", "--save", str(path)])
    train.train(args, train.begin(args, transfer=np.tanh))
    args = train.parse_args(["--data", str(small[1]), "--resume", str(path)])
    train.train(args, train.begin(args, transfer=np.tanh))
    status, _, errors = call("--data", small[1], "--resume", path)
    assert status == 2 and f": network: expected tanh as in {path}, found underflow: " in errors
    says = f"train.py: error: {path}: expected weights of fpnl's network, found one with tanh\n"
    assert call("--data", small[1], "--evaluate", path) == (2, "", says)


def test_the_help_is_a_page(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = call("-h")
    assert status == 0 and len(out.splitlines()) <= 50 and "--control-variate" in out


# --- Long runs ----------------------------------------------------------------------------------------


SMALL = "--hidden 24 24 --batch 10 --epochs 20 --reports 60 --seed 2".split()


@pytest.fixture
def small(tmp_path):
    """A folder with a tiny set, and the options of a run of 600 quick steps on it."""
    write_set(tmp_path / "set", train=300)
    return ["--data", tmp_path / "set", *SMALL]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The weights after all of these."""
    folder = tmp_path_factory.mktemp("whole")
    write_set(folder, train=300)
    run("--data", folder, *SMALL, "--workers", 1, "--quiet", "--save", folder / "w.npz")
    return folder / "w.npz"


def assert_same_run(found, expected):
    a, b = saved(found), saved(expected)
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for key in (key for key in a if a[key].dtype == np.float32):
        assert_same_bits(a[key], b[key])


def start(*arguments, program=TRAIN, **how):
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen([*map(str, [*program, *arguments])], **how)


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume(small, tmp_path, whole):
    """8 times, with one and with two workers: never an unreadable file, and in the end the same weights."""
    rng, path = RNG(0), tmp_path / "w.npz"
    steps = [0]
    for i in range(8):
        goes_on = ["--resume", path] if path.exists() else []
        child = start(*small, *goes_on, "--save", path, "--workers", 1 + i % 2)
        for _ in range(rng.integers(2, 6)):
            child.stdout.readline()
        time.sleep(0.02 * rng.random())
        child.kill()
        child.communicate()
        steps.append(int(saved(path)["step"]) if path.exists() else 0)
    assert steps == sorted(steps) and len(set(steps)) > 5
    run(*small, "--resume", path, "--save", path)
    assert_same_run(path, whole)


def in_process_1(program):
    """As the first process of a container, to which the system's own ways with signals do not apply."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or run(program=[*apart, "true"], check=False).returncode:
        pytest.skip("needs Linux, and root, to begin with a process 1")
    return apart + program


@pytest.mark.parametrize("process_1", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_the_last_step(small, tmp_path, number, workers, process_1):
    """Also where a shell or batch system has Ctrl-C ignored, and sends SIGTERM to all processes of the run."""
    path = tmp_path / "w.npz"
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "start_new_session": True}
    how["program"] = in_process_1(TRAIN) if process_1 else TRAIN
    child = start(*small, *"--epochs 2000 --reports 600 --workers".split(), workers, "--save", path, **how)
    for _ in range(4):
        child.stdout.readline()
    os.killpg(child.pid, number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    step = int(saved(path)["step"])
    assert 0 < step < 60000
    assert errors == f"train.py: interrupted after step {step} of 60000; go on with --resume {path}\n"


def test_process_1_hears_sigterm_from_its_first_lines_on(tmp_path):
    """While NumPy is imported: a container is to stop at once, not when it is killed."""
    (tmp_path / "numpy.py").write_text("import time; print('numpy', flush=True); time.sleep(60)")
    child = start(program=in_process_1(TRAIN), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    child.stdout.readline()
    os.kill([*family(child.pid)][1], signal.SIGTERM)
    assert child.communicate(timeout=30) == ("", "") and child.returncode == 128 + signal.SIGTERM


ENDLESS = "--batch 10000 --block 1 --importance 0 --save".split()  # whose steps take seconds


@pytest.mark.parametrize("process_1", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tmp_path, slice_of_mnist, number, process_1):
    """In a step, which nobody has to complete: nothing is reported or saved any more."""
    path, program = tmp_path / "w.npz", in_process_1(TRAIN) if process_1 else TRAIN
    path.write_bytes(b"older")
    child = start("--data", slice_of_mnist, *ENDLESS, path, program=program)
    for _ in range(2):
        child.stdout.readline()
    pid = [*family(child.pid)][1] if process_1 else child.pid
    for _ in range(2):
        time.sleep(0.3)
        assert child.poll() is None
        os.kill(pid, number)
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, out, errors) == (128 + number, "", "")
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"older"


@pytest.mark.slow
@needs_mpi
def test_workers_need_fpnl_and_nothing_else(slice_of_mnist, tmp_path):
    """Of the project; those of a dask are in the test of a dask that is there already."""
    code = """
import sys, train

args = train.parse_args(sys.argv[1:])
run = train.begin(args)
with train.engine(args) as (_, map_tasks, workers, lists):
    steps = train.steps(run, map_tasks=map_tasks, workers=lists)
    next(steps), next(steps)
    print(*map_tasks(eval, ["{*__import__('sys').modules} & {'data', 'fpnl', 'mine', 'train'}"] * 9))
"""
    program = MPI[: MPI.index("train.py")]
    done = run_program(tmp_path, code, "--engine", "mpi", "--data", slice_of_mnist, program=program)
    assert done.stdout == " ".join(["{'fpnl'}"] * 9) + "\n"


def family(pid):
    """A process and all that descend from it."""
    yield pid
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text("utf-8").split():
            yield from family(int(child))


def is_running(pid):
    """It may have ended and wait for its parent to look."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed(folder, tmp_path, engine, worker):
    """Runs to the end alone, and on an engine one of whose workers is killed on the way: status, output, errors."""
    options = ["--data", folder, *"--batch 100 --epochs 0.11 --reports 11 --save".split()]
    run(*options, tmp_path / "whole.npz")
    child = start(*options, tmp_path / "w.npz", program=engine)
    for _ in range(6):
        child.stdout.readline()
    commands = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [*family(child.pid)][1:]}
    os.kill([pid for pid, text in commands.items() if worker in text and b"hydra" not in text][-1], signal.SIGKILL)
    out, errors = child.communicate(timeout=120)
    return child.returncode, out, errors


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@needs_dask
def test_dask_computes_again_what_a_killed_worker_had(slice_of_mnist, tmp_path):
    status, _, errors = killed(slice_of_mnist, tmp_path, DASK, b"spawn_main")
    assert status == 0, errors
    assert "Restarting worker" in errors  # it was killed
    assert_same_run(tmp_path / "w.npz", tmp_path / "whole.npz")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
@needs_mpi
def test_mpi_ends_when_a_worker_is_killed_and_its_checkpoint_resumes(slice_of_mnist, tmp_path):
    status, out, errors = killed(slice_of_mnist, tmp_path, MPI, b"mpi4py.futures")
    assert status != 0 and "BAD TERMINATION" in out + errors and "result: " not in out  # as mpiexec reports it
    assert 0 <= saved(tmp_path / "w.npz")["step"] < saved(tmp_path / "whole.npz")["step"]
    run("--data", slice_of_mnist, "--resume", tmp_path / "w.npz", "--save", tmp_path / "w.npz")
    assert_same_run(tmp_path / "w.npz", tmp_path / "whole.npz")


@pytest.mark.slow
@needs_dask
def test_workers_of_a_dask_of_its_own_say_nothing(tmp_path):
    """As of a heartbeat that comes when the scheduler has gone."""
    code = """
import distributed, logging, train

if __name__ == "__main__":
    with train.engine(train.parse_args(["--engine", "dask", "--workers", "1"])):
        say = lambda: logging.getLogger("distributed.worker").error("heartbeat") or "done"
        print(*distributed.get_client().run(say).values())
"""
    assert run_program(tmp_path, code).stdout == "done\n"


@pytest.mark.slow
@needs_dask
def test_a_dask_that_is_there_already(slice_of_mnist, short_run, tmp_path):
    """Its workers have fpnl, and no part of train.py."""
    code = """
import distributed

def modules():
    import sys
    return {*sys.modules} & {"data", "fpnl", "train"}

if __name__ == "__main__":
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
        print(*distributed.Client(cluster).run(modules).values())
"""
    (tmp_path / "mine.py").write_text(code)
    shutil.copy(ROOT / "fpnl.py", tmp_path)
    cluster = start(program=[sys.executable, tmp_path / "mine.py"], cwd=tmp_path, stdin=subprocess.PIPE)
    options = ["--engine", "dask", "--scheduler", cluster.stdout.readline().strip(), "--save", tmp_path / "w.npz"]
    assert "2 workers" in run("--data", slice_of_mnist, *SHORT, *options).stdout
    assert cluster.communicate("\n", timeout=60)[0] == "{'fpnl'} {'fpnl'}\n"
    assert_same_weights(tmp_path / "w.npz", short_run)


INSTALL = "broken: pip install it (mpi4py mpich for --engine mpi, distributed for dask), also where workers are\n"
NO_SCHEDULER = "--engine dask --scheduler tcp://127.0.0.1:9"


@pytest.mark.parametrize(
    ("missing", "options", "says"),
    [
        ("mpi4py", "--engine mpi", INSTALL),
        ("distributed", "--engine dask", INSTALL),
        pytest.param(None, "--engine mpi", "--engine mpi: expected workers: mpiexec -n 3 python -m ", marks=needs_mpi),
        pytest.param(None, NO_SCHEDULER, "Timed out trying to connect to tcp", marks=[needs_dask, pytest.mark.slow]),
    ],
)
def test_an_engine_that_is_not_there_ends_in_one_line(small, tmp_path, missing, options, says):
    if missing:
        (tmp_path / f"{missing}.py").write_text("raise ImportError('broken')")
    done = run(*small, *options.split(), check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"train.py: error: {says}")


def test_resume_refuses_other_settings_by_name(small, tmp_path, call):
    path = tmp_path / "w.npz"
    call(*small, "--epochs", 1, "--save", path)
    good = saved(path)

    def refused(says, *options):
        status, _, errors = call("--data", small[1], "--resume", path, *options)
        says = f"train.py: error: {says} as in {path}, found .*: it is fixed\n"
        assert status == 2 and re.fullmatch(says, errors), errors

    refused("--lr: expected 0.001", "--lr", 0.5)
    refused("--weight-decay: expected 1.0", "--weight-decay", 0)
    refused(r"--hidden: expected \[24, 24\]", "--hidden", 24)
    refused("--epochs: expected 1.0", "--epochs", 2)
    refused("--flush: expected on", "--flush", "off")
    refused(r"--data: expected \d+", "--data", data.MNIST)
    assert "result: " in call("--data", small[1], "--resume", path, "--workers", 1, "--flush", "emulated")[1]
    others = {"version": 2, "task": 32, "piece": 7, "mask": 1, "least": 0.1, "network": "tanh", "method": "backprop"}
    for name, value in others.items():
        np.savez(path, **good | {"settings": json.dumps(json.loads(str(good["settings"])) | {name: value})})
        refused(f"{name}: expected {value}")


def test_resume_takes_over_that_nothing_flushes(small, tmp_path, call):
    """--flush is a setting of the run like the others: it need not be given again."""
    call(*small, "--epochs", 1, "--flush", "off", "--save", tmp_path / "off.npz")
    call("--data", small[1], "--resume", tmp_path / "off.npz", "--save", tmp_path / "w.npz")
    assert_same_run(tmp_path / "w.npz", tmp_path / "off.npz")


def test_a_full_disk_loses_nothing(small, tmp_path):
    """No file may grow beyond 16 KB: the first save ends the run, the older file stays, and nothing else is left."""
    pytest.importorskip("resource", reason="POSIX limits")
    path = tmp_path / "w.npz"
    code = """
import resource, sys, train

def limited(*args, begin=train.begin):
    begun = begin(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
    return begun

train.begin = limited
train.main(sys.argv[1:])
"""
    run(*small, "--epochs", 1, "--save", path)
    (tmp_path / "mine.py").write_text(code)
    before = path.read_bytes(), sorted(tmp_path.iterdir())
    assert len(before[0]) > 16384
    done = run_program(tmp_path, code, *small, "--workers", 1, "--save", path, check=False)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert len(done.stdout.splitlines()) == 2
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == before


def test_a_save_replaces_the_file_and_never_writes_into_it(small, tmp_path, call):
    """Who has the older file open goes on reading that."""
    path = tmp_path / "w.npz"
    call(*small, "--epochs", 0, "--save", path)
    with open(path, "rb") as file:
        before = path.read_bytes()
        call(*small, "--epochs", 1, "--save", path)
        assert file.read() == before != path.read_bytes()


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path, call):
    folder = tmp_path / "fixed"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom no mode stops
        folder = "/proc"
    says = f"train.py: error: {folder}/w.npz: expected a regular file in a folder to write to, found none\n"
    assert call("--save", f"{folder}/w.npz") == (2, "", says)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [0, 40])  # 0: it does not know
def test_the_live_line_never_garbles_the_reports(small, columns):
    """On a terminal: with the live line taken out, what is left is what a pipe shows."""
    small = [*small, "--epochs", 30, "--reports", 2]
    text = on_a_terminal(*small, columns=columns)
    live = re.findall("\r\x1b\\[K([^\r\n]*)(?=\r)", text)
    assert live and re.fullmatch(r" +[\d.]+ +[\d.]+ +[\d.]+" + (" +" if columns else r" +\d+ s"), live[0])
    assert not columns or len(live[0]) == columns - 1
    rows = re.sub("\r\x1b\\[K", "", re.sub("\r\x1b\\[K[^\r\n]*(?=\r)", "", text)).splitlines()
    piped = run(*small).stdout.splitlines()
    assert "\r" not in "".join(piped)
    timeless = [[re.sub(r" +\d+\.\d |seconds \d+$| +(\d+ s|\?)$", "", row) for row in lines] for lines in (rows, piped)]
    assert timeless[0] == timeless[1]


def test_quiet(small, call):
    status, out, errors = call(*small, "--epochs", 1, "--quiet")
    assert (status, len(out.splitlines()), errors) == (0, 1, "") and out.startswith("result: ")


def test_evaluate_and_predict(slice_of_mnist, tmp_path, call, trained):
    arrays = {f"{name}{i}": a for i, layer in enumerate(trained, 1) for name, a in zip("Wb", layer)}
    np.savez(tmp_path / "w.npz", **arrays)
    _, _, x, y = data.load(slice_of_mnist)
    expected = fpnl.forward(trained, data.pixels(x)).argmax(axis=1)
    header, *table, last = call("--data", slice_of_mnist, "--evaluate", tmp_path / "w.npz")[1].splitlines()
    assert header.split("\t") == ["label", *map(str, range(10)), "recall"]
    assert last == f"result: test {np.mean(expected == y):.4f}"
    for label, row in enumerate(table):
        found = expected[y == label]
        counts = [str(np.sum(found == other)) for other in range(10)]
        assert row.split("\t") == [str(label), *counts, f"{np.mean(found == label):.4f}"]
    predicted = call("--evaluate", tmp_path / "w.npz", "--predict", slice_of_mnist / "t10k-images-idx3-ubyte")
    assert predicted == (0, "".join(f"{label}\n" for label in expected), "")


NO_RUN = "expected a run of train.py, found what is of use for --evaluate"
WHOLE = "expected whole weights as --save writes them, found "


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": None}, NO_RUN),
        ({"mW1": None}, WHOLE + "mW1 missing or left over in a network of [20, 24, 24, 10]"),
        ({"W1": None}, WHOLE + "W1 missing or left over"),
        ({"W3": None, "b3": None}, WHOLE + "W3, b3 missing or left over"),
        ({"W3": None, "b3": None, "settings": None}, WHOLE + "mW3, mb3, vW3, vb3 missing or left over"),
        ({"W4": np.zeros((10, 2), "f"), "extra": np.zeros(1)}, WHOLE + "W4, extra missing or left over"),
        ({"step": None}, WHOLE + "mW1, mW2, mW3, mb1, mb2, mb3, seconds, vW1"),
        ({"W1": np.zeros((20, 24))}, WHOLE + "W1 float64 (20, 24), not finite float32 (20, 24)"),
        ({"W2": np.zeros((23, 24), "f")}, WHOLE + "W2 float32 (23, 24), not finite float32 (24, 24)"),
        ({"b3": np.full(10, np.nan, "f")}, WHOLE + "b3 float32 (10,), not finite"),
        ({"W1": np.array([{}], object)}, WHOLE + "Object arrays cannot be loaded"),
        ({"W3": np.zeros((24, 0), "f"), "b3": np.zeros(0, "f"), "settings": None}, WHOLE + "W3 float32 (24, 0), not"),
        ({"mb3": np.zeros(3, "f")}, WHOLE + "mb3 float32 (3,), not finite float32 (10,)"),
        ({"vW2": np.full((24, 24), np.nan, "f")}, WHOLE + "vW2 float32 (24, 24), not finite"),
        ({"step": -1}, NO_RUN),
        ({"step": 601}, NO_RUN),
        ({"step": np.inf}, NO_RUN),
        ({"seconds": np.nan}, NO_RUN),
        ({"settings": '{"hidden": [24, 24], "jitter": 0}'}, NO_RUN),
        ({"settings": '{"sizes": 4}'}, WHOLE),
        ({"settings": "{"}, WHOLE),
        (b"PK\3\4 and no more", WHOLE),
        (b"\x93NUMPY\1\0", WHOLE),
        (b"", WHOLE),
    ],
)
def test_damaged_weights_end_in_one_line(small, tmp_path, whole, call, change, says):
    path = tmp_path / "w.npz"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        arrays = {name: a for name, a in (saved(whole) | change).items() if a is not None}
        np.savez(path, **arrays)
    status, out, errors = call("--data", small[1], "--resume", path)
    assert (status, out, errors.count("\n")) == (2, "", 1) and errors.startswith(f"train.py: error: {path}: {says}")


def archive(method):
    """A checkpoint of a small network -> its content and what is in it; `method` is one of zipfile's."""
    params, _, _ = example((4, 3, 2))
    settings, file, stored = {"sizes": [4, 3, 2], "steps": 9}, io.BytesIO(), io.BytesIO()
    arrays = {"settings": json.dumps(settings), "step": 3, "seconds": 1.5}
    named = [(f"{n}{i}", a) for i, layer in enumerate(params, 1) for n, a in zip("Wb", layer)]
    arrays |= {tree + name: a for tree in ("", "m", "v") for name, a in named}
    np.savez(stored, **arrays)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue(), params, settings


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_archives_load_exactly_or_not_at_all(tmp_path, count):
    """Flipped bits anywhere and in the directory at the end, cuts, other bytes; of four ways to compress."""
    rng, loaded, path = RNG(count), 0, tmp_path / "mutated.npz"
    sound = [
        archive(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    ]
    for i in range(count):
        content, params, settings = sound[i % 4]
        content, directory = bytearray(content), content.index(b"PK\1\2")
        at = rng.integers(directory if i % 3 else 0, len(content))
        if i % 20 == 0:
            del content[at:]
        elif i % 20 == 1:
            content[at : at + 4] = rng.bytes(4)
        else:
            content[at] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            found, others = data.load_weights(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected whole weights")
            continue
        loaded += 1
        for tree in (found, others["m"], others["v"]):
            assert_same_params(tree, params)
        assert others["settings"] == settings and (others["step"], others["seconds"]) == (3, 1.5)
    assert 0.1 * count < loaded < 0.9 * count


@pytest.mark.parametrize("names", [("W1.npy", "W1.npy"), ("W1", "W1.npy")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_more_than_once(tmp_path, names):
    path, array = tmp_path / "w.npz", io.BytesIO()
    np.save(array, np.ones((3, 2), "f"))
    for written in (names[:1], names):
        np.savez(path, b1=np.zeros(2, "f"))
        with zipfile.ZipFile(path, "a") as file:
            for name in written:
                file.writestr(name, array.getvalue())
        assert written == names or data.load_weights(path)[0][0][0].shape == (3, 2)
    with pytest.raises(ValueError, match=r"found \['W1', 'W1'\] damaged, or more than once"):
        data.load_weights(path)


@pytest.mark.parametrize("shape", [(1000, 1000), (10**6, 10**6), (10**15, 10)])
def test_an_array_that_promises_more_than_there_is(tmp_path, shape):
    """Of any size: its header, not the memory of this machine, is at fault."""
    content, path = io.BytesIO(), tmp_path / "w.npz"
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("W1.npy", content.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=f"^{path}: expected whole weights"):
        data.load_weights(path)


def test_files_in_folders_of_their_names(tmp_path):
    """As some programs unpack them."""
    write_set(tmp_path)
    name = "train-labels-idx1-ubyte"
    (tmp_path / name).rename(tmp_path / "labels")
    (tmp_path / name).mkdir()
    (tmp_path / "labels").rename(tmp_path / name / name)
    with pytest.raises(
        FileNotFoundError, match=f"{name}: expected a file, found a folder: move the file that is in it to"
    ):
        data.load(tmp_path)


def test_held_out_images_leave_some_of_each_class(tmp_path):
    """They are the last as they lie: in a file that is ordered by class, those of a class may be all among them."""
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.repeat(np.arange(3), 20)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(20) % 3))
    assert [len(a) for a in data.load(tmp_path, 19)] == [41, 41, 19, 19]
    for held_out, left in ((20, 2), (45, 1), (60, 0), (1000, 0)):
        with pytest.raises(
            ValueError, match=f"validation: expected all 3 classes before the last {held_out}, found {left}"
        ):
            data.load(tmp_path, held_out)


def test_1000_mutated_files_load_exactly_or_not_at_all(tmp_path):
    """Flipped bits, cuts, wrong counts, other bytes; plain and gzipped: what a plain reader reads, or ValueError."""
    rng, loaded = RNG(10), 0
    for i in range(1000):
        content = bytearray(idx(rng.integers(0, 256, (6, 4, 3))))
        header = 4 if i % 3 else len(content)  # two in three leave the magic number alone
        kind = i % 5
        if kind == 0:
            content[rng.integers(header, len(content)) if i % 3 else rng.integers(4)] ^= 1 << rng.integers(8)
        elif kind == 1:
            del content[rng.integers(len(content)) :]
        elif kind == 2:
            content[4:16] = struct.pack(">3I", *rng.choice([0, 1, 3, 4, 6, 12, 2**16, 2**32 - 1], 3))
        elif kind == 3:
            content = bytearray(rng.bytes(rng.integers(40)))
        else:
            content[16:] = rng.bytes(len(content) - 16)
        if i % 2:
            content = bytearray(gzip.compress(bytes(content)))
            if i % 7 == 0:
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path = tmp_path / "mutated"
        path.write_bytes(content)
        try:
            plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else bytes(content)
            magic, *shape = struct.unpack_from(">4I", plain)
            good = magic == 0x803 and len(plain) == 16 + shape[0] * shape[1] * shape[2]
        except (struct.error, OSError, EOFError, zlib.error):
            good = False
        if good:
            found = data.read_idx(path, 3)
            assert found.shape == tuple(shape) and found.tobytes() == plain[16:]
            loaded += 1
        else:
            with pytest.raises(ValueError, match="^" + re.escape(str(path))):
                data.read_idx(path, 3)
    assert 200 < loaded < 800


def test_too_little_memory(small):
    resource = pytest.importorskip("resource", reason="POSIX limits")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (4 << 30, 4 << 30))
    done = run(*small, "--hidden", 10**6, 10**6, check=False, preexec_fn=limit)
    says = "expected more memory: try smaller layers or batches"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"train.py: error: {says}\n")


def test_a_saved_error_page_is_no_data(small, call):
    (small[1] / IMAGES).write_bytes(b"<!DOCTYPE html>")
    status, _, errors = call(*small)
    assert status == 2 and errors.endswith("found 3c21444f: copy it again\n")


# --- What a user's machine is like --------------------------------------------------------------------


def goes_on(path, small, expected):
    """The state is one from which the run can go on, to the weights that it would have had."""
    run("--data", small[1], "--resume", path, "--save", path, "--workers", 1, "--quiet")
    assert_same_run(path, expected)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_reader_that_goes_away_ends_the_run_quietly(small, tmp_path, whole, workers):
    """As `| head -3` and `less` do. What it would have read next is saved."""
    path = tmp_path / "w.npz"
    child = start(*small, "--workers", workers, "--save", path)
    for _ in range(3):
        child.stdout.readline()
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (141, "")
    child.stderr.close()
    assert 0 < int(saved(path)["step"]) < 600
    goes_on(path, small, whole)


def test_a_reader_of_the_log_that_goes_away(small, tmp_path, whole):
    os.mkfifo(tmp_path / "log")
    child = start(*small, "--quiet", "--log", tmp_path / "log", "--save", tmp_path / "w.npz")
    with open(tmp_path / "log", encoding="utf-8") as log:
        assert [log.readline()[:2] for _ in range(4)] == ["# ", "# ", "ep", "0,"]
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, out, errors) == (141, "", "")
    goes_on(tmp_path / "w.npz", small, whole)


@pytest.mark.parametrize("arguments", [["-h"], ["--evaluate", "WEIGHTS", "--data", "SET"]], ids=["help", "evaluate"])
def test_a_reader_that_has_gone_before_anything_is_written(small, whole, arguments):
    arguments = [{"WEIGHTS": whole, "SET": small[1]}.get(word, word) for word in arguments]
    read, write = os.pipe()
    os.close(read)
    child = start(*arguments, stdout=write)
    os.close(write)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode in (0, 141) and errors == ""  # argparse takes no notice


ALL = "<&- >&- 2>&-"


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize("closed", [*(pytest.param(c, marks=pytest.mark.slow) for c in ("<&-", "2>&-")), ">&-", ALL])
def test_standard_streams_may_be_closed(small, tmp_path, closed):
    """As cron and pythonw start programs. Nothing else gets their place, and an error is no traceback."""
    options = [*small, "--epochs", 2, "--workers", 2, "--log", tmp_path / "log", "--save", tmp_path / "w.npz"]
    run(*options)
    expected, rows = saved(tmp_path / "w.npz"), [[row[0], *row[2:]] for row in log_of(tmp_path / "log")[1]]
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "train.py"]
    done = run(*options, program=shell)
    assert ("result: " in done.stdout) == (closed in ("<&-", "2>&-"))
    assert_same_bits(saved(tmp_path / "w.npz")["W1"], expected["W1"])
    assert [[row[0], *row[2:]] for row in log_of(tmp_path / "log")[1]] == rows
    done = run("--frobnicate", program=shell, check=False)
    says = "" if "2>&-" in closed else "train.py: error: unrecognized arguments: --frobnicate\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("stream", ["stdout", "log"])
def test_output_that_finds_no_space_ends_in_one_line(small, stream):
    with open("/dev/full" if stream == "stdout" else os.devnull, "w", encoding="utf-8") as out:
        child = start(*small, *["--log", "/dev/full"] * (stream == "log"), stdout=out)
        errors = child.communicate(timeout=60)[1]
    assert (child.returncode, errors) == (2, "train.py: error: [Errno 28] No space left on device\n")


def test_a_program_that_calls_main_keeps_its_streams(tmp_path, capsys):
    """Also after an error: a notebook goes on."""
    import train

    for arguments, status in ((["--resume", str(tmp_path / "none")], 2), (["--frobnicate"], 2), (["-h"], 0)):
        with pytest.raises(SystemExit) as end:
            train.main(arguments)
        assert end.value.code == status
        print("and on")
    out, errors = capsys.readouterr()
    assert out.count("and on\n") == 3 and errors.count("\n") == 2


def test_the_weights_of_a_report_are_saved_before_it_is_told(small, tmp_path):
    """Whatever becomes of who reads the log and the report."""
    code = """
import sys, data, train

data.save_weights = lambda *args, **arrays: print("saved", flush=True)
train.main([*sys.argv[1:], "--log", "/dev/stdout", "--save", "w.npz"])
"""
    done = run_program(tmp_path, code, *small, "--epochs", 1, "--reports", 2)
    assert [line.split()[0].partition(",")[0] for line in done.stdout.splitlines()] == [
        *("#", "#", "epoch", "20-24-24-10", "epoch"),
        *("saved", "0", "0.00", "saved", "0.5", "0.50", "saved", "1", "1.00", "result:"),
    ]


@pytest.mark.parametrize(
    ("layer", "value", "number"),
    [
        (0, np.nan, signal.SIGINT),
        (2, np.inf, signal.SIGTERM),
        (1, np.nan, 0),  # no signal
        (1, 1e20, signal.SIGINT),  # whose square is not finite; weights and loss are
    ],
)
def test_a_state_that_cannot_go_on_never_replaces_one_that_can(small, tmp_path, whole, layer, value, number):
    """The gradient is not finite in the 25th step; in the next, a signal asks for the end."""
    import train

    def es(s, net):
        gradient, steps = train.es(s, net), itertools.count(1)

        def broken(*rows, **how):
            (grads, losses), step = gradient(*rows, **how), next(steps)
            if step == 25:
                grads[layer][0][:] = value
            if step == 26:
                os.kill(os.getpid(), number)
            return grads, losses

        return broken

    path = tmp_path / "w.npz"
    args = train.parse_args([*map(str, small), "--reports", "30", "--save", str(path)])
    says = r"^diverged: the loss is (nan|inf|\d.\d+) after 25 steps: try a smaller --lr$"
    with pytest.raises((ValueError, KeyboardInterrupt), match=says):
        train.train(args, train.begin(args, es))
    assert int(saved(path)["step"]) == 20
    goes_on(path, small, whole)


def test_saving_writes_through_links(small, tmp_path, call):
    """Of a link, the file that it names is replaced, or made; the link stays."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "relative")
    (tmp_path / "relative").symlink_to(pathlib.Path("elsewhere") / "w.npz")
    for epochs in (0, 1):  # the file is not there at first
        call(*small, "--epochs", epochs, "--save", tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "relative").is_symlink()
        assert int(saved(folder / "w.npz")["step"]) == 30 * epochs
    assert [path.name for path in folder.iterdir()] == ["w.npz"]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes of POSIX")
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "device link", "link into nowhere", "link to itself"])
def test_saving_to_what_is_no_regular_file_is_refused(small, tmp_path, call, kind):
    """Never with a device of the machine: whoever may replace it would."""
    path, device = tmp_path / "w.npz", tmp_path / "device"
    if "device" in kind:
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # another null
        except PermissionError:
            pytest.skip("needs root, to make a device")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "device":
        path.symlink_to({"link into nowhere": "/nowhere/w.npz", "link to itself": path, "device link": device}[kind])
    path = device if kind == "device" else path
    before = os.lstat(path)
    found = call(*small, "--save", path)
    says = f"{path}: expected a regular file in a folder to write to, found none\n"
    says = f"[Errno {errno.ELOOP}] {os.strerror(errno.ELOOP)}: '{path}'\n" if kind == "link to itself" else says
    assert found == (2, "", f"train.py: error: {says}")
    assert os.lstat(path)[:7] == before[:7]  # but for the times


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_that_is_write_protected_is_not_replaced(tmp_path, monkeypatch, stream):
    (tmp_path / "w.npz").write_bytes(b"")
    data.check_new_file(tmp_path / "w.npz", stream)
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)  # no mode stops root
    with pytest.raises(ValueError, match="w.npz: expected a (regular )?file in a folder to write to, found none"):
        data.check_new_file(tmp_path / "w.npz", stream)


def test_two_runs_that_save_to_one_name_do_not_meet(tmp_path, monkeypatch):
    """Both have written their files before either replaces the one."""
    meet, plain, names = threading.Barrier(2), os.replace, []

    def replace(source, target):
        names.append(source)
        meet.wait(10)
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    params = [example(seed=seed)[0] for seed in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda p: data.save_weights(tmp_path / ("n" * 250), p, {}), params))
    assert len(set(names)) == 2
    (left,) = tmp_path.iterdir()
    found, _ = data.load_weights(left)
    assert any(np.array_equal(found[0][0], p[0][0]) for p in params)


def log_of(path):
    """Comments and header, and the rows as lists of numbers."""
    lines = path.read_text("utf-8").splitlines()
    return lines[:3], [[float(value) for value in line.split(",")] for line in lines[3:]]


def test_a_log_that_goes_on_has_each_row_once(small, tmp_path, whole, call):
    """After Ctrl-C, after a row was cut by a kill, and after a row whose weights were not saved any more."""
    log, path = tmp_path / "log", tmp_path / "w.npz"
    child = start(*small, "--workers", 1, "--save", path, "--log", log)
    for _ in range(8):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    head, rows = log_of(log)
    stopped = int(saved(path)["step"]) / 30
    assert rows[-1][0] == pytest.approx(stopped, abs=1e-5) and len(rows) > 5  # where it stopped, too
    next_one = (int(saved(path)["step"]) // 10 + 1) / 3
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{next_one:.6g},1.0,2.0,3.0,4.0,5.0,6.0,7.0\n20,1")
    resume = ["--data", small[1], "--resume", path, "--log"]
    call(*resume, log, "--save", path, "--reports", 60)
    lines = log.read_text("utf-8").splitlines()
    assert lines.pop(3 + len(rows) + 1) == "20,1"  # it was ended first
    epochs = [line.split(",")[0] for line in lines[3:]]
    assert lines[:3] == head and len(epochs) == len(set(epochs)) and epochs[-1] == "20"
    assert {f"{step / 3:.6g}" for step in range(61)} <= set(epochs)
    assert_same_run(path, whole)
    before = log.read_text("utf-8")
    call(*resume, log)  # a finished run has nothing to add
    assert log.read_text("utf-8") == before
    call(*resume, tmp_path / "another")
    assert [row[0] for row in log_of(tmp_path / "another")[1]] == [20]
    for text in (before.replace('"seed": 2', '"seed": 3'), "a, table\n1,2\n", '# {"data": 217'):
        (tmp_path / "another").write_text(text)
        says = f"train.py: error: {tmp_path}/another: expected the log of this run, to go on with it, found another's\n"
        assert (
            call(*resume, tmp_path / "another") == (2, "", says) and (tmp_path / "another").read_text("utf-8") == text
        )
    says = f"train.py: error: expected another file to --log than to --save and --resume, found {path}\n"
    assert call(*resume, path) == (2, "", says) and int(saved(path)["step"]) == 600


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_the_log_may_be_a_pipe(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    options = [*small, "--epochs", 1, "--workers", 1, "--reports", 2, "--quiet", "--save", tmp_path / "w.npz"]
    for resumed in ([], ["--resume", tmp_path / "w.npz"]):
        child = start(*options, *resumed, "--log", tmp_path / "pipe")
        rows = log_of(tmp_path / "pipe")[1]
        assert child.wait(60) == 0
        child.communicate()
        assert [row[0] for row in rows] == ([1] if resumed else [0, 0.5, 1])
    done = run(*options, "--log", "/dev/stderr", check=False)
    assert done.returncode == 0 and re.findall("^..", done.stderr, re.MULTILINE) == ["# ", "# ", "ep", "0,", "0.", "1,"]


NAME = os.fsdecode(b"caf\xc3\xa9 \xff\n") if sys.platform == "linux" else "café \n"
LOCALES = [{"LC_ALL": name} for name in ("C", "POSIX", "en_US.ISO-8859-1", "C.UTF-8")]
LOCALES += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii:strict"}]


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: ",".join(locale.values()))
def test_any_locale_and_any_name(tmp_path, locale):
    """Of the clone, the data, the log and the weights: with a newline, an umlaut and a byte that is none in UTF-8."""
    folder = tmp_path / NAME
    write_set(folder)
    for name in ("train.py", "data.py", "fpnl.py"):
        shutil.copy(ROOT / name, folder)
    path, log = folder / f"w{NAME}.npz", folder / f"{NAME}.csv"

    def trained(*options):
        command = [sys.executable, folder / "train.py", "--workers", "2", "--data", folder, "--log", log, *options]
        environment = {k: v for k, v in os.environ.items() if k[:3] != "LC_"} | locale
        return subprocess.run(command, capture_output=True, timeout=60, env=environment)

    start = trained(*"--hidden 8 --batch 20 --epochs 1 --save".split(), path)
    assert (start.returncode, start.stderr) == (0, b"") and b"result: train " in start.stdout
    assert log.read_bytes().startswith(b'# {"version": ') and int(saved(path)["step"]) == 3
    assert trained("--resume", path, "--quiet").returncode == 0
    wrong = trained("--save", folder / "none" / path.name)
    assert wrong.returncode == 2 and wrong.stderr.count(b"\n") == 1
    assert wrong.stderr.startswith(b"train.py: error: ") and b"expected a regular file in a folder" in wrong.stderr


SWITCHES = ["-OO", "-W error -X dev", "-bb", "-I", "-E -s -u", "-X warn_default_encoding -W error", "-X utf8=0"]


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES)
def test_any_switch_of_python(small, tmp_path, switches):
    options = [*small, "--epochs", 1, "--workers", 2, "--log", tmp_path / "log", "--save", tmp_path / "w.npz"]
    for resumed in ([], ["--resume", tmp_path / "w.npz"]):
        done = run(*options, *resumed, program=[sys.executable, *switches.split(), "train.py"])
        assert "result: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"PYTHONSAFEPATH": "1"},
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
        {"TMPDIR": "/nowhere", "HOME": "/nowhere"},
        {"OMP_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "x"},
        {"COLUMNS": "1", "LINES": "x", "TERM": "nothing"},
    ],
    ids=lambda change: ",".join(change),
)
def test_any_environment(small, tmp_path, change):
    options = [*small, "--epochs", 1, "--workers", 2, "--save", tmp_path / "w"]
    assert "result: " in run(*options, env=os.environ | change).stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", ["examples/controls.py", "examples/gates.py", "examples/linearized.py"])
def test_packages_of_other_names_do_not_shadow_the_projects_folders(tmp_path, program):
    """Nor does it matter that there are no docstrings."""
    for name in ("docs", "examples", "mnist"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another package of that name')")
    how = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    assert "--seeds" in run("-h", program=[sys.executable, program], env=os.environ | {"PYTHONSAFEPATH": "1"}).stdout
    assert "--seeds" in run("-h", program=[sys.executable, "-OO", program], **how).stdout
    code = "import runpy; runpy.run_path('docs/benchmark.py', run_name='benchmark')"
    assert run("-c", code, program=[sys.executable, "-OO"], **how).stdout == ""


def test_predict_takes_the_pixels_of_the_training(small, tmp_path, call):
    call(*small, "--epochs", 0, "--save", tmp_path / "w.npz")

    def predicted(content):
        (tmp_path / "images").write_bytes(content)
        return call("--evaluate", tmp_path / "w.npz", "--predict", tmp_path / "images")

    images = RNG(0).integers(0, 256, (5, 4, 5))
    expected = predicted(idx(images))
    assert expected[0] == 0 and len(expected[1].split()) == 5
    assert predicted(idx(images / np.float32(255), 0x0D)) == expected
    for bad, found in ((images, "0.0 to 2"), (-images / 255, "-1.0 to -?0.0"), (images / 255 * np.nan, "nan to nan")):
        status, out, errors = predicted(idx(bad, 0x0D))
        says = rf"train.py: error: {tmp_path}/images: expected float pixels in \[0, 1\], found {found}"
        assert (status, out) == (2, "") and re.match(says, errors), errors
    for none in (idx(np.zeros((0, 4, 5))), idx(np.zeros((0, 4, 5)), 0x0D)):
        assert predicted(none) == (0, "", "")
    assert "expected weights for 9 pixels, found 20\n" in predicted(idx(np.zeros((0, 3, 3))))[2]


def test_settings_that_this_version_does_not_write_end_in_one_line(small, tmp_path, call):
    """Those of another version, and other JSON or none; to resume, and to evaluate, if that is refused, too."""
    path = tmp_path / "w.npz"
    call(*small, "--epochs", 1, "--save", path)
    good = saved(path) | {"step": 0}
    settings = json.loads(str(good["settings"]))
    np.savez(path, **good)
    assert call("--data", small[1], "--resume", path)[0] == 0
    changes = [{"jitter": 0}, {"sigma": 0}, {"lr": "x"}, {"lr": None}, {"lr": -1}, {"batch": 0}, {"batch": 7.5}]
    changes += [{"epochs": float("nan")}, {"epochs": 1e308}, {"seed": {}}, {"control_variate": "off"}, {"steps": 31}]
    changes += [{"flush": "maybe"}, {"flush": []}, {"method": 3}, {"data": "x"}, {"hidden": 24}, {"hidden": "24"}]
    changes += [{"hidden": [8], "sizes": [20, 8, 10]}]  # not those of the weights
    changes += [{name: [settings[name]]} for name in ("epochs", "batch", "sigma", "block", "importance", "lr", "seed")]
    changes += [{name: [settings[name]]} for name in ("validation", "weight_decay", "dropout", "smoothing", "hidden")]
    texts = [json.dumps(settings | change) for change in changes]
    texts += [json.dumps({name: value for name, value in settings.items() if name != left}) for left in settings]
    texts += ["[]", '"es"', "3", "null", "[[1, 2]]", "{}", '{"epochs": 1}', "{", "NaN", "[" * 10**5, b"\xff"]
    for text in texts:
        np.savez(path, **good | {"settings": text})
        for options in (["--resume", path], ["--evaluate", path]):
            status, _, errors = call("--data", small[1], *options)
            evaluated = status == 0 and "--evaluate" in options
            found = re.fullmatch(rf"train.py: error: .*{re.escape(str(path))}.*\n", errors)
            assert evaluated or status == 2 and found, (text[:400], errors)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_terminal_of_workers_elsewhere(slice_of_mnist, tmp_path, engine, times):
    """It is sent to all the processes of the run, and all end: after one, as with other engines. A second is MPI's."""
    path = tmp_path / "w.npz"
    options = ["--reports", 570, "--save"] if times == 1 else ENDLESS
    child = start("--data", slice_of_mnist, *options, path, program=engine, start_new_session=True)
    for _ in range(6 - 2 * times):
        child.stdout.readline()
    processes = [*family(child.pid)]
    for _ in range(times):
        time.sleep(1)
        os.killpg(child.pid, signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    assert child.returncode or times == 2 and engine is MPI  # whose mpiexec may fail at that, and say 0
    assert len(processes) > 2 and "Traceback" not in errors, errors
    if times == 1:
        step = int(saved(path)["step"])
        assert child.returncode == 130 and step > 0
        assert f"train.py: interrupted after step {step} of 570; go on with --resume {path}\n" in errors
    else:
        assert "result: " not in out and not path.exists()
    while any(map(is_running, processes)):
        time.sleep(0.1)


def on_a_terminal(*arguments, columns=0, **environment):
    """What a terminal gets."""
    pty, fcntl, termios = (pytest.importorskip(name, reason="POSIX terminals") for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    child = start(*arguments, stdout=theirs, stderr=None, env=os.environ | environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert child.wait() == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_a_terminal_that_cannot_go_back_in_a_line_gets_whole_lines(small):
    shown = on_a_terminal(*small, "--epochs", 30, "--reports", 2, TERM="dumb")
    assert "\r" not in shown and "\x1b" not in shown and len(shown.splitlines()) == 6


# --- AArch64, under QEMU's emulation -------------------------------------------------------------------

ARM = ROOT / ".aarch64" / "python"
needs_arm = pytest.mark.skipif(not ARM.exists(), reason="needs an Arm Python under QEMU: .ci/aarch64 .aarch64")


def on_aarch64(*arguments):
    done = subprocess.run([ARM, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@needs_arm
def test_aarch64_has_the_same_arithmetic():
    """These tests there, on FPCR.FZ: what the CPU computes, both rules, and the modes, of which it has two."""
    chosen = "bits_of or scaling_of_every or naive or golden or gpu or posts_examples or enters_a_mode or decorator"
    done = on_aarch64("-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_fpnl.py", "-k", chosen)
    reasons = re.findall(r"^SKIPPED .*?: (.*)$", done.stdout, re.MULTILINE)
    assert {*reasons} == {ONE_FLAG}, reasons
    passed = int(re.search(r"(\d+) passed, ", done.stdout)[1])
    assert passed > 3 * len(OPS) * len(THIS_CPUS_MODES) and "aarch64" in on_aarch64("-m", "platform").stdout


@pytest.mark.slow
@needs_arm
def test_aarch64_trains_emulated_and_by_its_flags_to_the_same_bits(mnist, tmp_path):
    """And as well as here, where sums are taken in another order."""
    command = ["train.py", "--data", write_slice(mnist, tmp_path, 2000, 1000), "--workers", 1]
    command += "--hidden 32 32 --batch 100 --epochs 2 --lr 1e-2 --block 4 --reports 1 --flush".split()
    emulated, flags = (on_aarch64(*command, how, "--save", tmp_path / how) for how in ("emulated", "hardware"))
    assert_same_weights(tmp_path / "hardware", saved(tmp_path / "emulated"))
    here = run(*command[1:], "emulated")
    assert result(emulated)[0] == result(flags)[0] == pytest.approx(result(here)[0], abs=0.05)
    assert result(here)[0] > 0.8
