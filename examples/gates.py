#!/usr/bin/env python3
"""Which nonlinearity passes information: units that pass on their message, or units that pass on a belief in it?

A unit sums up a message z = x @ W + b. Milletarí, Chotibut and Trevisanutto (*Mean Field Theory of Activation Functions
in Deep Neural Networks*, arXiv 1805.08786) have it do two things more: estimate the belief p that the message is worth
passing, and pass on z p. A sigmoid or tanh unit passes on the belief itself.

    message units, h = z p                          belief units
    identity     p = 1                              sigmoid    h = 1 / (1 + exp(-z))
    dead zone    p = 1 where |z| >= 1/2, else 0     tanh       h = tanh(z)
    ReLU         p = 1 where z > 0, else 0
    ESP          p = 1 / (1 + exp(-beta z))         (Swish.) One beta for the network, learned; at infinity, ReLU

    dh/dz = p + beta z p (1 - p),   dh/dbeta = z^2 p (1 - p)    almost everywhere: p (1 - p) = 0 for the hard gates

"underflow" is fpnl's own network, whose units are dead zones by float32: ES only, since no derivative sees them.
Its logits have a dead zone too and its later biases are inert; the others have linear logits and live biases.

    python examples/gates.py --log docs/runs/gates.csv      # four minutes on 2 cores; -h for the options

Test %: 784-width-width-10 after a few epochs by ES and by backprop. Signal, before training: the variance over images
of a layer's outputs, mean over its units, as a share of the pixels'; gradient: of a layer's dL/dz, a sum, as a share of
the logits'. The rest: a network small enough for its whole Hessian, 64-5-5-10, trained by backprop on all of 2,000 8x8
images at once; slope, its largest derivative at the end; alpha, the share of eigenvalues below -tolerance; gamma, of
those within +-tolerance, 1e-6 or 1e-4 of the largest magnitude.
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from train import as_params, flattened, provenance  # noqa: E402, I001 (first: it keeps BLAS at one thread)

import numpy as np  # noqa: E402

import data  # noqa: E402
import fpnl  # noqa: E402


def belief(z, beta=1.0):
    """1 / (1 + exp(-beta z)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * beta * z)


GATES = {  # real parts decide hard ones, so that complex steps leave them as they are
    "identity": lambda z, beta: np.ones_like(z),
    "dead zone": lambda z, beta: np.abs(z.real) >= 0.5,
    "ReLU": lambda z, beta: z.real > 0,
    "ESP": belief,
}
BELIEFS = {"sigmoid": (belief, lambda h: h * (1 - h)), "tanh": (np.tanh, lambda h: 1 - h * h)}  # h, and dh/dz from it
UNITS = ["identity", "dead zone", "underflow", "ReLU", "ESP", "sigmoid", "tanh"]
SETTINGS = dict.fromkeys(UNITS, (1e-2, 0.1))  # learning rate and weight decay
SETTINGS |= dict.fromkeys(("dead zone", "underflow"), (3e-3, 1.0))  # which validation asks for: see docs/RESULTS.md
BATCH, FLOW_IMAGES, DEPTHS = 256, 1000, (3, 10)  # layers
SMALL_SIZES, SMALL_IMAGES, SMALL_STEPS = (64, 5, 5, 10), 2000, 3000  # 415 weights and biases
LOOKS, TOLERANCES = 8, (1e-6, 1e-4)  # how often the Hessian is taken


def transfer(unit, beta):
    """What fpnl takes for the hidden units: a function of an array of sums, or None for its own network."""
    if unit == "underflow":
        return None
    return (lambda z: z * GATES[unit](z, beta)) if unit in GATES else BELIEFS[unit][0]


