"""Nonlinear computation in deep linear networks: float32 underflow as the only nonlinearity.

A network of matrix products and additions is linear in the real numbers. In float32 it is not:
with subnormals flushed to zero, every result below TINY = 2^-126 in magnitude becomes 0. Scale the
activations down to that threshold and each unit has a dead zone, t(z) = z where |z| >= 1/2, else 0,
in units of 1/S = 2^-125. Automatic differentiation takes the network for linear and cannot see it.
Evolution strategies (ES), which only compare the losses of mutated networks, can, and train it.

    h1 = (x @ W1 + b1) / S                    x: pixels in [0, 1],  S = 2^125
    h2 = h1 @ W2 + b2 / S
    o  = (h2 @ W3 + b3 / S) * S               o: logits

Products keep subnormals; every other operation flushes its operands and its result, as on the
hardware of the post. `add ... divide` reproduce that bit for bit on any CPU.

    params = init(rng)                                   # [(W1, b1), (W2, b2), (W3, b3)]
    grads = es_gradient(params, x, labels, rng)          # [(dW1, db1), ...], from losses alone
    adamw(W1, dW1, m, v, step=1, lr=1e-3)                # in place, for each array
    accuracy(forward(params, x), labels)

Shapes: x [batch, 784] float32, labels [batch] integers, W [fan_in, width], b [width].

Left out: data, schedules, processes and files (train.py), and every derivative.

References
----------
J. Foerster, *Nonlinear computation in deep linear networks*, OpenAI, 2017 ("the post"),
https://openai.com/index/nonlinear-computation-in-deep-linear-networks/
T. Salimans et al., *Evolution Strategies as a Scalable Alternative to Reinforcement Learning*,
arXiv 1703.03864. IEEE Std 754-2019, 7.5 (underflow). Intel SDM vol. 1, 10.2.3.3 and 10.2.3.4.
I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, arXiv 1711.05101.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import platform

import numpy as np

float32 = np.float32
TINY = float32(2.0**-126)  # smallest normal float32
SCALE = float32(2.0**125)  # S: a unit lives at |z| / S >= TINY, that is |z| >= 1/2
SIZES = (784, 512, 512, 10)
SLICE = 128  # examples evaluated together: what a task of `es_gradient` has

# --- Flush-to-zero arithmetic -------------------------------------------------------------------

_MAGNITUDE, _TINY_BITS = np.int32(0x7FFFFFFF), np.int32(0x00800000)  # all bits but the sign; those of TINY


def flush(x):
    """Replace every subnormal by the zero of its sign (what DAZ does to an operand).

    Parameters
    ----------
    x : float32 array or scalar, any shape.

    Returns
    -------
    float32, the same shape. +-0, normal numbers from +-TINY on, inf and NaN pass unchanged, bit for
    bit; magnitudes from 2^-149 to TINY - 2^-149 become +0 or -0. Integer operations only, so the
    result does not depend on the mode that the CPU is in.

    Raises
    ------
    TypeError : x is not float32.
    """
    bits = _float32(x).view(np.int32)
    keep = (_TINY_BITS - 1 - (bits & _MAGNITUDE)) >> 31  # every bit from TINY on, none below
    return (bits & (keep | ~_MAGNITUDE)).view(float32)[()]


def add(a, b, daz=True, tininess="after", out=None):
    """a + b as a CPU with flush-to-zero (FTZ) computes it, bit for bit.

    `subtract`, `multiply` and `divide` have the same signature and contract.

    Parameters
    ----------
    a, b : float32 arrays or scalars, broadcast as NumPy does.
    daz : also read subnormal operands as the zero of their sign ("denormals are zero").
    tininess : "after" rounding (x86: an exact result x is flushed iff |x| < TINY - 2^-151) or
        "before" (AArch64: iff |x| < TINY). They differ on products alone.
    out : float32 array to write to and return; may overlap `a` and `b`.

    Returns
    -------
    float32: IEEE 754 rounding to nearest even, except that a tiny result is the zero of the exact
    result's sign. +-0, inf and NaN follow IEEE 754 (the payload of a NaN is not specified), after
    DAZ on the operands: then 0/subnormal and subnormal/subnormal are NaN, 1/subnormal is inf.

    Raises
    ------
    TypeError : an operand or `out` is not float32. ValueError : an unknown `tininess`, or shapes
    that do not broadcast.
    """
    return _flushed(np.add, a, b, daz, tininess, out)


def subtract(a, b, daz=True, tininess="after", out=None):
    """a - b under flush-to-zero: see `add`."""
    return _flushed(np.subtract, a, b, daz, tininess, out)


def multiply(a, b, daz=True, tininess="after", out=None):
    """a * b under flush-to-zero: see `add`."""
    return _flushed(np.multiply, a, b, daz, tininess, out)


def divide(a, b, daz=True, tininess="after", out=None):
    """a / b under flush-to-zero: see `add`."""
    return _flushed(np.divide, a, b, daz, tininess, out)


def _flushed(op, a, b, daz, tininess, out):
    """`_compute` in chunks: what it reads more than once is then in the cache."""
    if tininess not in ("after", "before"):
        raise ValueError(f'tininess: expected "after" or "before", found {tininess!r}')
    for x in (a, b) if out is None else (a, b, out):
        _float32(x)
    chunks = np.nditer(
        [a, b, out],
        flags=["external_loop", "buffered", "zerosize_ok", "copy_if_overlap"],
        op_flags=[[use, "allocate", "overlap_assume_elementwise"] for use in ("readonly", "readonly", "writeonly")],
        buffersize=1 << 16,
    )
    with chunks, np.errstate(all="ignore"):
        for x, y, z in chunks:
            _compute(op, x, y, z, daz, tininess)
        result = chunks.operands[2]
    return result[()] if out is None else out


def _compute(op, x, y, z, daz, tininess):
    """z[:] = op(x, y), the same bits in whatever mode the CPU itself is."""
    sizes_x, sizes_y = _magnitudes(x), _magnitudes(y)
    least_x, least_y = sizes_x.min(), sizes_y.min()
    extreme_y = sizes_y.max() if op is np.divide else least_y
    read = flush if daz else _widen  # subnormals become zeros, or float64; zeros stay what they are
    x = read(x) if least_x < _TINY_BITS else x
    y = read(y) if least_y < _TINY_BITS else y
    if op in (np.add, np.subtract):
        op(x, y, out=z)  # a subnormal sum is exact: flushing it afterwards is no different
        if _magnitudes(z).min() < _TINY_BITS:
            z[:] = flush(z)
    elif op(least_x.view(float32), extreme_y.view(float32), dtype=np.float64) > TINY:
        op(x, y, out=z)  # the least result is not tiny, so none is
    else:
        # The rule: a result is tiny if it is below 1 in units of TINY, where the exponent is far from
        # its limit (what overflows is not tiny). "After" is rounded to float32; "before", float64 has
        # the bits to tell: products are exact, and a quotient is 1 or at least 2^-24 away from it.
        wide = np.float64 if tininess == "before" else np.result_type(x, y).type
        units = op(x * wide(1 / TINY), y)
        if tininess == "after":
            units = units.astype(float32, copy=False)
        op(x * (np.abs(units) >= 1), y, out=z)  # 0 op y is the zero of the right sign


def _magnitudes(x):
    """The bits without the sign, which have the order of |x|; just one where x is a broadcast scalar."""
    return (x[:1] if x.strides == (0,) else x).view(np.int32) & _MAGNITUDE


def _widen(x):
    """float32 -> float64 by way of the bits: a CPU in DAZ mode converts a subnormal to 0."""
    bits = x.view(np.int32) & _MAGNITUDE
    return np.where(bits < _TINY_BITS, np.copysign(bits * 2.0**-149, x), x)


def _float32(x):
    if getattr(x, "dtype", None) != float32:
        raise TypeError(f"expected float32, found {getattr(x, 'dtype', type(x).__name__)}")
    return np.asarray(x)


# Where the C library keeps the control register of the floating-point unit in its fenv_t. System, machine,
# bytes of a pointer: library, 32-bit words of fenv_t, index of the register, its FTZ bit, its DAZ bit.
_FENV = {
    ("Linux", "x86_64", 8): ("libm.so.6", 8, 7, 0x8000, 0x0040),  # glibc, MXCSR
    ("Linux", "aarch64", 8): ("libm.so.6", 2, 0, 1 << 24, 1 << 24),  # glibc, FPCR.FZ: both at once
    ("Darwin", "x86_64", 8): (None, 4, 1, 0x8000, 0x0040),
    ("Darwin", "arm64", 8): (None, 4, 2, 1 << 24, 1 << 24),
}


def hardware_ftz(daz=True):
    """Put the CPU itself in flush-to-zero mode, for the calling thread, as long as the context lasts.

    Flushes results (FTZ) and, with `daz`, operands. On leaving, also by an exception, the
    floating-point environment is exactly what it was; contexts nest. Keep matrix products outside:
    the threads of a BLAS keep their own mode, and an FMA flushes its accumulator. Make the inputs
    and look at the results outside too: inside, comparisons and `min` read subnormals as zeros.

    Verified on Linux x86-64; Linux AArch64, macOS and Windows are written from their documentation
    and unverified.

    Raises
    ------
    RuntimeError : on entering, if the platform is not known or cannot flush results without operands.
    """
    return _fpu_mode(True, daz)


@contextlib.contextmanager
def _fpu_mode(ftz, daz):
    read, write, register, mask, ftz_bit, daz_bit = _fpu_control()
    if ftz != daz and ftz_bit == daz_bit:
        raise RuntimeError("hardware_ftz: this CPU or system switches FTZ and DAZ only together (daz=True)")
    env = read()
    saved = env[register]
    env[register] = saved & ~mask | ftz * ftz_bit | daz * daz_bit
    write(env)
    env[register] = saved
    try:
        yield
    finally:
        write(env)


@functools.cache
def _fpu_control():
    """How to read and to write the environment; where in it the register is, its bits to clear, FTZ, DAZ."""
    system, machine = platform.system(), platform.machine()
    if system == "Windows":  # _MCW_DN is 0x03000000 and _DN_FLUSH, 1 << 24, is both at once
        control = ctypes.PyDLL("ucrtbase")._controlfp  # (new, mask) -> the word as it is then
        return lambda: [control(0, 0)], lambda env: control(env[0], 0x03000000), 0, 0x03000000, 1 << 24, 1 << 24
    try:
        library, words, register, ftz_bit, daz_bit = _FENV[system, machine, ctypes.sizeof(ctypes.c_void_p)]
        libm, fenv_t = ctypes.PyDLL(library), ctypes.c_uint32 * words  # PyDLL keeps the GIL: faster
    except (KeyError, OSError) as error:
        raise RuntimeError(f"hardware_ftz: unknown platform {system} {machine}; use the emulation") from error

    def read():
        env = fenv_t()
        libm.fegetenv(env)
        return env

    return read, libm.fesetenv, register, ftz_bit | daz_bit, ftz_bit, daz_bit


# --- The network ----------------------------------------------------------------------------------


def init(rng, sizes=SIZES):
    """He initialisation: W ~ N(0, sqrt(2 / fan_in)), b = 0.

    Parameters
    ----------
    rng : np.random.Generator.
    sizes : widths from input to output, at least two; len(sizes) - 1 layers.

    Returns
    -------
    list of (W [fan_in, width], b [width]), float32, one pair a layer.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: expected at least two positive widths, found {tuple(sizes)}")
    return [
        (rng.standard_normal((i, o), dtype=float32) * float32(np.sqrt(2 / i)), np.zeros(o, float32))
        for i, o in itertools.pairwise(sizes)
    ]


