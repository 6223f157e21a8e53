"""What fpnl.py makes of its arguments, and what the bits of its results do not depend on."""

import functools
import itertools
import os
import pickle
import platform
import re

import numpy as np
import pytest
from helpers import HARDWARE, PYTHON, RNG, ROOT, assert_same_bits, example, needs_hardware, run

import fpnl
from test_fpnl import MODES, OPS, RULES, TINY, cpu_mode, flags, grid, some


class Other:
    """An array of another library, which raises this error when NumPy asks for its values."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


def moved(a, offset, order):
    """In another order, at an address that is so many bytes past a multiple of 64: BLAS takes other kernels for it."""
    raw = np.zeros(a.nbytes + 128, np.uint8)
    there = np.ndarray(a.shape, a.dtype, raw, -raw.ctypes.data % 64 + offset, order=order)
    there[...] = a
    return there


KINDS = {  # of the same values
    "subclass": lambda a: a.view(np.recarray),
    "strided": lambda a: np.repeat(a, 3, axis=-1)[..., ::3],
    "Fortran": np.asfortranarray,
    **{f"moved {n} {order}": functools.partial(moved, offset=n, order=order) for n in (1, 4) for order in "CF"},
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "another library's": memoryview,
}
NOT_IN_PLACE = [*KINDS][-3:]
REFUSED = {
    "float64": (lambda a: np.zeros(a.shape), "expected float32 .*, found float64"),
    "masked": (lambda a: np.ma.array(a, mask=a > 0), "expected an array without a mask, found a masked one"),
    "with a gradient": (lambda a: Other(RuntimeError("on the GPU")), "expected an array, found Other: on the GPU"),
    "of a GPU": (lambda a: Other(TypeError("use .get()")), "expected an array, found Other: use .get"),
}


def arguments(sizes=(12, 10, 9, 5), n=7):
    """Of every public function that takes some: name -> {name: argument}."""
    params, x, labels = example(sizes, n)
    rng, net, weights = {"rng": RNG(2)}, {"params": params, "x": x}, np.linspace(0, 1, n, dtype=np.float32)
    es = net | {"labels": labels, "signs": fpnl.mutation_signs(RNG(1), params, n)}
    exponents = {"p": -9, "g": -63, "m": -130, "v": -140}
    pgmv = {name: [np.full_like(a, 2.0**e) for a in fpnl.leaves(params)] for name, e in exponents.items()}
    return {
        **dict.fromkeys(OPS, dict(zip("ab", some()))),
        **dict.fromkeys(("forward", "activations"), net),
        **dict.fromkeys(("es_gradient_plain", "es_gradient"), net | {"labels": labels, "weights": weights} | rng),
        "flush": {"x": some()[0]},
        "cross_entropy": {"logits": x[:, :5] * TINY, "labels": labels},
        "mutation_signs": {"params": params, "n": n} | rng,
        "es_slopes": es | {"control_variate": True},
        "init": {"sizes": sizes} | rng,
        "adamw": pgmv | {"step": 1, "lr": 0.1, "weight_decay": 0.5},
        "hardware_ftz": {},
    }


def results(name, given):
    """What a function returns, or has changed in place."""
    found = getattr(fpnl, name)(**given)
    return fpnl.leaves([given[tree] for tree in "pmv"] if found is None else found)


def state(given):
    """The bytes of all arrays, and where the generator is."""
    arrays = [np.asarray(a).tobytes() for a in fpnl.leaves([*given.values()]) if isinstance(a, np.ndarray)]
    return arrays, getattr(getattr(given.get("rng"), "bit_generator", None), "state", None)


def converted(tree, kind):
    if isinstance(tree, (list, tuple)):
        return [converted(branch, kind) for branch in tree]
    return kind(tree) if isinstance(tree, np.ndarray) else tree


all_that_take_arrays = pytest.mark.parametrize("name", arguments().keys() - {"mutation_signs", "init", "hardware_ftz"})


@pytest.mark.parametrize("kind", KINDS)
@all_that_take_arrays
def test_what_passes_a_check_is_what_is_computed_with(name, kind):
    """Whatever kind an array is and wherever it lies: the same bits, in arrays of NumPy's own."""
    given = {key: converted(value, KINDS[kind]) for key, value in arguments()[name].items()}
    given |= {key: arguments()[name][key] for key in ("p", "m", "v") if name == "adamw"}
    found = results(name, given)
    assert_same_bits(found, results(name, arguments()[name]))
    assert {*map(type, found)} == {np.ndarray}


