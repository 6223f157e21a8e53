#!/usr/bin/env python3
"""A recurrent network of matrix products and additions, float32 underflow its only nonlinearity, trained by ES.

    python examples/recurrent.py runs                       # all rows, three seeds; logs and weights go to the folder
    python examples/recurrent.py runs --rows es --seeds 1   # some of them
    python examples/recurrent.py runs --validation 5000 --lr 2e-3       # other settings, on images held out

The post ends with the wish for one. An image of MNIST is read row by row: at each of 28 steps the network sees 28
pixels x.

    f = ([x, m R] @ W + b) / S             f: features [n, F],   S = 2^125
    m = ([f S, m R] @ U + c) / R           m: memory [n, M], 0 before the first row,   R = 2^121
    o = ((m R) @ V + d) / S * S            o: logits, after the last row

These are three of fpnl.py's networks of one layer, each of which flushes as there, and between them values go back to
order 1, so that all biases act. With f in units of 1/S: f = t([x, m] @ W + b), t(z) = z where |z| >= 1/2, else 0, and
so the logits; the memory's dead zone ends at 1/32, so that little is lost on the way. In the real numbers all this is
linear.

At the start features see pixels alone, and the memory is turned by an orthogonal matrix at each row, which keeps its
length, and gets features added, times a random matrix. So what is far back reaches the logits as well as what is near.

ES as in fpnl.py, but for this: a member is the network in which, at one row alone, a block of units has its weights
moved along what they are multiplied with, with random signs e, so that their sums move by e delta, and all that follows
is computed; beside it is its mirror image, -e. Blocks of 1 are for the logits alone, whose sums move as in fpnl.py. The
control variate's prediction is the chain rule from the slopes of the logits back through all rows, with a unit's own
c / (2 e delta) as its derivative; that depends on no sign, so the slopes are the same in expectation. The gradient is
the sum over the rows.
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent))
import controls
import numpy as np

import data
import fpnl
import train

PIXELS, CLASSES = 28, 10  # of a row, of the images
R = np.float32(2.0**121)  # the memory's S
EDGES = [float(scale * fpnl.TINY) for scale in (fpnl.SCALE, R, fpnl.SCALE)]  # of the dead zones: 1/2, 1/32, 1/2


# --- The network -----------------------------------------------------------------------------------------


def init(rng, features, memory):
    """[(W, b), (U, c), (V, d)]: W [28 + memory, features], U [features + memory, memory], V [memory, 10].

    Normal with variance 2 / fan_in, the fan_in 28, features and memory; but the memory's part of W is 0 and that of U
    orthogonal, from the QR decomposition of a Gaussian matrix. b is normal with deviation 1/2; c = d = 0.
    """
    (W, b), (U, c), readout = (
        fpnl.init(rng, sizes)[0] for sizes in ((PIXELS, features), (features, memory), (memory, CLASSES))
    )
    orthogonal = np.linalg.qr(rng.standard_normal((memory, memory)))[0].astype(np.float32)
    b += np.float32(0.5) * rng.standard_normal(features, np.float32)
    return [(np.vstack([W, np.zeros((memory, features), np.float32)]), b), (np.vstack([U, orthogonal]), c), readout]


def load_weights(path):
    """What a run has saved, as `init` makes them."""
    with np.load(path) as file:
        return [(file[f"W{i}"], file[f"b{i}"]) for i in (1, 2, 3)]


def forward(params, x, ftz=True):
    """The network, operation by operation: f in units of 1/S and m of 1/R, after each row, and the logits.

    Parameters
    ----------
    params : as `init` makes them; all widths are read from the weights, pixels a row = len(W) - memory.
    x : [n, rows * pixels] float32. ftz : as `fpnl.forward` takes it.

    Returns
    -------
    f [rows, n, features], m [rows, n, memory] and logits [n, classes], float32.
    """
    first, second, readout = params
    m, fs, ms = np.zeros((len(x), len(readout[0])), np.float32), [], []
    for row in np.split(x, x.shape[1] // (len(first[0]) - len(readout[0])), axis=1):
        fs += fpnl.activations([first], np.hstack([row, m]), ftz)
        ms += fpnl.activations([second], np.hstack([fs[-1], m]), ftz, R)
        m = ms[-1]
    return np.stack(fs), np.stack(ms), fpnl.forward([readout], m, ftz)


@np.errstate(all="ignore")
def unrolled(params, x, ftz=True):
    """The same, faster, with the same bits where the flush is on. ftz is True or False, or None: tanh stands for the
    flush, and the logits are linear."""
    ((W, b), (U, c), (V, d)), (t, u, v) = params, transfers(ftz)
    m, fs, ms = np.zeros((len(x), len(c)), np.float32), [], []
    for row in np.split(x, x.shape[1] // (len(W) - len(c)), axis=1):
        fs.append(t(np.hstack([row, m]) @ W + b))
        ms.append(m := u(np.hstack([fs[-1], m]) @ U + c))
    return np.stack(fs), np.stack(ms), v(m @ V + d)


def inputs_and_sums(params, x, f, m):
    """Of features and memory: what W and U are multiplied with, [rows, n, fan_in], and what they add up to."""
    before = np.concatenate([np.zeros_like(m[:1]), m[:-1]])
    inputs = [np.concatenate([a, before], axis=2) for a in (np.split(x, len(m), axis=1), f)]
    return inputs, [a @ W + b for a, (W, b) in zip(inputs, params)]


def transfers(ftz):
    """Functions of the sums of features, memory and logits."""
    if ftz is None:
        return [np.tanh, np.tanh, np.positive]
    return [functools.partial(kept, edge if ftz else 0) for edge in EDGES]


def kept(edge, z):
    """What a flush leaves of z, from the edge of the dead zone on."""
    return z * (np.abs(z) >= np.float32(edge))


# --- Slopes of each image's loss along the sums of the units ---------------------------------------------------
#
# A method returns the inputs of features and memory, [rows, n, fan_in], and of the logits, [n, memory]; the slopes
# along their sums, [rows, n, units] and [n, classes]; and the logits, [n, classes].


def es(s, params, x, labels, rng, ftz=True, members=True):
    """Evolution strategies with the control variate; without `members` the prediction alone: c g / (2 e delta), which
    depends on no sign. c, r and p as in fpnl.py; g: the predicted dL/dh; `moves` are e delta."""
    *outputs, logits = unrolled(params, x, ftz)
    inputs, sums = inputs_and_sums(params, x, *outputs)
    moves = [rng.choice(np.float32([-delta, delta]), z.shape) for delta, z in zip(s.delta, sums)]
    moved = [np.stack([t(z + e), t(z - e)], axis=1) for t, z, e in zip(transfers(ftz), sums, moves)]
    c = [h[:, 0] - h[:, 1] for h in moved]
    m, signs = outputs[1][-1], np.ones((len(x), CLASSES), np.int8)  # no matter which, one unit at a time
    out = fpnl.es_slopes(params[2:], m, labels, signs, ftz=ftz)[1][0]  # of fpnl's network of one layer
    g = chain(params, [change / (2 * e) for change, e in zip(c, moves)], out)
    p = [change * slope for change, slope in zip(c, g)]
    if members:
        numbers = [np.arange(len(b)) // k for (_, b), k in zip(params, s.block)]
        blocks = [J == np.arange(J[-1] + 1)[:, None] for J in numbers]  # [blocks, units]
        r = differences(params, x, labels, sums[1], outputs, moved, blocks, ftz)
        p = [a + (rest - a @ B.T) @ B * (change != 0) for a, rest, B, change in zip(p, r, blocks, c)]
    return [*inputs, m], [*(a / (2 * e) for a, e in zip(p, moves)), out], logits


def differences(params, x, labels, sums, outputs, moved, blocks, ftz):
    """r of each block, [rows, n, blocks], of features and of memory; all members are computed together. sums: of the
    memory; moved: outputs of members and mirror images, [rows, 2, n, units]."""
    ((W, b), (U, c), (V, d)), (t, u, v), n = params, transfers(ftz), len(x)
    features, memory = len(b), len(c)
    f, m = (np.where(B[:, None, None], h[:, None], a[:, None, None]) for B, h, a in zip(blocks, moved, outputs))
    after = u(sums[:, None, None] + (f - outputs[0][:, None, None]) @ U[:features])
    ms = np.concatenate([after, m], axis=1)  # the members' memory, [rows, blocks, 2, n, memory]
    for i, row in enumerate(np.split(x, len(ms), axis=1)):
        m = ms[:i].reshape(-1, memory)  # of those that were mutated before
        f = t((m @ W[-memory:]).reshape(-1, n, features) + (row @ W[:-memory] + b)).reshape(-1, features)
        ms[:i] = u(f @ U[:features] + m @ U[features:] + c).reshape(ms[:i].shape)
    L = fpnl.cross_entropy(v(ms @ V + d), labels)
    return np.split((L[:, :, 0] - L[:, :, 1]).swapaxes(1, 2), [len(blocks[0])], axis=2)


def chain(params, derivatives, out):
    """The chain rule: dL/dh of features and memory, from their dh/dz and from the slopes along the logits' sums."""
    (W, _), (U, _), (V, _) = params
    found, features, g = [], len(U) - len(V), out @ V.T
    for of_features, of_memory in zip(*(reversed(of_layer) for of_layer in derivatives)):
        along = g * of_memory
        of_f = along @ U[:features].T
        found.append((of_f, g))
        g = along @ U[features:].T + of_f * of_features @ W[-len(V) :].T
    return [np.stack(of_layer[::-1]) for of_layer in zip(*found)]