def forward(params, x, ftz=True, scale=SCALE, transfer=None):
    """The network, operation by operation: [batch, inputs] -> logits [batch, classes], float32.

    `ftz`: True, every operation but the product flushes its operands and its result; "hardware",
    the CPU's own flags do that, with the same bits; False, the same code in IEEE arithmetic with
    gradual underflow, where the network is linear up to rounding. `scale`: another S, a power of two.
    `transfer`: for comparison, an ordinary network without S and flush, whose hidden units have this
    function of an array of sums, float32 to float32 of the same shape, and whose logits are linear.
    Raises TypeError for anything but float32, ValueError for shapes that do not fit.
    """
    logits = activations(params, x, ftz, scale, transfer)[-1]
    return _arithmetic(ftz)[1](logits, scale) if transfer is None else logits


def activations(params, x, ftz=True, scale=SCALE, transfer=None):
    """h1, h2, ... of every layer, [batch, width] each, at their true size: around 2^-126 without a transfer."""
    _check(params, x)
    if transfer is not None:
        hs = []
        for l, (W, b) in enumerate(params, 1):
            x = x @ W + b
            hs.append(x := transfer(x) if l < len(params) else x)
        return hs
    plus, _, over = _arithmetic(ftz)
    (W, b), *later = params
    hs = [over(plus(x @ W, b), scale)]
    for W, b in later:  # b / S underflows until |b| >= 1/2: as in the post, these biases are inert
        hs.append(plus(product(hs[-1], W, scale), over(b, scale)))
    return hs


