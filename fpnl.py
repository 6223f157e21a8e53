"""Nonlinear computation in deep linear networks: float32 underflow as the only nonlinearity.

A network of matrix products and additions is linear in the real numbers. In float32 it is not:
with subnormals flushed to zero, a sum or quotient below TINY = 2^-126 in magnitude becomes 0. Scale
the activations down to that threshold and each unit, the logits too, has a dead zone, t(z) = z where
|z| >= 1/2, else 0, in units of 1/S = 2^-125. Automatic differentiation takes the network for linear
and cannot see it. Evolution strategies (ES), which compare mutated networks, can, and train it.

    h1 = (x @ W1 + b1) / S                    x: pixels in [0, 1],  S = 2^125
    h2 = h1 @ W2 + b2 / S
    o  = (h2 @ W3 + b3 / S) * S               o: logits

Matrix products keep subnormals; every other operation flushes its operands and its result, as on the
hardware of the post. So b2 / S and b3 / S are 0 while |b| < 1/2: those biases are inert.

    params = init(rng)                                   # [(W1, b1), (W2, b2), (W3, b3)]
    grads = es_gradient(params, x, labels, rng)          # [(dW1, db1), ...]
    adamw(params, grads, m, v, step=1, lr=1e-3)          # in place; m, v: zeros of the same shapes
    accuracy(forward(params, x), labels)

Shapes: x [batch, inputs] float32, labels [batch] integers, W [fan_in, width], b [width], float32.

On one machine with one BLAS, every function here gives bits that depend on the values of its arguments
and on the number of BLAS threads (with one, the work of a pool is fastest; those of a row of a product
depend on the rows beside it, by a rounding): not on where an array lies or in which order, also in a
thread that flushes already (another library may have switched the CPU to that) and whatever
`np.seterr` says; both are left as they were. Two things cannot be helped: the threads of a BLAS that
were started while the CPU flushed go on flushing in matrix products, and on a platform that
`hardware_ftz` does not know a flush that is on stays on. Another CPU or BLAS sums a matrix product in
another order.

Left out: data and files (data.py), schedules and pools (train.py), and derivatives.

References
----------
J. Foerster, *Nonlinear computation in deep linear networks*, OpenAI, 2017 ("the post"),
https://openai.com/index/nonlinear-computation-in-deep-linear-networks/
T. Salimans et al., *Evolution Strategies as a Scalable Alternative to Reinforcement Learning*,
arXiv 1703.03864.
R. J. Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement
learning*, Machine Learning 8, 1992; J. Werfel, X. Xie, H. S. Seung, *Learning curves for stochastic
gradient descent in linear feedforward networks*, NIPS 2003; S. Dalm, M. van Gerven, N. Ahmad,
*Effective Learning with Node Perturbation in Deep Neural Networks*, arXiv 2310.00965.
I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, arXiv 1711.05101.
IEEE Std 754-2019, 7.5 (underflow). Intel SDM vol. 1, 10.2.3.3 and 10.2.3.4.
"""

import contextlib
import ctypes
import functools
import inspect
import numbers
import platform

import numpy as np

__all__ = ["TINY", "SCALE", "SIZES", "flush", "hardware_ftz", "add", "subtract", "multiply", "divide"]
__all__ += ["init", "forward", "activations", "product", "cross_entropy", "loss", "accuracy"]
__all__ += ["mutation_signs", "es_slopes", "es_gradient", "es_gradient_plain"]
__all__ += ["gradient_from_slopes", "mapped", "adamw", "leaves"]

float32 = np.float32
TINY = float32(2.0**-126)  # smallest normal float32
SCALE = float32(2.0**125)  # S: z / S survives where |z| / S >= TINY, that is |z| >= 1/2
SIZES = (784, 512, 512, 10)


def _require(holds, name, expected, found, error=ValueError):
    if not holds:
        raise error(f"{name}: expected {expected}, found {found}")


def _float32(x, name="operand"):
    found = getattr(x, "dtype", type(x).__name__)
    _require(found == float32, name, "float32 (x.astype(np.float32) converts an array)", found, TypeError)
    return np.asarray(x)


def _in_order(tree):
    """Arrays, alone or in lists, tuples, dicts, as BLAS gets them everywhere: another layout takes another kernel."""
    if isinstance(tree, dict):
        return dict(zip(tree, _in_order([*tree.values()])))
    if isinstance(tree, (list, tuple)):
        return [*map(_in_order, tree)]
    return np.require(tree, requirements=["C", "ALIGNED"]) if isinstance(tree, np.ndarray) else tree


# --- The CPU's flags ------------------------------------------------------------------------------

# Where the C library keeps the control register of the floating-point unit in its fenv_t. System, machine, bytes of
# a pointer: library, 32-bit words of fenv_t, index of the register, its bits to clear, FTZ bit, DAZ bit.
_FENV = {
    ("Linux", "x86_64", 8): ("libm.so.6", 8, 7, 0x8040, 0x8000, 0x0040),  # glibc, MXCSR
    ("Linux", "aarch64", 8): ("libm.so.6", 2, 0, 1 << 24, 1 << 24, 1 << 24),  # glibc, FPCR.FZ: both at once
    ("Darwin", "x86_64", 8): (None, 4, 1, 0x8040, 0x8000, 0x0040),
    ("Darwin", "arm64", 8): (None, 4, 2, 1 << 24, 1 << 24, 1 << 24),
}


