#!/usr/bin/env python3
"""Train a network of matrix products and additions on MNIST by evolution strategies.

    python train.py                      # the main job: all cores, ends on its own
    python train.py --preset best        # for longer, and against overfitting
    python train.py --until-test 0.967   # stops when it is as good as the post's network
    python train.py --save weights.npz   # keeps W1, b1, W2, b2, W3, b3, at every report
    python train.py --resume weights.npz --save weights.npz     # goes on where that stopped
    python train.py --evaluate weights.npz                      # accuracy, confusions, recalls
    python train.py -h                   # all options

The same seed gives the same weights, bit for bit, whatever does the work and however many: a step is
fixed tasks of TASK images, whose slopes are measured, and fixed bands of BAND rows of weights, which are
updated. The loop is `train` and `steps`; everything else is called from there.
"""

import os
import sys

# BLAS reads this when NumPy is imported: one thread a process, as processes are the parallelism, and others give other
# bits. In a program that has imported NumPy without it, workers are processes that start afresh.
START = "spawn" if "numpy" in sys.modules and os.environ.get("OPENBLAS_NUM_THREADS") != "1" else None
os.environ.update({f"{blas}_THREADS": "1" for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")})

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import math
import multiprocessing
import pathlib
import platform
import shutil
import signal
import threading
import time

import numpy as np

if __name__ == "__main__":  # also where Python leaves the script's folder out: -I, PYTHONSAFEPATH
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import data
import fpnl

TASK, BAND, PIECE = 64, 64, 1000  # images of a task, rows of weights updated, images evaluated together
INIT, ORDER, SIGNS, DROPPED = range(4)  # random streams of a seed
RARELY = 0.05  # the least probability with which --importance has an image measured
PRESETS = {"best": {"epochs": 100, "control_variate": True, "dropout": 0.2, "smoothing": 0.1}}


def number(kind, low, high):
    """A type for argparse: a number from low to high."""

    def parse(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, found {text}")

    parse.__name__ = kind.__name__
    return parse


DEFAULT = "(default: %(default)s)"


def option(default, says, **how):
    return dataclasses.field(default=default, metadata={"help": f"{says} {DEFAULT}", **how})


COUNT, SIZE, LONG = number(int, 1, 1e6), number(float, 0, 1e38), number(float, 0, 1e6)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the weights: options, a checkpoint's JSON, and the first line of a log."""

    data: int  # CRC-32 of the images and labels
    inputs: int
    classes: int
    method: str
    flush: str  # "on" or "off"
    # fmt: off
    validation: int = option(0, "hold out the last N training images", type=number(int, 0, 1e9), metavar="N")
    hidden: tuple = option(fpnl.SIZES[1:-1], "hidden layers", type=COUNT, nargs="*", metavar="N")
    epochs: float = option(30, "passes over the training images; fractions too, 0 evaluates", type=LONG)
    batch: int = option(512, "images a step", type=COUNT)
    sigma: float = option(0.02, "size of a mutation of a unit's weights", type=number(float, 1e-9, 1e9))
    block: int = option(4, "lower units mutated together: more, and a step is quicker and noisier", type=COUNT)
    control_variate: bool = option(False, "less noise in a block", action=argparse.BooleanOptionalAction)
    importance: float = option(2.0, "measure an image with probability N (1 - p), p of its label; 0: all", type=SIZE)
    lr: float = option(1e-3, "AdamW's learning rate, falling to zero as a cosine", type=SIZE)
    weight_decay: float = option(1.0, "AdamW's decoupled decay", type=SIZE)
    dropout: float = option(0.0, "share of the hidden units that a task is without", type=number(float, 0, 0.99))
    smoothing: float = option(0.0, "share of each label that is spread over all classes", type=number(float, 0, 1))
    seed: int = option(0, "of the weights, the order of the images and the mutations", type=number(int, 0, math.inf))
    # fmt: on

    @property
    def sizes(self):
        return self.inputs, *self.hidden, self.classes


ENGINES = "processes", "threads", *(REMOTE := {"mpi": "mpi4py mpich", "dask": "distributed"})  # and what to install
FTZ = {"emulated": True, "hardware": "hardware", "off": False}  # as fpnl takes it
OPTIONS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}


@dataclasses.dataclass
class Run:
    """What a process keeps of one run, made once in each and handed on as an argument from there."""

    settings: Settings
    sets: tuple  # images and labels to train on, images and labels of the other set
    net: dict  # ftz and transfer, as fpnl takes them
    method: object  # what measures slopes: see `es`
    floats: object  # weights, moments and columns of a batch, or weights alone
    control: object = None  # DONE, ASKED, STOPPED, ENDED
    barrier: object = None
    update: object = fpnl.adamw

    def __post_init__(self):
        sizes, batch = self.settings.sizes, self.settings.batch
        count = sum((i + 1) * o for i, o in itertools.pairwise(sizes))
        self.weights, moments, columns = np.split(np.frombuffer(self.floats, np.float32), [count, 3 * count])
        self.params, self.moments = as_params(self.weights, sizes), moments.reshape(2, -1)
        ends = np.cumsum([*(i + 1 for i in sizes[:-1]), *sizes[1:]])[:-1]
        columns = np.split(columns.reshape(-1, batch), ends)  # what a method returns, of the whole batch
        self.inputs, self.slopes = columns[: len(sizes) - 1], columns[len(sizes) - 1 :]
        self.steps_per_epoch = len(self.sets[0]) // batch
        self.steps = round(self.settings.epochs * self.steps_per_epoch)

    def __reduce__(self):  # the memory, not its contents
        return Run, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


SIGNALS = signal.SIGINT, signal.SIGTERM
DONE, ASKED, STOPPED, ENDED = range(4)  # steps; a signal asks for a stop, which all have seen; the run is over

# --- The loop ----------------------------------------------------------------------------------------


def es(settings, net, params, x, labels, signs):
    """Measure slopes by evolution strategies. A control is another function of these arguments.

    -> for each layer its inputs [fan_in + 1, n], the last row 1 if the bias acts, else 0, and the slopes [width, n]:
    the gradient of [W; b] is inputs @ slopes.T / n.
    """
    how = settings.sigma, settings.block, losses(settings), settings.control_variate
    outputs, slopes = fpnl.es_slopes(params, x, labels, signs, *how, **net)
    return [with_bias(a, l == 0 or not net["ftz"] or net["transfer"]) for l, a in enumerate([x.T, *outputs])], slopes


def losses(settings):
    """Cross-entropy; with smoothing (Szegedy et al. 2016), of labels of which a share is spread over all classes."""
    return functools.partial(smoothed, np.float32(settings.smoothing)) if settings.smoothing else fpnl.cross_entropy


def smoothed(share, logits, labels):
    right = logits[..., np.arange(len(labels)), labels]
    return fpnl.cross_entropy(logits, labels) + share * (right - logits.mean(axis=-1))


def thinned(method, key, settings, net, params, x, labels, signs):
    """Dropout (Srivastava et al. 2014): a method without some hidden units, the others' outputs / (1 - dropout)."""
    rng, (fan_in, *hidden, classes) = np.random.default_rng(key), settings.sizes
    kept = [rng.permutation(n) >= int(settings.dropout * n) for n in hidden]
    kept = [np.ones(fan_in, bool), *kept, np.ones(classes, bool)]
    gains = [np.float32(1 / units.mean()) for units in kept]
    thin = [(W[np.ix_(i, o)] * gain, b[o]) for (W, b), i, o, gain in zip(params, kept, kept[1:], gains)]
    inputs, slopes = method(settings, net, thin, x, labels, signs[:, np.concatenate(kept[1:])])
    inputs = [np.vstack([whole(a[:-1] * gain, i), a[-1:]]) for a, i, gain in zip(inputs, kept, gains)]  # the chain rule
    return inputs, [*map(whole, slopes, kept[1:])]


def whole(found, kept):
    array = np.zeros((len(kept), found.shape[1]), np.float32)
    array[kept] = found
    return array


def measure(run, step, images, rank, workers):
    """(columns of the batch, inputs, slopes) of each task of one of the workers: of the images that are measured.

    Importance sampling (Katharopoulos, Fleuret 2018): an image is measured with a probability q that grows with its
    loss, from RARELY to 1, and counts 1 / q; so the expectation is that of all images.
    """
    s, rng = run.settings, np.random.default_rng((run.settings.seed, SIGNS, step))
    signs, drawn = fpnl.mutation_signs(rng, run.params, len(images)), rng.random(len(images))
    for start in range(0, len(images), TASK)[rank::workers]:
        task = slice(start, start + TASK)
        x, labels = data.pixels(run.sets[0][images[task]]), run.sets[1][images[task]]
        q = np.ones(len(x), np.float32)
        if s.importance:
            q = chances_of(fpnl.forward(run.params, x, **run.net), labels, s.importance)
        if len(some := np.flatnonzero(drawn[task] < q)):
            method = functools.partial(thinned, run.method, (s.seed, DROPPED, step, start)) if s.dropout else run.method
            inputs, slopes = method(s, run.net, run.params, x[some], labels[some], signs[task][some])
            yield start + some, inputs, [slope / q[some] for slope in slopes]


def chances_of(logits, labels, importance):
    """The probabilities [n] with which images are measured."""
    return np.clip(importance * (1 - np.exp(-fpnl.cross_entropy(logits, labels))), RARELY, 1)


def train(args, method=es, transfer=None):
    """One run as the arguments say -> (loss, accuracy, live units ...) on the training set and on the other."""
    run, first, before, held_out = begin(args, method, transfer)
    crew = elsewhere if args.engine in REMOTE else here
    columns = "epoch", "seconds", "loss", "train", held_out, *(f"live{l + 1}" for l in range(len(run.params)))
    log = data.open_log(args.log or os.devnull, dataclasses.asdict(run.settings), columns, goes_on=args.resume)
    with crew(args, run) as (run, everyone, descend, n), log as write, interruptible(run.control):
        report, step, later = Report(args, run, write, first, before, held_out, n), first, reports(args, run, first)
        while True:
            seconds, (trained, held) = report.seconds(), (score(everyone(evaluate, which)) for which in (0, 2))
            if not (math.isfinite(trained[0]) and np.isfinite(run.moments).all()):
                raise ValueError(f"diverged: the loss is {trained[0]} after {step} steps: try a smaller --lr")
            if args.save:
                spent = {"step": step, "seconds": report.seconds()}
                data.save_weights(args.save, run.params, dataclasses.asdict(run.settings), moments=run.moments, **spent)
            report.row(step, seconds, trained, held)
            if step >= run.steps or args.until_test is not None and held[1] >= args.until_test:
                break
            if number := int(run.control[ASKED]):
                kept = f"; go on with --resume {args.save}" if args.save else ""
                raise KeyboardInterrupt(f"interrupted after step {step} of {run.steps}{kept}", "", 128 + number)
            step = descend(step, next(later), tick=report.live)
    print(f"result: train {trained[1]:.4f} {held_out} {held[1]:.4f} seconds {report.seconds():.0f}", flush=True)
    return trained, held


@np.errstate(all="ignore")
def steps(run, first, last, rank=0, workers=1, measured=measure):
    """The steps from `first` to `last` by one of the workers, who meet twice a step -> steps done.

    Who has which task and band makes no difference. Elsewhere, `measured` has all of them measure.
    """
    s = run.settings
    layers = [*zip(*(as_layers(flat, s.sizes) for flat in (run.weights, *run.moments)))]  # [W; b] and two moments
    own = np.arange(s.batch) // TASK % workers == rank  # columns
    for step in range(first, last):
        epoch, place = divmod(step, run.steps_per_epoch)
        if place == 0 or step == first:
            order = np.random.default_rng((s.seed, ORDER, epoch)).permutation(len(run.sets[0]))
        images = order[place * s.batch : (place + 1) * s.batch]
        lr = s.lr * (1 + math.cos(math.pi * step / max(run.steps, 1))) / 2
        for slopes in run.slopes:
            slopes[:, own] = 0
        for columns, inputs, slopes in measured(run, step, images, rank, workers):
            for array, found in zip(run.inputs + run.slopes, inputs + slopes):
                array[:, columns] = found
        run.barrier.wait()
        some = measured_columns(run)
        for l, band in bands(s.sizes)[rank::workers]:
            weights, *moments = (array[band] for array in layers[l])
            run.update(weights, gradient(run, l, band, some), *moments, step + 1, lr, s.weight_decay)
        if rank == 0:
            run.control[DONE], run.control[STOPPED] = step + 1, run.control[ASKED]
        run.barrier.wait()
        if run.control[STOPPED]:
            return step + 1
    return last


# --- The work of a step and of a report ----------------------------------------------------------------


def measured_columns(run):
    """Which images of the batch any unit has a slope for; the others add nothing to the gradient."""
    return np.any([slopes.any(axis=0) for slopes in run.slopes], axis=0)


def gradient(run, l, band, some):
    """Of rows of [W; b] of layer l: the mean over the batch, of which those columns are measured."""
    return run.inputs[l][band][:, some] @ run.slopes[l][:, some].T / np.float32(run.settings.batch)


def evaluate(run, which, rank, workers):
    """(first image, [number, summed loss, number right, summed shares of live units]) of each piece of a worker's."""
    found = []
    for start in range(0, len(run.sets[which]), PIECE)[rank::workers]:
        images, y = (array[start : start + PIECE] for array in run.sets[which : which + 2])
        hs = fpnl.activations(run.params, data.pixels(images), **run.net)
        hs = hs if run.net["transfer"] else [h * fpnl.SCALE for h in hs]  # exact
        scores = 1, float(fpnl.loss(hs[-1], y)), fpnl.accuracy(hs[-1], y), *(np.mean(h != 0) for h in hs)
        found.append((start, len(y) * np.array(scores)))
    return found


def score(found):
    """Loss, accuracy and share of live units in each layer, over a whole set, from what the workers found."""
    pieces = sorted(itertools.chain.from_iterable(found), key=lambda piece: piece[0])
    number, *sums = sum(scores for _, scores in pieces)
    return [float(value / number) for value in sums]


def with_bias(a, acts):
    """[fan_in, n] and a last row, what the bias is multiplied with."""
    return np.vstack([a, np.full((1, a.shape[1]), bool(acts), np.float32)])


def bands(sizes):
    """(layer, rows of its [W; b]) that are updated together."""
    return [(l, slice(i, i + BAND)) for l, fan_in in enumerate(sizes[:-1]) for i in range(0, fan_in + 1, BAND)]


def as_layers(flat, sizes):
    """[W; b] of each layer, [fan_in + 1, width], as views of a flat array."""
    ends = np.cumsum([(i + 1) * o for i, o in itertools.pairwise(sizes)])
    return [part.reshape(-1, o) for part, o in zip(np.split(flat, ends[:-1]), sizes[1:])]


def as_params(flat, sizes):
    """[(W, b), ...] as views of a flat array."""
    return [(layer[:-1], layer[-1]) for layer in as_layers(flat, sizes)]


def flattened(params):
    """The inverse: a copy of them all in one array."""
    return np.concatenate([a.ravel() for layer in params for a in layer])


# --- Where a run starts, and what it reports -------------------------------------------------------------


def begin(args, method, transfer):
    """A fresh or resumed run, steps done, seconds spent, and what its other set is: test, or held out to validate."""
    sets, step, seconds = data.load(args.data, args.validation), 0, 0.0
    chosen = {name: getattr(args, name) for name in OPTIONS} | {"hidden": (*args.hidden,), "epochs": float(args.epochs)}
    classes = 1 + int(max(sets[1].max(), sets[3].max()))
    found = {"data": data.checksum(sets), "inputs": sets[0].shape[1], "classes": classes, "method": method.__name__}
    settings = Settings(**found, **chosen, flush="off" if args.flush == "off" else "on")
    if args.batch > len(sets[0]):
        raise ValueError(f"--batch: expected at most the {len(sets[0])} training images, found {args.batch}")
    run = fresh(settings, sets, {"ftz": FTZ[args.flush], "transfer": transfer}, method)
    if args.resume:
        params, moments, step, seconds, saved = read_run(args.resume)
        for name, found in dataclasses.asdict(settings).items():
            if found != (expected := getattr(saved, name)):
                says = f"--{name.replace('_', '-')}: expected {expected} as in {args.resume}, found {found}"
                raise ValueError(f"{says}: they and the learning rates over all epochs are fixed from the start")
        run.weights[...], run.moments[...] = flattened(params), moments
    return run, step, seconds, "validation" if args.validation else "test"


def fresh(settings, sets, net, method, update=fpnl.adamw):
    """A run at its start, for one worker; others can share its memory."""
    floats = sum(3 * (i + 1) * o + settings.batch * (i + 1 + o) for i, o in itertools.pairwise(settings.sizes))
    run = Run(settings, sets, net, method, np.zeros(floats, "f"), np.zeros(4, "q"), threading.Barrier(1), update)
    run.weights[...] = flattened(fpnl.init(np.random.default_rng((settings.seed, INIT)), settings.sizes))
    return run


def reports(args, run, first):
    """The steps with a report after the first, the last of all among them; twice an epoch or more for --until-test."""
    count = args.reports if args.until_test is None else max(args.reports, math.ceil(2 * args.epochs))
    return iter(sorted({step for i in range(count + 1) if (step := round(i * run.steps / count)) > first}))


class Report:
    """What a run prints: a title, rows, which the log has, too, and on a terminal a live line between them."""

    def __init__(self, args, run, write, first, before, held_out, workers):  # step and seconds that it begins with
        self.args, self.run, self.write, self.first, self.before, s = args, run, write, first, before, run.settings
        self.began, self.terminal = time.perf_counter(), sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.say(
            f"{'-'.join(map(str, s.sizes))} network, {run.weights.size:,} weights; {len(run.sets[0]):,} images, "
            f"{run.steps:,} steps of {s.batch}; {s.method}, seed {s.seed}, flush {args.flush}, {workers} workers\n"
            f"{'epoch':>6} {'seconds':>8} {'loss':>8} {'train':>7} {held_out:>10}   live units{'left':>10}"
        )

    def say(self, text, live=False):
        if not self.args.quiet and (self.terminal or not live):
            text = text[: shutil.get_terminal_size().columns - 1] if live else text
            print("\r\x1b[K" * self.terminal + text, end="" if live else "\n", flush=True)

    def seconds(self):
        return self.before + time.perf_counter() - self.began

    def left(self, step):
        done, seconds = step - self.first, self.seconds() - self.before
        return f"{seconds * (self.run.steps - step) / done:8.0f} s" if done > 0 else f"{'?':>10}"

    def row(self, step, seconds, trained, held):
        self.loss, shares = trained[0], "".join(f" {share:.2f}" for share in trained[2:])
        row = step / self.run.steps_per_epoch, seconds, *trained[:2], held[1]
        self.write(*row, *trained[2:])
        self.say("{:6.2f} {:8.1f} {:8.4f} {:7.4f} {:10.4f}  ".format(*row) + shares + self.left(step))

    def live(self):
        step, run = max(self.first, self.run.control[DONE]), self.run
        speed = (step - self.first) * run.settings.batch / (self.seconds() - self.before)
        done = f"step {step}, epoch {step / run.steps_per_epoch:.2f}, loss {self.loss:.4f}"
        self.say(f"{done}, {speed:.0f} images/s,{self.left(step)} left", live=True)


@contextlib.contextmanager
def interruptible(control):
    """Ctrl-C and SIGTERM ask for a stop, so that a step is always completed; a second one ends at once."""

    def ask(number, _):
        control[ASKED] = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():  # no other may
            stack.callback(signal.signal, number, signal.signal(number, ask) or signal.SIG_DFL)  # None: not Python's
        yield


# --- Workers -------------------------------------------------------------------------------------------
#
# Here, they share memory, and each is handed all the steps up to the next report. Elsewhere, each is handed the weights
# once a step and returns the slopes of its tasks. Either gives the run that they work on, everyone(work, *args), the
# results of all workers, descend(first, last, tick=), which does the steps and calls `tick` at times, and their number.


@contextlib.contextmanager
def here(args, run):
    n, threads = args.workers, args.engine == "threads" or args.workers == 1 and not START
    if threads:
        run, pool = dataclasses.replace(run, barrier=threading.Barrier(n)), concurrent.futures.ThreadPoolExecutor(n)
    else:
        try:
            memory = multiprocessing.RawArray("f", len(run.floats)), multiprocessing.RawArray("q", 4)
            context, alone = multiprocessing.get_context(START), run
            run = dataclasses.replace(run, floats=memory[0], control=memory[1], barrier=context.Barrier(n))
            pool = concurrent.futures.ProcessPoolExecutor(n, context, enter, (run,))
        except (ImportError, OSError, NotImplementedError) as error:
            raise OSError(f"expected memory that processes can share, found {error}: try --engine threads") from error
        run.weights[...], run.moments[...] = alone.weights, alone.moments

    def everyone(work, *given, tick=lambda: None):
        return gathered([pool.submit(do, threads and run, work, *given, rank, n) for rank in range(n)], tick)

    with pool:
        try:
            yield run, everyone, lambda *span, tick: everyone(steps, *span, tick=tick)[0], n
        except BaseException as error:
            asked, run.control[ASKED], run.control[ENDED] = run.control[ASKED], 1, 1  # threads end after their step
            if threads:
                run.barrier.abort()
            if isinstance(error, concurrent.futures.BrokenExecutor):
                if asked:  # the signal had reached a process that was not deaf yet
                    raise KeyboardInterrupt from error
                raise RuntimeError("a worker was killed, perhaps for want of memory: go on with --resume") from error
            raise


@contextlib.contextmanager
def elsewhere(args, run):
    job = os.urandom(16), args.data
    try:
        opened, pool, n = mpi() if args.engine == "mpi" else dask(args.workers, args.scheduler)
    except ImportError as error:
        raise ValueError(f"--engine {args.engine}: expected its packages: pip install {REMOTE[args.engine]}") from error

    def everyone(work, *given):
        task = *job, run.settings, run.net, run.method, run.weights.copy(), work, *given
        return gathered([pool.submit(there, *task, rank, n) for rank in range(n)])

    def measured(tick, run, step, images, *_):
        tick()
        return itertools.chain.from_iterable(everyone(measure, step, images))

    with opened:
        yield run, everyone, lambda *span, tick: steps(run, *span, measured=functools.partial(measured, tick)), n


def mpi():
    from mpi4py import MPI, futures

    if (n := MPI.COMM_WORLD.Get_size() - 1) < 1 or MPI.COMM_WORLD.Get_rank():  # or each of them is a main process
        raise ValueError("--engine mpi: expected workers: mpiexec -n 3 python -m mpi4py.futures train.py ...")
    return (pool := futures.MPIPoolExecutor(initializer=deaf)), pool, n


def dask(workers, scheduler):
    import distributed

    own = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None, "timeout": 60}
    try:
        client = distributed.Client(**{"address": scheduler, "timeout": 5} if scheduler else own)
        client.wait_for_workers(1, timeout=5)
        if not scheduler:
            client.register_worker_callbacks(mute)
    except OSError as error:  # TimeoutError, too
        raise ValueError(f"--scheduler: expected workers there, found none: dask worker {scheduler}") from error
    return client, client.get_executor(pure=False), len(client.nthreads())


entered = None  # the run of a worker process, in which `enter` sets it, once, and `do` hands it on


def enter(run):
    global entered
    entered = run
    deaf()
    threading.Thread(target=end_in_time, args=(run.control,), daemon=True).start()


def deaf():
    """Signals, which a terminal and a batch system send to all processes, are the main process's affair."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mute():
    """Deaf, and without dask's messages: an error reaches the main process anyway; a heartbeat at the end is none."""
    deaf()
    logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)


