#!/usr/bin/env python3
"""Train a network of matrix products and additions on MNIST by evolution strategies.

    python train.py                      # the main job: all cores, ends on its own
    python train.py --preset best        # for longer, with the control variate
    python train.py --until-test 0.967   # stops when it is as good as the post's network
    python train.py --save weights.npz   # keeps W1, b1, W2, b2, W3, b3, at every report
    python train.py --resume weights.npz --save weights.npz     # goes on where that stopped
    python train.py --evaluate weights.npz                      # accuracy, confusions, recalls
    python train.py -h                   # all options

The same seed gives the same weights, bit for bit, whatever the number of workers: a batch is cut into
fixed slices, each with a random stream of its own, and their gradients are added in their order.
"""

import os

os.environ.update({f"{blas}_THREADS": "1" for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")})

import argparse
import concurrent.futures
import contextlib
import errno
import importlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import pathlib
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import zipfile
import zlib

import numpy as np

import data
import fpnl

SLICE = 128  # examples of a batch whose gradient is computed together
MAX_SLICES = 32  # of SLICE examples or more, a step; 2.7 MB of gradient each
CHUNK = 1 << 15  # floats updated at a time, so that the optimizer runs in the cache
EVALUATED = 1000  # images in an evaluation task
PRESETS = {"best": {"epochs": 150, "control_variate": True}}
RUNS = pathlib.Path(__file__).resolve().parent / "docs" / "runs"  # where --compare writes


# --- What the workers do: `job` is the same in all processes, its arrays are shared ------------------

job = None


def join(args, sets, sizes, shared):
    """Enter the job: called once in every worker."""
    global job
    job = types.SimpleNamespace(args=args, sets=sets, sizes=sizes)
    for name, (array, shape) in shared.items():
        setattr(job, name, np.frombuffer(array, np.float32).reshape(shape))


def share(sizes, slices):
    """Shared memory for a job: name -> (buffer of float32, shape)."""
    weights = sum((i + 1) * o for i, o in itertools.pairwise(sizes))
    shapes = {"weights": (weights,), "moments": (2, weights), "gradients": (slices, weights)}
    return {name: (multiprocessing.RawArray("f", math.prod(shape)), shape) for name, shape in shapes.items()}


def as_params(flat, sizes):
    """[(W, b), ...] as views of a flat array."""
    params = []
    for i, o in itertools.pairwise(sizes):
        W, b, flat = np.split(flat, [i * o, (i + 1) * o])
        params.append((W.reshape(i, o), b))
    return params


def flattened(params):
    """The inverse: a copy of them all in one array."""
    return np.concatenate([a.ravel() for layer in params for a in layer])


def ftz():
    return {"emulated": True, "hardware": "hardware", "off": False}[job.args.flush]


def portion(count, part, parts):
    """Which of `count` things are this part's."""
    return slice(part * count // parts, (part + 1) * count // parts)


def gradient(step, batch, part, parts):
    """A part of the slices of a step's batch (indices of images), each to its share of the step's gradient."""
    args, slices = job.args, len(job.gradients)
    params = as_params(job.weights, job.sizes)
    for s in range(slices)[portion(slices, part, parts)]:
        rows = batch[s * args.batch // slices : (s + 1) * args.batch // slices]
        x, y = data.pixels(job.sets[0][rows]), job.sets[1][rows]
        if args.method == "es":
            rng = np.random.default_rng((args.seed, 2, step, s))
            options = {"control_variate": args.control_variate, "ftz": ftz()}
            grads = fpnl.es_gradient(params, x, y, rng, args.sigma, args.block, **options)
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
    method, flush = job.args.method, ftz()
    if method == "relu":
        return fpnl.activations(params, x, transfer=relu)
    if method != "es" and not flush:
        return fpnl.activations(params, x, transfer=np.positive)  # linear, at its natural scale
    return [h * fpnl.SCALE for h in fpnl.activations(params, x, flush)]  # exact: nothing left to flush


def relu(z):
    return np.maximum(z, np.float32(0))


def update(step, part, parts, lr):
    """AdamW on a part of the weights: elementwise, so the parts do not change the result."""
    mine = range(job.weights.size)[portion(job.weights.size, part, parts)]
    for start in mine[::CHUNK]:
        chunk = slice(start, min(start + CHUNK, mine.stop))
        g = job.gradients[0, chunk].copy()
        for other in job.gradients[1:]:
            g += other[chunk]
        fpnl.adamw(job.weights[chunk], g, *job.moments[:, chunk], step + 1, lr, job.args.weight_decay)


def evaluate(which, part, parts):
    """A part of a set, EVALUATED images at a time -> of each, number, summed loss, number right, live units."""
    results, starts = [], range(0, len(job.sets[which]), EVALUATED)
    for start in starts[portion(len(starts), part, parts)]:
        x, y = (a[start : start + EVALUATED] for a in job.sets[which : which + 2])
        hs = outputs(as_params(job.weights, job.sizes), data.pixels(x))
        scores = float(fpnl.loss(hs[-1], y)), fpnl.accuracy(hs[-1], y), *(float(np.mean(h != 0)) for h in hs)
        results.append((len(y), *(len(y) * score for score in scores)))
    return results


turn = threading.Lock()  # the threads that a dask worker may have share one job


def gradient_there(args, weights, step, batch, part, parts):
    """`gradient` in a process that shares no memory with the main one: the weights come along, the slices return."""
    with turn:
        enter(args, weights)
        gradient(step, batch, part, parts)
        return job.gradients[portion(len(job.gradients), part, parts)]


def evaluate_there(args, weights, *task):
    with turn:
        enter(args, weights)
        return evaluate(*task)


def enter(args, weights):
    if job is None or job.args != args:  # the first task here: this process reads the images itself
        join(*prepare(args)[0])
    job.weights[...] = weights


# --- The run -----------------------------------------------------------------------------------------


def train(args):
    """One run as the arguments say -> (loss, accuracy, live units ...) on the training set and on the other."""
    of_job, held_out = prepare(args)
    join(*of_job)
    first, before = begin()

    images = len(job.sets[0])
    steps_per_epoch = images // args.batch
    steps = round(args.epochs * steps_per_epoch)
    mark = math.inf if args.until_test is None else args.until_test
    count = args.reports if args.until_test is None else max(args.reports, math.ceil(2 * args.epochs))
    reports = {first, *(round(i * steps / count) for i in range(count + 1))}
    say = (lambda *_, **__: None) if args.quiet else print
    began = shown = time.perf_counter()
    with workers(*of_job) as run, open_log(args, held_out) as log, interruptible() as interrupted:
        say(
            f"{'-'.join(map(str, job.sizes))} network, {job.weights.size:,} weights; {images:,} images, "
            f"{steps:,} steps of {args.batch}; {args.method}, seed {args.seed}, flush {args.flush}, "
            f"{args.workers} workers"
        )
        say(f"{'epoch':>6} {'seconds':>8} {'loss':>8} {'train':>7} {held_out:>10}   live units{'left':>10}", flush=True)
        for step in range(first, steps + 1):
            seconds = time.perf_counter() - began
            left = f"{seconds * (steps - step) / (step - first):8.0f} s" if step > first else f"{'?':>10}"
            if step in reports:
                trained, held = measure(run, 0), measure(run, 2)
                row = step / steps_per_epoch, before + seconds, *trained[:2], held[1]
                live_units = "".join(f" {share:.2f}" for share in trained[2:])
                live_line(args, "")
                say("{:6.2f} {:8.1f} {:8.4f} {:7.4f} {:10.4f}  ".format(*row) + live_units + left, flush=True)
                print(*(f"{value:.6g}" for value in row + tuple(trained[2:])), sep=",", file=log, flush=True)
                if not math.isfinite(trained[0]):
                    raise ValueError(f"the loss is {trained[0]} after {step} steps: try a smaller --lr")
            if args.save and (step in reports or interrupted.is_set()):
                save(args.save, step, before + time.perf_counter() - began)
            if interrupted.is_set():
                live_line(args, "")
                raise KeyboardInterrupt(f"interrupted after step {step} of {steps}")
            if step == steps or (step in reports and held[1] >= mark):
                break
            if time.perf_counter() - shown > 0.2:
                shown = time.perf_counter()
                done = f"step {step}, epoch {step / steps_per_epoch:.2f}, loss {trained[0]:.4f}"
                live_line(args, f"{done}, {(step - first) * args.batch / seconds:.0f} images/s,{left} left")
            if step % steps_per_epoch == 0 or step == first:
                order = np.random.default_rng((args.seed, 1, step // steps_per_epoch)).permutation(images)
            start = step % steps_per_epoch * args.batch
            lr = args.lr * (1 + math.cos(math.pi * step / steps)) / 2
            descend(run, step, order[start : start + args.batch], lr)
    seconds = before + time.perf_counter() - began
    print(f"result: train {trained[1]:.4f} {held_out} {held[1]:.4f} seconds {seconds:.0f}", flush=True)
    return trained, held


def prepare(args):
    """What `join` takes, and what the other set is."""
    sets, held_out = load(args)
    sizes = (sets[0].shape[1], *args.hidden, data.CLASSES)
    slices = min(MAX_SLICES, math.ceil(args.batch / SLICE))
    return (args, sets, sizes, share(sizes, slices)), held_out


def begin():
    """Fresh or resumed weights and moments -> steps done, seconds spent."""
    if job.args.resume:
        weights, moments, step, seconds, _ = read_run(job.args.resume)
        if weights.size != job.weights.size:
            raise ValueError(f"{job.args.resume}: expected {job.weights.size} weights, found {weights.size}")
        job.weights[...], job.moments[...] = weights, moments
        return step, seconds
    job.weights[...] = flattened(fpnl.init(np.random.default_rng((job.args.seed, 0)), job.sizes))
    return 0, 0.0


def live_line(args, text):
    """On a terminal, one line that the next one overwrites."""
    if sys.stdout.isatty() and not args.quiet:
        print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C sets an event, so that a step is always completed; a second one interrupts at once."""
    event, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        event.set()
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield event
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def open_log(args, held_out):
    """--log FILE.csv: a comment with what it takes to repeat the run, a header, then a row a report."""
    log = open(args.log or os.devnull, "a" if args.resume else "w")
    if log.tell():
        return log  # goes on, too
    options = [
        as_option(name, value)
        for name, value in vars(args).items()
        if value is not None and name not in ("quiet", "fingerprint", "resumed")
    ]
    print("# python train.py", *options, file=log, end=f"; {provenance()}\n")
    live = ",".join(f"live{i + 1}" for i in range(len(args.hidden) + 1))
    print(f"epoch,seconds,loss,train,{held_out},{live}", file=log, flush=True)
    return log


def as_option(name, value):
    """An option as it is given: as_option("control_variate", True) -> "--control-variate"."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def provenance():
    """What a number depends on beside the command: versions, machine, date."""
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    return f"{versions}; {platform.platform()}, {cpu()}; {time.strftime('%Y-%m-%d')}"


def cpu():
    with contextlib.suppress(OSError, StopIteration):  # Linux has no better way
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()


def load(args):
    """(train_x, train_y, other_x, other_y) and what the other set is: test, or held out of the training set."""
    sets, n = data.load(args.data), args.validation
    args.fingerprint = zlib.crc32(sets[1], zlib.crc32(sets[0]))
    if args.resume:
        refuse_other_settings(args)
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
    """The workers of the job, as a function with the signature of `map`; args.workers becomes their number."""
    if args.engine == "mpi":
        with mpi_pool(args) as pool:
            yield pool.map
    elif args.engine == "dask":
        with dask_client(args) as client:
            yield client.get_executor(pure=False).map
    elif args.workers == 1:
        yield map
    elif args.engine == "threads":
        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            yield pool.map
    else:
        initargs = args, *of_job
        with concurrent.futures.ProcessPoolExecutor(args.workers, initializer=join_quietly, initargs=initargs) as pool:
            yield pool.map


def mpi_pool(args):
    try:
        from mpi4py import MPI, futures
    except (ImportError, RuntimeError) as error:
        raise ValueError("--engine mpi: expected the package mpi4py and an MPI: pip install mpi4py mpich") from error
    started = MPI.COMM_WORLD.Get_size() - 1
    if started < 1:
        how = "mpiexec -n 3 python -m mpi4py.futures train.py --engine mpi"
        raise ValueError(f"--engine mpi: expected two processes at least, found one: start it by {how}")
    args.workers = started
    return futures.MPIPoolExecutor()


@contextlib.contextmanager
def dask_client(args):
    try:
        import distributed
    except ImportError as error:
        raise ValueError("--engine dask: expected the package distributed: pip install distributed") from error
    local = None
    if not args.scheduler:
        local = distributed.LocalCluster(n_workers=args.workers, threads_per_worker=1, dashboard_address=None)
    try:
        client = distributed.Client(local or args.scheduler, timeout=5)
        client.wait_for_workers(1, timeout=5)
    except OSError as error:  # TimeoutError, too
        how = "dask scheduler, and dask worker ADDRESS where train.py can be imported"
        raise ValueError(f"--scheduler: expected a scheduler with workers at {args.scheduler}: start {how}") from error
    with local or contextlib.nullcontext(), client:
        args.workers = len(client.nthreads())
        yield client


def join_quietly(*of_job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    threading.Thread(target=end_with_parent, daemon=True).start()
    join(*of_job)


def end_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def descend(run, step, batch, lr):
    """One step of all workers."""
    slices = everywhere(run, gradient, step, batch)
    if job.args.engine in REMOTE:
        job.gradients[...] = np.concatenate(slices)
        update(step, 0, 1, lr)
    else:
        each(run, update, [(step, part, job.args.workers, lr) for part in range(job.args.workers)])


def measure(run, which):
    """Loss, accuracy and share of live units in each layer, over a whole set."""
    results = itertools.chain.from_iterable(everywhere(run, evaluate, which))
    return [sum(column) / len(job.sets[which]) for column in list(zip(*results))[1:]]


def everywhere(run, function, *task):
    """A task in as many parts as there are workers."""
    args = job.args
    if args.engine in REMOTE:  # by the name of this module, not as __main__
        function, task = (
            getattr(importlib.import_module("train"), f"{function.__name__}_there"),
            (args, job.weights, *task),
        )
    return each(run, function, [(*task, part, args.workers) for part in range(args.workers)])


def each(run, function, tasks):
    return list(run(function, *zip(*tasks)))


# --- Files ---------------------------------------------------------------------------------------------

ENGINES, REMOTE = ("processes", "threads", "mpi", "dask"), ("mpi", "dask")
METHODS, FLUSHES = ("es", "backprop", "deadzone", "relu"), ("emulated", "hardware", "off")
SETTINGS = "validation hidden method epochs batch sigma block control_variate lr weight_decay seed flush".split()


def settings(args):
    """What decides the weights, and so must not change between a run and its continuation."""
    chosen = {name: getattr(args, name) for name in SETTINGS}
    chosen["flush"] = "off" if args.flush == "off" else "on"  # emulated or by the CPU: the same bits
    return json.loads(json.dumps(chosen | {"data": args.fingerprint}))


def refuse_other_settings(args):
    for name, value in settings(args).items():
        before = args.resumed.get(name)
        if value != before:
            raise ValueError(f"--{name.replace('_', '-')}: expected {before} as in {args.resume}, found {value}")


def save(path, step, seconds):
    """W1, b1, ... and what --resume needs, as .npz: complete or not at all."""
    params = as_params(job.weights, job.sizes)
    arrays = {f"{name}{i}": a for i, layer in enumerate(params, 1) for name, a in zip("Wb", layer)}
    arrays |= {"moments": job.moments, "step": step, "seconds": seconds, "settings": json.dumps(settings(job.args))}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_weights(path):
    """[(W, b), ...] and the other arrays of an .npz file, checked."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected weights as --save writes them, found a damaged or other file") from error
    params = []
    while f"W{len(params) + 1}" in arrays:
        i = len(params) + 1
        W, b = (arrays.pop(f"{name}{i}", np.empty(0)) for name in "Wb")
        fan_in = params[-1][0].shape[1] if params else len(W) if W.ndim else 0
        if not (W.dtype == b.dtype == np.float32 and W.ndim == 2 and len(W) == fan_in and b.shape == W.shape[1:]):
            found = f"W{i} {W.dtype} {W.shape}, b{i} {b.dtype} {b.shape}"
            raise ValueError(f"{path}: expected float32 W{i} [{fan_in}, width] and b{i} [width], found {found}")
        if not (np.isfinite(W).all() and np.isfinite(b).all()):
            raise ValueError(f"{path}: expected finite weights, found others in layer {i}")
        params.append((W, b))
    if not params:
        raise ValueError(f"{path}: expected W1, b1, ..., found {', '.join(arrays) or 'nothing'}")
    return params, arrays


def read_run(path):
    """Flat weights, moments, steps done, seconds spent and settings of a run that --save has kept."""
    params, arrays = read_weights(path)
    weights = flattened(params)
    try:
        moments, step, seconds = arrays["moments"], int(arrays["step"]), float(arrays["seconds"])
        chosen = json.loads(str(arrays["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a run saved by --save, found weights alone") from error
    if moments.dtype != np.float32 or moments.shape != (2, weights.size) or not np.isfinite(moments).all() or step < 0:
        raise ValueError(f"{path}: expected finite float32 moments (2, {weights.size}) and a step, found others")
    return weights, moments, step, seconds, chosen


def evaluate_file(args):
    """--evaluate: accuracy, confusion matrix and recalls of saved weights on the test set; with --predict,
    a label a line for the images of an IDX file."""
    params, arrays = read_weights(args.evaluate)
    chosen = json.loads(str(arrays["settings"])) if "settings" in arrays else {}
    args.method = chosen.get("method", "es")
    args.flush = "off" if chosen.get("flush") == "off" else args.flush
    images = [data.read_idx(args.predict, 3)] if args.predict else data.load(args.data)[2:]
    join(args, images, None, {})
    x = images[0].reshape(len(images[0]), -1)
    if x.shape[1] != len(params[0][0]):
        raise ValueError(f"{args.evaluate}: expected weights for {x.shape[1]} pixels, found {len(params[0][0])}")
    found = [outputs(params, data.pixels(x[i : i + EVALUATED]))[-1].argmax(axis=1) for i in range(0, len(x), EVALUATED)]
    found = np.concatenate(found) if found else np.empty(0, int)
    if args.predict:
        print(*found, sep="\n")
        return
    labels, classes = images[1], max(data.CLASSES, params[-1][0].shape[1])
    table = np.zeros((classes, classes), int)
    np.add.at(table, (labels, found), 1)
    print("label  " + "".join(f"{label:6}" for label in range(classes)) + "   <- found    recall")
    for label, row in enumerate(table):
        recall = f"{row[label] / row.sum():.4f}" if row.any() else "-"
        print(f"{label:5}  " + "".join(f"{count:6}" for count in row) + f"{recall:>20}")
    print(f"result: test {np.trace(table) / len(labels):.4f}")


# --- The command ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message):
    print("train.py: error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


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
    try:
        if not path.is_dir():
            tempfile.TemporaryFile(dir=path.parent).close()
            return path
    except OSError:
        pass
    raise argparse.ArgumentTypeError(f"expected a file in a folder to write to, found {text}")


def parse_args(argv=None):
    count, size, path = number(int, 1), number(float, 0), {"type": pathlib.Path, "metavar": "FILE.npz"}
    flush = "hardware" if has_hardware_ftz() else "emulated"
    best = ", ".join(as_option(name, value) for name, value in PRESETS["best"].items())
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=Formatter)
    # fmt: off
    group = parser.add_argument_group("data").add_argument
    group("--data", type=pathlib.Path, default=data.MNIST, metavar="DIR", help="folder with the four files of a set")
    group("--validation", type=number(int, 0), default=0, metavar="N", help="hold out the last N training images")
    group = parser.add_argument_group("training").add_argument
    group("--preset", choices=PRESETS, help=f"other defaults; best: {best}")
    group("--hidden", type=count, nargs="*", default=list(fpnl.SIZES[1:-1]), metavar="N", help="hidden layers")
    group("--method", choices=METHODS, default="es", help="es, or a control by reverse mode (see backprop)")
    group("--epochs", type=size, default=30, help="passes over the training images; fractions too, 0 evaluates")
    group("--batch", type=count, default=512, help="images a step")
    group("--sigma", type=number(float, 0, excluded=True), default=0.02, help="size of a mutation of a unit's weights")
    group("--block", type=count, default=8, help="units mutated together: more, and a step is quicker and noisier")
    group("--control-variate", action=argparse.BooleanOptionalAction, default=False, help="less noise in a block")
    group("--lr", type=size, default=1e-3, help="AdamW's learning rate, falling to zero as a cosine")
    group("--weight-decay", type=size, default=1.0, help="AdamW's decoupled decay")
    group("--seed", type=number(int, 0), default=0, help="of the weights, the order of the images and the mutations")
    group("--flush", choices=FLUSHES, default=flush, help="to zero: in NumPy or by the CPU (same bits), or not")
    group = parser.add_argument_group("running").add_argument
    group("--engine", choices=ENGINES, default="processes", help="what the workers are; does not change the result")
    group("--workers", type=count, default=cores(), help="their number; does not change the result either")
    group("--scheduler", metavar="ADDRESS", help="of a running dask; without it, one is started here")
    group("--reports", type=count, default=15, help="rows of the table")
    group("--until-test", type=size, metavar="ACC", help="stop at the first report from this test accuracy on")
    group("--quiet", action="store_true", help="print the result alone")
    group("--log", type=new_file, metavar="FILE.csv", help="write a row a report here")
    group("--save", type=new_file, metavar="FILE.npz", help="write the weights here, at every report")
    group("--resume", **path, help="go on with the run that was saved there")
    group = parser.add_argument_group("instead of training").add_argument
    group("--evaluate", **path, help="accuracy, confusion matrix and recalls of these weights")
    group("--predict", type=pathlib.Path, metavar="FILE.idx", help="with --evaluate: a label a line for these images")
    group("--compare", type=pathlib.Path, nargs="?", const=RUNS, metavar="DIR", help="run all controls, too")
    # fmt: on
    args = parser.parse_args(argv)
    if args.resume:  # its settings are the defaults; load() refuses others
        saved = saved_settings(parser, args.resume)
        defaults = {name: saved[name] for name in SETTINGS if name in saved}
        defaults["flush"] = "off" if saved.get("flush") == "off" else flush
        parser.set_defaults(resumed=saved, **defaults)
    parser.set_defaults(**PRESETS.get(args.preset, {}))
    args = parser.parse_args(argv)
    if args.scheduler and args.engine != "dask":
        parser.error("argument --scheduler: expected --engine dask beside it")
    if args.predict and not args.evaluate:
        parser.error("argument --predict: expected --evaluate FILE.npz beside it, found none")
    return args


def saved_settings(parser, path):
    try:
        return read_run(path)[-1]
    except (ValueError, OSError) as error:
        parser.error(error)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_hardware_ftz():
    try:
        with fpnl.hardware_ftz():
            return True
    except RuntimeError:
        return False


def main():
    args = parse_args()
    try:
        if args.compare:
            from docs.compare import compare

            compare(args)
        elif args.evaluate:
            evaluate_file(args)
        else:
            _, held = train(args)
            if args.until_test is not None and held[1] < args.until_test:
                print(f"train.py: the accuracy ended at {held[1]:.4f}, below {args.until_test}", file=sys.stderr)
                sys.exit(1)
    except concurrent.futures.BrokenExecutor:
        fail(f"a worker process was killed, perhaps for want of memory{goes_on(args)}")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            error = "expected more memory: try smaller --hidden layers or --batch, or fewer --workers"
        fail(error)
    except KeyboardInterrupt as stop:
        print(f"train.py: {stop or 'interrupted'}{goes_on(args)}", file=sys.stderr)
        sys.exit(130)


def goes_on(args):
    return f"; go on with --resume {args.save}" if args.save and args.save.exists() else ""


if __name__ == "__main__":
    main()