class hardware_ftz:
    """Put the CPU itself in flush-to-zero mode, for the calling thread, as long as the context lasts.

        with hardware_ftz():                            # or as a decorator of a function
            h = z / S

    Flushes results (FTZ) and, with `daz`, operands ("denormals are zero"). With `ftz=False` results
    stay: `hardware_ftz(daz=False, ftz=False)` is IEEE arithmetic, whatever the thread's mode was. On
    leaving, also by an exception, the floating-point environment is what it was; contexts nest. An
    instance is for one thread; a decorator, for any.

    The flags belong to the thread, not to the block of text. On Linux, threads begun inside inherit
    them and keep them for life; those that run already, as the workers of a BLAS and of a pool do, keep their
    own. After a `yield` or `await` inside, whoever runs next in the thread runs with them. So keep
    matrix products outside (a fused multiply-add flushes its accumulator, too), make the inputs and
    look at the results outside: inside, comparisons, `min` and `sort` read subnormals as zeros.

    The first time that a process enters a mode, its effect on a product and on an operand is looked
    at. Seen: Linux x86-64 on CPUs of Intel and AMD, Linux AArch64 under QEMU's emulation. macOS and
    Windows are written from their documentation.

    Raises
    ------
    RuntimeError : on entering, if the platform is not known, sets the flags without any effect (some
        emulators and instrumenting tools) or has one flag for both and is asked for one.
    TypeError : it decorates a generator or coroutine, whose body would run outside. ValueError : `daz` or
        `ftz` is anything but True or False, as in `@hardware_ftz` without parentheses.
    """

    def __init__(self, daz=True, ftz=True):
        _require(daz in (True, False) and ftz in (True, False), "daz, ftz", "True or False", f"{daz}, {ftz}")
        self.ftz, self.daz, self.undo = bool(ftz), bool(daz), []

    def __enter__(self):
        self.undo.append(_switch(self.ftz, self.daz)())

    def __exit__(self, *error):
        self.undo.pop()()

    def __call__(self, function):
        kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
        found = f"{function}: use `with hardware_ftz()` inside it, between one yield or await and the next"
        _require(not any(kind(function) for kind in kinds), "hardware_ftz", "an ordinary function", found, TypeError)

        @functools.wraps(function)
        def flushing(*args, **options):
            with hardware_ftz(self.daz, self.ftz):
                return function(*args, **options)

        return flushing


@functools.cache
def _switch(ftz, daz):
    """A function that puts the calling thread in a mode and returns the function that undoes it; tried once, here."""
    fenv_t, read, write, register, mask, ftz_bit, daz_bit = _fpu_control()

    def switch():
        read(env := fenv_t())
        saved = env[register]
        env[register] = saved & ~mask | ftz * ftz_bit | daz * daz_bit
        write(env)
        env[register] = saved
        return functools.partial(write, env)

    subnormal = np.uint32(1 << 22).view(float32)  # TINY / 2; times 2, TINY, unless it is read as 0
    with np.errstate(all="ignore"):
        undo = switch()
        results = TINY * float32(0.5), subnormal * float32(2)
        undo()
    effect = tuple(bool(result.view(np.uint32) == 0) for result in results)
    found = f"{effect} after setting them: use the emulation"
    _require(effect == (ftz, daz), "hardware_ftz: unknown platform: FTZ, DAZ", (ftz, daz), found, RuntimeError)
    return switch


def _fpu_control():
    """fenv_t, the functions that read and write one, and what a row of _FENV has after its size."""
    system, machine = platform.system(), platform.machine()
    try:
        if system == "Windows":  # _MCW_DN is 0x03000000 and _DN_FLUSH, 1 << 24, is both at once
            control = ctypes.PyDLL("ucrtbase")._controlfp  # (new, mask) -> the word as it is then
            read, write = lambda env: env.__setitem__(0, control(0, 0)), lambda env: control(env[0], 0x03000000)
            return ctypes.c_uint32 * 1, read, write, 0, 0x03000000, 1 << 24, 1 << 24
        library, words, *where = _FENV[system, machine, ctypes.sizeof(ctypes.c_void_p)]
        libm = ctypes.PyDLL(library)  # PyDLL keeps the GIL: faster
        return ctypes.c_uint32 * words, libm.fegetenv, libm.fesetenv, *where
    except (KeyError, OSError, AttributeError) as error:
        raise RuntimeError(f"hardware_ftz: unknown platform {system} {machine}; use the emulation") from error


def _ieee(function):
    """Compute a function in IEEE arithmetic, whatever mode the thread is in and whatever np.seterr says."""

    @functools.wraps(function)
    def computed(*args, **options):
        with np.errstate(all="ignore"), contextlib.ExitStack() as stack:
            with contextlib.suppress(RuntimeError):  # an unknown platform: its mode stays as it is
                stack.callback(_switch(False, False)())
            return function(*args, **options)

    return computed


# --- Flush-to-zero arithmetic ---------------------------------------------------------------------


