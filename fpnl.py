"""Nonlinear computation in deep linear networks: float32 underflow as the only nonlinearity.

A network of matrix products and additions is linear in the real numbers. In float32 arithmetic that flushes subnormals
to zero it is not: a result below TINY = 2^-126 in magnitude becomes 0. Scale the activations down to that threshold,
and each unit has a dead zone. Automatic differentiation takes the network for linear and cannot see it. Evolution
strategies (ES), which compare mutated networks, can, and train it.

    u1 = (x @ W1 + b1) / S                  x: pixels in [0, 1];  S = 2^125, so u is about 2^-126
    u2 = u1 @ W2 + b2 / S
    u3 = u2 @ W3 + b3 / S
    o  = u3 * S                             o: the logits

As on the hardware of the post, each +, / and * flushes its operands and its result, but the products @ keep subnormals.
(With h = u S, u1 @ W2 is computed as h1 @ W2 / S, and this division, a part of the product, does not flush either.)
While |b| is below 1/2, b2 / S and b3 / S flush to 0: those biases do nothing, but to add that 0 flushes the product. So

    h1 = t(x @ W1 + b1),   h2 = t(h1 @ W2),   o = t(h2 @ W3),   with the dead zone   t(z) = z if |z| >= 1/2, else 0

of the logits, too. (In all layers but the first, 0.49999997, the float32 below 1/2, gives 1/2: see `activations`.)

Usage, for any depth:

    params = init(rng)                                   # [(W1, b1), (W2, b2), (W3, b3)]
    grads = es_gradient(params, x, labels, rng)          # [(dW1, db1), ...]
    adamw(params, grads, m, v, step=1, lr=1e-3)          # in place; m, v: zeros of the same shapes
    np.mean(forward(params, x).argmax(axis=1) == labels) # accuracy

Shapes: x [n, inputs], W [fan_in, width], b [width], h [n, width], logits [n, classes], all float32; labels [n]
integers. In all public functions, an example is a row.

Left out: data and files (data.py), schedules and pools (train.py), and backpropagation.

References
----------
J. Foerster, *Nonlinear computation in deep linear networks*, OpenAI, 2017 ("the post"),
https://openai.com/index/nonlinear-computation-in-deep-linear-networks/
T. Salimans et al., *Evolution Strategies as a Scalable Alternative to Reinforcement Learning*, arXiv 1703.03864.
R. J. Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*, Machine
Learning 8, 1992; J. Werfel, X. Xie, H. S. Seung, *Learning curves for stochastic gradient descent in linear feedforward
networks*, NIPS 2003; S. Dalm, M. van Gerven, N. Ahmad, *Effective Learning with Node Perturbation in Deep Neural
Networks*, arXiv 2310.00965.
I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, arXiv 1711.05101.
IEEE Std 754-2019, 7.5 (underflow). Intel SDM vol. 1, 10.2.3.3 and 10.2.3.4.
"""

import contextlib
import ctypes
import functools
import numbers
import platform

import numpy as np

if int(np.__version__.split(".")[0]) < 2:
    raise ImportError(f"fpnl: expected NumPy 2 or later, found {np.__version__}")

float32 = np.float32
# The smallest normal float32.
TINY = float32(2.0**-126)
# S.
SCALE = float32(2.0**125)
# Of the post: pixels, two layers of hidden units, classes.
SIZES = (784, 512, 512, 10)


@contextlib.contextmanager
def _ieee():
    """A decorator, `@_ieee()`: a function computes in IEEE arithmetic, whatever the CPU's mode is or np.seterr says."""
    with np.errstate(all="ignore"), contextlib.ExitStack() as stack:
        # On an unknown platform, the mode stays as it is.
        with contextlib.suppress(RuntimeError):
            stack.enter_context(hardware_ftz(daz=False, ftz=False))
        yield


# --- Flush-to-zero arithmetic -----------------------------------------------------------------------------------------
#
# Functions that check arguments (`_float32`, `_one_of`, ...) are at the end: they raise, or return plain NumPy arrays.


def flush(x):
    """Replace every subnormal by the zero of its sign (what DAZ, "denormals are zero", does to an operand).

    Parameters
    ----------
    x : float32 array or scalar, any shape.

    Returns
    -------
    float32, the same shape. +-0, normal numbers from +-TINY on, inf and NaN pass unchanged, bit for bit; magnitudes
    from 2^-149 to TINY - 2^-149 become +0 or -0.

    Raises
    ------
    TypeError : x is not float32.
    """
    x = _float32(x)
    return np.where(np.abs(x) < TINY, np.copysign(float32(0), x), x)[()]


