#!/usr/bin/env python3
"""Which nonlinearity passes information: units that pass on their message, or units that pass on a belief in it?

A unit sums up a message z = x @ W + b. Milletarí et al. have it do two things more: estimate the belief p that
the message is worth passing, and pass on z p. A sigmoid or tanh unit passes on the belief itself.

    message units, h = z p                          belief units
    identity     p = 1                              sigmoid    h = 1 / (1 + exp(-z))
    dead zone    p = 1 where |z| >= 1/2, else 0     tanh       h = tanh(z)
    ReLU         p = 1 where z > 0, else 0
    ESP          p = 1 / (1 + exp(-beta z))         (Swish.) One beta for the network, learned; at infinity, ReLU

    dh/dz = p + beta z p (1 - p),   dh/dbeta = z^2 p (1 - p)    almost everywhere: p (1 - p) = 0 for the hard gates

"underflow" is fpnl's own network, whose units are dead zones by float32: ES only, since no derivative sees them.
Its logits have a dead zone too and its later biases are inert; the others have linear logits and live biases.

    python examples/gates.py                            # a few minutes on 2 cores; -h for the options
    python examples/gates.py --log docs/runs/gates.csv  # every number of it, from which docs/figures.py draws

1. Accuracy after a few epochs by ES and by backprop: 784-width-width-10, the same settings for every unit.
2. Before training, the share of the variance over images that arrives. Signal: of a layer's outputs, in that of
   the pixels, means over the units. Gradient: of a layer's dL/dz, in that of the logits, sums over the units. He's
   init is made for a unit that passes on half of it, ReLU: the identity's doubles with every layer.
3. A network small enough for its whole Hessian, 64-5-5-10, trained by backprop on all of 2,000 8x8 images at once,
   towards a stationary point: "slope" is the largest derivative. alpha: the share of eigenvalues below
   -tolerance; gamma: of those within +-tolerance; the tolerance is 1e-6, or 1e-4, of the largest magnitude.

M. Milletarí, T. Chotibut, P. E. Trevisanutto, *Mean Field Theory of Activation Functions in Deep Neural Networks*
(first *Expectation propagation: a probabilistic view of Deep Feed Forward Networks*), arXiv 1805.08786.
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import os
import pathlib
import platform
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from train import as_params, flattened  # noqa: E402, I001 (first: it keeps BLAS at one thread)

import numpy as np  # noqa: E402

import data  # noqa: E402
import fpnl  # noqa: E402


def belief(z, beta=1.0):
    """1 / (1 + exp(-beta z)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * beta * z)


GATES = {
    "identity": lambda z, beta: np.ones_like(z),
    "dead zone": lambda z, beta: np.abs(z) >= 0.5,
    "ReLU": lambda z, beta: z > 0,
    "ESP": belief,
}
BELIEFS = {"sigmoid": (belief, lambda h: h * (1 - h)), "tanh": (np.tanh, lambda h: 1 - h * h)}  # h, and dh/dz from it
UNITS = ["identity", "dead zone", "underflow", "ReLU", "ESP", "sigmoid", "tanh"]
SETTINGS = dict.fromkeys(UNITS, (1e-2, 0.1))  # learning rate and weight decay
SETTINGS |= dict.fromkeys(("dead zone", "underflow"), (3e-3, 1.0))  # which validation asks for: see docs/RESULTS.md
DEPTHS = (3, 10)  # layers
BATCH, FLOW_IMAGES = 256, 1000
SMALL_SIZES, SMALL_IMAGES, LOOKS = (64, 5, 5, 10), 2000, 8  # 415 weights and biases; how often the Hessian is taken
TOLERANCES = (1e-6, 1e-4)


def transfer(unit, beta):
    """What fpnl takes for the hidden units: a function of an array of sums, or None for its own network."""
    if unit == "underflow":
        return None
    return (lambda z: z * GATES[unit](z, beta)) if unit in GATES else BELIEFS[unit][0]


def backprop(unit, params, beta, x, labels, held=None):
    """Mean loss over x [n, inputs], its gradient [(dW, db), ...], dbeta, dL/dz of each layer [n, width], and the gates
    p [n, width] of each hidden layer of message units. held: such gates, to use instead of what z says."""
    a, inputs, gates, slopes = x, [], [], []
    for l, (W, b) in enumerate(params[:-1]):
        inputs.append(a)
        z = a @ W + b
        if unit in GATES:
            p = held[l] if held else GATES[unit](z, beta).astype(z.dtype)
            gates.append(p)
            a = z * p
            slopes.append((p + beta * z * p * (1 - p), z * z * p * (1 - p)))  # dh/dz, dh/dbeta
        else:
            a = BELIEFS[unit][0](z)
            slopes.append((BELIEFS[unit][1](a), 0 * a))
    W, b = params[-1]
    logits = a @ W + b
    delta = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(x)), labels] -= 1
    deltas, dbeta = [delta / x.dtype.type(len(x))], 0.0
    for (W, _), (by_z, by_beta) in reversed([*zip(params[1:], slopes)]):
        dh = deltas[0] @ W.T
        dbeta += float(np.sum(dh * by_beta))
        deltas.insert(0, dh * by_z)
    grads = [(a.T @ delta, delta.sum(axis=0)) for a, delta in zip([*inputs, a], deltas)]
    return fpnl.loss(logits, labels), grads, dbeta, deltas, gates