def flush(x):
    """Replace every subnormal by the zero of its sign (what DAZ does to an operand).

    Parameters
    ----------
    x : float32 array or scalar, any shape.

    Returns
    -------
    float32, the same shape. +-0, normal numbers from +-TINY on, inf and NaN pass unchanged, bit for
    bit; magnitudes from 2^-149 to TINY - 2^-149 become +0 or -0. Integer operations only.

    Raises
    ------
    TypeError : x is not float32.
    """
    bits, magnitude = _float32(x).view(np.int32), np.int32(0x7FFFFFFF)
    lost = ((bits & magnitude) - np.int32(0x00800000) >> 31) & magnitude & bits  # >> 31: -1 below TINY, 0 from it on
    return (bits ^ lost).view(float32)[()]


def add(a, b, daz=True, tininess="after"):
    """a + b as a CPU with flush-to-zero (FTZ) computes it, bit for bit.

    `subtract`, `multiply` and `divide` have the same signature and contract. Compared with x86-64
    CPUs of Intel and AMD, with products of an NVIDIA H200 (both "after"), with AArch64 under QEMU's
    emulation ("before") and with Berkeley SoftFloat (either), without a difference.

    Parameters
    ----------
    a, b : float32 arrays or scalars, broadcast as NumPy does.
    daz : also read subnormal operands as the zero of their sign ("denormals are zero").
    tininess : "after" rounding (an exact result x is flushed iff |x| < TINY - 2^-151) or "before"
        (iff |x| < TINY). They differ on `multiply` alone.

    Returns
    -------
    float32: IEEE 754 rounding to nearest even, except that a tiny result is the zero of the exact
    result's sign. +-0, inf and NaN follow IEEE 754 (the payload of a NaN is not specified), after
    DAZ on the operands: then 0/subnormal and subnormal/subnormal are NaN, 1/subnormal is inf.

    Raises
    ------
    TypeError : an operand is not float32. ValueError : an unknown `tininess` or `daz`, or shapes that do
    not broadcast.
    """
    return _flushed(np.add, a, b, daz, tininess)


def subtract(a, b, daz=True, tininess="after"):
    """a - b under flush-to-zero: see `add`."""
    return _flushed(np.subtract, a, b, daz, tininess)


def multiply(a, b, daz=True, tininess="after"):
    """a * b under flush-to-zero: see `add`."""
    return _flushed(np.multiply, a, b, daz, tininess)


def divide(a, b, daz=True, tininess="after"):
    """a / b under flush-to-zero: see `add`."""
    return _flushed(np.divide, a, b, daz, tininess)


# An exact result x is flushed iff |x| < LEAST. float64 decides that: sums near TINY and products are exact in it, and a
# quotient of 24-bit significands is TINY itself or at least 2^-49 |x| away from either threshold, where float64 errs by
# 2^-53 |x|. Where x is not flushed, the IEEE result is right: from TINY - 2^-151 on, it has rounded up to TINY.
LEAST = {"after": 2.0**-126 - 2.0**-151, "before": 2.0**-126}


@_ieee
def _flushed(op, a, b, daz, tininess):
    _require(tininess in ("after", "before"), "tininess", '"after" or "before"', repr(tininess))
    _require(daz in (True, False), "daz", "True or False", repr(daz))
    a, b = (flush(a), flush(b)) if daz else (_float32(a), _float32(b))
    with np.nditer([a, b, None], ["external_loop", "buffered", "zerosize_ok"], buffersize=1 << 15) as chunks:
        for x, y, result in chunks:  # few enough elements for the temporaries to stay in the cache
            wide = op(x, y, dtype=np.float64)
            np.multiply(op(x, y), np.abs(wide, out=wide) >= LEAST[tininess], out=result)
        return chunks.operands[2][()]


# --- The network ----------------------------------------------------------------------------------


def init(rng, sizes=SIZES):
    """He initialisation: W ~ N(0, 2 / fan_in) (the variance), b = 0.

    Parameters
    ----------
    rng : np.random.Generator.
    sizes : widths from input to output, at least two; len(sizes) - 1 layers.

    Returns
    -------
    list of (W [fan_in, width], b [width]), float32, one pair a layer.
    """
    _require(isinstance(rng, np.random.Generator), "rng", "a numpy.random.Generator", type(rng).__name__, TypeError)
    _require(len(sizes) >= 2 and min(sizes) >= 1, "sizes", "at least two positive widths", tuple(sizes))
    pairs = zip(sizes, sizes[1:])
    return [(rng.standard_normal((i, o), float32) * float32(np.sqrt(2 / i)), np.zeros(o, float32)) for i, o in pairs]


def _check(params, x, ftz=True, scale=SCALE, transfer=None):
    """float32 everywhere (one stray float64 changes the physics), shapes that fit, a network that there is."""
    width = _float32(x, "x").shape[-1] if np.ndim(x) == 2 else f"shape {np.shape(x)}"
    _require(len(params) > 0, "params", "[(W, b), ...], a pair a layer", params)
    for i, (W, b) in enumerate(params, 1):
        fits = _float32(W, f"W{i}").ndim == 2 and len(W) == width and _float32(b, f"b{i}").shape == W.shape[1:] != (0,)
        _require(fits, f"layer {i}", f"W [{width}, n], b [n], n > 0", f"{W.shape}, {np.shape(b)}, which do not fit")
        width = W.shape[1]
    _require(ftz in (True, False, "hardware"), "ftz", 'True, False or "hardware"', repr(ftz))
    _check_scale(scale)
    if transfer is not None:
        h = transfer(np.zeros((1, 1), float32)) if callable(transfer) else transfer
        _require(_float32(h, "transfer's result").shape == (1, 1), "transfer", "a result of its argument's shape", h)