def backprop(s, params, x, labels, rng, ftz=None):
    """Backpropagation through time, of the network with tanh."""
    *outputs, logits = unrolled(params, x, ftz)
    inputs, _ = inputs_and_sums(params, x, *outputs)
    out, derivatives = controls.softmax_error(logits, labels), [1 - h * h for h in outputs]
    slopes = [g * d for g, d in zip(chain(params, derivatives, out), derivatives)]
    return [*inputs, outputs[1][-1]], [*slopes, out], logits


# --- Training, by the loop of train.py -------------------------------------------------------------------------


def weighted(method, params, x, labels, weights, rng):
    """Gradient of sum_i w_i L_i, and the losses, of a task of `controls.in_tasks`."""
    inputs, slopes, logits = method(params, x, labels, rng)
    slopes = [slope * weights[:, None] for slope in slopes]
    columns = zip(*([a.reshape(-1, a.shape[-1]) for a in of_layers] for of_layers in (inputs, slopes)))
    return [(a.T @ slope, slope.sum(axis=0)) for a, slope in columns], fpnl.cross_entropy(logits, labels)


def update(recurrent, params, grads, m, v, step, lr, weight_decay):
    """AdamW with the gradient clipped to a norm of 1; biases and recurrent weights do not decay."""
    length = math.sqrt(sum(float(np.vdot(g, g)) for g in fpnl.leaves(grads)))
    grads = [[g / np.float32(max(1, length)) for g in layer] for layer in grads]
    rates = (lr, weight_decay), (lr, 0), (lr * recurrent, 0)
    for rate, *part in zip(rates, *map(parts, (params, grads, m, v))):
        fpnl.adamw(*part, step, *rate)