def _arithmetic(ftz):
    """add, multiply, divide for a value of `ftz`."""
    if ftz == "hardware":
        return tuple(hardware_ftz()(op.__call__) for op in (np.add, np.multiply, np.divide))
    if ftz not in (True, False):
        raise ValueError(f'ftz: expected True, False or "hardware", found {ftz!r}')
    return (add, multiply, divide) if ftz else (np.add, np.multiply, np.divide)


def product(h, W, scale=SCALE):
    """h @ W for h around 2^-126, keeping subnormals: [batch, fan_in] -> [batch, width].

    Written as (h S) @ W / S, divided in IEEE arithmetic: S is a power of two, so only the rounding
    of subnormal partial sums (to multiples of 2^-149) is spared, and with it a factor of 200 in time.
    """
    return (h * scale) @ W / scale


def loss(logits, labels):
    """Mean cross-entropy in nats of [batch, classes] logits against [batch] labels; to be minimised."""
    z = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels])


def accuracy(logits, labels):
    """Share of [batch] labels that the largest of the [batch, classes] logits names."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def _check(params, x):
    """float32 everywhere (one stray float64 changes the physics) and shapes that fit."""
    width = _float32(x).shape[-1] if np.ndim(x) == 2 else f"shape {np.shape(x)}"
    for i, (W, b) in enumerate(params, 1):
        if _float32(W).ndim != 2 or len(W) != width or _float32(b).shape != W.shape[1:]:
            raise ValueError(f"layer {i}: W {W.shape}, b {b.shape} do not fit an input of {width}")
        width = W.shape[1]


# --- The ES gradient ------------------------------------------------------------------------------
#
# ES estimates a gradient from the losses of mutated networks: g = E[(L(w + sigma e) - L(w - sigma e)) e]
# / (2 sigma). Drawing one e for all 669,706 weights and a whole batch buries the signal in noise.
# Five exact steps make the same estimate cheap:
#   1. The expectation is linear: every example has mutations of its own.
#   2. An example sees the weights of unit j only through z_j = a . W[:, j], a being the layer's input.
#      Mutations across a change nothing, so mutate along it: W[:, j] +- sigma a/|a|, z_j +- sigma |a|.
#   3. A member mutates a block of k units of one layer, signs e at random, against its mirror image -e.
#   4. A unit whose output is the same in both has no part in their difference: its estimate is 0.
#   5. The layer above is measured first. With its slopes, the loss per change of its sums, a change c of the
#      output of unit j predicts the difference c (W slopes)_j. Every unit gets what is predicted for itself,
#      and only what all predictions leave of the measured difference goes to all units of the block: a
#      control variate, which takes noise away and leaves the expectation alone, however good or bad it is.
# With `jitter` and `dropout`, all this happens in a network of the example's own, the same for all its members: every
# unit of it is mutated once, and some hidden ones so far that their sums are 0, with all weights of the layer above
# larger by as much as is missing then. The loss is smoothed over that: units keep away from their thresholds and do
# not rely on each other.


def mutation_signs(rng, width, n):
    """A random sign for every unit and example: [width, n] of -1 or +1, float32."""
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-width * n // 8)), np.uint8), count=width * n)
    return (2 * bits.reshape(width, n).view(np.int8) - 1).astype(float32)


def block_sizes(params, block):
    """Units mutated together in each layer; the few of the last one have a member each."""
    return [min(block, len(b)) for _, b in params[:-1]] + [1]


def mutated(params, l, J, step):
    """A copy of params with step [fan_in + 1, k] added to the units J of layer l, its last row to b."""
    W, b = (a.copy() for a in params[l])
    W[:, J] += step[:-1]
    b[J] += step[-1]
    return [*params[:l], (W, b), *params[l + 1 :]]


def shifted(params, x, shifts, ftz, transfer):
    """A copy of params for one example x [1, inputs], mutated in each layer along the input that the
    example brings there, so that the layer's sums move by its shift [width]."""
    for l, shift in enumerate(shifts):
        a = _layer_input(params, x, l, ftz, transfer)
        if np.any(a) and np.any(shift):
            params = mutated(params, l, slice(None), np.outer(a / (a @ a), shift))
    return params