def add(a, b, daz=True, tininess="after"):
    """a + b as a CPU with flush-to-zero (FTZ) computes it, bit for bit.

    `subtract`, `multiply` and `divide` have the same signature and contract. Compared with x86-64 CPUs of Intel and
    AMD, with `multiply` of an NVIDIA H200 (both "after"), with AArch64 under QEMU's emulation ("before") and with
    Berkeley SoftFloat (either), without a difference.

    Parameters
    ----------
    a, b : float32 arrays or scalars, broadcast as NumPy does.
    daz : also read subnormal operands as the zero of their sign.
    tininess : "after" rounding (an exact result x is flushed iff |x| < TINY - 2^-151) or "before" (iff |x| < TINY).
        They differ on `multiply` alone.

    Returns
    -------
    float32: IEEE 754 rounding to nearest even, except that a tiny result is the zero of the exact result's sign. +-0,
    inf and NaN follow IEEE 754 (the payload of a NaN is not specified), after DAZ on the operands: then 0/subnormal and
    subnormal/subnormal are NaN, 1/subnormal is inf.

    Raises
    ------
    TypeError : an operand is not float32. ValueError : an unknown `tininess` or `daz`, or shapes that do not broadcast.
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


# The rule: a result is flushed iff its exact value x has |x| < LEAST.
#
# Tininess "after" rounding asks whether x is below TINY once it has been rounded to 24 significant bits. The largest
# such number below TINY is TINY - 2^-150; from half way between the two, TINY - 2^-151, x is rounded to TINY and is not
# tiny. Any result that is not flushed is the IEEE result. (From LEAST to TINY, x is rounded to TINY.)
#
# float64 can decide whether |x| < LEAST. Products, and sums near TINY, are exact in it. Quotients are rounded, by a
# relative 2^-53 at most, but none is so near to LEAST: in units of TINY, a quotient of two float32 is m / n, integers,
# one below 2^24, and the other, too, but for a factor that is a power of two. If m < n, then m < 2^24, whichever it is,
# and m / n <= m / (m + 1) <= 1 - 2^-24, while LEAST is 1 - 2^-25; else m / n >= 1. So no quotient is between LEAST and
# TINY, and no sum is, as sums are multiples of 2^-149: "after" and "before" differ on `multiply` alone.
LEAST = {"after": 2.0**-126 - 2.0**-151, "before": 2.0**-126}


@_ieee()
def _flushed(op, a, b, daz, tininess):
    _one_of("tininess", tininess, "after", "before")
    _one_of("daz", daz, True, False)
    a, b = (flush(a), flush(b)) if daz else (_float32(a), _float32(b))
    tiny = np.abs(op(a, b, dtype=np.float64)) < LEAST[tininess]
    # Times 1 or 0: a result times 0 is the zero of its sign. (inf and NaN are not tiny.)
    return op(a, b) * ~tiny


# --- The network ------------------------------------------------------------------------------------------------------


def forward(params, x, ftz=True, scale=SCALE, transfer=None):
    """The network, operation by operation: [n, inputs] -> logits [n, classes], float32.

    Parameters
    ----------
    params : list of (W [fan_in, width], b [width]), float32; any depth.
    x : [n, inputs] float32.
    ftz : True, every operation but the product flushes its operands and its result; "hardware", the CPU's own flags do
        that, with the same bits (compared on Linux x86-64); False, the same operations with gradual underflow: the
        network is linear up to rounding. (No operation that flushes is one on which the `tininess` of `add` matters.)
    scale : S, a float32 power of two from 1 to 2^126; the dead zones end at |z| = S TINY.
    transfer : for comparison, an ordinary network without S and flush, whose hidden units have this function of an
        array of sums (float32 to float32, elementwise) and whose logits are linear.

    Raises
    ------
    TypeError : anything but float32. ValueError : shapes that do not fit, another `ftz` or `scale`, a transfer whose
    result has another shape. RuntimeError : "hardware" where `hardware_ftz` raises it.
    """
    return activations(params, x, ftz, scale, transfer)[-1]


@_ieee()
def activations(params, x, ftz=True, scale=SCALE, transfer=None):
    """h = u S of every layer, [n, width] each; the last are the logits. Arguments and errors: see `forward`."""
    # With a transfer, S is 1, nothing flushes, and ts are what makes h of the sums of each layer: the transfer, and for
    # the logits np.positive, which changes nothing.
    params, x, ts, _ = _network(params, x, ftz, scale, transfer)
    ftz, scale = (ftz, scale) if transfer is None else (False, float32(1))
    plus, over = (np.add, np.divide) if ftz in (False, "hardware") else (add, divide)
    hs = [x]
    for l, ((W, b), t) in enumerate(zip(params, ts)):
        # The product u @ W, computed as h @ W / S, is rounded once where it is subnormal, and not in each term and
        # partial sum. (Products of subnormals take 200 times as long, too, on some CPUs.) This division does not flush.
        # So, if h @ W is 0.49999997, the quotient, TINY - 2^-150, is rounded to TINY, and h is 1/2.
        product = hs[-1] @ W if l == 0 else hs[-1] @ W / scale
        with hardware_ftz() if ftz == "hardware" else contextlib.nullcontext():
            u = over(plus(product, b), scale) if l == 0 else plus(product, over(b, scale))
        # u S is exact, and where u is flushed it is 0 or at least S TINY: to flush it, too, would change nothing.
        hs.append(u * scale if transfer is None else t(u))
    return hs[1:]


@_ieee()
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
    TypeError : logits are not float32, or labels not integers. ValueError : labels of another shape or range, another
    smoothing.
    """
    logits, labels = _float32(logits, "logits"), _array(labels, "labels")
    _require(labels.dtype.kind in "iu", "labels", "integers", labels.dtype, TypeError)
    fit = labels.shape == logits.shape[-2:-1] and labels.size > 0 and logits.ndim > 1
    _require(fit, "logits, labels", "[..., n, classes], [n], n > 0", f"{logits.shape}, {labels.shape}")
    _require(0 <= labels.min() and labels.max() < logits.shape[-1], "labels", f"all in [0, {logits.shape[-1]})", labels)
    _require(0 <= smoothing <= 1, "smoothing", "a share from 0 to 1", smoothing)
    # The classes first, in an array of its own, which is written over: half the time.
    z = np.moveaxis(logits, -1, 0).copy()
    z -= z.max(axis=0)
    own, mean = np.moveaxis(z[labels, ..., np.arange(len(labels))], 0, -1), z.mean(axis=0) if smoothing else float32(0)
    return np.log(np.exp(z, out=z).sum(axis=0)) - (1 - float32(smoothing)) * own - float32(smoothing) * mean


