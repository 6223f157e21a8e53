"""The claims of fpnl.py, in its order, each beside its proof.

`python -m pytest` leaves out the long tests, `python -m pytest -m slow` runs those. Bits are compared as uint32.
"""

import concurrent.futures
import contextlib
import copy
import ctypes
import functools
import itertools
import multiprocessing
import pickle
import platform
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from helpers import PYTHON, RNG, ROOT, assert_same_bits, bits, example, hardware, needs_hardware, run, slow

import data
import fpnl

# --- Flush-to-zero arithmetic: vectors and oracles ---------------------------------------------------

OPS = ("add", "subtract", "multiply", "divide")
MODES = list(itertools.product((False, True), repeat=2))  # FTZ, DAZ
RULES = list(itertools.product((True, False), ("after", "before")))  # daz, tininess
CPU_TININESS = "before" if platform.machine().lower() in ("aarch64", "arm64") else "after"
THIS_CPUS_MODES = MODES if CPU_TININESS == "after" else [(False, False), (True, True)]  # Arm: both at once
ONE_FLAG = "this CPU switches FTZ and DAZ only together"
TINY = fpnl.TINY
all_modes = pytest.mark.parametrize(("ftz", "daz"), MODES)


def from_bits(x):
    return np.asarray(x, np.uint32).view(np.float32)


def ldexp(significand, exponent):
    return np.ldexp(np.float64(significand), exponent).astype(np.float32)


def zeroed(x):
    """Bits of float32 numbers, with the zero of its sign in the place of each subnormal."""
    return np.where((x & 0x7FFFFFFF) < 0x00800000, x & 0x80000000, x)


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
    exponent, near = c >> 23 & 0xFF, rng.integers(-4, 5, n)
    wanted = np.where(np.arange(n) % 2, 128 - exponent + near, exponent + 126 + near)
    d = d & 0x807FFFFF | np.clip(wanted, 0, 254).astype(np.uint32) << 23
    return from_bits(np.concatenate([a, c])), from_bits(np.concatenate([b, d]))


@functools.cache
def some(n=20_000):
    """The grid and a sample of the others, for the slower tests."""
    rng = RNG(3)
    samples = [np.array(pairs)[:, rng.integers(0, pairs[0].size, n)] for pairs in (directed(), random())]
    return np.concatenate([grid(), *samples], axis=1)


@functools.cache
def scaled(exponent=125):
    """The network's own operation at the exponents that decide: all 2^23 significands from 1/4 to 1, and S."""
    return np.arange(0x3E800000, 0x3F800000, dtype=np.uint32).view(np.float32), np.float32(2.0**exponent)


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


def softfloat(op, a, b, daz, tininess):
    """Berkeley SoftFloat, flushing what is subnormal or raises the underflow flag."""
    soft = pytest.importorskip("softfloatpy", reason="needs softfloatpy: pip install softfloatpy")
    function = getattr(soft, f"f32_{op[:3]}")  # f32_add, f32_sub, f32_mul, f32_div
    soft.set_tininess_mode(getattr(soft.TininessMode, f"{tininess.upper()}_ROUNDING"))
    soft.set_rounding_mode(soft.RoundingMode.NEAR_EVEN)
    found, underflows = bytearray(), []
    a, b = (zeroed(x.view(np.uint32)) if daz else x.view(np.uint32) for x in (a, b))
    for pair in zip(a.tolist(), b.tolist(), strict=True):
        soft.set_exception_flags(soft.ExceptionFlag(0))
        found += function(*(soft.Float32.from_bytes(x.to_bytes(4, "big")) for x in pair)).to_bytes()
        underflows.append(soft.test_exception_flags(soft.ExceptionFlag.UNDERFLOW))
    r = np.frombuffer(found, ">u4").astype(np.uint32)
    return from_bits(np.where(underflows, r & 0x80000000, zeroed(r)))


# --- Flush-to-zero arithmetic -------------------------------------------------------------------------


def test_flush_touches_nothing_but_subnormals():
    """Raw bits, payloads of NaNs included."""
    x, _ = random()
    np.testing.assert_array_equal(fpnl.flush(x).view(np.uint32), zeroed(x.view(np.uint32)))


ON_THE_CPU = [*itertools.product(OPS, (grid, directed, random)), ("divide", scaled), ("multiply", lambda: scaled(-125))]


