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
import platform
import signal
import sys
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
    params, x, y = as_params(job.weights, job.sizes), data.pixels(job.sets[0][rows]), job.sets[1][rows]
    if args.method == "es":
        rng = np.random.default_rng((args.seed, 2, step, s))
        grads = fpnl.es_gradient(params, x, y, rng, args.sigma, args.block, ftz())
    else:
        grads = backprop(params, x, y)
    for to, values in zip(as_params(job.gradients[s], job.sizes), grads):
        for array, value in zip(to, values):
            np.multiply(value, np.float32(len(rows) / args.batch), out=array)


def backprop(params, x, labels):
    """The controls, by reverse mode. "backprop" takes the network for linear: every derivative is 1, blind to
    underflow, whether the forward pass flushes or not. "deadzone" and "relu" know theirs: 0 where a unit is dead."""
    hs = outputs(params, x)
    delta = np.exp(hs[-1] - hs[-1].max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(x)), labels] -= 1
    grads = []
    for (W, b), a, h in reversed([*zip(params, [x, *hs], hs)]):
        if job.args.method == "deadzone" or (job.args.method == "relu" and grads):  # no ReLU on the logits
            delta *= h != 0
        db = delta.mean(axis=0)
        if job.args.method == "deadzone" and a is not x:  # the later biases are flushed before they are added
            db *= np.abs(b) >= 0.5
        grads.append((a.T @ delta / np.float32(len(x)), db))
        delta = delta @ W.T
    return grads[::-1]


def outputs(params, x):
    """Outputs of every layer in units of 1/S, the logits last."""
    if job.args.method != "relu" and (job.args.method == "es" or job.args.flush != "off"):
        return [h * fpnl.SCALE for h in fpnl.activations(params, x, ftz())]  # exact: nothing left to flush
    hs = []
    for W, b in params:
        x = x @ W + b
        if job.args.method == "relu" and len(hs) < len(params) - 1:
            x = np.maximum(x, np.float32(0))
        hs.append(x)
    return hs


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
    hs = outputs(as_params(job.weights, job.sizes), data.pixels(x))
    n = len(y)
    return n, n * float(fpnl.loss(hs[-1], y)), n * fpnl.accuracy(hs[-1], y), *(n * float(np.mean(h != 0)) for h in hs)


# --- The run -----------------------------------------------------------------------------------------


def train(args):
    """One run as the arguments say -> (loss, accuracy, live units ...) on the training set and on the other."""
    sets, held_out = load(args)
    sizes = (sets[0].shape[1], *args.hidden, data.CLASSES)
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
        f"{'-'.join(map(str, sizes))} network, {job.weights.size:,} weights; {len(sets[0]):,} images, {steps:,} steps "
        f"of {args.batch}; {args.method}, seed {args.seed}, flush {args.flush}, {args.workers} workers"
    )
    print(f"{'epoch':>6} {'seconds':>8} {'loss':>8} {'train':>7} {held_out:>10}   live units{'left':>10}", flush=True)
    began = time.perf_counter()
    with workers(args, sets, sizes, shared) as run, open_log(args, held_out) as log:
        for step in range(steps + 1):
            if step in reports:
                seconds = time.perf_counter() - began
                trained, held = measure(run, 0), measure(run, 2)
                row = step / steps_per_epoch, seconds, *trained[:2], held[1]
                print("{:6.2f} {:8.1f} {:8.4f} {:7.4f} {:10.4f}  ".format(*row), end="")
                print("".join(f" {share:.2f}" for share in trained[2:]), end="")
                print(f"{seconds * (steps - step) / step:8.0f} s" if step else f"{'?':>10}", flush=True)
                print(*(f"{value:.6g}" for value in row + tuple(trained[2:])), sep=",", file=log, flush=True)
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
    return trained, held


def open_log(args, held_out):
    """--log FILE.csv: a comment with what it takes to repeat the run, a header, then a row a report."""
    log = open(args.log or os.devnull, "w")
    where = f"{platform.platform()}, {platform.processor() or platform.machine()}, {args.workers} workers"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    options = [
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if name == 'hidden' else value}"
        for name, value in vars(args).items()
        if value is not None
    ]
    print("# python train.py", *options, file=log, end=f"; {versions}; {where}; {time.strftime('%Y-%m-%d')}\n")
    live = ",".join(f"live{i + 1}" for i in range(len(args.hidden) + 1))
    print(f"epoch,seconds,loss,train,{held_out},{live}", file=log, flush=True)
    return log


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
        fail(message)


def fail(message):
    print("train.py: error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def number(kind, low, excluded=False):
    """A type for argparse: a finite number from low on, or above it."""

    def parse(text):
        value = kind(text)
        if not (value > low if excluded else value >= low) or not value < math.inf:
            raise argparse.ArgumentTypeError(
                f"expected a finite number {'above' if excluded else 'from'} {low}, found {text}"
            )
        return value

    parse.__name__ = kind.__name__
    return parse


def new_file(text):
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder to write to, found {text}")
    return path


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, size, positive = number(int, 1), number(float, 0), number(float, 0, excluded=True)
    flush = "hardware" if has_hardware_ftz() else "emulated"
    for name, default, options, text in (
        ("data", data.MNIST, {"type": pathlib.Path, "metavar": "DIR"}, "folder with four files in MNIST's format"),
        (
            "validation",
            0,
            {"type": number(int, 0), "metavar": "N"},
            "hold the last N training images out, not the test set",
        ),
        ("hidden", fpnl.SIZES[1:-1], {"type": count, "nargs": "*", "metavar": "N"}, "widths of the hidden layers"),
        (
            "method",
            "es",
            {"choices": ("es", "backprop", "deadzone", "relu")},
            "es, or a control by reverse mode (see backprop)",
        ),
        ("epochs", 28, {"type": size}, "passes over the training images; fractions too, 0 evaluates"),
        ("batch", 512, {"type": count}, "images a step"),
        ("sigma", 0.02, {"type": positive}, "size of a mutation of a unit's weights"),
        ("block", 4, {"type": count}, "units mutated together where that is cheaper: in the first layer"),
        ("lr", 1e-3, {"type": size}, "AdamW's learning rate, falling to zero as a cosine"),
        ("weight-decay", 0.7, {"type": size}, "AdamW's decoupled decay"),
        ("seed", 0, {"type": number(int, 0)}, "of the weights, the order of the images and the mutations"),
        (
            "flush",
            flush,
            {"choices": ("emulated", "hardware", "off")},
            "to zero: in NumPy or by the CPU (same bits), or not",
        ),
        ("workers", cores(), {"type": count}, "processes; does not change the result"),
        ("reports", 20, {"type": count}, "rows of the table"),
        ("compare", None, {"type": pathlib.Path, "metavar": "DIR"}, "run the main job and all its controls into DIR"),
        ("log", None, {"type": new_file, "metavar": "FILE.csv"}, "write a row a report here"),
        ("save", None, {"type": new_file, "metavar": "FILE.npz"}, "write the weights here"),
    ):
        parser.add_argument(f"--{name}", default=default, help=text, **options)
    return parser.parse_args(argv)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_hardware_ftz():
    try:
        with fpnl.hardware_ftz():
            return True
    except RuntimeError:
        return False


if __name__ == "__main__":
    try:
        arguments = parse_args()
        if arguments.compare:
            from docs.compare import compare

            compare(arguments)
        else:
            train(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