# --- The ES gradient --------------------------------------------------------------------------------------------------
#
# THE ALGORITHM. For each example, whose loss is L, and each layer, from the last to the first:
#
#     a                        the layer's input, x or the h of the layer below; and one more entry, 1 if the layer's
#                              biases act, else 0 (the first layer's act; all, if ftz=False or with a `transfer`)
#     V                        the layer's weights W, with b as one more row
#     z = a @ V,  h = t(z)     its sums and its outputs, one of each for every unit j
#     d = sigma |a|            how far a mutation, sigma long, moves a sum
#     k                        `block`, but 1 in the last hidden layer and in the logits' layer
#     for each block J, k consecutive units of the layer, the last block perhaps fewer:
#         e_j = +1 or -1       at random, for each j in J, by `mutation_signs`
#         L+, h+               L and h of a *member*: the network, but that z_j is z_j + e_j d for all j in J
#         L-, h-               L and h of its mirror image, in which z_j is z_j - e_j d for all j in J
#         r = L+ - L-          one number for the block
#         c_j = h+_j - h-_j    how far the unit's own output moves
#         s_j = r / (2 e_j d)  the slope of L along z_j; but 0 where c_j = 0, and where d = 0
#     dV = a^T s               the slope along V, as z is linear in it: [fan_in + 1, width], dW and in the last row db
#
# The result, called the gradient, is the sum over the examples of w dV; an example's w is 1 / n if none is given.
#
# WHY ALONG a. ES estimates a gradient as the mean of (L(v + sigma g) - L(v - sigma g)) g / (2 sigma), v being all N
# weights of the network, and g ~ N(0, 1) for each. With M such pairs of members, the noise is about sqrt(N / M) times
# as long as the gradient, and N is 669,706 for SIZES. But an example sees the weights of unit j only through z_j. A
# mutation of V[:, j] orthogonal to a moves no z_j, so none is tried; one along a, of length sigma, is +- sigma a / |a|,
# and moves z_j by +- d. (Node perturbation: Williams 1992; Werfel, Xie, Seung 2003; Dalm, van Gerven, Ahmad 2023.)
#
# WHY BLOCKS. The k units of a block share two losses, so there are fewer of them. But for each unit, what the others
# add to r is noise. In the last two layers k = 1, as members are cheap: one row of weights leads from a unit to the
# logits.
#
# WHY 0 IF c_j = 0. Then L does not depend on e_j, and the slope is 0: r is what the others add.
#
# WHAT s_j ESTIMATES. Let q_i = e_i e_j be the signs of the other units of the block as seen from unit j, and L(y, q)
# the loss if z_j is y and each of the others is moved by q_i d. Then, for e_j = 1 and for e_j = -1,
#
#     r / e_j = L(z_j + d, q) - L(z_j - d, -q)
#
# As q and -q are equally likely, s_j is an unbiased estimate, but for rounding, of the slope over an interval,
#
#     (L(z_j + d, q) - L(z_j - d, q)) / (2 d),      averaged over all q
#
# (A slope of 0 where c_j = 0 adds no bias: whether c_j is 0 depends on no sign.) If k = 1, there is no q, and no noise:
# s_j is a difference, and its sign cancels. These slopes are not the gradient of the loss smoothed by a Gaussian (signs
# are not Gaussian, a block is not the whole network, d depends on a), nor, in general, of any function.
#
# THE CONTROL VARIATE, an option, for blocks of k > 1. Let s' be the slopes of the layer above, which have just been
# measured, and W' its weights. The chain rule predicts that unit j adds p_j = c_j (W' s')_j to r. The predictions for
# the other units are subtracted:
#
#     s_j = (r - sum of p_i over the other units i of J) / (2 e_j d),     and again 0 where c_j = 0 and where d = 0
#
# The mean stays as it is, however bad the predictions: p_i changes its sign with e_i and depends on no other sign of
# its layer (s' was measured with this layer unmutated), so E[p_i / e_j] = 0. Good ones take noise away, bad ones add
# noise. p is a linear surrogate of the loss, made of measured slopes. (With the same s', backprop would have s_j =
# t'(z_j) (W' s')_j; that is p_j / (2 e_j d) with the derivative in the place of c_j / (2 e_j d).)
#
# THE COST of an example, with H hidden layers of m units, if only what a mutation changes is computed again: for SIZES
#
#     2 ((H - 1) m / k + m + classes)                              losses: 2 (512 / 4 + 512 + 10) = 1,300
#     2 (H - 1) m^2 (1 + classes / k) + (H - 1) (H - 2) m^3 / k    multiplications, about: 1.8 million