def parts(layers):
    """Weights of pixels, features and logits; biases; weights of the memory before a row."""
    (W, b), (U, c), (V, d) = layers
    return [W[: -len(V)], U[: -len(V)], V], [b, c, d], [W[-len(V) :], U[-len(V) :]]


OWN = {"epochs": 30.0, "batch": 512, "lr": 8e-3}  # in the place of the main job's
SETTINGS = {  # default, kind, what it is
    "features": (64, train.COUNT, "units"),
    "memory": (64, train.COUNT, "units"),
    "delta": ((0.25, 1.0), train.number(float, 1e-9, 1e9), "movement of a sum by a mutation: of features, of memory"),
    "block": ((16, 32), train.COUNT, "units mutated together, of features and of memory"),
    **{name: train.OPTIONS[name] for name in ("validation", "importance")},
    **{name: (own, *train.OPTIONS[name][1:]) for name, own in OWN.items()},
    "weight_decay": (0.3, train.SIZE, "AdamW's decoupled decay, of weights other than the recurrent"),
    "recurrent": (1 / 64, train.SIZE, "rate of the weights of the memory before a row, as a share of --lr"),
}
ROWS = {  # name of the log: row of the table, method, flush (None: tanh), other defaults
    "es": ("ES, flush to zero", es, True, {}),
    "es-off": ("ES, gradual underflow", es, False, {}),
    "prediction": ("the prediction alone", functools.partial(es, members=False), True, {"lr": 1.6e-2}),
    "tanh": ("tanh, backprop through time", backprop, None, {"lr": 4e-3, "recurrent": 1.0}),
}