@pytest.mark.parametrize("kind", REFUSED)
@all_that_take_arrays
def test_what_would_lose_something_is_refused_by_name(name, kind):
    """Each array alone, also one in a list, before any work."""
    refused, says = REFUSED[kind]
    for argument, value in arguments()[name].items():
        for array in fpnl.leaves(value):
            if isinstance(array, np.ndarray) and (kind != "float64" or array.dtype == np.float32):
                bad = converted(value, lambda a, array=array: refused(a) if a is array else a)
                given = arguments()[name] | {argument: bad}
                before = state(given)
                with pytest.raises(TypeError, match=r"^\w+: " + says):
                    results(name, given)
                assert state(given) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", "pmv")
def test_adamw_changes_arrays_in_place_or_not_at_all(place, kind):
    """Of any layout, and several chunks of a large one; but no copy, which would be changed in their stead."""
    given = arguments((300, 200, 2))["adamw"]
    given[place][0] = KINDS[kind](given[place][0])
    before = state(given)
    if kind in NOT_IN_PLACE:
        with pytest.raises(ValueError, match="p, m, v: expected NumPy's own arrays"):
            fpnl.adamw(**given)
        assert state(given) == before
    else:
        found, expected = results("adamw", given), results("adamw", arguments((300, 200, 2))["adamw"])
        assert_same_bits([*map(np.asarray, found)], expected)


ALL_OPS, NETS = " ".join(OPS), "forward activations es_slopes es_gradient es_gradient_plain"
ES, GRADIENT = "es_slopes es_gradient es_gradient_plain", "es_gradient es_gradient_plain"
PARAMS, X, Y = example(n=7)
NARROW, NONE = [(W, b[1:]) for W, b in PARAMS], [(W[:, :0], b[:0]) for W, b in PARAMS]
NOT_32, NO_FLAG = [1.0, 1, None, [1.0], np.float64(1), np.ones(5), np.ones(5, "e")], ["off", 2, 1, 0.0, None]
NO_COUNT, SIGNS = [0, 1.5, "8"], [*map(np.full, [(5, 24), (8, 24), (7, 24), (7, 24)], [1, 1, 0, 2])]
NO_WEIGHTS = [np.float32([1] * 6 + [w]) for w in (-1e-9, np.inf, np.nan)] + [np.ones(5, "f")]
BAD = [  # functions, arguments, values that are refused, how (N: the argument's name)
    (ALL_OPS, "a b", NOT_32, TypeError, "operand: expected float32 .*, found"),
    (ALL_OPS, "tininess", ["during"], ValueError, r"N: expected one of \('after', 'before'\), found 'during'"),
    (ALL_OPS, "daz", NO_FLAG, ValueError, r"N: expected one of \(True, False\), found"),
    ("hardware_ftz", "daz ftz", [*NO_FLAG, flags], ValueError, r"N: expected one of \(True, False\), found"),
    ("init", "sizes", [(), (5,), (5, 0)], ValueError, "N: expected at least two positive widths, found"),
    (f"init mutation_signs {GRADIENT}", "rng", [0, np.random.RandomState(0)], TypeError, "N: expected a numpy.random"),
    (NETS, "params", [[]], ValueError, r"N: expected \[\(W, b\), ...\]"),
    (NETS, "params", [PARAMS[::-1], NARROW, NONE], ValueError, r"layer 1: expected W \[12, n\], b \[n\], n > 0, found"),
    (NETS, "x", [X[:, 1:], X[0], X[0, 0]], ValueError, r"layer 1: expected W \[(11|shape \((12,)?\)), n\]"),
    (NETS, "ftz", [*NO_FLAG, X], ValueError, r"N: expected one of \(True, False, 'hardware'\), found"),
    (NETS, "scale", [2.0**125, 1, None], TypeError, "N: expected float32"),
    (NETS, "scale", [*np.float32([0, 0.5, 3, -2, 2.0**127, np.nan])], ValueError, "N: expected a power of two from 1"),
    (NETS, "transfer", ["tanh", lambda z: z.astype(float), X], TypeError, "N's result: expected float32 .*, found"),
    (NETS, "transfer", [lambda z: z[0]], ValueError, "N: expected a result of its argument's shape"),
    (ES, "x", [X[:0]], ValueError, "labels: expected 0 >= 1 rows, as in x"),
    (ES, "labels", [Y[1:], Y[0]], ValueError, "N: expected 7 >= 1 rows, as in x, found"),
    ("cross_entropy", "labels", [Y[1:], Y[0], Y[:, None]], ValueError, r"logits, N: expected \[..., n, classes\], "),
    (f"{ES} cross_entropy", "labels", [Y.astype("f"), Y > 1], TypeError, "N: expected integers, found"),
    (f"{ES} cross_entropy", "labels", [0 * Y + 5, 0 * Y - 1], ValueError, r"N: expected all in \[0, 5\), found \["),
    ("cross_entropy", "logits", [X[:0], X[0]], ValueError, r"N, labels: expected \[..., n, classes\], "),
    ("cross_entropy", "smoothing", [-0.1, 1.1, np.nan], ValueError, "N: expected a share from 0 to 1, found"),
    (ES, "sigma", [0, -1, 2.0**-127, np.inf, np.nan, "1"], ValueError, "N: expected finite, >= 2"),
    (ES, "block", [*NO_COUNT, None], ValueError, "N: expected an integer >= 1, found"),
    (ES, "control_variate", NO_FLAG, ValueError, r"N: expected one of \(True, False\), found"),
    (ES, "losses", [lambda o, y: o.sum(-1, float)], TypeError, "result of N: expected float32"),
    (ES, "losses", [lambda o, y: o], ValueError, "N: expected .* for logits"),
    ("es_slopes", "signs", SIGNS, ValueError, r"N: expected shape \(7, 24\) of -1 and"),
    (GRADIENT, "weights", NO_WEIGHTS, ValueError, "N: expected 7 finite numbers >= 0, found"),
    ("es_gradient", "task workers", NO_COUNT, ValueError, "N: expected an integer >= 1, found"),
    ("adamw", "step", NO_COUNT, ValueError, "N: expected an integer >= 1, found"),
    ("adamw", "lr weight_decay", [-0.1, np.nan, np.inf, 1e300], ValueError, "lr, weight_decay, beta1, beta2, eps: exp"),
    ("adamw", "beta1 beta2", [1.0, 1.5, -0.1], ValueError, "lr, weight_decay, beta1, beta2, eps: .* beta < 1"),
    ("adamw", "eps", [0.0, -0.1], ValueError, "lr, weight_decay, beta1, beta2, eps: expected .* eps > 0"),
    ("adamw", "p g m", [fpnl.leaves(PARAMS)[::-1], [PARAMS[0][0]]], ValueError, "p, g, m, v: expected the same shapes"),
]  # fmt: skip