@_ieee()
def es_gradient_plain(
    params, x, labels, rng, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, weights=None, **net
):
    """`es_gradient` literally: example by example and member by member, each a network with mutated weights.

    Arguments and results are those of `es_gradient`, below. `losses` is the loss of each example: logits [..., n,
    classes] and labels -> [..., n]. `net` are ftz, scale and transfer, as in `forward`.
    """
    # acting: in how many layers, from the first, the biases act; signs: [width, n] of each layer.
    params, x, labels, w, acting, _ = _check(params, x, labels, sigma, block, losses, control_variate, weights, **net)
    signs = _of_layers(mutation_signs(rng, params, len(x)), params)
    grads = [np.zeros((len(W) + 1, len(b)), float32) for W, b in params]
    for i in range(len(x)):
        inputs, s = [x[i], *(h[0] for h in activations(params, x[i : i + 1], **net))], {}
        for l, (W, b) in reversed([*enumerate(params)]):
            a, e = np.append(inputs[l], float32(l < acting)), signs[l][:, i]
            d, k = float32(sigma) * np.linalg.norm(a), block if l < len(params) - 2 else 1
            blocks = np.split(np.arange(len(b)), range(k, len(b), k))
            s[l] = np.zeros_like(b)
            for J in blocks if d > 0 else []:
                h, L = [], []
                for sign in (1, -1):
                    V = np.vstack([W, b])
                    V[:, J] += float32(sigma) * np.outer(a / np.linalg.norm(a), sign * e[J])
                    hs = activations([*params[:l], (V[:-1], V[-1]), *params[l + 1 :]], x[i : i + 1], **net)
                    h.append(hs[l][0, J])
                    L.append(losses(hs[-1], labels[i : i + 1])[0])
                r, c = L[0] - L[1], h[0] - h[1]
                p = c * (params[l + 1][0][J] @ s[l + 1]) if control_variate and k > 1 else 0 * c
                s[l][J] = (r - (p.sum() - p)) * (c != 0) / (2 * e[J] * d)
            grads[l] += w[i] * np.outer(a, s[l])
    return [(dV[:-1], dV[-1]) for dV in grads]


# --- The same, fast ---------------------------------------------------------------------------------------------------
#
# From here to `init`, the same is computed for many examples at once. `mutation_signs` draws all signs. `es_slopes`
# measures s: it does not compute again what is below a mutation, and of the sums in the layer above it computes only
# the change. `es_gradient` has that done in tasks, which a pool may compute, and makes the gradient of it. The symbols
# of the algorithm, and their names in the code:
#
#     symbol     es_gradient_plain     es_slopes, for n examples at once
#     a          a                     a[l] [fan_in, n], without the entry for the bias
#     z          none                  z[l] [width, n]
#     h          inputs[l + 1]         a[l + 1] [width, n]
#     h+, h-     h[0], h[1]            h[:, 0], h[:, 1]; h is [width, 2, n]
#     L+, L-     L[0], L[1]            L[0], L[1]; L is [2, blocks, n]
#     s          s[l]                  s[l] [width, n]


def mutation_signs(rng, params, n):
    """e of all layers, [n, sum of the widths] int8 of -1 and +1: a row an example, the first layer first.

    They are drawn at once, and follow from the state of the generator, which advances. Raises TypeError if `rng` is no
    np.random.Generator.
    """
    _require(isinstance(rng, np.random.Generator), "rng", "a numpy.random.Generator", rng, TypeError)
    count = n * sum(len(b) for _, b in params)
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)
    return (2 * bits.view(np.int8) - 1).reshape(n, -1)


def _dead_zone(z, ftz, scale):
    """t(z), written over z."""
    if ftz == "hardware":
        with hardware_ftz():
            # 1 / S is exact and no subnormal, and a multiplication takes a third of the time of a division.
            return np.multiply(np.multiply(z, 1 / scale, out=z), scale, out=z)
    return np.multiply(z, np.abs(z) >= scale * TINY, out=z) if ftz else z


def _blocks(rows, k):
    """[width, m] -> [blocks, k, m]; the last is filled up with zeros."""
    return (np.pad(rows, ((0, -len(rows) % k), (0, 0))) if len(rows) % k else rows).reshape(-1, k, rows.shape[1])