def _check_scale(scale):
    good = _float32(scale, "scale").ndim == 0 and scale >= 1 and np.frexp(scale)[0] == 0.5
    _require(good, "scale", "a power of two from 1 to 2^127", scale)


@_ieee
def product(h, W, scale=SCALE):
    """h @ W for h around 2^-126, keeping subnormals: [batch, fan_in] -> [batch, width].

    Written as (h S) @ W / S, divided in IEEE arithmetic. S is a power of two, so it differs from the
    literal product only in the rounding of subnormal partial sums (to multiples of 2^-149). It avoids
    subnormals, which are slow on some CPUs: 200 times on one, not at all on an AMD EPYC (Zen 3).
    """
    _check_scale(scale)
    return (_in_order(_float32(h)) * scale) @ _in_order(_float32(W)) / scale


def _arithmetic(ftz):
    """add, multiply, divide for a value of `ftz`."""
    if ftz == "hardware":
        return [hardware_ftz()(op.__call__) for op in (np.add, np.multiply, np.divide)]
    return (add, multiply, divide) if ftz else (np.add, np.multiply, np.divide)


def _outputs(params, x, ftz, scale, transfer):
    """Of every layer, [batch, width] each, at their true size: about 1/S without a transfer."""
    _check(params, x, ftz, scale, transfer)
    params, x = _in_order(params), _in_order(x)
    if transfer is not None:
        hs = [x]
        for (W, b), t in zip(params, [transfer] * (len(params) - 1) + [np.positive]):
            hs.append(t(hs[-1] @ W + b))
        return hs[1:]
    plus, _, over = _arithmetic(ftz)
    (W, b), *later = params
    hs = [over(plus(x @ W, b), scale)]
    for W, b in later:  # b / S underflows until |b| >= S TINY, 1/2: as in the post, these biases are inert
        hs.append(plus(product(hs[-1], W, scale), over(b, scale)))
    return hs


@_ieee
def forward(params, x, ftz=True, scale=SCALE, transfer=None):
    """The network, operation by operation: [batch, inputs] -> logits [batch, classes], float32.

    Parameters
    ----------
    params : list of (W [fan_in, width], b [width]), float32; any depth.
    x : [batch, inputs] float32.
    ftz : True, every operation but the product flushes its operands and its result; "hardware", the
        CPU's own flags do that, with the same bits (compared on Linux x86-64); False, the same
        operations with gradual underflow: the network is linear up to rounding. No operation needs a
        `tininess`: a sum, or a scaling by a power of two, never has an exact result where they differ.
    scale : S, a float32 power of two from 1 to 2^127; the dead zones end at |z| = S TINY.
    transfer : for comparison, an ordinary network without S and flush, whose hidden units have this
        function of an array of sums (float32 to float32, elementwise) and whose logits are linear.

    Raises
    ------
    TypeError : anything but float32. ValueError : shapes that do not fit, another `ftz` or `scale`, a
    transfer whose result has another shape. RuntimeError : "hardware" where `hardware_ftz` raises it.
    """
    o = _outputs(params, x, ftz, scale, transfer)[-1]
    return _arithmetic(ftz)[1](o, scale) if transfer is None else o


@_ieee
def activations(params, x, ftz=True, scale=SCALE, transfer=None):
    """h1, h2, ... of every layer, [batch, width] each, in units of 1/S; the last are the logits.

    Arguments and errors: see `forward`.
    """
    hs = _outputs(params, x, ftz, scale, transfer)
    return [h * scale for h in hs] if transfer is None else hs  # exact


def _check_labels(logits, labels):
    _require(_float32(logits, "logits").ndim >= 2, "logits", "[..., n, classes]", logits)
    labels, (n, classes) = np.asarray(labels), logits.shape[-2:]
    _require(labels.dtype.kind in "iu", "labels", "integers", labels.dtype, TypeError)
    _require(labels.shape == (n,) and n >= 1, "labels", f"shape ({n},), 1 or more of them", labels.shape)
    found = f"{labels.min()} to {labels.max()}"
    _require(0 <= labels.min() and labels.max() < classes, "labels", f"integers in [0, {classes})", found)


@_ieee
def cross_entropy(logits, labels, smoothing=0.0):
    """Cross-entropy of each example, in nats.

    Parameters
    ----------
    logits : [..., n, classes] float32; not changed.
    labels : [n] integers in [0, classes), n >= 1; the same for all leading axes.
    smoothing : share of each label that is spread over all classes, 0 to 1 (Szegedy et al., arXiv 1512.00567).

    Returns
    -------
    [..., n] float32.

    Raises
    ------
    TypeError : logits are not float32, or labels not integers. ValueError : labels of another shape or range,
    another smoothing.
    """
    _check_labels(logits, labels)
    _require(0 <= smoothing <= 1, "smoothing", "a share from 0 to 1", smoothing)
    z = logits - logits.max(axis=-1, keepdims=True)
    found = np.log(np.exp(z).sum(axis=-1)) - (1 - float32(smoothing)) * z[..., np.arange(len(labels)), labels]
    return found - float32(smoothing) * z.mean(axis=-1) if smoothing else found