@pytest.mark.parametrize(("functions", "names", "values", "error", "says"), BAD)
def test_a_bad_argument_is_one_clear_error_before_any_work(functions, names, values, error, says):
    """The others are what they were: arrays that are changed in place, and the generator."""
    for function, name, value in itertools.product(functions.split(), names.split(), values):
        given = arguments()[function] | {name: value}
        before = state(given)
        with pytest.raises(error, match=re.sub(r"\bN\b", name, says)):
            getattr(fpnl, function)(**given)
        assert state(given) == before


# --- What no bits depend on -----------------------------------------------------------------------------


@functools.cache
def calls():
    """Of every public function of numbers, in all its modes; made once, as a CPU that flushes would make others."""
    given, a, b = arguments(), *grid()
    networks = [{"ftz": ftz} for ftz in (True, False, *["hardware"] * HARDWARE)] + [{"transfer": np.tanh}]
    found = [(op, given[op] | {"daz": daz, "tininess": tininess}) for op in OPS for daz, tininess in RULES]
    found += [(op, {"a": x, "b": y}) for op in OPS for x, y in [*zip(a[::20], b[::20]), (a, fpnl.SCALE)]]
    found += [(name, given[name] | network) for name in NETS.split() for network in networks]
    return found + [(name, given[name]) for name in ("flush", "cross_entropy", "adamw")]


def everything(these):
    """All results; arrays that are changed in place, and generators, are copies."""
    return [results(name, pickle.loads(pickle.dumps(given))) for name, given in these]


AROUND = [pytest.param(functools.partial(cpu_mode, *mode), marks=needs_hardware, id=f"{mode}") for mode in MODES]
AROUND += [pytest.param(functools.partial(np.errstate, all=how), id=how) for how in ("raise", "warn")]
plainly = functools.cache(lambda: everything(calls()))


@pytest.mark.parametrize("around", AROUND)
def test_bits_depend_on_the_arguments_alone(around):
    """Another library may have switched this thread's flags on, or NumPy's errors: they are as they were afterwards."""
    with around():
        before = flags(), np.geterr()
        found = everything(calls())
        assert (flags(), np.geterr()) == before
    assert_same_bits(found, plainly())


CHILD = """
import ctypes, pickle, sys
libm, env = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
libm.fegetenv(env)
env[7] |= 0x8040
libm.fesetenv(env)
import test_arguments
found = test_arguments.everything(pickle.load(open(sys.argv[1], "rb")))
assert test_arguments.flags() == (True, True)
pickle.dump(found, open(sys.argv[1], "wb"))
"""


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="by hand on Linux x86-64")
def test_bits_when_numpy_is_imported_into_a_process_that_flushes(tmp_path):
    """FTZ and DAZ are set before NumPy and fpnl are imported."""
    (tmp_path / "calls").write_bytes(pickle.dumps(calls()))
    run("-c", CHILD, tmp_path / "calls", program=PYTHON, env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}"})
    assert_same_bits(pickle.loads((tmp_path / "calls").read_bytes()), plainly())