def _shifts(rng, z, size, jitter, dropout):
    """How the sums z [width, n] of a layer move in the examples' own networks, size [n] being that of its input."""
    shift = np.zeros_like(z)
    if jitter:
        shift += mutation_signs(rng, *z.shape) * (float32(jitter) * size)
    if dropout:
        shift = np.where(rng.random(z.shape, dtype=float32) < float32(dropout), -z, shift)
    return shift


def _louder(params, dropout):
    """Weights with a gain of 1 / (1 - dropout) where some of the inputs are silent: in all layers but the first."""
    return [(W / float32(1 - dropout) if l and dropout else W, b) for l, (W, b) in enumerate(params)]


def _layer_input(params, x, l, ftz, transfer):
    """Input of layer l for one example, with the 1 of the bias if that acts: [fan_in + 1]."""
    a = _outputs(params, x, ftz, transfer)[l - 1][0] if l else x[0]
    return np.append(a, float32(_bias_acts(l, ftz)))


def _outputs(params, x, ftz, transfer):
    """`activations` in units of 1/S."""
    return [h * SCALE if transfer is None else h for h in activations(params, x, ftz, transfer=transfer)]


def es_gradient_plain(params, x, labels, rng, sigma=0.02, block=8, ftz=True, jitter=0.0, dropout=0.0, transfer=None):
    """`es_gradient` as stated above: each member is a network with literally mutated weights."""
    ftz, params = ftz if transfer is None else False, _louder(params, dropout)
    n, grads, predicted = len(x), [], 0  # predicted: loss per change of an output, [width, n]
    examples = [x[i : i + 1] for i in range(n)]
    shifts = [[] for _ in examples]
    for l, (W, b) in enumerate(params):
        own = [shifted(params, *pair, ftz, transfer) for pair in zip(examples, shifts)]
        a = np.stack([_layer_input(*pair, l, ftz, transfer) for pair in zip(own, examples)], axis=1)
        z, size = W.T @ a[:-1] + b[:, None] * a[-1], np.linalg.norm(a, axis=0)
        moved = _shifts(rng, z, size, jitter, dropout if l + 1 < len(params) else 0)
        for i in range(n):
            shifts[i].append(moved[:, i])
    for l, k in reversed([*enumerate(block_sizes(params, block))]):
        W, b = params[l]
        signs = mutation_signs(rng, len(b), n)
        predicted, slopes = np.zeros_like(signs) + predicted, np.empty_like(signs)
        dW, db = np.zeros_like(W), np.zeros_like(b)
        for i, J in [(i, slice(j, j + k)) for i in range(n) for j in range(0, len(b), k)]:
            a = _layer_input(shifted(params, examples[i], shifts[i], ftz, transfer), examples[i], l, ftz, transfer)
            size = np.maximum(np.linalg.norm(a), float32(0.5))
            e = signs[J, i]
            step = np.outer(a / size, float32(sigma) * e)
            mutants = [shifted(mutated(params, l, J, s), examples[i], shifts[i], ftz, transfer) for s in (step, -step)]
            L = [loss(forward(mutant, examples[i], ftz, transfer=transfer), labels[i : i + 1]) for mutant in mutants]
            h = [_outputs(mutant, examples[i], ftz, transfer)[l][0, J] for mutant in mutants]
            own = predicted[J, i] * (h[0] - h[1])
            rest = L[0] - L[1] - own.sum()
            slopes[J, i] = (own + rest * (h[0] != h[1])) * e / float32(2 * sigma * size)
            dW[:, J] += np.outer(a[:-1], slopes[J, i]) / float32(n)
            db[J] += a[-1] * slopes[J, i] / float32(n)
        grads.insert(0, (dW, db))
        predicted = W @ slopes
    return _louder(grads, dropout)