@needs_hardware
@all_modes
@pytest.mark.parametrize(("op", "vectors"), ON_THE_CPU)
def test_bits_of_the_cpu(op, vectors, ftz, daz):
    """The claim: emulated and on the CPU, four operations, four settings of its flags."""
    assert_same_bits(emulated(op, *vectors(), ftz, daz), on_the_cpu(op, *vectors(), ftz, daz))


def test_the_vectors_are_where_the_rules_differ():
    """Products that are tiny, and are rounded to TINY: a mask of the rounded result would not do."""
    a, b = map(fpnl.flush, directed())
    exact = np.abs(a.astype(float) * b)
    assert np.sum((exact >= 2.0**-126 - 2.0**-150) & (exact < 2.0**-126 - 2.0**-151)) > 10_000
    assert np.sum(bits(fpnl.multiply(a, b)) != bits(fpnl.multiply(a, b, tininess="before"))) > 1000


@pytest.mark.parametrize(("daz", "tininess"), RULES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vectors", [pytest.param(functools.partial(directed, 60_000), marks=slow), some])
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
    ("divide", 0x3F000000, 0x7E000000, T, T, T, T),
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
]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row[0]}-{row[1]:08x}-{row[2]:08x}")
def test_golden_values(row):
    """By hand, without another implementation."""
    name, a, b, *expected = row
    op, a, b = getattr(fpnl, name), from_bits(a), from_bits(b)
    assert_same_bits(op(a, b), from_bits(expected[0])[()])  # the defaults
    assert type(op(a, b)) is np.float32 and op(a[None, None], b.repeat(0)).shape == (1, 0)  # as NumPy
    for (daz, tininess), value in zip(RULES, expected, strict=True):
        assert_same_bits(op(a, b, daz=daz, tininess=tininess), from_bits(value)[()])


def test_products_of_a_gpu():
    """mul.rn.ftz.f32 on an NVIDIA H200, where the two rules differ and elsewhere: it flushes after rounding."""
    rows = (ROOT / "docs" / "golden" / "nvidia-mul-ftz.csv").read_text("utf-8").split("a,b,product\n")[1].split()
    a, b, product = from_bits([[int(value, 16) for value in row.split(",")] for row in rows]).T
    after, before = (fpnl.multiply(a, b, tininess=tininess) for tininess in ("after", "before"))
    assert_same_bits(after, product)
    assert len(rows) == 512 and np.sum(bits(before) != bits(product)) == 45


@pytest.mark.parametrize("compute", [emulated, pytest.param(on_the_cpu, marks=needs_hardware)])
@pytest.mark.parametrize(
    ("ftz", "daz", "sums", "products"),
    [
        (False, False, (15938355, 15938355), (7549747, 7549747)),
        (True, False, (8388608, 20971520), (0, 7549747)),  # 0.9 TINY is flushed; -0.6 TINY is flushed
        (True, True, (8388608, 20971520), (0, 0)),  # DAZ takes d and e for 0, on either side
    ],
)
def test_the_posts_examples(compute, ftz, daz, sums, products):
    """Addition is not associative under FTZ; multiplication not distributive under FTZ without DAZ."""
    # In multiples of 2^-149, TINY being 2^23: 2.5 TINY, -1.6 TINY and TINY; 0.4 TINY and 0.5 TINY. 1 / TINY is 2^126.
    a, b, c, d, e = (np.float32(n * 2.0**-149) for n in (20971520, -13421773, 8388608, 3355443, 4194304))
    add, multiply = (functools.partial(compute, op, ftz=ftz, daz=daz) for op in ("add", "multiply"))
    assert_same_bits([add(add(a, b), c), add(add(b, c), a)], [*ldexp(sums, -149)])
    found = multiply(add(d, e), 1 / TINY), add(multiply(d, 1 / TINY), multiply(e, 1 / TINY))
    assert_same_bits(found, [*ldexp(products, -23)])


# --- The network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(9, 4), (9, 8, 4), (9, 8, 7, 4), (9, 8, 7, 6, 4)])
@pytest.mark.parametrize("exponent", [124, 125, 126])
@pytest.mark.parametrize("ftz", [True, hardware])
def test_forward_is_a_chain_of_dead_zones(sizes, exponent, ftz):
    """Weights, inputs and biases in quarters: every sum is exact, so float64 is the reference."""
    rng = RNG(2)
    params = [(rng.integers(-3, 4, (i, o)) / 4, rng.integers(-4, 5, o) / 4) for i, o in itertools.pairwise(sizes)]
    x = rng.integers(0, 5, (20, sizes[0])) / 4 * 2.0 ** (exponent - 125)

    def t(z):
        return np.where(np.abs(z) >= 2.0 ** (exponent - 126), z, 0)

    (W, b), *later = params
    h = t(x @ W + b)
    for W, b in later:
        h = t(t(h @ W) + t(b))
    params = [(W.astype(np.float32), b.astype(np.float32)) for W, b in params]
    found = fpnl.forward(params, x.astype(np.float32), ftz, np.float32(2.0**exponent))
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
        assert np.all((h == 0) | (np.abs(h) >= TINY)) and 0.1 < np.mean(h == 0) < 0.9  # nothing is subnormal