def es(unit, params, beta, x, labels, rng, nudge=0.05):
    """The same, estimated from losses alone: gradient [(dW, db), ...] and, by an antithetic difference, dbeta."""
    grads = fpnl.es_gradient(params, x, labels, rng, transfer=transfer(unit, beta))
    if unit != "ESP":
        return grads, 0.0
    up, down = (fpnl.loss(fpnl.forward(params, x, transfer=transfer(unit, beta + s * nudge)), labels) for s in (1, -1))
    return grads, (up - down) / (2 * nudge)


def train(unit, method, sizes, x, labels, rng, epochs, batch, lr, weight_decay, look=lambda *_: None):
    """AdamW, in the dtype of x, from fpnl.init and beta = 1, its rate falling to 0 as a cosine -> params, beta.
    look(step, params, beta) is called before every step and after the last."""
    theta, beta = flattened(fpnl.init(rng, sizes)).astype(x.dtype), np.ones(1, x.dtype)
    params, moments = as_params(theta, sizes), [np.zeros((2, *a.shape), x.dtype) for a in (theta, beta)]
    steps = max(1, round(epochs * (len(x) // batch)))
    for step in range(steps + 1):
        look(step, params, beta[0])
        if step == steps:
            return params, beta[0]
        place = step % (len(x) // batch) * batch
        if place == 0:
            order = rng.permutation(len(x))
        rows = order[place : place + batch]
        args = unit, params, beta[0], x[rows], labels[rows]
        grads, dbeta = es(*args, rng) if method == "ES" else backprop(*args)[1:3]
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        fpnl.adamw(theta, flattened(grads), *moments[0], step + 1, rate, weight_decay)
        fpnl.adamw(beta, np.full(1, dbeta, x.dtype), *moments[1], step + 1, rate)


# --- The parts: each takes a unit, a seed and the options, and returns rows (measure, at, value) ---------


@functools.cache
def images(folder, validation):
    """train_x, train_y, other_x, other_y: float32 pixels and labels; the others are the test set, or held out."""
    x, y, *other = data.load(folder)
    if not validation < len(x) - BATCH or x.shape[1] != 784:
        raise ValueError(f"{folder}: expected images of 28 x 28, {BATCH} of them to train on, found {x.shape}")
    if validation:
        x, y, *other = x[:-validation], y[:-validation], x[-validation:], y[-validation:]
    return data.pixels(x), y, data.pixels(other[0]), other[1]


def learn(method, unit, seed, args):
    """Part 1."""
    x, y, other_x, other_y = images(args.data, args.validation)
    sizes, rng = (x.shape[1], args.width, args.width, data.CLASSES), np.random.default_rng((seed, 1))
    params, beta = train(unit, method, sizes, x, y, rng, args.epochs, BATCH, *SETTINGS[unit])
    logits = fpnl.forward(params, other_x, transfer=transfer(unit, beta))
    rows = [(f"{method} test %", args.epochs, 100 * fpnl.accuracy(logits, other_y))]
    return rows + [(f"{method} beta", args.epochs, beta)] * (unit == "ESP")


def flow(unit, seed, args):
    """Part 2, after each number of layers passed."""
    x, y = (a[:FLOW_IMAGES] for a in images(args.data, 0)[:2])
    rows = []
    for depth in DEPTHS:
        sizes = (x.shape[1], *[args.width] * (depth - 1), data.CLASSES)
        params = fpnl.init(np.random.default_rng((seed, 2)), sizes)
        hs = fpnl.activations(params, x, transfer=transfer(unit, 1.0))[:-1]
        signal = [h.var(axis=0).mean() for h in (x, *hs)]
        gradient = [delta.var(axis=0).sum() for delta in reversed(backprop(unit, params, 1.0, x, y)[3])]
        for what, variances in (("signal", signal), ("gradient", gradient)):
            rows += [(f"{what} {depth} layers", i, v / variances[0]) for i, v in enumerate(variances)]
    return rows


def pooled(x):
    """[n, 784] -> [n, 64]: the middle 20 x 20 pixels, where the digits are, as means of 2.5 x 2.5."""
    middle = x.reshape(-1, 28, 28)[:, 4:24, 4:24].repeat(2, axis=1).repeat(2, axis=2)
    return middle.reshape(-1, 8, 5, 8, 5).mean(axis=(2, 4)).reshape(-1, 64)


def hessian(unit, params, beta, x, labels, step=1e-5):
    """Second derivatives of the loss by the weights and biases [P, P], by central differences of its gradient.

    Hard gates are held as they are: this is the smooth piece of the loss around params, without kinks and jumps.
    beta is held as well: W1 and all hidden b, times beta, and the last W, divided by it, do what it does."""
    theta, sizes = flattened(params), (x.shape[1], *(len(b) for _, b in params))
    held = backprop(unit, params, beta, x, labels)[-1] if unit in ("dead zone", "ReLU") else None
    rows = []
    for e in step * np.eye(len(theta)):
        up, down = (backprop(unit, as_params(theta + s * e, sizes), beta, x, labels, held)[1] for s in (1, -1))
        rows.append((flattened(up) - flattened(down)) / (2 * step))
    return (np.array(rows) + np.array(rows).T) / 2


def curvature(unit, seed, args):
    """Part 3, at LOOKS steps from 0 to the last."""
    x, y = (a[:SMALL_IMAGES] for a in images(args.data, 0)[:2])
    x, rows = pooled(x.astype(np.float64)), []
    looks = {0, args.small_steps, *np.geomspace(10, args.small_steps, LOOKS - 1).astype(int)}

    def look(step, params, beta):
        if step in looks:
            loss, grads, *_ = backprop(unit, params, beta, x, y)
            eigenvalues = np.linalg.eigvalsh(hessian(unit, params, beta, x, y))
            rows.extend([("loss", step, loss), ("slope", step, np.abs(flattened(grads)).max())])
            for tolerance in TOLERANCES:
                bound = tolerance * np.abs(eigenvalues).max()
                rows.append((f"alpha {tolerance:g} %", step, 100 * np.mean(eigenvalues < -bound)))
                rows.append((f"gamma {tolerance:g} %", step, 100 * np.mean(np.abs(eigenvalues) <= bound)))

    rng = np.random.default_rng((seed, 3))
    train(unit, "backprop", SMALL_SIZES, x, y, rng, args.small_steps, len(x), 0.02, 0, look)
    return rows


PARTS = {"ES": functools.partial(learn, "ES"), "backprop": functools.partial(learn, "backprop")}
PARTS |= {"curvature": curvature, "flow": flow}
SECTIONS = [  # of the table: measure: format
    {
        "ES test %": ".2f",
        "backprop test %": ".2f",
        **{f"{what} {depth} layers": ".2g" for what in ("signal", "gradient") for depth in DEPTHS},
    },
    {"loss": ".3f", "slope": ".1g"} | {f"{index} {t:g} %": ".1f" for t in TOLERANCES for index in ("alpha", "gamma")},
    {"ES beta": ".3f", "backprop beta": ".3f"},
]


def measured(task):
    """Rows (unit, seed, measure, at, value); at counts epochs, steps of the small network or layers passed."""
    part, unit, seed, args = task
    return [(unit, seed, *row) for row in PARTS[part](unit, seed, args)]


def spread(rows, unit, measure, form):
    """Mean and standard deviation over the seeds of what was measured last."""
    found = [row[3:] for row in rows if (row[0], row[2]) == (unit, measure)]
    values = [value for at, value in found if at == max(found)[0]]
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=len(values) > 1):{form}}" if values else ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default, says in (
        ("--seeds", 3, "0, 1, ... of them"),
        ("--epochs", 3.0, "of ES and of backprop"),
        ("--width", 256, "of the hidden layers"),
        ("--small-steps", 3000, "of the small network"),
        ("--validation", 0, "last training images held out, to test on them"),
        ("--data", str(data.MNIST), "folder of the four files of MNIST"),
        ("--log", os.devnull, "FILE.csv: every number"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=says)
    args = parser.parse_args()
    if min(args.seeds, args.width, args.small_steps) < 1 or not args.epochs > 0 or args.validation < 0:
        parser.error("expected --seeds, --width and --small-steps >= 1, --epochs > 0 and --validation >= 0")
    tasks = [*itertools.product(PARTS, UNITS, range(args.seeds), [args])]
    tasks = [task for task in tasks if task[0] == "ES" or task[1] != "underflow"]
    try:
        images(args.data, args.validation)
        log = open(args.log, "w", encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with log, concurrent.futures.ProcessPoolExecutor() as pool:
        command = " ".join(["# python examples/gates.py", *sys.argv[1:]])
        versions = f"Python {platform.python_version()}, NumPy {np.__version__}; {platform.platform()}"
        print(f"{command}; {versions}; {time.strftime('%Y-%m-%d')}\nunit,seed,measure,at,value", file=log, flush=True)
        rows = [*itertools.chain(*pool.map(measured, tasks))]
        print(*(f"{','.join(map(str, row[:-1]))},{row[-1]:.6g}" for row in rows), sep="\n", file=log)
    for section in SECTIONS:
        print(f"{'':9}", *(f"{measure:>19}" for measure in section))
        for unit in UNITS:
            cells = [spread(rows, unit, *column) for column in section.items()]
            if any(cells):
                print(f"{unit:9}", *(f"{cell or '-':>19}" for cell in cells))


if __name__ == "__main__":
    main()
