#!/usr/bin/env python3
"""Which nonlinearity passes information: units that pass on their message, or units that pass on a belief in it?

A unit sums up a message z = x @ W + b. Milletarí, Chotibut and Trevisanutto (*Mean Field Theory of Activation Functions
in Deep Neural Networks*, arXiv 1805.08786) have it do two things more: estimate the belief p that the message is worth
passing, and pass on z p. A sigmoid or tanh unit passes on the belief itself.

    message units, h = z p                          belief units
    identity     p = 1                              sigmoid    h = 1 / (1 + exp(-z))
    dead zone    p = 1 where |z| >= 1/2, else 0     tanh       h = tanh(z)
    ReLU         p = 1 where z > 0, else 0
    ESP          p = 1 / (1 + exp(-z))          (Swish)

    dh/dz = p + z p (1 - p) almost everywhere: p (1 - p) = 0 for the hard gates

(The paper's ESP has beta z in the place of z, and learns beta. W1 and the hidden biases times beta, and the last W
divided by it, do the same: it is no new freedom, and 1 here.)

"underflow" is fpnl's own network, whose units are dead zones by float32: ES only, since no derivative sees them.
Its logits have a dead zone too and its later biases are inert; the others have linear logits and live biases.

    python examples/gates.py --log docs/runs/gates.csv      # eleven minutes on 2 cores; -h for the options

Test %: 784-width-width-10 after a few epochs by ES and by backprop. Signal, before training: the variance over images
of a layer's outputs, mean over its units, as a share of the pixels'; gradient: of a layer's dL/dz, a sum, as a share of
the logits'. The rest: a network small enough for its whole Hessian, 64-5-5-10, trained by backprop on all of 2,000 8x8
images at once; slope, its largest derivative at the end; alpha, the share of eigenvalues below -tolerance; gamma, of
those within +-tolerance, 1e-6 or 1e-4 of the largest magnitude.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a process
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent))
import controls
import numpy as np

import data
import fpnl
import train


def belief(z):
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


GATES = {  # real parts decide hard ones, so that complex steps leave them as they are
    "identity": lambda z: np.ones_like(z),
    "dead zone": lambda z: np.abs(z.real) >= 0.5,
    "ReLU": lambda z: z.real > 0,
    "ESP": belief,
}
BELIEFS = {"sigmoid": (belief, lambda h: h * (1 - h)), "tanh": (np.tanh, lambda h: 1 - h * h)}  # h, and dh/dz from it
UNITS = ["identity", "dead zone", "underflow", "ReLU", "ESP", "sigmoid", "tanh"]
SETTINGS = dict.fromkeys(UNITS, (1e-2, 0.1))  # learning rate and weight decay
SETTINGS |= dict.fromkeys(("dead zone", "underflow"), (3e-3, 1.0))  # which validation asks for: see docs/gates.md
CLASSES, BATCH, FLOW_IMAGES, DEPTHS = 10, 256, 1000, (3, 10)  # layers
SMALL_HIDDEN, SMALL_IMAGES, SMALL_STEPS = (5, 5), 2000, 3000  # 415 weights and biases
LOOKS, TOLERANCES = 8, (1e-6, 1e-4)  # how often the Hessian is taken


def transfer(unit):
    """What fpnl takes for the hidden units: a function of an array of sums, or None for its own network."""
    if unit == "underflow":
        return None
    return (lambda z: z * GATES[unit](z).astype(z.dtype)) if unit in GATES else BELIEFS[unit][0]


def derivative(unit, z):
    if unit in BELIEFS:
        h, of_h = BELIEFS[unit]
        return of_h(h(z))
    p = GATES[unit](z).astype(z.dtype)
    return p + z * p * (1 - p)


def backprop(unit, params, x, labels):
    """Outputs [n, width] of each layer, the last the logits, and dL/dz [n, width] of each image's loss."""
    (_, *hidden), sums = controls.forward(params, x, transfer(unit))
    derivatives = [derivative(unit, z) for z in sums[:-1]]
    return [*hidden, sums[-1]], controls.backward(params, derivatives, controls.softmax_error(sums[-1], labels))


def gradient(unit, params, x, labels):
    """Of the mean loss by all weights and biases, flat."""
    outputs, deltas = backprop(unit, params, x, labels)
    return controls.flattened([(a.T @ delta / len(x), delta.mean(axis=0)) for a, delta in zip([x, *outputs], deltas)])