def test_later_products_are_the_literal_ones_of_subnormals():
    """Up to the rounding of every partial sum to a multiple of 2^-149, half of one each."""
    params, x, _ = example((40, 30, 20), n=25)
    W = params[1][0] / np.float32(8)  # sums around 2^-126, many of them subnormal
    h1, h2 = fpnl.activations([params[0], (W, params[1][1])], x, ftz=False)
    literal, rescaled = h1 / fpnl.SCALE @ W, h2 / fpnl.SCALE
    assert np.sum((np.abs(rescaled) < TINY) & (rescaled != 0)) > 100
    assert np.all(np.abs(literal.astype(float) - rescaled.astype(float)) <= (len(W) + 1) * 2.0**-149)


@pytest.mark.parametrize("ftz", [False, True, hardware])
def test_forward_is_linear_without_the_flush_only(ftz):
    """f(x) - f(0) doubles with x in the linear network; with the flush it does not, far from it."""
    params, x, _ = example((30, 20, 20, 4), n=40)
    f = functools.partial(fpnl.forward, params, ftz=ftz)
    assert (np.abs(f(2 * x) - 2 * f(x) + f(0 * x)).max() < 1e-5) == (ftz is False)


@needs_hardware
def test_forward_on_the_cpus_own_flags_has_the_same_bits(mnist):
    """All 10,000 test images, initial and trained weights: the claim this project stands on."""
    x = data.pixels(mnist[2])
    for params in (fpnl.init(RNG(0)), data.load_weights(ROOT / "docs" / "weights.npz")[0]):
        assert_same_bits(fpnl.forward(params, x), fpnl.forward(params, x, ftz="hardware"))


@pytest.mark.parametrize("ftz", [True, hardware])
def test_the_float_below_the_threshold_lives_in_later_layers_alone(ftz):
    """0.49999997 / S is divided in IEEE arithmetic there, and is rounded to TINY: so `forward` and `es_gradient_plain`.
    In the first layer it flushes, and `es_slopes` has one dead zone for all."""
    below, one, zero = np.float32(0.49999997), np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    first, later = [(one * below, zero), (one, zero)], [(one, zero), (one * below, zero)]
    assert [h.item() for h in fpnl.activations(first, one, ftz)] == [0, 0]
    assert [h.item() for h in fpnl.activations(later, one, ftz)] == [1, 0.5]
    outputs, _ = fpnl.es_slopes(later, one, [0], np.ones((1, 2), np.int8), ftz=ftz)
    assert [h.item() for h in outputs] == [1, 0]
    assert [h.item() for h in fpnl.activations(later, one, ftz=False)] == [1, 0.5]  # rounded there, too


@pytest.mark.parametrize("ftz", [True, hardware])
@pytest.mark.parametrize(
    ("bias", "exponent", "acts"),
    [(0.49999997, 125, False), (0.5, 125, True), (0.49999997, 124, True), (0.5, 126, False)],
)
def test_later_biases_act_from_the_threshold_on(ftz, bias, exponent, acts):
    """Below it, they change no output, and ES leaves them alone; from it on, it refuses them."""
    params, x, labels = example((20, 16, 12, 5), n=30)
    x, net = x * np.float32(2.0 ** (exponent - 125)), {"ftz": ftz, "scale": np.float32(2.0**exponent)}
    biased = [params[0], *((W, RNG(3).choice(np.float32([-bias, bias]), len(b))) for W, b in params[1:])]
    assert np.array_equal(fpnl.forward(biased, x, **net), fpnl.forward(params, x, **net)) != acts
    with pytest.raises(ValueError, match=r"later biases: expected \|b\| < S") if acts else contextlib.nullcontext():
        grads = fpnl.es_gradient(biased, x, labels, RNG(4), **net)
        assert_same_bits(grads, fpnl.es_gradient(params, x, labels, RNG(4), **net))
        assert all(not db.any() for _, db in grads[1:]) and grads[0][1].all()