def _member_losses(change, k, z, layers, labels, losses):
    """L of all members of a layer and of their mirror images, [2, blocks, n].

    change : how h+ and h- of that layer differ from h, [width, 2, n]. z : the sums of the next layer, [next width, n],
    without mutations. layers : (W, b, t) of the next layer and of all above it.
    """
    (W, _, t), *above = layers
    # [blocks, k, 2 n]; [blocks, k, next width]; [next width, 2 n].
    change, W, z = _blocks(change.reshape(len(change), -1), k), _blocks(W, k), np.tile(z, 2)
    # As many blocks at once as the cache holds, which saves a tenth of the time.
    some, found = max(1, (1 << 19) // z.size), []
    for i in range(0, len(W), some):
        # [some, next width, 2 n], then [some, classes, 2 n].
        h = np.matmul(W[i : i + some].swapaxes(1, 2), change[i : i + some])
        h = t(np.add(h, z, out=h))
        for W2, b2, t2 in above:
            h = t2(W2.T @ h + b2)
        # The logits as [some, 2, n, classes].
        found.append(losses(np.moveaxis(h.reshape(*h.shape[:2], 2, -1), 1, -1), labels))
    return np.concatenate(found).swapaxes(0, 1)


@_ieee()
def es_slopes(params, x, labels, signs, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, **net):
    """What ES measures: the slope s of each example's loss along the sums of each layer.

    The same slopes as in `es_gradient_plain`, but for rounding: z + d here, a @ (V + mutation) there. So sigma |a|
    should be far above the rounding of z; and a unit whose sum is at the edge of the dead zone may be 0 in one of the
    two and not in the other. 0.49999997 gives 0 here, in all layers.

    Parameters
    ----------
    signs : [n, sum of the widths], as `mutation_signs` draws them.
    Others as in `es_gradient`, and the same errors.

    Returns
    -------
    outputs, slopes : lists of h [n, width] and s [n, width] of each layer, float32; the last h are the logits. With the
        layer's input a, x or the h below, a^T s / n is dW.
    """
    params, x, labels, _, acting, ts = _check(params, x, labels, sigma, block, losses, control_variate, **net)
    signs, shape = _array(signs, "signs"), (len(x), sum(len(b) for _, b in params))
    _require(signs.shape == shape and np.all(np.abs(signs) == 1), "signs", f"shape {shape} of -1 and +1", signs.shape)
    # A bias that does not act is 0. From here to the end an example is a column: a row takes 1.5 times as long.
    layers = [(W, b[:, None] * (l < acting), t) for l, ((W, b), t) in enumerate(zip(params, ts))]
    a, z, s = [x.T], [], {}
    for W, b, t in layers:
        z.append(W.T @ a[-1] + b)
        a.append(t(z[-1].copy()))
    # The layer above the logits: its sums are the logits, its weights the identity.
    z, identity = [*z, a[-1]], [(np.eye(len(a[-1]), dtype=float32), float32(0), np.positive)]
    for l, e in reversed([*enumerate(_of_layers(signs, params))]):
        k = min(block, len(e)) if l < len(params) - 2 else 1
        d = float32(sigma) * np.sqrt(np.square(a[l]).sum(axis=0) + float32(l < acting))
        h = layers[l][2](np.stack([z[l] + e * d, z[l] - e * d], axis=1))
        L = _member_losses(h - a[l + 1][:, None], k, z[l + 1], layers[l + 1 :] or identity, labels, losses)
        r, c, p = L[0] - L[1], h[:, 0] - h[:, 1], float32(0)
        if control_variate and k > 1:
            p = c * (params[l + 1][0] @ s[l + 1])
            r -= _blocks(p, k).sum(axis=1)
        # [width, n]: what is one number for a block is repeated for each of its units. From r all p_i of the block have
        # been subtracted, so a unit's own is added. Where d is 0, c is 0, and so is s.
        s[l] = (np.repeat(r, k, axis=0)[: len(e)] + p) * (c != 0) * (e * (0.5 / np.maximum(d, TINY)))
    return [h.T for h in a[1:]], [s[l].T for l in range(len(params))]


@_ieee()
def es_gradient(params, x, labels, rng, sigma=0.02, block=4, losses=cross_entropy, control_variate=False, weights=None,
                task=32, workers=None, map_tasks=map, return_losses=False, **net):  # fmt: skip
    """The gradient of the mean loss, as evolution strategies see it (s in the place of derivatives): for descent.

    All that it uses are losses and activations of the network and its mutations; with the control variate, the weights
    above a mutation too. What it estimates is in the comment above, what it computes in `es_gradient_plain`.

    Parameters
    ----------
    params : list of (W [fan_in, width], b [width]), float32; any depth.
    x : [n, inputs] float32, n >= 1.
    labels : [n] integers in [0, classes); with other `losses`, any array of n rows.
    rng : np.random.Generator, for the signs of the mutations; it advances.
    sigma : size of a mutation of a unit's weights (Euclidean norm), from TINY on.
    block : units k mutated together, >= 1, in the layers below the last two; with it the variance grows and the cost
        falls.
    losses : the loss of each example: logits [..., n, classes] and labels -> [..., n], float32; it may overwrite the
        logits.
    control_variate : whether the chain rule's prediction is taken out of a block's difference, where k > 1.
    weights : w, [n] float32, finite and >= 0: the gradient is that of sum_i w_i L_i. None: of the mean, w = 1 / n.
    task : at most so many examples are measured together. The cut decides the last bits. A small network is faster with
        more than 32.
    workers : into how many lists the tasks are put for `map_tasks`, best the number of processes or machines, as the
        weights travel once with each list. None: each task is a list.
    map_tasks : calls a function with each of a list of arguments and returns the results in their order, like the
        builtin `map`: also that of a pool of threads or processes, of mpi4py.futures or dask. The function pickles if
        `losses` and `transfer` do. The bits are the same whatever maps, if the machines are alike.
    return_losses : also return the losses [n] of the examples in the network as it is, of the pass that is made anyway.
    **net : `ftz`, `scale`, `transfer`, as in `forward`; "hardware" gives the same bits as True, faster.

    Returns
    -------
    list of (dW, db), float32, shaped like params. With the flush, db is 0 after the first layer: those biases flush
    before they are added. Without it, or with a transfer, all biases act.

    Raises
    ------
    TypeError : not float32, or not of its kind. ValueError : shapes that do not fit, values out of range, and, with the
    flush, later biases of S TINY (1/2) or more, which do not flush: training makes none. RuntimeError : "hardware"
    where `hardware_ftz` raises it.
    """
    params, x, labels, w, acting, _ = _check(params, x, labels, sigma, block, losses, control_variate, weights, **net)
    _count("task", task)
    _count("workers", 1 if workers is None else workers)
    how = {"sigma": sigma, "block": block, "losses": losses, "control_variate": control_variate, **net}
    # The least even number of tasks that have at most `task` rows each, so that two workers have the same to do. But
    # task / 2 rows or fewer are one task, and no task is empty.
    count = min(len(x), 2 * -(-len(x) // (2 * task))) if len(x) > task // 2 else 1
    parts = zip(*(np.array_split(rows, count) for rows in (x, labels, mutation_signs(rng, params, len(x)))))
    tasks = [dict(zip(("params", "x", "labels", "signs"), (params, *part))) for part in parts]
    # found[task][0][l] is h of layer l, found[task][1][l] is s.
    found = mapped(functools.partial(es_slopes, **how), tasks, workers, map_tasks)
    hs, slopes = ([np.concatenate([of[i][l] for of in found]) for l in range(len(params))] for i in (0, 1))
    terms = [(a, w[:, None] * s) for a, s in zip([x, *hs], slopes)]
    grads = [(a.T @ s, s.sum(axis=0) * (l < acting)) for l, (a, s) in enumerate(terms)]
    return (grads, losses(hs[-1][None], labels)[0]) if return_losses else grads


def mapped(function, tasks, workers=None, map_tasks=map):
    """[function(**task) for task in tasks], by whatever maps: see `es_gradient`.

    Tasks go out in as many lists as there are `workers` (None: each alone). Whoever gets one computes in IEEE
    arithmetic, with arrays that are made aligned and C-contiguous where transport has left them otherwise.
    """
    count = min(workers or len(tasks), len(tasks))
    lists = [tasks[i * len(tasks) // count : (i + 1) * len(tasks) // count] for i in range(count)]
    return [result for _, results in map_tasks(functools.partial(_work, function), lists) for result in results]


@_ieee()
def _work(function, tasks):
    """A pair: this machine's name, for a `map_tasks` that wants to know, as train.py's does; and the results."""
    return platform.node(), [function(**{name: _in_order(value) for name, value in task.items()}) for task in tasks]


# --- The start of a training, and its step ----------------------------------------------------------------------------


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
    _require(isinstance(rng, np.random.Generator), "rng", "a numpy.random.Generator", rng, TypeError)
    _require(len(sizes) >= 2 and min(sizes) >= 1, "sizes", "at least two positive widths", tuple(sizes))
    pairs = zip(sizes, sizes[1:])
    return [(rng.standard_normal((i, o), float32) * float32(np.sqrt(2 / i)), np.zeros(o, float32)) for i, o in pairs]


@_ieee()
def adamw(p, g, m, v, step, lr, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
    """One AdamW step, in place: p against gradient g, with moments m and v.

    Parameters
    ----------
    p, g, m, v : float32 arrays of one shape, or lists of such, nested alike: `params` and what `es_gradient` returns. m
        and v start as zeros. p, m and v are changed, so they are NumPy's own, writable and of this machine's byte
        order.
    step : counts from 1. lr : learning rate, >= 0.
    weight_decay : decoupled, p -= lr * weight_decay * p.

    Raises
    ------
    TypeError : not float32. ValueError : shapes that differ, p, m or v that cannot be changed in place, a step below 1,
    another value out of range. Nothing is changed then.
    """
    _count("step", step)
    rates = lr, weight_decay, beta1, beta2, eps
    good = all(0 <= float32(rate) < np.inf for rate in rates) and max(beta1, beta2) < 1 and float32(eps) > 0
    _require(good, "lr, weight_decay, beta1, beta2, eps", "finite, >= 0, beta < 1, eps > 0", rates)
    trees = ps, gs, ms, vs = [*map(leaves, (p, g, m, v))]
    shapes = [[_float32(a, name).shape for a in tree] for name, tree in zip("pgmv", trees)]
    _require(shapes == 4 * shapes[:1], "p, g, m, v", "the same shapes", shapes)
    ours = all(isinstance(a, np.ndarray) and a.dtype.isnative and a.flags.writeable for a in [*ps, *ms, *vs])
    _require(ours, "p, m, v", "NumPy's own arrays, native and writable", [*map(type, [*ps, *ms, *vs])])
    # So many elements at once that they stay in the cache: half the time.
    how = {"flags": ["external_loop", "buffered", "zerosize_ok"], "buffersize": 1 << 14}
    for arrays in zip(ps, map(_float32, gs), ms, vs):
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


# --- The CPU's flags --------------------------------------------------------------------------------------------------
#
# What the bits of results depend on, in all of this file: on the values of the arguments. Those of products depend, in
# the last places, also on how the CPU and its BLAS add up, on the number of BLAS threads (one is the fastest for the
# work of a pool) and on the size of the batch; those of `cross_entropy` on whether there is one example, or more. No
# bits depend on the memory order of arrays or on where they lie, on `np.seterr`, or on the mode of the thread, which
# another library may have made flush; a function leaves the last two as they were.
# Two things cannot be helped: threads of a BLAS that were started while the CPU flushed go on flushing in products, and
# on a platform that `_fpu_control` does not know, a flush that is on stays on.


class hardware_ftz:
    """Put the CPU itself in flush-to-zero mode, for the calling thread, as long as the context lasts.

        with hardware_ftz():
            u = z / S

    Flushes results (FTZ) and, with `daz`, operands ("denormals are zero"). With `ftz=False` results stay:
    `hardware_ftz(daz=False, ftz=False)` is IEEE arithmetic, whatever the thread's mode was. On leaving, also by an
    exception, the floating-point environment is what it was; contexts nest. An instance is for one thread.

    The flags belong to the thread, not to the block of text. On Linux, threads begun inside inherit them and keep them
    for life; those that run already, as the workers of a BLAS and of a pool do, keep their own. After a `yield` or
    `await` inside, whoever runs next in the thread runs with them. So keep matrix products outside (a fused
    multiply-add flushes its accumulator, too), make the inputs and look at the results outside: inside, comparisons,
    `min` and `sort` read subnormals as zeros.

    The first time that a process enters a mode, its effect on a product and on an operand is looked at. Seen: Linux
    x86-64 on CPUs of Intel and AMD, Linux AArch64 under QEMU's emulation. macOS and Windows are written from their
    documentation.

    Raises
    ------
    RuntimeError : on entering, if the platform is not known, sets the flags without any effect (some emulators and
        instrumenting tools) or has one flag for both and is asked for one.
    ValueError : `daz` or `ftz` is not True or False. (This is no decorator: `@hardware_ftz` would pass a function for
        daz.)
    """

    def __init__(self, daz=True, ftz=True):
        _one_of("daz", daz, True, False)
        _one_of("ftz", ftz, True, False)
        self.mode, self.before = (bool(ftz), bool(daz)), []

    def __enter__(self):
        _look_at_the_effect(*self.mode)
        self.before.append(_switch(*self.mode))

    def __exit__(self, *error):
        _fpu_control()[1](self.before.pop())


# Where the C library keeps the control register of the floating-point unit, MXCSR or FPCR, in its fenv_t:
#
#     (system, machine, bytes of a pointer): (library, glibc's on Linux; index of the register among the 32-bit words;
#         (its bits for no flush, for operands alone (DAZ), for results alone (FTZ), for both))
#
# FPCR has one bit for both, and 0 stands for either alone: `_look_at_the_effect` refuses that.
_FENV = {
    ("Linux", "x86_64", 8): ("libm.so.6", 7, (0, 0x0040, 0x8000, 0x8040)),
    ("Linux", "aarch64", 8): ("libm.so.6", 0, (0, 0, 0, 1 << 24)),
    ("Darwin", "x86_64", 8): (None, 1, (0, 0x0040, 0x8000, 0x8040)),
    ("Darwin", "arm64", 8): (None, 2, (0, 0, 0, 1 << 24)),
}


@functools.cache
def _fpu_control():
    """Functions that read and write a fenv_t, and what a row of _FENV has after its library."""
    system, machine = platform.system(), platform.machine()
    try:
        if system == "Windows":
            # _controlfp(new, mask) returns the word as it is then; the mask is _MCW_DN.
            control = ctypes.PyDLL("ucrtbase")._controlfp
            read, write = lambda env: env.__setitem__(0, control(0, 0)), lambda env: control(env[0], 3 << 24)
            return read, write, 0, (0, 2 << 24, 3 << 24, 1 << 24)
        library, *where = _FENV[system, machine, ctypes.sizeof(ctypes.c_void_p)]
        # PyDLL keeps the GIL: faster.
        libm = ctypes.PyDLL(library)
        return libm.fegetenv, libm.fesetenv, *where
    except (KeyError, OSError, AttributeError) as error:
        raise RuntimeError(f"hardware_ftz: unknown platform {system} {machine}; use the emulation") from error


def _switch(ftz, daz):
    """Put the calling thread in a mode -> its floating-point environment before, a fenv_t."""
    read, write, register, bits = _fpu_control()
    read(before := (ctypes.c_uint32 * 8)())
    env = type(before).from_buffer_copy(before)
    # The largest of the numbers has all the bits.
    env[register] = before[register] & ~max(bits) | bits[2 * ftz + daz]
    write(env)
    return before


@functools.cache
def _look_at_the_effect(ftz, daz):
    """Once for each mode: raise RuntimeError if the arithmetic is not what it says."""
    # TINY / 2; twice that is TINY, unless it is read as 0.
    half = np.uint32(1 << 22).view(float32)
    with np.errstate(all="ignore"):
        before = _switch(ftz, daz)
        effect = tuple(bool(x.view(np.uint32) == 0) for x in (TINY * float32(0.5), half * float32(2)))
        _fpu_control()[1](before)
    found = f"{effect} after setting them: use the emulation"
    _require(effect == (ftz, daz), "hardware_ftz: unknown platform: FTZ, DAZ", (ftz, daz), found, RuntimeError)


# --- Checks: each raises, or returns what is computed with ------------------------------------------------------------


def _require(holds, name, expected, found, error=ValueError):
    if not holds:
        raise error(f"{name}: expected {expected}, found {found}")


def _one_of(name, value, *choices):
    _require(isinstance(value, (bool, np.bool_, str)) and value in choices, name, f"one of {choices}", repr(value))


def _count(name, value):
    _require(isinstance(value, numbers.Integral) and value >= 1, name, "an integer >= 1", repr(value))


def _array(x, name):
    """An array of NumPy's own and of this machine's byte order."""
    _require(not isinstance(x, np.ma.MaskedArray), name, "an array without a mask", "a masked one", TypeError)
    try:
        return np.asarray(x, np.asarray(x).dtype.newbyteorder("="))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array, found {type(x).__name__}: {error}") from error


def _float32(x, name="operand"):
    x = _array(x, name)
    _require(x.dtype == float32, name, "float32 (x.astype(np.float32) converts an array)", x.dtype, TypeError)
    return x


def _in_order(tree):
    """Arrays, alone or in lists and tuples, as BLAS gets them everywhere: another layout takes another kernel."""
    if isinstance(tree, (list, tuple)):
        return [*map(_in_order, tree)]
    return np.require(tree, requirements=["C", "ALIGNED"]) if isinstance(tree, np.ndarray) else tree


def _of_layers(signs, params):
    """[n, sum of the widths] -> [width, n] float32 of each layer."""
    return np.split(signs.T.astype(float32, order="C"), np.cumsum([len(b) for _, b in params])[:-1])


def _network(params, x, ftz=True, scale=SCALE, transfer=None):
    """Checked: params, x; ts, functions that may overwrite the sums they get; in how many layers the biases act."""
    x, layers = _float32(x, "x"), []
    # A width that is a text fits no W, and the error says what x is.
    width = x.shape[1] if x.ndim == 2 else f"shape {x.shape}"
    _require(len(params) > 0, "params", "[(W, b), ...], a pair a layer", params)
    for i, (W, b) in enumerate(params, 1):
        W, b = _float32(W, f"W{i}"), _float32(b, f"b{i}")
        fits = W.ndim == 2 and len(W) == width and b.shape == W.shape[1:] != (0,)
        _require(fits, f"layer {i}", f"W [{width}, n], b [n], n > 0", f"{W.shape}, {b.shape}")
        layers, width = [*layers, (W, b)], len(b)
    _one_of("ftz", ftz, True, False, "hardware")
    good = _float32(scale, "scale").shape == () and 1 <= scale <= 2.0**126 and np.frexp(scale)[0] == 0.5
    _require(good, "scale", "a power of two from 1 to 2^126", scale)
    if transfer is None:
        ts = [functools.partial(_dead_zone, ftz=ftz, scale=float32(scale))] * len(layers)
        return _in_order(layers), _in_order(x), ts, 1 if ftz else len(layers)
    h = transfer(np.zeros((1, 1), float32)) if callable(transfer) else repr(transfer)
    _require(_float32(h, "transfer's result").shape == (1, 1), "transfer", "a result of its argument's shape", h)
    return _in_order(layers), _in_order(x), [transfer] * (len(layers) - 1) + [np.positive], len(layers)


def _check(params, x, labels, sigma, block, losses, control_variate, weights=None, **net):
    """Checked: params, x, labels, weights; in how many layers the biases act, and t of each."""
    params, x, ts, acting = _network(params, x, **net)
    labels, n, classes, least = _array(labels, "labels"), len(x), len(params[-1][1]), net.get("scale", SCALE) * TINY
    _require(isinstance(sigma, numbers.Real) and TINY <= float32(sigma) < np.inf, "sigma", "finite, >= 2^-126", sigma)
    _count("block", block)
    _one_of("control_variate", control_variate, True, False)
    _require(labels.shape[:1] == (n,) and n >= 1, "labels", f"{n} >= 1 rows, as in x", f"shape {labels.shape}")
    # (NaN passes: the loss of a training that diverges shows it.)
    inert = not any(np.abs(b).max() >= least for _, b in params[acting:])
    _require(inert, "the later biases", "|b| < S TINY, 1/2 by default, which flushes: only b1 acts", "a larger one")
    # As `es_slopes` will call it: logits [..., n, classes] whose memory is [..., classes, n].
    found = _float32(losses(np.zeros((1, classes, n), float32).swapaxes(1, 2), labels), "the result of losses").shape
    _require(found == (1, n), "losses", f"[..., {n}] for logits [..., {n}, {classes}]", f"shape {found} for [1, ...]")
    weights = np.full(n, 1 / n, float32) if weights is None else _float32(weights, "weights")
    good = weights.shape == (n,) and np.all(weights >= 0) and np.all(weights < np.inf)
    _require(good, "weights", f"{n} finite numbers >= 0", weights)
    return params, x, labels, weights, acting, ts