def backprop(unit, params, beta, x, labels):
    """Mean loss over x [n, inputs], its gradient [(dW, db), ...], dbeta, and dL/dz of each layer [n, width]."""
    inputs, slopes = [x], []
    for W, b in params[:-1]:
        z = inputs[-1] @ W + b
        if unit in GATES:
            p = GATES[unit](z, beta).astype(z.dtype)
            inputs.append(z * p)
            slopes.append((p + beta * z * p * (1 - p), z * z * p * (1 - p)))  # dh/dz, dh/dbeta
        else:
            h, slope = BELIEFS[unit]
            inputs.append(h(z))
            slopes.append((slope(inputs[-1]), 0))
    W, b = params[-1]
    logits = inputs[-1] @ W + b
    z, rows = logits - logits.max(axis=1, keepdims=True), np.arange(len(x))
    delta = np.exp(z)
    total = delta.sum(axis=1, keepdims=True)
    delta /= total
    delta[rows, labels] -= 1
    deltas, dbeta = [delta / x.dtype.type(len(x))], 0.0
    for (W, _), (by_z, by_beta) in reversed([*zip(params[1:], slopes)]):
        dh = deltas[0] @ W.T
        dbeta += np.sum(dh * by_beta)
        deltas.insert(0, dh * by_z)
    grads = [(a.T @ delta, delta.sum(axis=0)) for a, delta in zip(inputs, deltas)]
    return np.mean(np.log(total[:, 0]) - z[rows, labels]), grads, dbeta, deltas


def es(unit, params, beta, x, labels, rng, nudge=0.05):
    """The same by ES, with the control variate: gradient [(dW, db), ...] and, by an antithetic difference, dbeta."""
    grads = fpnl.es_gradient(params, x, labels, rng, control_variate=True, transfer=transfer(unit, beta))
    if unit != "ESP":
        return grads, 0.0
    up, down = (fpnl.loss(fpnl.forward(params, x, transfer=transfer(unit, beta + s * nudge)), labels) for s in (1, -1))
    return grads, (up - down) / (2 * nudge)