@_ieee
def loss(logits, labels):
    """Mean `cross_entropy` of [batch, classes] logits against [batch] labels; to be minimised."""
    return cross_entropy(logits, labels).mean()


@_ieee
def accuracy(logits, labels):
    """Share of [batch] labels that the largest of the [batch, classes] logits names."""
    _check_labels(logits, labels)
    return float(np.mean(logits.argmax(axis=-1) == labels))


# --- The ES gradient ------------------------------------------------------------------------------
#
# ES estimates a gradient from the losses of mutated networks: g = E[(L(w + sigma e) - L(w - sigma e)) e]
# / (2 sigma), e ~ N(0, 1) for every weight. For all 669,706 weights and a whole batch at once, the noise
# of that buries the signal. This is a relative with less noise, by four steps. From here on, L is the loss
# of one example; of a layer, a is the input, with a 1 if the bias acts (W has b as its last row then),
# z = a . W the sums and h = t(z) the outputs, in units of 1/S.
#
#   1. The gradient of a mean is the mean of the gradients, so every example has members of its own.
#   2. The example sees the weights of unit j only through z_j = a . W[:, j]. A mutation orthogonal to a
#      changes nothing, so mutate along a: W[:, j] +- sigma a/|a|, which moves z_j by +- sigma |a|. (The field
#      calls that node perturbation: Williams 1992; Werfel, Xie, Seung 2003; Dalm, van Gerven, Ahmad 2023.)
#   3. Cut the units of a layer into blocks J of k, the last perhaps smaller. A member is the network with one
#      block mutated, with a random sign e_j = +-1 for each unit; beside it stands its mirror image, with -e.
#      In the last two layers k = 1: there, logits are all that a mutation leaves to compute.
#   4. A unit whose output is the same in both has no part in their difference: its estimate is 0.
#
#     r   = L(+e) - L(-e)                            the difference of the losses, one for the block
#     c_j = h_j(+e) - h_j(-e)                        the movement of the unit's output
#     s_j = r [c_j != 0] / (2 e_j sigma |a|)         the slope of the loss along z_j; 0 where |a| = 0
#     dW[:, j] = a s_j,   db_j = s_j                 means over the batch; db_j = 0 if the bias does not act
#
# s_j is an unbiased estimate of the slope of the loss along z_j over the interval +- sigma |a|,
#
#     (L(z_j + sigma |a|) - L(z_j - sigma |a|)) / (2 sigma |a|),
#
# averaged over the signs of the other units of its block, with no mutation elsewhere; if k = 1, it is that
# slope, without noise. These slopes are neither the gradient of the Gaussian-smoothed loss nor obviously
# the gradient of one function. Step 1 leaves the expectation as it is, and so do 2 and 4 if nothing below
# the layer is mutated, as here; signs instead of Gaussians, and step 3, change what is estimated.
#
# Optional, a control variate: layers are measured from the last to the first, so the slopes s' of the
# layer above are known, and with its weights W' the chain rule predicts what unit j adds to r:
#
#     p_j = c_j (W' s')_j,     s_j = (p_j + (r - sum_J p) [c_j != 0]) / (2 e_j sigma |a|)
#
# So s_j is r without what the other units of the block are predicted to add. The expectation is the same
# however bad the prediction, as p changes its sign with e, and s' was measured with other signs; a good one
# removes noise; where k = 1 there is none to remove. It is a linear surrogate of the loss made of measured
# slopes, and takes no derivative; with c_j / (2 e_j sigma |a|) where backprop has t'(z_j), it is also what
# backprop would do.


def mutation_signs(rng, params, n):
    """e of all layers, [n, sum of the widths] int8 of -1 and +1: a row an example, the first layer first.

    Drawn at once from the generator as it stands, which advances: its state decides them, before the
    batch is cut into tasks. Raises TypeError if `rng` is no np.random.Generator.
    """
    _require(isinstance(rng, np.random.Generator), "rng", "a numpy.random.Generator", type(rng).__name__, TypeError)
    count = n * sum(len(b) for _, b in params)
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)
    return (2 * bits.view(np.int8) - 1).reshape(n, -1)


def _acts(l, ftz=True, scale=SCALE, transfer=None):
    """Whether the bias of layer l = 0, 1, ... acts: with the flush, the later ones are 0 before they are added."""
    return l == 0 or not ftz or transfer is not None