def es_gradient(params, x, labels, rng, sigma=0.02, block=8, ftz=True, jitter=0.0, dropout=0.0, map=map, transfer=None):
    """Evolution-strategies estimate of the gradient of the loss, ready for descent.

    The same estimate as `es_gradient_plain`, up to rounding, a thousand times faster: what is
    upstream of a mutation is not recomputed, and downstream only the change is multiplied.

    Parameters
    ----------
    params : list of (W [fan_in, width], b [width]), float32; any depth.
    x : [batch, inputs] float32. labels : [batch] integers in [0, classes).
    rng : np.random.Generator, for the signs of the mutations.
    sigma : size of a mutation of a unit's weights (Euclidean norm), > 0.
    block : units mutated together, >= 1; the variance of the estimate grows and its cost falls with it.
    ftz : as in `forward`; "hardware" gives the same bits as True, faster.
    jitter : size of the mutation, as sigma, of the network in which an example's members are evaluated, >= 0.
    dropout : share of the hidden units that are silent in that network, their sums moved to 0; in [0, 1).
    map : calls a function with each of a list of tasks and returns the results in their order, like the builtin:
        also the `map` of a pool of threads or processes, of mpi4py.futures, dask or Ray. A task pickles, has
        SLICE examples and, if there are several, random numbers of its own; their results are added in order.
        So the bits are the same whatever computes them.
    transfer : as in `forward`; with it, all biases act and nothing is flushed. It pickles if a task must.

    Returns
    -------
    list of (dW, db), float32, shaped like params. With ftz, db is 0 after the first layer: those
    biases flush before they are added, and one of 1/2 or more, which training never makes, is left alone.

    Raises
    ------
    TypeError : not float32. ValueError : shapes that do not fit; sigma, block, jitter, dropout or labels out of range.
    """
    _check(params, x)
    n, classes = len(x), len(params[-1][1])
    if not 0 < float32(sigma) < np.inf or block < 1:
        raise ValueError(f"expected a finite sigma > 0 and block >= 1, found {sigma} and {block}")
    if not (0 <= float32(jitter) < np.inf and 0 <= dropout < 1):
        raise ValueError(f"expected a finite jitter >= 0 and dropout in [0, 1), found {jitter} and {dropout}")
    if np.shape(labels) != (n,) or n == 0 or np.min(labels) < 0 or np.max(labels) >= classes:
        raise ValueError(f"expected {n} >= 1 labels in [0, {classes}), one for each row of x")
    params, starts = _louder(params, dropout), range(0, n, SLICE)
    streams = rng.spawn(len(starts)) if len(starts) > 1 else [rng]
    tasks = [(params, x[i : i + SLICE], labels[i : i + SLICE], stream) for i, stream in zip(starts, streams)]
    options = {"sigma": sigma, "block": block, "jitter": jitter, "dropout": dropout, "transfer": transfer}
    function = functools.partial(_slice_gradient, n=n, ftz=ftz if transfer is None else False, **options)
    return _louder(functools.reduce(_added, map(function, tasks)), dropout)  # by the chain rule