def end_in_time(control):
    while multiprocessing.parent_process().is_alive() and not control[ENDED]:
        time.sleep(0.1)
    os._exit(1)


def do(run, work, *args):
    run = run or entered
    try:
        return work(run, *args)
    except BaseException:
        run.barrier.abort()  # nobody waits for this one
        raise


def there(key, folder, settings, net, method, weights, work, *args):
    """Some work in a process that shares nothing with the main one."""
    return list(work(Run(settings, sets_there(key, folder, settings), net, method, weights), *args))


@functools.lru_cache(4)
def sets_there(key, folder, settings):
    """The images of the run with this key, read once in a process."""
    sets = data.load(folder, settings.validation)
    if (found := data.checksum(sets)) != settings.data:
        raise ValueError(f"--data: expected the run's, checksum {settings.data}, found {found} on {platform.node()}")
    return sets


def gathered(futures, tick=lambda: None):
    """All results. `tick` is called at times until they are there; an error is that of the worker it began with."""
    while concurrent.futures.wait(futures, 0.2).not_done:
        tick()
    for future in sorted(futures, key=lambda future: isinstance(future.exception(), threading.BrokenBarrierError)):
        future.result()
    return [future.result() for future in futures]


# --- Files ---------------------------------------------------------------------------------------------


def read_run(path):
    """Weights [(W, b), ...], moments, steps done, seconds spent and settings of a run that --save has kept."""
    params, arrays = data.load_weights(path)
    inputs, *hidden, classes = len(params[0][0]), *(len(b) for _, b in params)
    sizes = {"inputs": inputs, "hidden": tuple(hidden), "classes": classes}
    try:
        moments, step, seconds = arrays["moments"], number(int, 0, math.inf)(arrays["step"]), SIZE(arrays["seconds"])
        return params, moments, step, seconds, Settings(**arrays["settings"] | sizes)
    except (KeyError, TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
        found = "another's" if arrays["settings"] else "weights alone"
        raise ValueError(f"{path}: expected a run of this train.py, found {found}, of use for --evaluate") from error


def evaluate_file(args):
    """--evaluate: accuracy, confusion matrix and recalls of saved weights on the test set; with --predict,
    a label a line for the images of an IDX file."""
    params, arrays = data.load_weights(args.evaluate)
    if (method := arrays["settings"].get("method", "es")) != "es":
        raise ValueError(f"{args.evaluate}: expected weights of ES, found those of {method}")
    flush = FTZ["off" if arrays["settings"].get("flush") == "off" else args.flush]
    x, *labels = [data.read_images(args.predict)] if args.predict else data.load(args.data)[2:]
    x = x.reshape(len(x), math.prod(x.shape[1:]))
    if x.shape[1] != len(params[0][0]):
        raise ValueError(f"{args.evaluate}: expected weights for {x.shape[1]} pixels, found {len(params[0][0])}")
    pieces = (data.pixels(x[i : i + PIECE]) for i in range(0, len(x), PIECE))
    found = np.array([label for piece in pieces for label in fpnl.forward(params, piece, flush).argmax(axis=1)], int)
    if args.predict:
        return print("".join(f"{label}\n" for label in found), end="")
    labels, classes = labels[0], max(1 + int(labels[0].max()), params[-1][0].shape[1])
    table = np.bincount(labels * np.int64(classes) + found, minlength=classes**2).reshape(classes, classes)
    print("label  " + "".join(f"{label:6}" for label in range(classes)) + "   <- found    recall")
    for label, row in enumerate(table):
        recall = f"{row[label] / row.sum():.4f}" if row.any() else "-"
        print(f"{label:5}  " + "".join(f"{count:6}" for count in row) + f"{recall:>20}")
    print(f"result: test {np.trace(table) / len(labels):.4f}")


# --- The command ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def command():
    """A program up to its exit status: errors are one line; standard streams may be closed, or take ASCII alone."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # who read it has gone: as the signal SIGPIPE
            sys.exit(141)
        many = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        fail("expected more memory: try smaller layers or batches, or fewer workers" if many else error)
    except KeyboardInterrupt as stop:
        fail(*stop.args or ("interrupted", "", 130))


def fail(message, kind="error: ", status=2):
    print(f"{pathlib.Path(sys.argv[0]).name}: {kind}{' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def parse_args(argv=None):
    live = "live units: the share of each layer's outputs, logits last, that are not 0, over the training images"
    parser = argparse.ArgumentParser(description="Train a network on MNIST by evolution strategies.", epilog=live)
    parser.error = fail  # one line
    flush, path = "emulated", {"type": pathlib.Path, "metavar": "FILE.npz"}
    with contextlib.suppress(RuntimeError), fpnl.hardware_ftz():
        flush = "hardware"
    # fmt: off
    group = parser.add_argument_group("training").add_argument
    group("--data", type=pathlib.Path, default=data.MNIST, metavar="DIR", help="folder with the four files of a set")
    group("--preset", choices=PRESETS, help=f"other defaults: {PRESETS}")
    for name, field in OPTIONS.items():
        group(f"--{name.replace('_', '-')}", default=field.default, **field.metadata)
    group("--flush", choices=FTZ, default=flush, help=f"to 0, in NumPy or by the CPU (same bits), or not {DEFAULT}")
    group = parser.add_argument_group("running").add_argument
    group("--engine", choices=ENGINES, default=ENGINES[0], help=f"what works; the result is the same {DEFAULT}")
    group("--workers", type=COUNT, default=cores(), help=f"how many; the result is the same {DEFAULT}")
    group("--scheduler", metavar="ADDRESS", help="of a running dask; without it, one is started here")
    group("--reports", type=COUNT, default=15, help=f"rows of the table {DEFAULT}")
    group("--until-test", type=SIZE, metavar="ACC", help="stop at the first report from this test accuracy on")
    group("--quiet", action="store_true", help="print the result alone")
    group("--log", type=pathlib.Path, metavar="FILE.csv", help="write a row a report here")
    group("--save", type=pathlib.Path, metavar="FILE.npz", help="write the weights here, at every report")
    group("--resume", **path, help="go on with the run that was saved there")
    group = parser.add_argument_group("instead of training").add_argument
    group("--evaluate", **path, help="accuracy, confusion matrix and recalls of these weights")
    group("--predict", type=pathlib.Path, metavar="FILE.idx", help="with --evaluate: a label a line for these images")
    # fmt: on
    args = parser.parse_args(argv)
    saved = dataclasses.asdict(read_run(args.resume)[-1]) if args.resume else {"flush": "on"}  # others are refused
    texts = {name: v if isinstance(v, (bool, tuple)) else str(v) for name, v in saved.items() if name in OPTIONS}
    parser.set_defaults(**texts, flush="off" if saved["flush"] == "off" else flush)
    parser.set_defaults(**PRESETS.get(args.preset, {}))
    args = parser.parse_args(argv)
    same = args.log and args.log.resolve() in [path.resolve() for path in (args.save, args.resume) if path]
    if args.scheduler and args.engine != "dask" or args.predict and not args.evaluate or same:
        fail("expected --engine dask beside --scheduler, --evaluate beside --predict, and another file to --log")
    return args


def cores(groups=pathlib.Path("/sys/fs/cgroup"), own=pathlib.Path("/proc/self/cgroup")):
    """How many this process may use: its affinity (taskset) and the CPU quota of its container (cgroup 2 and 1);
    elsewhere at most 61, the processes that Windows can wait for."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else min(os.cpu_count() or 1, 61)
    lines = own.read_text("utf-8", "replace").splitlines() if own.exists() else []
    for group in (top / line.split(":", 2)[2].strip("/") for line in lines for top in (groups, groups / "cpu")):
        for folder in (group, *group.parents):
            files = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
            words = " ".join(file.read_text("ascii") for file in files if file.exists()).split()  # microseconds
            if len(words) == 2 and words[0].isdecimal():  # "max" and -1: no limit
                count = min(count, math.ceil(int(words[0]) / int(words[1])))
    return count


def main(argv=None):
    with command():
        args = parse_args(argv)
        if args.evaluate:
            return evaluate_file(args)
        for path in filter(None, (args.log, args.save)):
            data.check_new_file(path, stream=path is args.log)
        _, held = train(args)
        if args.until_test is not None and held[1] < args.until_test:
            sys.exit(f"train.py: the accuracy ended at {held[1]:.4f}, below {args.until_test}")


if __name__ == "__main__":
    import train  # by this name its functions are known in every process

    train.main()