def _check_es(params, x, labels, sigma, block, losses, control_variate, weights=None, **net):
    _check(params, x, **net)
    n, classes, least = len(x), len(params[-1][1]), net.get("scale", SCALE) * TINY
    good = isinstance(sigma, numbers.Real) and TINY <= float32(sigma) < np.inf and isinstance(block, numbers.Integral)
    _require(good and block >= 1, "sigma, block", "a finite number > 0, an integer >= 1", f"{sigma}, {block}")
    _require(control_variate in (True, False), "control_variate", "True or False", repr(control_variate))
    _require(np.shape(labels)[:1] == (n,) and n >= 1, "labels", f"{n} >= 1 rows, as in x", f"shape {np.shape(labels)}")
    inert = not any(np.abs(b).max() >= least and not _acts(l, **net) for l, (_, b) in enumerate(params))  # NaN is in L
    _require(inert, "the later biases", "|b| < S TINY, 1/2 by default, which flushes: only b1 acts", "a larger one")
    found = _float32(losses(np.zeros((1, classes, n), float32).swapaxes(1, 2), labels), "the result of losses").shape
    _require(found == (1, n), "losses", f"[..., {n}] for logits [..., {n}, {classes}]", f"shape {found} for [1, ...]")
    weights = np.full(n, 1 / n, float32) if weights is None else _float32(weights, "weights")
    good = weights.shape == (n,) and np.all(weights >= 0) and np.all(weights < np.inf)
    _require(good, "weights", f"{n} finite numbers >= 0", f"shape {weights.shape}, {weights.min(initial=0)} and more")
    return weights


@_ieee
def es_gradient_plain(
    params, x, labels, rng, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, weights=None, **net
):
    """`es_gradient` literally: example by example and member by member, each a network with mutated weights."""
    weights = _check_es(params, x, labels, sigma, block, losses, control_variate, weights, **net)
    last = len(params) - 1
    grads = [np.zeros((len(W) + 1, len(b)), float32) for W, b in params]  # of [W; b]
    for i, signs in enumerate(mutation_signs(rng, params, len(x)).astype(float32)):
        example, label, above = x[i : i + 1], labels[i : i + 1], None
        inputs = [example, *activations(params, example, **net)]
        for l, (W, b) in reversed([*enumerate(params)]):
            signs, e = np.split(signs, [-len(b)])
            a, s = np.append(inputs[l], float32(_acts(l, **net))), np.zeros_like(b)
            shift, k = float32(sigma) * np.linalg.norm(a), min(block, len(b)) if l + 1 < last else 1
            for J in [np.arange(j, min(j + k, len(b))) for j in range(0, len(b), k) if shift > 0]:
                L, h = [], []
                for sign in (1, -1):
                    Wb = np.vstack([W, b])
                    Wb[:, J] += np.outer(a / np.linalg.norm(a), sign * float32(sigma) * e[J])
                    member = [*params[:l], (Wb[:-1], Wb[-1]), *params[l + 1 :]]
                    L.append(losses(forward(member, example, **net), label)[0])
                    h.append(activations(member, example, **net)[l][0, J])
                c = h[0] - h[1]
                p = c * (params[l + 1][0][J] @ above) if control_variate and k > 1 else np.zeros_like(c)
                s[J] = (p + (L[0] - L[1] - p.sum()) * (c != 0)) / (2 * e[J] * shift)
            grads[l] += np.outer(a, s) * weights[i]
            above = s
    return [(grad[:-1], grad[-1]) for grad in grads]


def _layers(params, ftz=True, scale=SCALE, transfer=None):
    """(W, b, t) of each layer, in units of 1/S, an example a column: h = t(W^T a + b). t may overwrite z."""

    def dead_zone(z):
        if ftz == "hardware":
            with hardware_ftz():
                z /= scale
                z *= scale
        elif ftz:
            z *= np.abs(z) >= scale * TINY
        return z

    ts = [dead_zone] * len(params) if transfer is None else [transfer] * (len(params) - 1) + [np.positive]
    return [(W, b[:, None] * _acts(l, ftz, scale, transfer), t) for l, ((W, b), t) in enumerate(zip(params, ts))]