def _added(grads, others):
    return [(dW + dW2, db + db2) for (dW, db), (dW2, db2) in zip(grads, others)]


def _slice_gradient(task, n, ftz, sigma, block, jitter, dropout, transfer):
    """What some of a batch's n examples have in its gradient."""
    params, x, labels, rng = task
    layers, inputs, sizes, sums, outputs = _forward_columns(params, x, rng, ftz, jitter, dropout, transfer)
    grads, predicted = [], float32(0)
    for l, k in reversed([*enumerate(block_sizes(params, block))]):
        step = mutation_signs(rng, *sums[l].shape)
        step *= float32(sigma) * sizes[l]
        h = _activate(layers[l], np.concatenate([sums[l] + step, sums[l] - step], axis=1), ftz) * _unit(ftz)
        up, down = np.split(h, 2, axis=1)
        own = predicted * (up - down)
        changes = np.stack([up - outputs[l], down - outputs[l]], axis=1)
        rest = _loss_differences(params, layers, sums, outputs, l, k, changes, labels, ftz)
        rest -= _in_blocks(own, k).sum(axis=1)
        slopes = own + np.repeat(rest, k, axis=0)[: len(own)] * (up != down)
        slopes /= 2 * step
        delta = slopes / float32(n)
        grads.insert(0, (inputs[l] @ delta.T, float32(_bias_acts(l, ftz)) * delta.sum(axis=1)))
        predicted = params[l][0] @ slopes if l else None
    return grads