def test_another_transfer_makes_an_ordinary_network():
    """Its logits are linear, all its biases act, nothing is scaled or flushed."""
    params, x, _ = example()
    params = [(W, np.linspace(-0.3, 0.3, len(b), dtype=np.float32)) for W, b in params]
    (W1, b1), (W2, b2), (W3, b3) = params
    h1 = np.tanh(x @ W1 + b1)
    h2 = np.tanh(h1 @ W2 + b2)
    assert_same_bits(fpnl.activations(params, x, transfer=np.tanh), [h1, h2, h2 @ W3 + b3])
    tiny = x * TINY / np.float32(8)
    products = tiny @ W1 @ W2 @ W3
    assert_same_bits(fpnl.forward([(W, 0 * b) for W, b in params], tiny, transfer=np.positive), products)
    assert products.any() and np.abs(products).max() < TINY


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("size", [5, 1e4])
def test_cross_entropy_is_its_formula_whatever_the_memory_order(smoothing, size):
    """-sum_c y_c log softmax(o)_c, also where exp(o) overflows; leading axes share the labels; the logits stay."""
    logits, labels = np.float32(size) * RNG(0).standard_normal((3, 2, 7, 10), np.float32), RNG(1).integers(0, 10, 7)
    o, y = logits.astype(float), np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    expected = np.logaddexp.reduce(o, axis=-1) - (y * o).sum(axis=-1)
    found = fpnl.cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * size)
    assert_same_bits(fpnl.cross_entropy(logits[1], [*labels], smoothing), found[1])
    for order in itertools.permutations(range(4)):
        moved = np.ascontiguousarray(logits.transpose(order)).transpose(np.argsort(order))
        before = moved.copy()
        assert_same_bits([fpnl.cross_entropy(moved, labels, smoothing), moved], [found, before])
    for none in (slice(0), 0):
        with pytest.raises(ValueError, match=r"logits, labels: expected \[..., n, classes\], \[n\], n > 0, found"):
            fpnl.cross_entropy(logits[0, 0][none], labels[none])


# --- The ES gradient --------------------------------------------------------------------------------