def _member_losses(layers, l, k, change, base, labels, losses):
    """Losses [blocks, 2, n] of the members, and of their mirror images, whose outputs in layer l `change`.

    change : [width, 2, n], of the outputs of the layer; a block is k rows, the last perhaps fewer.
    base : [next width, n], what it is added to: the sums of the next layer, or the logits.
    """
    (width, _, n), classes = change.shape, layers[-1][0].shape[1]
    (W, _, t), *above = layers[l + 1 :] or [(np.eye(classes, dtype=float32), 0, np.positive)]
    change, W, base = _blocks(change.reshape(width, 2 * n), k), _blocks(W, k), np.tile(base, 2)
    # So many blocks at once that what they need stays in the cache: a tenth of the time.
    some, found = max(1, (1 << 19) // (max(len(base), classes) * 2 * n)), []
    for i in range(0, len(change), some):
        z = np.matmul(W[i : i + some].swapaxes(1, 2), change[i : i + some])
        z += base
        h = t(z)
        for W2, b2, t2 in above:
            h = t2(W2.T @ h + b2)
        found.append(losses(np.moveaxis(h.reshape(-1, classes, 2, n), 1, -1), labels))
    return np.concatenate(found)


def _blocks(rows, k):
    """[width, m] -> [blocks, k, m]; a last, smaller block is filled up with zeros."""
    if missing := -len(rows) % k:
        rows = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
    return rows.reshape(-1, k, rows.shape[1])


def _slopes(params, x, labels, signs, sigma, block, losses, control_variate, net):
    """What `es_slopes` returns, in the symbols of the comment above; [width, n] unless it says more."""
    layers, sums, a = _layers(params, **net), [], [x.T]  # a: the inputs of the layers, and the logits
    for W, b, t in layers:
        sums.append(W.T @ a[-1] + b)
        a.append(t(sums[-1].copy()))
    signs = np.split(signs.T.astype(float32), np.cumsum([len(b) for _, b in params])[:-1])
    mirror, slopes = np.array([[1], [-1]], float32), [None] * len(layers)
    for l, (e, (_, _, t)) in reversed([*enumerate(zip(signs, layers))]):
        k = min(block, len(e)) if l + 2 < len(layers) else 1
        shift = float32(sigma) * np.sqrt(np.square(a[l]).sum(axis=0) + float32(_acts(l, **net)))  # sigma |a|, [n]
        h = t(sums[l][:, None] + mirror * (e * shift)[:, None])  # of members and mirror images, [width, 2, n]
        L = _member_losses(layers, l, k, h - a[l + 1][:, None], [*sums, a[-1]][l + 1], labels, losses)  # [blocks, 2, n]
        r, c, p = L[:, 0] - L[:, 1], h[:, 0] - h[:, 1], float32(0)
        if control_variate and k > 1:
            p = c * (params[l + 1][0] @ slopes[l + 1])
            r -= _blocks(p, k).sum(axis=1)
        per_shift = np.divide(0.5, shift, out=np.zeros_like(shift), where=shift > 0)
        slopes[l] = (p + np.repeat(r, k, axis=0)[: len(c)] * (c != 0)) * (e * per_shift)
    return a[1:], slopes


@_ieee
def es_slopes(params, x, labels, signs, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, **net):
    """What ES measures: the slope s of each example's loss along the sum of each unit.

    The same as in `es_gradient_plain`, up to rounding (a sum within rounding of a threshold may live in one and
    not in the other), without its repetitions: what is below a mutation is computed once, and only the change of
    k outputs is multiplied with the next weights.

    Parameters
    ----------
    signs : [n, sum of the widths], as `mutation_signs` draws them.
    Others as in `es_gradient`, and the same errors.

    Returns
    -------
    outputs, slopes : lists of h [width, n] and s [width, n] of each layer, float32, an example a column; the last h
        are the logits. With the layer's input a, x.T or the h below, a s^T / n is the gradient of W.
    """
    _check_es(params, x, labels, sigma, block, losses, control_variate, **net)
    signs, shape = np.asarray(signs), (len(x), sum(len(b) for _, b in params))
    _require(signs.shape == shape and np.all(np.abs(signs) == 1), "signs", f"shape {shape} of -1 and +1", signs.shape)
    how = {"sigma": sigma, "block": block, "losses": losses, "control_variate": control_variate, "net": net}
    return mapped(_slopes, [{"params": params, "x": x, "labels": labels, "signs": signs} | how])[0]


def mapped(function, tasks, shared=None, workers=None, map_tasks=map):
    """[function(**shared, **task) for task in tasks], by whatever maps: `es_gradient` describes `map_tasks`.

    Each of the `workers` gets `shared` and a list of tasks (None: each task goes alone) and computes them under IEEE
    arithmetic, with arrays that are aligned and C-contiguous, as they need not be where they arrive.
    """
    count = min(workers or len(tasks), len(tasks))
    lists = [tasks[i * len(tasks) // count : (i + 1) * len(tasks) // count] for i in range(count)]
    work = functools.partial(_work, function, shared or {})
    return [result for _, results in map_tasks(work, lists) for result in results]


@_ieee
def _work(function, shared, tasks):
    """What a worker does, and which it is."""
    who, shared = f"{platform.node()} ({platform.machine()}, NumPy {np.__version__})", _in_order(shared)
    return who, [function(**shared, **_in_order(task)) for task in tasks]


def gradient_from_slopes(slopes, params, x, labels, signs, weights, task=32, workers=None, map_tasks=map):
    """The gradient of sum_i w_i L_i from the slopes s of each L_i along the sums of the units: sum_i w_i a_i s_i^T.

    Parameters
    ----------
    slopes : a function of the keywords params, x, labels and signs, the last three some of the rows of those given
        here, which returns what `es_slopes` does.
    weights : w, [n] float32.
    Others as in `es_gradient`, which is this function of what ES measures.

    Returns
    -------
    list of (dW, db), as if all biases acted, and the logits [n, classes].
    """
    rows = {"x": x, "labels": labels, "signs": signs}
    count = 2 * -(-len(x) // (2 * task)) if len(x) > task // 2 else 1
    parts = zip(*(np.array_split(array, count) for array in rows.values()))
    found = mapped(slopes, [dict(zip(rows, part)) for part in parts], {"params": params}, workers, map_tasks)
    (*outputs, logits), slopes = ([np.concatenate(parts, axis=1) for parts in zip(*of)] for of in zip(*found))
    slopes = [s * weights for s in slopes]
    return [(a @ s.T, s.sum(axis=1)) for a, s in zip([_in_order(x).T, *outputs], slopes)], logits.T


@_ieee
def es_gradient(
    params, x, labels, rng, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, weights=None,
    task=32, workers=None, map_tasks=map, return_losses=False, **net,
):  # fmt: skip
    """Evolution-strategies estimate of the gradient of the mean loss, ready for descent.

    From losses and activations of the network and its mutations alone; with the control variate, from the weights
    above a mutation too. What it estimates is in the comment above, what it computes in `es_gradient_plain`.

    Parameters
    ----------
    params : list of (W [fan_in, width], b [width]), float32; any depth.
    x : [n, inputs] float32, n >= 1.
    labels : [n] integers in [0, classes); with other `losses`, any array of n rows.
    rng : np.random.Generator, for the signs of the mutations; it advances.
    sigma : size of a mutation of a unit's weights (Euclidean norm), > 0.
    block : units k mutated together, >= 1, in the layers below the last two; with it the variance grows and the
        cost falls.
    losses : the loss of each example: logits [..., n, classes] and labels -> [..., n], float32; it may
        overwrite the logits.
    control_variate : whether the chain rule's prediction is taken out of a block's difference, where k > 1.
    weights : w, [n] float32, finite and >= 0: the gradient is that of sum_i w_i L_i. None: of the mean, w = 1 / n.
    task : how many examples at most are measured together. They are cut into tasks of equal size, an even number of
        them, so that two workers have the same to do, but one for half as many as `task` or fewer. That depends on n
        alone, and decides the last bits. A small network is faster with more than 32.
    workers : None, and each task is mapped alone, or into how many lists of tasks the work is cut: each travels with
        the weights once, so their number is best that of the processes or machines.
    map_tasks : calls a function with each of a list of arguments and returns the results in their order, like
        the builtin `map`: also that of a pool of threads or processes, of mpi4py.futures or dask. The function
        pickles if `losses` and `transfer` do. The bits are the same whatever maps.
    return_losses : also return the losses [n] of the examples in the network as it is, of the pass that is made anyway.
    **net : `ftz`, `scale`, `transfer`, as in `forward`; "hardware" gives the same bits as True, faster.

    Returns
    -------
    list of (dW, db), float32, shaped like params. With the flush, db is 0 after the first layer: those
    biases flush before they are added. Without it, or with a transfer, all biases act.

    Raises
    ------
    TypeError : not float32, or not of its kind. ValueError : shapes that do not fit, values out of range,
    and, with the flush, later biases of S TINY (1/2) or more, which do not flush: training makes none.
    RuntimeError : "hardware" where `hardware_ftz` raises it.
    """
    weights = _check_es(params, x, labels, sigma, block, losses, control_variate, weights, **net)
    for name, value in (("task", task), ("workers", 1 if workers is None else workers)):
        _require(isinstance(value, numbers.Integral) and value >= 1, name, "an integer >= 1", value)
    how = {"sigma": sigma, "block": block, "losses": losses, "control_variate": control_variate, "net": net}
    measure, signs = functools.partial(_slopes, **how), mutation_signs(rng, params, len(x))
    grads, logits = gradient_from_slopes(
        measure, params, x, np.asarray(labels), signs, weights, task, workers, map_tasks
    )
    grads = [(dW, db * _acts(l, **net)) for l, (dW, db) in enumerate(grads)]
    return (grads, losses(logits[None], labels)[0]) if return_losses else grads


@_ieee
def adamw(p, g, m, v, step, lr, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
    """One AdamW step, in place: p against gradient g, with moments m and v.

    Parameters
    ----------
    p, g, m, v : float32 arrays of one shape, or lists of such, nested alike: `params` and what `es_gradient`
        returns. m and v start as zeros.
    step : counts from 1. lr : learning rate, >= 0.
    weight_decay : decoupled, p -= lr * weight_decay * p.

    Raises
    ------
    TypeError : not float32. ValueError : shapes that differ, a step below 1, another value out of range.
    Nothing is changed then.
    """
    _require(isinstance(step, numbers.Integral) and step >= 1, "step", "an integer >= 1", step)
    rates = lr, weight_decay, beta1, beta2, eps
    good = all(0 <= float32(rate) < np.inf for rate in rates) and max(beta1, beta2) < 1 and float32(eps) > 0
    _require(good, "lr, weight_decay, beta1, beta2, eps", "finite numbers from 0 on, beta < 1, eps > 0", rates)
    trees = [leaves(tree) for tree in (p, g, m, v)]
    shapes = [[_float32(a, name).shape for a in arrays] for name, arrays in zip("pgmv", trees)]
    written = all(a.flags.writeable for a in trees[0] + trees[2] + trees[3])
    _require(written and shapes == 4 * shapes[:1], "p, g, m, v", "writable arrays of the same shapes", shapes)
    how = {"flags": ["external_loop", "buffered", "zerosize_ok"], "buffersize": 1 << 14}  # stays in the cache
    for arrays in zip(*trees):
        with np.nditer(arrays, op_flags=[["readwrite"], ["readonly"], ["readwrite"], ["readwrite"]], **how) as chunks:
            for p, g, m, v in chunks:
                m += float32(1 - beta1) * (g - m)
                v += float32(1 - beta2) * (g * g - v)
                t = np.sqrt(v * float32(1 / (1 - beta2**step))) + float32(eps)
                p *= float32(1 - lr * weight_decay)
                p -= float32(lr / (1 - beta1**step)) * (m / t)


def leaves(tree):
    """The arrays of lists and tuples, nested in any way, in their order."""
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, (list, tuple)) else [tree]