def _bias_acts(l, ftz):
    """Only the first layer's bias is added at full size; the later ones are flushed before."""
    return l == 0 or not ftz


_Layer = collections.namedtuple("_Layer", "W gain bias flushed_bias transfer")  # W transposed; None: there is none


def _unit(ftz):
    """What `_activate` leaves an output in, to be multiplied with: the CPU flushes it at its true size."""
    return SCALE if ftz == "hardware" else float32(1)


def _forward_columns(params, x, rng, ftz, jitter, dropout, transfer):
    """The layers, then the inputs of each, their sizes, sums (before the flush) and outputs, in units of
    1/S and an example a column: the layout in which BLAS is fastest on narrow products."""
    layers, inputs, sizes, sums, outputs = [], [], [], [], []
    a = x.T
    for l, (W, b) in enumerate(params):
        W, b, acts = W.T, b[:, None], _bias_acts(l, ftz)
        hidden, size = l + 1 < len(params), np.sqrt(np.square(a).sum(axis=0) + float32(acts))
        layer = _Layer(W, None, b if acts else None, None, transfer if hidden else None)
        z = _sums(layer, a)
        if jitter or dropout:
            shift = _shifts(rng, z, size, jitter, dropout if hidden else 0)
            layer, z = layer._replace(bias=b * float32(acts) + shift), z + shift
        if not acts and np.any(flushed := _activate(layer, b.copy(), ftz)):  # 0 until |b| >= 1/2
            layer = layer._replace(flushed_bias=flushed)
        inputs.append(a)
        sizes.append(np.maximum(size, float32(0.5)))  # 0, where no mutation has an effect, or at least 1/2
        sums.append(z)
        outputs.append(a := _activate(layer, z.copy(), ftz) * _unit(ftz))
        if l > 1 and ftz == "hardware":  # members get there with outputs at their true size, S times smaller:
            layer = layer._replace(W=W * float32(2.0**64), gain=float32(2.0**61))  # at once, W might overflow
        layers.append(layer)
    return layers, inputs, sizes, sums, outputs


def _sums(layer, a):
    """[..., fan_in, n] -> [..., width, n]"""
    z = layer.W @ a
    if layer.gain is not None:
        z *= layer.gain
    if layer.bias is not None:
        z += layer.bias
    return z


def _columns(layer, columns):
    """The layer for some of the examples."""
    if layer.bias is None or layer.bias.shape[1] == 1:
        return layer
    return layer._replace(bias=layer.bias[:, columns])


def _activate(layer, z, ftz):
    """Output of a layer, [..., width, n], from its sums z, in place but for a transfer: z where |z| >= 1/2, else 0,
    twice if there is a bias. "hardware": one multiplication, as in the network, which leaves it at its true size."""
    if ftz == "hardware":
        with hardware_ftz():
            z *= 1 / SCALE
            if layer.flushed_bias is not None:
                z += layer.flushed_bias
    elif layer.transfer is not None:
        z = layer.transfer(z)
    elif ftz:
        z *= np.abs(z) >= float32(0.5)
        if layer.flushed_bias is not None:
            z += layer.flushed_bias
            z *= np.abs(z) >= float32(0.5)
    return z


_TILE = 1 << 16  # floats in a buffer of mutated activations: 256 KB, so that several fit the L2 cache


