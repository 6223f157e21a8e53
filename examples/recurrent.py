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
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import pathlib
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import controls
import numpy as np

import data
import fpnl
import train

PIXELS, CLASSES = 28, 10  # of a row, of the images
TASK = 128  # images whose slopes are measured together
R = np.float32(2.0**121)  # the memory's S
EDGES = [float(scale * fpnl.TINY) for scale in (fpnl.SCALE, R, fpnl.SCALE)]  # of the dead zones: 1/2, 1/32, 1/2
INIT, ORDER, MEASURE = range(3)  # random streams of a seed


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


def forward(params, x, ftz=True):
    """The network, operation by operation: features and memory after each row, at their true size, and the logits.

    Parameters
    ----------
    params : as `init` makes them; all widths are read from the weights, pixels a row = len(W) - memory.
    x : [n, rows * pixels] float32. ftz : as `fpnl.forward` takes it.

    Returns
    -------
    fs, ms : lists of [n, features], [n, memory], one a row, and logits [n, classes], all float32.
    """
    first, second, readout = params
    memory, fs, ms = second[0].shape[1], [], []
    m = np.zeros((len(x), memory), np.float32)
    for row in np.split(x, x.shape[1] // (len(first[0]) - memory), axis=1):
        (f,) = fpnl.activations([first], np.hstack([row, m * R]), ftz)
        (m,) = fpnl.activations([second], np.hstack([f * fpnl.SCALE, m * R]), ftz, R)
        fs.append(f)
        ms.append(m)
    return fs, ms, fpnl.forward([readout], m * R, ftz)


def load_weights(path):
    """What a run has saved, as `init` makes them."""
    with np.load(path) as file:
        return [(file[f"W{i}"], file[f"b{i}"]) for i in (1, 2, 3)]


def unrolled(params, x, ftz=True):
    """The same with f in units of 1/S, m of 1/R: inputs, sums and outputs, each of (features, memory), [rows, n, ...],
    and logits [n, classes]. ftz is True or False, or None: tanh stands for the flush, and the logits are linear."""
    ((W, b), (U, c), (V, d)), (t, u, v) = params, transfers(ftz)
    m, steps = np.zeros((len(x), len(c)), np.float32), []
    for row in np.split(x, x.shape[1] // (len(W) - len(c)), axis=1):
        a = np.hstack([row, m])
        f = t(z := a @ W + b)
        fm = np.hstack([f, m])
        m = u(zm := fm @ U + c)
        steps.append([(a, fm), (z, zm), (f, m)])
    return [[np.stack(of_layer) for of_layer in zip(*of_rows)] for of_rows in zip(*steps)], v(m @ V + d)


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
# A method returns the inputs of features and memory, [rows, n, fan_in], and of the logits, [n, memory], and the slopes
# along their sums, [rows, n, units] and [n, classes].


def es(how, params, x, labels, rng, ftz=True, members=True):
    """Evolution strategies with the control variate; without `members` the prediction alone: c g / (2 e delta), which
    depends on no sign. c, r and p as in fpnl.py; g: the predicted dL/dh; `moves` are e delta."""
    (inputs, sums, outputs), _ = unrolled(params, x, ftz)
    m, mirror = outputs[1][-1], np.array([[1], [-1]], np.float32)
    moves = [
        np.float32(delta) * (2 * rng.integers(0, 2, z.shape) - 1).astype(np.float32)
        for delta, z in zip(how.delta, sums)
    ]
    moved = [t(z[:, :, None] + mirror * move[:, :, None]) for t, z, move in zip(transfers(ftz), sums, moves)]
    c = [h[:, :, 0] - h[:, :, 1] for h in moved]
    signs = np.ones((len(x), CLASSES), np.int8)  # no matter which, one unit at a time
    out = fpnl.es_slopes(params[2:], m, labels, signs, ftz=ftz)[1][0].T  # of fpnl's network of one layer
    g = chain(params, [change / (2 * move) for change, move in zip(c, moves)], out)
    r = differences(how, params, x, labels, sums, outputs, moved, ftz) if members else [0, 0]
    slopes = []
    for change, of_layer, move, rest, k in zip(c, g, moves, r, how.block):
        p = change * of_layer
        if members:
            rest = np.repeat(rest - np.add.reduceat(p, range(0, p.shape[2], k), axis=2), k, axis=2)[:, :, : p.shape[2]]
            p = p + rest * (change != 0)
        slopes.append(p / (2 * move))
    return [*inputs, m], [*slopes, out]


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


def differences(how, params, x, labels, sums, outputs, moved, ftz):
    """L(+e) - L(-e) of the members [rows, n, blocks], of features and of memory."""
    ((W, b), (U, c), (V, d)), (t, u, v), n = params, transfers(ftz), len(x)
    memory, features = U.shape[1], len(b)
    rows = np.split(x, len(sums[0]), axis=1)
    blocks = [
        np.arange(-(-units // k))[:, None] == np.arange(units) // k for units, k in zip((features, memory), how.block)
    ]
    found, per = [], 2 * sum(map(len, blocks))
    pixels = [np.repeat(row @ W[:-memory] + b, per, axis=0) for row in rows]
    for i in range(len(rows)):
        pairs = [h[i][:, None] for h in moved]  # [n, 1, 2, units]
        f, m = (np.where(block[:, None], pair, h[i][:, None, None]) for block, pair, h in zip(blocks, pairs, outputs))
        change = (f - outputs[0][i][:, None, None]).reshape(-1, features) @ U[:features]
        after = u(sums[1][i][:, None, None] + change.reshape(n, -1, 2, memory))
        m = np.concatenate([after, m], axis=1).reshape(-1, memory)
        for later in pixels[i + 1 :]:
            m = u(t(m @ W[-memory:] + later) @ U[:features] + m @ U[features:] + c)
        logits = v(m @ V + d).reshape(n, -1, 2, len(d))
        L = fpnl.cross_entropy(np.moveaxis(logits, 0, 2), labels)
        found.append((L[:, 0] - L[:, 1]).T)
    return np.split(np.stack(found), [len(blocks[0])], axis=2)


def backprop(how, params, x, labels, rng, ftz=None):
    """Backpropagation through time, of the network with tanh."""
    (inputs, _, outputs), logits = unrolled(params, x, ftz)
    out, derivatives = controls.softmax_error(logits, labels), [1 - h * h for h in outputs]
    return [*inputs, outputs[1][-1]], [*(g * d for g, d in zip(chain(params, derivatives, out), derivatives)), out]


# --- Training --------------------------------------------------------------------------------------------------


SETTINGS = {  # default, kind, what it is
    "features": (64, train.COUNT, "units"),
    "memory": (64, train.COUNT, "units"),
    "epochs": (30.0, train.LONG, "passes over the training images"),
    "batch": (512, train.COUNT, "images a step"),
    "delta": ((0.25, 1.0), train.number(float, 1e-9, 1e9), "movement of a sum by a mutation: of features, of memory"),
    "block": ((16, 32), train.COUNT, "units mutated together, of features and of memory"),
    "importance": (2.0, train.SIZE, "measure an image with probability N (1 - p), p of its label; 0: all"),
    "lr": (8e-3, train.SIZE, "AdamW's learning rate, falling to zero as a cosine"),
    "decay": (0.3, train.SIZE, "AdamW's decoupled decay, of weights other than the recurrent"),
    "recurrent": (1 / 64, train.SIZE, "rate of the weights of the memory before a row, as a share of --lr"),
}
ROWS = {  # name of the log: row of the table, method, flush (None: tanh), other defaults
    "es": ("ES, flush to zero", es, True, {}),
    "es-off": ("ES, gradual underflow", es, False, {}),
    "prediction": ("the prediction alone", functools.partial(es, members=False), True, {"lr": 1.6e-2}),
    "tanh": ("tanh, backprop through time", backprop, None, {"lr": 4e-3, "recurrent": 1.0}),
}


@functools.cache
def sets(validation):
    return data.load(validation=validation)


def gradient(row, how, params, step, images):
    """Of the loss summed over these images, of which some are measured, as in train.py, and count 1 / q."""
    _, method, ftz, _ = ROWS[row]
    rng = np.random.default_rng((how.seed, MEASURE, step, images[0]))
    x, labels = data.pixels(sets(how.validation)[0][images]), sets(how.validation)[1][images]
    q = np.ones(len(x), np.float32)
    if how.importance:
        q = train.chances_of(unrolled(params, x, ftz)[1], labels, how.importance)
    some = np.flatnonzero(rng.random(len(x)) < q)
    if not len(some):
        return [tuple(map(np.zeros_like, layer)) for layer in params]
    inputs, slopes = method(how, params, x[some], labels[some], rng, ftz)
    slopes = [slope / q[some, None] for slope in slopes]
    columns = [(a.reshape(-1, a.shape[-1]), s.reshape(-1, s.shape[-1])) for a, s in zip(inputs, slopes)]
    return [(a.T @ s, s.sum(axis=0)) for a, s in columns]


def evaluate(row, how, params, which, start):
    """Loss, accuracy and shares of units that are not 0, of features and of memory, all times the number of images."""
    images, labels = (array[start : start + train.PIECE] for array in sets(how.validation)[which : which + 2])
    x, ftz = data.pixels(images), ROWS[row][2]
    if ftz is None:
        (_, _, states), logits = unrolled(params, x, ftz)
    else:
        *states, logits = forward(params, x, ftz)
    return len(labels) * np.array(
        [fpnl.loss(logits, labels), fpnl.accuracy(logits, labels), *(np.mean(np.not_equal(h, 0)) for h in states)]
    )


def learn(row, how, folder, everywhere):
    """One run; `everywhere` is map, or that of a pool of processes -> (train, other) accuracy."""
    number, held_out = len(sets(how.validation)[0]), "validation" if how.validation else "test"
    params = init(np.random.default_rng((how.seed, INIT)), how.features, how.memory)
    m, v = ([tuple(map(np.zeros_like, layer)) for layer in params] for _ in range(2))
    per_epoch, began = number // how.batch, time.perf_counter()
    steps = round(per_epoch * how.epochs)
    reports = {round(i * steps / how.reports) for i in range(how.reports + 1)}
    settings = {"row": row, **vars(how)}
    name = f"{row}-{how.seed}"
    columns = "epoch", "seconds", "loss", "train", held_out, "live features", "live memory"
    with data.open_log(folder / f"{name}.csv", settings, columns) as write:
        for step in range(steps + 1):
            if step in reports:
                seconds, scores = time.perf_counter() - began, []
                for which in (0, 2):
                    total = len(sets(how.validation)[which])
                    work = functools.partial(evaluate, row, how, params, which)
                    scores.append(sum(everywhere(work, range(0, total, train.PIECE))) / total)
                (loss, *trained), (_, held, *_) = scores
                if not math.isfinite(loss):
                    raise ValueError(f"{row}: the loss is {loss} after {step} steps: try a smaller --lr")
                data.save_weights(folder / f"{name}.npz", params, settings)
                write(step / per_epoch, seconds, loss, trained[0], held, *trained[1:])
                live = " ".join(f"{share:.2f}" for share in trained[1:])
                print(
                    f"{step / per_epoch:6.2f} {seconds:8.1f} {loss:8.4f} {trained[0]:7.4f} {held:10.4f}   {live}",
                    flush=True,
                )
            if step == steps:
                return trained[0], held
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = np.random.default_rng((how.seed, ORDER, epoch)).permutation(number)
            images = order[place * how.batch : (place + 1) * how.batch]
            work = functools.partial(gradient, row, how, params, step)
            tasks = [images[i : i + TASK] for i in range(0, how.batch, TASK)]
            grads = [
                [sum(parts) / np.float32(how.batch) for parts in zip(*layer)] for layer in zip(*everywhere(work, tasks))
            ]
            descend(how, params, grads, m, v, step, (1 + math.cos(math.pi * step / steps)) / 2)


def descend(how, params, grads, m, v, step, fraction):
    """One AdamW step, in place, with the gradient clipped to a norm of 1; biases and recurrent weights do not decay."""
    length = math.sqrt(sum(float(np.vdot(g, g)) for layer in grads for g in layer))
    grads = [tuple(g / np.float32(max(1, length)) for g in layer) for layer in grads]
    rates = (how.lr, how.decay), (how.lr, 0), (how.lr * how.recurrent, 0)
    for (lr, decay), *part in zip(rates, *map(parts, (params, grads, m, v))):
        fpnl.adamw(*part, step + 1, lr * fraction, decay)


def parts(layers):
    """Weights of pixels, features and logits; biases; weights of the memory before a row."""
    (W, b), (U, c), (V, d) = layers
    return [W[: -len(V)], U[: -len(V)], V], [b, c, d], [W[-len(V) :], U[-len(V) :]]


# --- The comparison --------------------------------------------------------------------------------------------


def compare(args, given):
    """Run everything, a seed after the other; print a table of accuracies in percent."""
    table, held_out = {}, "validation" if args.validation else "test"
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(args.workers, initializer=train.deaf))
        stack.callback(pool.shutdown, cancel_futures=True)  # an error or Ctrl-C ends it
        for seed, row in itertools.product(range(args.seeds), dict.fromkeys(args.rows)):
            says, *_, other = ROWS[row]
            defaults = {name: default for name, (default, *_) in SETTINGS.items()}
            fixed = {"validation": args.validation, "reports": args.reports, "seed": seed}
            how = argparse.Namespace(**defaults | other | given | fixed)
            print(f"\n{says}, seed {seed}\n epoch  seconds     loss   train {held_out:>10}   live units", flush=True)
            table.setdefault(says, []).append(learn(row, how, args.folder, pool.map))
    controls.print_table(table, held_out, {})


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = train.fail
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="for logs and weights; those of an earlier run are replaced")
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    add("--seeds", type=train.COUNT, default=3, metavar="N", help="0, 1, ... of them (default: 3)")
    add("--workers", type=train.COUNT, default=train.cores(), help="processes; makes no difference (default: all)")
    add("--reports", type=train.COUNT, default=15, metavar="N", help="lines of a run after its first (default: 15)")
    says = "hold out the last N training images, and evaluate on them, not on the test images"
    add("--validation", type=train.number(int, 0, 1e6), default=0, metavar="N", help=says)
    for name, (default, kind, says) in SETTINGS.items():
        others = "".join(f"; {row}: {other[name]:g}" for row, (*_, other) in ROWS.items() if name in other)
        count = len(default) if isinstance(default, tuple) else None
        add(f"--{name}", type=kind, nargs=count, help=f"{says} (default: {default}{others})")
    args = parser.parse_args()
    if (batch := args.batch or SETTINGS["batch"][0]) > (number := len(sets(args.validation)[0])):
        raise ValueError(f"--batch: expected at most the {number} training images, found {batch}")
    args.folder.mkdir(parents=True, exist_ok=True)
    compare(args, {name: value for name in SETTINGS if (value := getattr(args, name)) is not None})


if __name__ == "__main__":
    with train.command():
        main()