def begin(row, seed, args, sets):
    """A run of train.py's loop, on these sets."""
    _, method, ftz, _ = ROWS[row]
    fixed = train.FIXED | {"least": 0.05, "method": row, "seed": seed}
    s = argparse.Namespace(**fixed, **{name: getattr(args, name) for name in SETTINGS})
    s.images, s.sizes = len(sets[0]), [PIXELS, s.features, s.memory, CLASSES]
    s.steps = round(s.epochs * (s.images // s.batch))
    params = init(np.random.default_rng((seed, train.INIT)), s.features, s.memory)
    of_task = functools.partial(weighted, functools.partial(method, s, ftz=ftz))
    gradient = functools.partial(controls.in_tasks, of_task, s.task)
    how = functools.partial(unrolled, ftz=ftz), gradient, params, functools.partial(update, s.recurrent)
    return train.fresh(s, sets, *how)


# --- The comparison --------------------------------------------------------------------------------------------


def compare(args, sets):
    """Run everything, a seed after the other; print a table of accuracies in percent."""
    args.folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for seed, row in itertools.product(range(args.seeds), dict.fromkeys(args.rows)):
        says, _, ftz, others = ROWS[row]
        print(f"\n{says}, seed {seed}")
        log, save = (args.folder / f"{row}-{seed}.{end}" for end in ("csv", "npz"))
        of_row = parse_args(**others, flush="on" if ftz else "off", log=log, save=save)
        trained, held = train.train(of_row, begin(row, seed, of_row, sets))
        table.setdefault(says, []).append((trained[1], held[1]))
    controls.print_table(table, "validation" if args.validation else "test", {})


def parse_args(**others):
    """With other defaults, and with what train.py takes and this program does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = train.fail
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="for logs and weights; those of an earlier run are replaced")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    add("--seeds", type=train.COUNT, default=3, metavar="N", help="0, 1, ... of them (default: 3)")
    add("--data", type=pathlib.Path, default=data.MNIST, metavar="DIR", help="folder with the four files of a set")
    add("--engine", choices=["threads", "mpi", "dask"], default="threads", help="what computes (default: threads)")
    add("--workers", type=train.COUNT, default=data.cores(), metavar="N", help="how many (default: all cores)")
    add("--reports", type=train.COUNT, default=15, metavar="N", help="rows of a table (default: 15)")
    for name, (default, kind, says) in SETTINGS.items():
        of_rows = "".join(f"; {row}: {other[name]:g}" for row, (*_, other) in ROWS.items() if name in other)
        how = {"nargs": len(default)} if isinstance(default, tuple) else {}
        how |= {"type": kind, "default": default, "help": f"{says} (default: {default}{of_rows})"}
        add(f"--{name.replace('_', '-')}", metavar="N", **how)
    parser.set_defaults(scheduler=None, until_test=None, quiet=False, resume=None, **others)
    return parser.parse_args()


def main():
    with train.command():
        args = parse_args()
        sets = data.load(args.data, args.validation)
        if args.batch > len(sets[0]):
            raise ValueError(f"--batch: expected at most the {len(sets[0])} training images, found {args.batch}")
        try:
            compare(args, sets)
        except KeyboardInterrupt as stop:
            train.fail(f"interrupted: what is done is in {args.folder}", "", 128 + (*stop.args, train.signal.SIGINT)[0])


if __name__ == "__main__":
    import recurrent  # by this name its functions are known to workers elsewhere

    recurrent.main()