def start(unit, method, hidden, sets, seed, epochs, **settings):
    """A run of train.py's loop, on these sets."""
    fixed = {"sigma": 0.02, "block": 8, "smoothing": 0, "control_variate": True, "importance": 0, "task": 64}
    s, net = argparse.Namespace(**fixed | settings, seed=seed), {"ftz": True, "transfer": transfer(unit)}
    s.images = len(sets[0])
    s.steps = max(1, round(epochs * (s.images // s.batch)))
    params = fpnl.init(np.random.default_rng((seed, train.INIT)), (sets[0].shape[1], *hidden, CLASSES))
    by_backprop = functools.partial(controls.gradient, s, len(params), functools.partial(backprop, unit))
    gradient = train.es(s, net) if method == "ES" else by_backprop
    return train.fresh(s, sets, functools.partial(fpnl.activations, **net), gradient, params)


@functools.cache
def images(folder, validation):
    """train_x, train_y, other_x, other_y: float32 pixels and labels; the others are the test set, or held out."""
    x, y, *other = data.load(folder, validation)
    if len(x) < BATCH or x.shape[1] != 784 or y.max() >= CLASSES:
        found = f"{x.shape} of {y.max() + 1} classes"
        raise ValueError(
            f"{folder}: expected images of 28 x 28, {BATCH} of them to train on, of 10 classes, found {found}"
        )
    return data.pixels(x), y, data.pixels(other[0]), other[1]


def learn(method, unit, seed, args):
    """Rows (measure, at, value), of the network after some epochs."""
    sets, (lr, decay) = images(args.data, args.validation), SETTINGS[unit]
    options = {"seed": seed, "epochs": args.epochs, "batch": BATCH, "lr": lr, "weight_decay": decay}
    run = start(unit, method, (args.width, args.width), sets, **options)
    for _ in train.steps(run):
        pass
    named = run.outputs(run.params, sets[2])[-1].argmax(axis=1)
    return [(f"{method} test %", args.epochs, 100 * np.mean(named == sets[3]))]


def flow(unit, seed, args):
    """Rows after each number of layers passed."""
    x, y = (a[:FLOW_IMAGES] for a in images(args.data, 0)[:2])
    rows = []
    for depth in DEPTHS:
        params = fpnl.init(np.random.default_rng((seed, 2)), (784, *[args.width] * (depth - 1), CLASSES))
        hs = fpnl.activations(params, x, transfer=transfer(unit))[:-1]
        signal = [h.var(axis=0).mean() for h in (x, *hs)]
        gradient = [delta.var(axis=0).sum() for delta in reversed(backprop(unit, params, x, y)[1])]
        for what, variances in (("signal", signal), ("gradient", gradient)):
            rows += [(f"{what} {depth} layers", i, v / variances[0]) for i, v in enumerate(variances)]
    return rows


def pooled(x):
    """[n, 784] -> [n, 64]: the middle 20 x 20 pixels, where the digits are, as means of 2.5 x 2.5."""
    middle = x.reshape(-1, 28, 28)[:, 4:24, 4:24].repeat(2, axis=1).repeat(2, axis=2)
    return middle.reshape(-1, 8, 5, 8, 5).mean(axis=(2, 4)).reshape(-1, 64)


def hessian(unit, params, x, labels):
    """Second derivatives of the loss by the weights and biases [P, P], by complex steps of its gradient: exact, and of
    the smooth piece of the loss around params, as all hard gates are held."""
    theta, sizes = controls.flattened(params), (x.shape[1], *(len(b) for _, b in params))
    steps = (controls.as_params(theta + 1e-20j * e, sizes) for e in np.eye(len(theta)))
    return np.array([gradient(unit, step, x, labels).imag / 1e-20 for step in steps])


def curvature(unit, seed, args):
    """Rows at LOOKS steps from 0 to the last."""
    x, y = (a[:SMALL_IMAGES] for a in images(args.data, 0)[:2])
    x, rows = pooled(x), []
    options = {"seed": seed, "epochs": SMALL_STEPS, "batch": len(x), "lr": 0.02, "weight_decay": 0}
    run = start(unit, "backprop", SMALL_HIDDEN, (x, y, x, y), **options)
    looks = {0, SMALL_STEPS, *np.geomspace(10, SMALL_STEPS, LOOKS - 1).astype(int).tolist()}
    for step in (run.step for _ in train.steps(run) if run.step in looks):
        params = [tuple(a.astype(np.float64) for a in layer) for layer in run.params]
        eigenvalues = np.linalg.eigvalsh(hessian(unit, params, x, y))
        loss = fpnl.cross_entropy(run.outputs(run.params, x)[-1], y).mean()
        rows += [("loss", step, loss), ("slope", step, np.abs(gradient(unit, params, x, y)).max())]
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="0, 1, ... of them")
    add("--epochs", type=float, default=3, help="of ES and of backprop")
    add("--width", type=int, default=256, help="of the hidden layers")
    add("--validation", type=int, default=0, help="last training images held out, to test on them")
    add("--data", default=data.MNIST, help="folder of the four files of MNIST")
    add("--log", default=os.devnull, help="FILE.csv: every number")
    parser.error = train.fail
    args = parser.parse_args()
    if min(args.seeds, args.width) < 1 or not 0 < args.epochs < math.inf or args.validation < 0:
        says = "expected --seeds and --width >= 1, a finite --epochs > 0 and --validation >= 0"
        raise ValueError(f"{says}, found {' '.join(sys.argv[1:])}")
    images(args.data, args.validation)
    parts = [functools.partial(learn, "ES"), functools.partial(learn, "backprop"), flow, curvature]
    tasks = [*itertools.product(parts, UNITS, range(args.seeds), [args])]
    tasks = [task for task in tasks if task[0] is parts[0] or task[1] != "underflow"]
    log = open(args.log, "w", encoding="utf-8", errors="backslashreplace")
    with log, concurrent.futures.ProcessPoolExecutor() as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # an error or Ctrl-C ends it
        print(f"# python {' '.join(sys.argv)}; {data.provenance()}\nunit,seed,measure,at,value", file=log, flush=True)
        found = [pool.submit(*task) for task in tasks]
        rows = [(*task[1:3], *row) for task, future in zip(tasks, found) for row in future.result()]
        print(*(",".join(map(str, row[:-1])) + f",{row[-1]:.6g}" for row in rows), sep="\n", file=log)
    print_table(rows)


if __name__ == "__main__":
    with train.command():
        main()