def assert_plain_is_fast(*arguments, task=32, **options):
    """`es_gradient` against `es_gradient_plain`, whose gradient is returned."""
    plain = fpnl.es_gradient_plain(*arguments, RNG(5), **options)
    fast = fpnl.es_gradient(*arguments, RNG(5), task=task, **options)
    for a, b in zip(fpnl.leaves(fast), fpnl.leaves(plain), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    return plain


NETWORKS = [
    {},
    {"ftz": False},
    pytest.param({"ftz": "hardware"}, marks=needs_hardware),
    pytest.param({"scale": np.float32(2.0**126)}, marks=slow),
    {"transfer": np.tanh},
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("sizes", [(6, 4), (12, 9, 5), (12, 10, 9, 5), (6, 8, 7, 9, 4)])
@pytest.mark.parametrize("block", [1, 3, 64, *(pytest.param(b, marks=slow) for b in (2, 4))])
@pytest.mark.parametrize("control_variate", [False, True])
def test_fast_members_are_literally_mutated_networks(sizes, block, control_variate, network):
    """One example, and five in tasks of two, with weights. All biases act where nothing flushes, else b1 alone."""
    params, x, labels = example(sizes, n=5, seed=len(sizes))
    params = [(W, np.linspace(-0.4, 0.4, len(b), dtype=np.float32)) for W, b in params]
    x *= network.get("scale", fpnl.SCALE) / fpnl.SCALE  # with the dead zone
    acting = len(params) if "transfer" in network or network.get("ftz") is False else 1
    for n, sigma, task, weights in ((1, 0.2, 32, None), (5, 0.05, 2, np.linspace(0.5, 0, 5, dtype=np.float32))):
        how = {"sigma": sigma, "block": block, "control_variate": control_variate, "weights": weights, **network}
        grads = assert_plain_is_fast(params, x[:n], labels[:n], task=task, **how)
        assert [(dW.any(), db.any()) for dW, db in grads] == [(True, l < acting) for l in range(len(params))]


@slow
@pytest.mark.parametrize("control_variate", [False, True])
def test_fast_members_of_the_real_network(mnist, control_variate):
    """784-512-512-10, one image, 1,300 literally mutated networks. Where a sum is at the threshold but for its
    rounding, a unit lives in one of the two and not in the other: that may move the estimate of a few units."""
    arguments = fpnl.init(RNG(0)), data.pixels(mnist[2][:1]), mnist[3][:1]
    plain = fpnl.es_gradient_plain(*arguments, RNG(1), control_variate=control_variate)
    fast = fpnl.es_gradient(*arguments, RNG(1), control_variate=control_variate)
    for (dW, _), (dW_fast, _) in zip(plain, fast):
        assert dW.any()
        assert np.all(np.abs(dW - dW_fast) <= 1e-4 * np.abs(dW).max(), axis=0).mean() > 0.95


@pytest.mark.parametrize("control_variate", [False, True])
def test_no_mutation_along_an_input_of_zero_has_an_effect(control_variate):
    """Where all outputs of a layer are 0, the slopes of the next are; also if sigma passes the threshold."""
    params, x, labels = example(n=4)
    x[1] = 0  # and b1 = 0
    options = {"sigma": 3.0, "block": 2, "control_variate": control_variate}
    assert_plain_is_fast(params, x, labels, **options)
    outputs, slopes = fpnl.es_slopes(params, x, labels, fpnl.mutation_signs(RNG(0), params, 4), **options)
    assert not outputs[0][1].any() and not slopes[1][1].any() and slopes[0][1].any() and slopes[1][0].any()


def test_other_losses():
    """Regression: the labels are rows of targets, and the loss writes over the outputs."""

    def losses(outputs, targets):
        found = np.square(outputs - targets).sum(axis=-1)
        outputs[:] = 0
        return found

    params, x, _ = example(n=7)
    targets = RNG(1).standard_normal((7, 5), dtype=np.float32)
    assert assert_plain_is_fast(params, x, targets, losses=losses, block=3, control_variate=True)[0][0].any()
    found = fpnl.es_gradient(params, x, targets, RNG(0), losses=losses, return_losses=True)[1]
    np.testing.assert_allclose(found, losses(fpnl.forward(params, x), targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("control_variate", [False, True])
def test_gradient_of_a_linear_layer_is_the_analytic_one(control_variate):
    """One layer without the flush: softmax regression, x^T w (p - y). Fixes sign and scale; w = 1 / n if none are
    given. The losses come from the pass that is made anyway."""
    params, x, labels = example((20, 6), n=40)
    how = {"sigma": 0.01, "ftz": False, "control_variate": control_variate, "return_losses": True, "task": 16}
    z = x.astype(float) @ params[0][0]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    for weights in (None, RNG(1).random(40, np.float32)):
        ((dW, db),), losses = fpnl.es_gradient(params, x, labels, RNG(0), weights=weights, **how)
        delta = (p - np.eye(6)[labels]) * (1 / 40 if weights is None else weights[:, None])
        for found, expected in ((dW, x.T @ delta), (db, delta.sum(axis=0))):
            np.testing.assert_allclose(found, expected, atol=2e-4 if weights is None else 4e-3)
        np.testing.assert_allclose(losses, -np.log(p[np.arange(40), labels]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transfer", [None, lambda z: z * (z > 0), np.tanh], ids=["dead zone", "ReLU", "tanh"])
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
        found = (fpnl.es_gradient(params, x, labels, RNG(seed), ftz=False, control_variate=cv) for cv in (True, False))
        errors = [np.linalg.norm(dW - exact) for (dW, _), *_ in found]
        assert errors[0] < errors[1] / 20


def test_signs_are_independent_fair_coins():
    params = [(None, range(width)) for width in (200, 91, 10)]
    signs = fpnl.mutation_signs(RNG(0), params, 1003)
    assert signs.shape == (1003, 301) and signs.dtype == np.int8 and set(np.unique(signs)) == {-1, 1}
    for pairs in (signs, signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1], signs[:, 8:] * signs[:, :-8]):
        assert abs(pairs.mean()) < 4 / np.sqrt(pairs.size)


@pytest.mark.parametrize("n", [1, 304])
def test_the_generators_state_decides_the_signs(n):
    """Not its seed, and whatever the size of the batch: it advances, and one that is given its state goes on alike."""
    params, x, labels = example((12, 40, 9, 5), n)
    rng, same, another, alone, drawn, resumed = map(RNG, (3, 3, 3, 3, 3, 4))
    defaults = {"sigma": 0.02, "block": 4, "control_variate": False}
    first, second = (fpnl.es_gradient(params, x, labels, rng) for _ in range(2))
    assert not np.array_equal(first[0][0], second[0][0])
    assert_same_bits(fpnl.es_gradient(params, x, labels, same, **defaults), first)
    resumed.bit_generator.state = same.bit_generator.state
    assert_same_bits(fpnl.es_gradient(params, x, labels, resumed), second)
    signs = fpnl.mutation_signs(another, params, n)
    np.testing.assert_array_equal(signs[:1], fpnl.mutation_signs(alone, params, 1))
    for f, given in ((fpnl.es_slopes, signs[:1]), (fpnl.es_gradient_plain, RNG(0))):
        expected = f(params, x[:1], labels[:1], copy.deepcopy(given), **defaults)
        assert_same_bits(f(params, x[:1], labels[:1], given), expected)
    fpnl.mutation_signs(another, params, n)
    assert all(drawn.bytes(-(-54 * n // 8)) for _ in range(2))  # 40 + 9 + 5 signs an example, a bit each
    assert rng.bit_generator.state == another.bit_generator.state == drawn.bit_generator.state


@pytest.mark.parametrize("ftz", [True, hardware])
@pytest.mark.parametrize("exponent", [125, *(pytest.param(e, marks=slow) for e in (126, 64))])
def test_the_fast_dead_zone_is_the_scaling_of_the_network(ftz, exponent):
    """z / S * S, from 1/4 to 1 and at special values."""
    scale, one = np.float32(2.0**exponent), (np.ones((1, 1), np.float32), np.zeros(1, np.float32))
    all_of_them, _ = scaled()
    near = np.concatenate([all_of_them[:: 1 << 5], all_of_them[(1 << 22) - 1000 :][:2000], grid()[0][:64]])
    x = near[np.abs(near) < 4] * np.float32(2.0 ** (exponent - 125))
    for z in np.array_split(np.concatenate([x, -x]), 64):
        (found,), _ = fpnl.es_slopes([one], z[:, None], [0] * len(z), np.ones((len(z), 1)), ftz=ftz, scale=scale)
        assert_same_bits(found[:, 0], fpnl.divide(z + np.float32(0), scale) * scale)
        np.testing.assert_array_equal(found[:, 0] != 0, np.abs(z) >= scale * TINY)


@needs_hardware
def test_the_fast_path_flushes_by_the_cpu_if_asked_to(monkeypatch):
    """The bits are the same either way, so only this tells."""
    entered, enter = [], fpnl.hardware_ftz.__enter__
    monkeypatch.setattr(fpnl.hardware_ftz, "__enter__", lambda self: entered.append(self.mode) or enter(self))
    for ftz, used in (("hardware", True), (True, False), (False, False)):
        entered.clear()
        fpnl.es_gradient(*example(), RNG(0), ftz=ftz)
        assert ((True, True) in entered) == used and (False, False) in entered


def test_whatever_maps_the_bits_are_the_same():
    """More than two tasks, by every kind of map; the generator advances here, not where a task goes."""
    params, x, labels = example(n=67)
    gradient = functools.partial(fpnl.es_gradient, params, x, labels, block=3, control_variate=True)
    rng = RNG(0)
    expected = [gradient(rng), gradient(rng)]
    with concurrent.futures.ThreadPoolExecutor(3) as threads, multiprocessing.get_context("spawn").Pool(2) as pool:
        for its_map, workers in itertools.product((threads.map, pool.map, pool.imap), (None, 2, 5)):
            rng = RNG(0)
            assert_same_bits([gradient(rng, map_tasks=its_map, workers=workers) for _ in range(2)], expected)


@pytest.mark.parametrize(
    ("n", "task", "workers", "sizes", "lengths"),
    [
        (64, 16, 1, [16, 16, 16, 16], [4]),
        (70, 16, 4, [12, 12, 12, 12, 11, 11], [1, 2, 1, 2]),
        (70, 16, 9, [12, 12, 12, 12, 11, 11], [1, 1, 1, 1, 1, 1]),
        (5, None, None, [5], [1]),
        (16, None, None, [16], [1]),
        (17, None, None, [9, 8], [1, 1]),
        (65, None, None, [17, 16, 16, 16], [1, 1, 1, 1]),
        (3, 1, None, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_work_is_cut_into_equal_tasks_and_a_list_for_each_worker(n, task, workers, sizes, lengths):
    """None is empty, no example travels twice, the network's weights once a list; who gets one needs fpnl alone."""
    params, x, labels = example((12, 40, 9, 5), n)
    found = []

    def its_map(function, lists):
        assert pickle.loads(pickle.dumps(function)).func.__module__ == "fpnl"
        found[:] = lists
        return map(function, lists)

    fpnl.es_gradient(params, x, labels, RNG(0), workers=workers, map_tasks=its_map, **({"task": task} if task else {}))
    parts, weights = [task["x"] for each in found for task in each], sum(a.nbytes for a in fpnl.leaves(params))
    assert ([*map(len, parts)], [*map(len, found)]) == (sizes, lengths)
    np.testing.assert_array_equal(np.concatenate(parts), x)
    assert sum(len(pickle.dumps(each)) for each in found) < x.nbytes + n * 100 + len(found) * (weights + 2000)


def test_memory_stays_bounded():
    """1,000 classes and blocks of 1: the logits of all members at once would take 128 MB."""
    params, x, labels = example((20, 300, 1000), n=16)
    tracemalloc.start()
    fpnl.es_gradient(params, x, labels, RNG(0), block=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


# --- The start of a training, and its step ----------------------------------------------------------


@pytest.mark.parametrize("sizes", [(784, 512, 512, 10), (3, 1), (5, 4, 3), (4, 6, 5, 7, 2)])
def test_init_is_he_normal_float32_with_zero_biases(sizes):
    params = fpnl.init(RNG(1), sizes)
    assert [W.shape for W, b in params] == list(itertools.pairwise(sizes))
    assert all(b.shape == W.shape[1:] and not b.any() for W, b in params)
    assert all(W.std() == pytest.approx(np.sqrt(2 / len(W)), rel=3 / np.sqrt(2 * W.size)) for W, b in params)
    assert_same_bits(params, fpnl.init(RNG(1), sizes))


@pytest.mark.parametrize(("decay", "beta1", "beta2", "eps"), [(0, 0.9, 0.999, 1e-8), (0.3, 0.3, 0.4, 0.1)])
def test_adamw_is_the_published_algorithm(decay, beta1, beta2, eps):
    """Of all arrays in lists, nested alike, and in place; by its defaults, and by others."""

    def tree(filled):
        return [[filled((3, 5), np.float32)], (filled(100, np.float32), filled(0, np.float32))]

    normal = RNG(9).standard_normal
    p, m, v = map(tree, (normal, np.zeros, np.zeros))
    ps, ms, vs = ([a.astype(float) for a in fpnl.leaves(of)] for of in (p, m, v))
    how = {"weight_decay": decay, "beta1": beta1, "beta2": beta2, "eps": eps} if decay else {}
    for step in range(1, 30):
        g, lr = tree(normal), 0.01 / step
        fpnl.adamw(p, g, m, v, step, lr, **how)
        for i, grad in enumerate(fpnl.leaves(g)):
            ms[i] = beta1 * ms[i] + (1 - beta1) * grad
            vs[i] = beta2 * vs[i] + (1 - beta2) * grad.astype(float) ** 2
            t = np.sqrt(vs[i] / (1 - beta2**step)) + eps
            ps[i] = ps[i] - lr * decay * ps[i] - lr * (ms[i] / (1 - beta1**step)) / t
    for found, expected in zip(fpnl.leaves(p), ps, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# --- The CPU's flags ----------------------------------------------------------------------------------


def flags():
    """FTZ and DAZ as this thread's arithmetic shows them: is TINY / 2 zero, and is 2^-127 * 2?"""
    with np.errstate(all="ignore"):
        products = TINY * np.float32(0.5), from_bits(0x00400000) * np.float32(2)
    return tuple(bool(bits(x) == 0) for x in products)


def environment():
    """This thread's floating-point environment, byte for byte."""
    read, *_ = fpnl._fpu_control()
    read(env := (ctypes.c_uint32 * 8)())
    return bytes(env)


@needs_hardware
@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(THIS_CPUS_MODES, repeat=2)])
def test_the_cpu_enters_a_mode_and_returns(outer, inner):
    """From any mode into any other, also twice, and back, after an exception or none: exactly what was there."""
    flags()  # some exceptions are noted in the environment, and stay
    start, switch = environment(), fpnl.hardware_ftz(ftz=inner[0], daz=inner[1])
    with cpu_mode(*outer):
        assert flags() == outer
        between = environment()
        with pytest.raises(ZeroDivisionError), switch, switch:
            assert flags() == inner
            raise ZeroDivisionError
        assert environment() == between and flags() == outer
    assert environment() == start and flags() == (False, False)


@needs_hardware
def test_a_mode_is_of_its_thread():
    """Threads that run already keep theirs; those that start in a mode have it for life, but not in what is mapped, a
    function of the user's own included, and in AdamW."""
    with concurrent.futures.ThreadPoolExecutor(1) as older, concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert older.submit(flags).result() == (False, False)
        with fpnl.hardware_ftz():
            assert (older.submit(flags).result(), pool.submit(flags).result()) == ((False, False), (True, True))
        assert (flags(), pool.submit(flags).result()) == ((False, False), (True, True))
        found, expected = (fpnl.es_gradient(*example(n=67), RNG(0), map_tasks=each) for each in (pool.map, map))
        assert_same_bits(found, expected)
        assert fpnl.mapped(flags, [{}, {}], map_tasks=pool.map) == [(False, False)] * 2
        found, expected = ([np.full(3, 2.0**e, np.float32) for e in (-120, -63, -130, -140)] for _ in range(2))
        fpnl.adamw(*expected, step=1, lr=1e-3)
        pool.submit(fpnl.adamw, *found, step=1, lr=1e-3).result()
        assert_same_bits(found, expected)


@pytest.fixture
def forgotten(monkeypatch):
    """What is known of the platform is asked for again: a monkeypatch for the answer."""
    for name in ("_fpu_control", "_look_at_the_effect"):
        monkeypatch.setattr(fpnl, name, functools.cache(getattr(fpnl, name).__wrapped__))
    return monkeypatch


NO_LIBRARY = {key: ("libnowhere.so", *where) for key, (_, *where) in fpnl._FENV.items()}
UNKNOWN = [
    (platform, "system", lambda: "Plan9"),
    (platform, "machine", lambda: "riscv64"),
    pytest.param(ctypes, "sizeof", lambda _: 4, marks=needs_hardware),  # a 32-bit process
    pytest.param(fpnl, "_FENV", NO_LIBRARY, marks=needs_hardware),
]


@pytest.mark.parametrize(("owner", "name", "other"), UNKNOWN)
def test_an_unknown_platform_is_a_runtime_error(forgotten, owner, name, other):
    """But only where the CPU is to be switched: the emulation goes on."""
    forgotten.setattr(owner, name, other)
    says = f"hardware_ftz: unknown platform {platform.system()} {platform.machine()}; use the emulation"
    with pytest.raises(RuntimeError, match=says), fpnl.hardware_ftz():
        pytest.fail("inside")
    with pytest.raises(RuntimeError, match=says):
        fpnl.es_gradient(*example(), RNG(0), ftz="hardware")
    assert fpnl.multiply(TINY, np.float32(0.5)) == 0
    fpnl.es_gradient(*example(), RNG(0))


@needs_hardware
@pytest.mark.parametrize("daz", [True, False])
def test_flags_without_effect_are_a_runtime_error(forgotten, daz):
    """An emulator or instrumenting tool that takes the write and computes on; a CPU with one flag for both."""
    read, write, register, bits = fpnl._fpu_control()
    before, one_flag = environment(), ((0, 0, bits[2], bits[2]) if daz else (0, 0, bits[3], bits[3]))
    for control in ((read, lambda env: None, register, bits), (read, write, register, one_flag)):
        forgotten.setattr(fpnl, "_fpu_control", lambda control=control: control)
        with pytest.raises(RuntimeError, match="unknown platform.*after setting them"), fpnl.hardware_ftz(daz):
            pytest.fail("inside")
        assert environment() == before


# --- The module -----------------------------------------------------------------------------------------


ALONE = """
import sys, numpy as np, fpnl
before = np.random.get_state()[1].copy()
params, x = fpnl.init(np.random.default_rng(0)), np.ones((2, 784), "f")
fpnl.es_gradient(params, x, [0, 1], np.random.default_rng(0))
print(fpnl.__file__, fpnl.forward(params, x).shape, (before == np.random.get_state()[1]).all())
print([n for n, v in vars(fpnl).items() if n[0] != "_" and (n in dir(__builtins__) or not v.__doc__)])
print({"train", "data", "scipy", "pytest"} & {m.partition(".")[0] for m in sys.modules})
"""


def test_fpnl_alone_in_a_folder(tmp_path):
    """It imports nothing else, needs NumPy 2, says so, and leaves the global generator alone."""
    shutil.copy(ROOT / "fpnl.py", tmp_path)
    done = run("-c", ALONE, program=PYTHON, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'fpnl.py'} (2, 10) True\n[]\nset()\n"
    older = "import numpy; numpy.__version__ = '1.26.4'; import fpnl"
    done = run("-c", older, program=PYTHON, cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: fpnl: expected NumPy 2 or later, found 1.26.4"


def test_the_readmes_example(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[1]
    exec(code, {})
    flushed, linear = map(float, capsys.readouterr().out.split())
    assert flushed > 0.9 and linear < 0.75