def train(unit, method, sizes, x, labels, rng, epochs, batch, lr, weight_decay):
    """AdamW, in float32, from fpnl.init and beta = 1, which does not decay, its rate falling to 0 as a cosine. Yields
    params and beta before every step and after the last."""
    theta = np.append(flattened(fpnl.init(rng, sizes)), np.float32(1))  # all weights and biases, and beta
    params, moments = as_params(theta[:-1], sizes), np.zeros((2, len(theta)), np.float32)
    steps = max(1, round(epochs * (len(x) // batch)))
    for step in range(steps):
        yield params, theta[-1]
        place = step % (len(x) // batch) * batch
        if place == 0:
            order = rng.permutation(len(x))
        rows = order[place : place + batch]
        args = unit, params, theta[-1], x[rows], labels[rows]
        grads, dbeta = es(*args, rng) if method == "ES" else backprop(*args)[1:3]
        lr_now = lr * (1 + math.cos(math.pi * step / steps)) / 2
        g = np.append(flattened(grads), dbeta).astype(np.float32)
        for part, decay in ((slice(None, -1), weight_decay), (slice(-1, None), 0.0)):
            fpnl.adamw(theta[part], g[part], *moments[:, part], step + 1, lr_now, decay)
    yield params, theta[-1]


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
    """Rows (measure, at, value), of the network after some epochs."""
    x, y, other_x, other_y = images(args.data, args.validation)
    sizes, rng = (x.shape[1], args.width, args.width, data.CLASSES), np.random.default_rng((seed, 1))
    *_, (params, beta) = train(unit, method, sizes, x, y, rng, args.epochs, BATCH, *SETTINGS[unit])
    logits = fpnl.forward(params, other_x, transfer=transfer(unit, beta))
    rows = [(f"{method} test %", args.epochs, 100 * fpnl.accuracy(logits, other_y))]
    return rows + [(f"{method} beta", args.epochs, beta)] * (unit == "ESP")


def flow(unit, seed, args):
    """Rows after each number of layers passed."""
    x, y = (a[:FLOW_IMAGES] for a in images(args.data, 0)[:2])
    rows = []
    for depth in DEPTHS:
        params = fpnl.init(np.random.default_rng((seed, 2)), (784, *[args.width] * (depth - 1), data.CLASSES))
        hs = fpnl.activations(params, x, transfer=transfer(unit, 1.0))[:-1]
        signal = [h.var(axis=0).mean() for h in (x, *hs)]
        gradient = [delta.var(axis=0).sum() for delta in reversed(backprop(unit, params, 1.0, x, y)[-1])]
        for what, variances in (("signal", signal), ("gradient", gradient)):
            rows += [(f"{what} {depth} layers", i, v / variances[0]) for i, v in enumerate(variances)]
    return rows


def pooled(x):
    """[n, 784] -> [n, 64]: the middle 20 x 20 pixels, where the digits are, as means of 2.5 x 2.5."""
    middle = x.reshape(-1, 28, 28)[:, 4:24, 4:24].repeat(2, axis=1).repeat(2, axis=2)
    return middle.reshape(-1, 8, 5, 8, 5).mean(axis=(2, 4)).reshape(-1, 64)


def hessian(unit, params, beta, x, labels):
    """Second derivatives of the loss by the weights and biases [P, P], by complex steps of its gradient: exact, and of
    the smooth piece of the loss around params, as all hard gates are held. beta is held as well."""
    theta, sizes = flattened(params), (x.shape[1], *(len(b) for _, b in params))
    steps = (as_params(theta + 1e-20j * e, sizes) for e in np.eye(len(theta)))
    return np.array([flattened(backprop(unit, step, beta, x, labels)[1]).imag / 1e-20 for step in steps])


def curvature(unit, seed, args):
    """Rows at LOOKS steps from 0 to the last."""
    x, y = (a[:SMALL_IMAGES] for a in images(args.data, 0)[:2])
    x, rows, rng = pooled(x.astype(np.float64)), [], np.random.default_rng((seed, 3))
    looks = {0, SMALL_STEPS, *np.geomspace(10, SMALL_STEPS, LOOKS - 1).astype(int)}
    training = train(unit, "backprop", SMALL_SIZES, x, y, rng, SMALL_STEPS, len(x), 0.02, 0)
    for step, (params, beta) in enumerate(training):
        if step in looks:
            params = [tuple(a.astype(np.float64) for a in layer) for layer in params]
            eigenvalues = np.linalg.eigvalsh(hessian(unit, params, beta, x, y))
            loss, grads, *_ = backprop(unit, params, beta, x, y)
            rows += [("loss", step, loss), ("slope", step, np.abs(flattened(grads)).max())]
            for tolerance in TOLERANCES:
                bound = tolerance * np.abs(eigenvalues).max()
                rows.append((f"alpha {tolerance:g} %", step, 100 * np.mean(eigenvalues < -bound)))
                rows.append((f"gamma {tolerance:g} %", step, 100 * np.mean(np.abs(eigenvalues) <= bound)))
    return rows


def print_table(rows):
    """Mean ± standard deviation over the seeds of what was measured last: a line a measure, a column a unit."""
    print(f"{'':19}" + "".join(f"{unit:>20}" for unit in UNITS))
    for measure in dict.fromkeys(row[2] for row in rows):
        last = max(row[3] for row in rows if row[2] == measure)
        found = ([row[4] for row in rows if (row[0], *row[2:4]) == (unit, measure, last)] for unit in UNITS)
        cells = (f"{np.mean(v):.4g} ± {statistics.stdev(v) if v[1:] else 0:.2g}" if v else "-" for v in found)
        print(f"{measure:19}" + "".join(f"{cell:>20}" for cell in cells))


def main():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="0, 1, ... of them")
    add("--epochs", type=float, default=3, help="of ES and of backprop")
    add("--width", type=int, default=256, help="of the hidden layers")
    add("--validation", type=int, default=0, help="last training images held out, to test on them")
    add("--data", default=data.MNIST, help="folder of the four files of MNIST")
    add("--log", default=os.devnull, help="FILE.csv: every number")
    args = parser.parse_args()
    if min(args.seeds, args.width) < 1 or not 0 < args.epochs < math.inf or args.validation < 0:
        says = "expected --seeds and --width >= 1, a finite --epochs > 0 and --validation >= 0"
        parser.error(f"{says}, found {' '.join(sys.argv[1:])}")
    try:
        images(args.data, args.validation)
        log = open(args.log, "w", encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    parts = [functools.partial(learn, "ES"), functools.partial(learn, "backprop"), flow, curvature]
    tasks = [*itertools.product(parts, UNITS, range(args.seeds), [args])]
    tasks = [task for task in tasks if task[0] is parts[0] or task[1] != "underflow"]
    with log, concurrent.futures.ProcessPoolExecutor() as pool:
        print(f"# python {' '.join(sys.argv)}; {provenance()}\nunit,seed,measure,at,value", file=log, flush=True)
        found = [pool.submit(*task) for task in tasks]
        rows = [(*task[1:3], *row) for task, future in zip(tasks, found) for row in future.result()]
        print(*(",".join(map(str, row[:-1])) + f",{row[-1]:.6g}" for row in rows), sep="\n", file=log)
    print_table(rows)


if __name__ == "__main__":
    main()