def _loss_differences(params, layers, sums, outputs, l, k, changes, labels, ftz):
    """L(+e) - L(-e) of every block of k units in layer l and every example, [blocks, n], from the
    changes of the outputs of the layer by +e and by -e, [width, 2, n]."""
    n, depth, classes = len(labels), len(layers), len(outputs[-1])
    # A block's change enters the next layer's sums through k rows of the next W, as [blocks, width, k];
    # a change of the logits enters the logits.
    W, base = (params[l + 1][0], sums[l + 1]) if l + 1 < depth else (np.eye(classes, dtype=float32), outputs[l])
    W = _in_blocks(W, k).swapaxes(1, 2)
    times = np.matmul if k > 1 else np.multiply  # one row: the same, and faster
    result = np.empty((len(W), n), float32)
    columns = max(1, _TILE // (2 * len(base)))
    for i in range(0, n, columns):
        tile = slice(i, i + columns)
        y, unchanged = np.tile(labels[tile], 2), np.tile(base[:, tile], 2)
        above = [_columns(layer, np.tile(np.arange(n)[tile], 2)) for layer in layers[l + 2 :]]
        change = _in_blocks(changes[:, :, tile].reshape(-1, len(y)), k)  # [blocks, k, 2m]
        few = max(1, _TILE // unchanged.size)  # blocks whose next layer fits a buffer
        many = few * max(1, _TILE // (few * classes * len(y)))  # blocks whose logits do
        buffer, logits = (np.empty((c, w, len(y)), float32) for c, w in ((few, len(base)), (many, classes)))
        for start in range(0, len(W), many):
            stop = min(start + many, len(W))
            for j in range(start, stop, few):
                J = slice(j, min(j + few, stop))
                z = times(W[J], change[J], out=buffer[: J.stop - j])
                z += unchanged
                for below, layer in zip(layers[l + 1 :], above):
                    z = _sums(layer, _activate(below, z, ftz))
                logits[j - start : J.stop - start] = z
            o = logits[: stop - start]
            if l + 1 < depth:
                o = _activate(layers[-1], o, ftz)
                o *= _unit(ftz)
            losses = _losses(o, y)
            result[start:stop, tile] = losses[:, : len(y) // 2] - losses[:, len(y) // 2 :]
    return result


def _in_blocks(a, k):
    """[width, m] -> [blocks, k, m], the last block filled up with zeros."""
    missing = -len(a) % k
    if missing:
        a = np.concatenate([a, np.zeros((missing, a.shape[1]), float32)])
    return a.reshape(-1, k, a.shape[1])


def _losses(o, labels):
    """Cross-entropy of every column of [blocks, classes, columns] logits, which it overwrites."""
    o -= o.max(axis=1, keepdims=True)
    right = o[:, labels, np.arange(len(labels))]
    return np.log(np.exp(o, out=o).sum(axis=1)) - right


def adamw(p, g, m, v, step, lr, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
    """One AdamW step, in place: p against gradient g, with moments m and v; float32, any one shape.

    step counts from 1. The decay is decoupled: p -= lr * weight_decay * p.
    """
    m += float32(1 - beta1) * (g - m)
    v += float32(1 - beta2) * (g * g - v)
    denominator = np.sqrt(v / float32(1 - beta2**step)) + float32(eps)
    p -= float32(lr) * (m / float32(1 - beta1**step) / denominator + float32(weight_decay) * p)


def _main():
    """`python -m fpnl`: what this machine does near 2^-126, emulated and on the CPU."""
    system = f"{platform.system()} {platform.machine()}, NumPy {np.__version__}"
    print(f"The post's examples near TINY = 2^-126 on {system}\n")
    print(f"{'':38} {'flags':12}{'emulated':>14}{'CPU':>14}")
    a, b, c, d, e = (float32(k * 2.0**-126) for k in (2.5, -1.6, 1, 0.4, 0.5))
    examples = {
        "(2.5 TINY + -1.6 TINY) + TINY": lambda add, mul: add(add(a, b), c),
        "(-1.6 TINY + TINY) + 2.5 TINY": lambda add, mul: add(add(b, c), a),
        "(0.4 TINY + 0.5 TINY) * 1/TINY": lambda add, mul: mul(add(d, e), 1 / TINY),
        "0.4 TINY * 1/TINY + 0.5 TINY * 1/TINY": lambda add, mul: add(mul(d, 1 / TINY), mul(e, 1 / TINY)),
    }
    for text, example in examples.items():
        for flags, ftz, daz in (("none", 0, 0), ("DAZ", 0, 1), ("FTZ", 1, 0), ("FTZ and DAZ", 1, 1)):
            if ftz:
                ops = [functools.partial(op, daz=daz) for op in (add, multiply)]
            else:
                read = flush if daz else np.positive
                ops = [lambda a, b, op=op, read=read: op(read(a), read(b)) for op in (np.add, np.multiply)]
            emulated = _in_units(text, example(*ops))
            try:
                with _fpu_mode(ftz, daz):
                    value = example(np.add, np.multiply)
                cpu = _in_units(text, value)
            except RuntimeError:
                cpu = "unknown"
            print(f"{text:38} {flags:12}{emulated:>14}{cpu:>14}")
        print()


def _in_units(text, value):
    return f"{float(value):.4g}" if "*" in text else f"{float(value) * 2.0**126:.4g} TINY"


if __name__ == "__main__":
    _main()
