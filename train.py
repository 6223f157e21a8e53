#!/usr/bin/env python3
"""Train a network of matrix products and additions on MNIST by evolution strategies.

    python train.py                      # the main job: all cores, ends on its own
    python train.py --save weights.npz   # and keeps W1, b1, W2, b2, W3, b3
    python train.py -h                   # all options

The same seed gives the same weights, bit for bit, whatever the number of workers: a batch is cut into
fixed slices, each with a random stream of its own, and their gradients are added in their order.
"""

import os

os.environ.update({f"{blas}_THREADS": "1" for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")})

import argparse
import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import pathlib
import signal
import tempfile
import time
import types

import numpy as np

import data
import fpnl

MIN_SLICE, MAX_SLICES = 128, 32  # examples in a task at least; tasks a step at most (2.7 MB of gradient each)
CHUNK = 1 << 15  # floats updated at a time, so that the optimizer runs in the cache
EVALUATED = 1000  # images in an evaluation task


# --- What the workers do: `job` is the same in all processes, its arrays are shared ------------------

job = None


def join(args, sets, sizes, shared):
    """Enter the job: called once in every worker."""
    global job
    job = types.SimpleNamespace(args=args, sets=sets, sizes=sizes)
    for name, (array, shape, dtype) in shared.items():
        setattr(job, name, np.frombuffer(array, dtype).reshape(shape))


def share(sizes, slices, examples):
    """Shared memory for a job: name -> (buffer, shape, dtype)."""
    weights = sum((i + 1) * o for i, o in itertools.pairwise(sizes))
    shapes = {"weights": (weights,), "moments": (2, weights), "gradients": (slices, weights), "order": (examples,)}
    dtypes = {name: np.dtype(np.int32 if name == "order" else np.float32) for name in shapes}
    return {
        name: (multiprocessing.RawArray("b", math.prod(shape) * dtypes[name].itemsize), shape, dtypes[name])
        for name, shape in shapes.items()
    }


def as_params(flat, sizes):
    """[(W, b), ...] as views of a flat array."""
    params = []
    for i, o in itertools.pairwise(sizes):
        W, b, flat = np.split(flat, [i * o, (i + 1) * o])
        params.append((W.reshape(i, o), b))
    return params


def ftz():
    return {"emulated": True, "hardware": "hardware", "off": False}[job.args.flush]


def gradient(step, s):
    """Slice s of a step's batch -> its share of the step's gradient."""
    args, slices = job.args, len(job.gradients)
    start = step * args.batch % (len(job.order) // args.batch * args.batch)
    batch = job.order[start : start + args.batch]
    rows = batch[s * args.batch // slices : (s + 1) * args.batch // slices]
    x, y = data.pixels(job.sets[0][rows]), job.sets[1][rows]
    rng = np.random.default_rng((args.seed, 2, step, s))
    grads = fpnl.es_gradient(as_params(job.weights, job.sizes), x, y, rng, args.sigma, args.block, ftz())
    for to, values in zip(as_params(job.gradients[s], job.sizes), grads):
        for array, value in zip(to, values):
            np.multiply(value, np.float32(len(rows) / args.batch), out=array)


def update(step, lr, part, parts):
    """AdamW on a part of the weights: elementwise, so the parts do not change the result."""
    count = job.weights.size
    for start in range(part * count // parts, (part + 1) * count // parts, CHUNK):
        chunk = slice(start, min(start + CHUNK, (part + 1) * count // parts))
        g = job.gradients[0, chunk].copy()
        for other in job.gradients[1:]:
            g += other[chunk]
        fpnl.adamw(job.weights[chunk], g, *job.moments[:, chunk], step + 1, lr, job.args.weight_decay)


def evaluate(which, start):
    """Up to EVALUATED images of a set -> number, summed loss, number right, live units in each layer."""
    x, y = (a[start : start + EVALUATED] for a in job.sets[which : which + 2])
    hs = fpnl.activations(as_params(job.weights, job.sizes), data.pixels(x), ftz())
    logits = hs[-1] * fpnl.SCALE  # exact: nothing is left to flush
    n = len(y)
    return n, n * float(fpnl.loss(logits, y)), n * fpnl.accuracy(logits, y), *(n * float(np.mean(h != 0)) for h in hs)


# --- The run -----------------------------------------------------------------------------------------


def train(args):
    """Everything that `python train.py` does, after its arguments were read."""
    sets, held_out = load(args)
    sizes = (sets[0].shape[1], *fpnl.SIZES[1:])
    slices = min(MAX_SLICES, math.ceil(args.batch / MIN_SLICE))
    shared = share(sizes, slices, len(sets[0]))
    join(args, sets, sizes, shared)
    for params, fresh in zip(as_params(job.weights, sizes), fpnl.init(np.random.default_rng((args.seed, 0)), sizes)):
        for array, value in zip(params, fresh):
            array[...] = value

    steps_per_epoch = len(sets[0]) // args.batch
    steps = round(args.epochs * steps_per_epoch)
    reports = {round(i * steps / args.reports) for i in range(args.reports + 1)}
    print(
        f"{'-'.join(map(str, sizes))} linear network, {job.weights.size:,} weights; {len(sets[0]):,} images, "
        f"{steps:,} steps of {args.batch}; seed {args.seed}, flush {args.flush}, {args.workers} workers"
    )
    print(f"{'epoch':>6} {'seconds':>8} {'loss':>8} {'train':>7} {held_out:>10}   live units{'left':>10}", flush=True)
    began = time.perf_counter()
    with workers(args, sets, sizes, shared) as run:
        for step in range(steps + 1):
            if step in reports:
                seconds = time.perf_counter() - began
                trained, held = measure(run, 0), measure(run, 2)
                left = seconds * (steps - step) / step if step else math.nan
                row = f"{step / steps_per_epoch:6.2f} {seconds:8.1f} {trained[0]:8.4f} "
                row += f"{trained[1]:7.4f} {held[1]:10.4f}  "
                row += "".join(f" {share:.2f}" for share in trained[2:])
                print(row + (f"{left:8.0f} s" if step else f"{'?':>10}"), flush=True)
                if not math.isfinite(trained[0]):
                    raise ValueError(f"the loss is {trained[0]} after {step} steps: try a smaller --lr")
            if step == steps:
                break
            if step % steps_per_epoch == 0:
                order = np.random.default_rng((args.seed, 1, step // steps_per_epoch))
                job.order[...] = order.permutation(len(job.order))
            lr = args.lr * (1 + math.cos(math.pi * step / steps)) / 2
            each(run, gradient, [(step, s) for s in range(slices)])
            each(run, update, [(step, lr, part, args.workers) for part in range(args.workers)])
    if args.save:
        save(args.save, as_params(job.weights, sizes))
    print(f"result: train {trained[1]:.4f} {held_out} {held[1]:.4f} seconds {time.perf_counter() - began:.0f}")


def load(args):
    """(train_x, train_y, other_x, other_y) and what the other set is: test, or held out of the training set."""
    sets, n = data.load(args.data), args.validation
    if n:
        train_x, train_y = sets[:2]
        if n >= len(train_y):
            raise ValueError(f"--validation: expected fewer than {len(train_y)} images, found {n}")
        sets = train_x[:-n], train_y[:-n], train_x[-n:], train_y[-n:]
    if args.batch > len(sets[0]):
        raise ValueError(f"--batch: expected at most the {len(sets[0])} training images, found {args.batch}")
    return sets, "validation" if n else "test"


@contextlib.contextmanager
def workers(args, *of_job):
    """The job's workers as a function with the signature of `map`."""
    if args.workers == 1:
        yield map
        return
    initargs = args, *of_job
    with concurrent.futures.ProcessPoolExecutor(args.workers, initializer=join_quietly, initargs=initargs) as pool:
        yield pool.map


def join_quietly(*of_job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    join(*of_job)


def each(run, function, tasks):
    return list(run(function, *zip(*tasks)))


def measure(run, which):
    """Loss, accuracy and share of live units in each layer, over a whole set."""
    n = len(job.sets[which])
    parts = each(run, evaluate, [(which, start) for start in range(0, n, EVALUATED)])
    return [sum(column) / n for column in list(zip(*parts))[1:]]


def save(path, params):
    """W1, b1, ... as .npz, complete or not at all."""
    arrays = {f"{name}{i}": a for i, layer in enumerate(params, 1) for name, a in zip("Wb", layer)}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# --- The command ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, excluded=False):
    """A type for argparse: a finite number from low (excluded or not) to high."""

    def parse(text):
        value = kind(text)
        if not (low < value if excluded else low <= value) or not value <= high or not math.isfinite(value):
            bounds = f"{'above' if excluded else 'from'} {low}" + (f" to {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected a finite number {bounds}, found {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=pathlib.Path, default=data.MNIST, metavar="DIR", help="folder with four files in MNIST's format")
    add(
        "--validation",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="hold the last N training images out; leaves the test set alone",
    )
    add(
        "--epochs",
        type=number(float, 0),
        default=40,
        help="passes over the training images; fractions too, 0 evaluates",
    )
    add("--batch", type=number(int, 1), default=512, help="images a step")
    add("--sigma", type=number(float, 0, excluded=True), default=0.02, help="size of a mutation of a unit's weights")
    add("--block", type=number(int, 1), default=8, help="units mutated together in the first layer")
    add("--lr", type=number(float, 0), default=1e-3, help="AdamW's learning rate, falling to zero as a cosine")
    add("--weight-decay", type=number(float, 0), default=1.0, help="AdamW's decoupled decay")
    add("--seed", type=number(int, 0), default=0, help="of the weights, the order of the images and the mutations")
    add(
        "--flush",
        choices=("emulated", "hardware", "off"),
        default=fastest_flush(),
        help="to zero: in NumPy or by the CPU, with the same bits; off: never",
    )
    add("--workers", type=number(int, 1), default=cores(), help="processes; does not change the result")
    add("--reports", type=number(int, 1), default=20, help="rows of the table")
    add("--save", type=pathlib.Path, metavar="FILE.npz", help="write the weights here")
    args = parser.parse_args(argv)
    if args.save and not (args.save.parent.is_dir() and os.access(args.save.parent, os.W_OK)):
        parser.error(f"argument --save: expected a folder to write to, found {args.save.parent}")
    return parser, args


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest_flush():
    try:
        with fpnl.hardware_ftz():
            return "hardware"
    except RuntimeError:
        return "emulated"


def main():
    parser, args = parse_args()
    try:
        train(args)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
