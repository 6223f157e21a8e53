#!/usr/bin/env python3
"""Train a network of matrix products and additions on MNIST by evolution strategies.

    python train.py                      # the main job: all cores, ends on its own
    python train.py --preset best        # for longer, and against overfitting
    python train.py --until-test 0.967   # stops when it is as good as the post's network
    python train.py --save weights.npz   # keeps W1, b1, W2, b2, W3, b3, at every report
    python train.py --resume weights.npz --save weights.npz     # goes on where that stopped
    python train.py --evaluate weights.npz                      # accuracy, confusions, recalls
    python train.py -h                   # all options

The loop is `steps`: of a batch, images are drawn by what the network makes of them, `fpnl.es_gradient` measures those,
and `fpnl.adamw` updates. `train` asks it for steps, reports and saves. The same seed gives the same weights, bit for
bit, whatever maps the work and however many workers: work is always cut in the same way, and nothing is shared.
"""

import os
import signal
import sys

# The first process of a container hears no signal that it does not handle.
if __name__ == "__main__" and os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
# BLAS reads these when NumPy is imported: other numbers of its threads give other bits, and the work is mapped anyway.
ONE_THREAD = {f"{blas}_THREADS": "1" for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")}
NUMPY_WAS_FIRST = "numpy" in sys.modules
os.environ.update(ONE_THREAD)

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import math
import pathlib
import time

import numpy as np

# Also where Python leaves the script's folder out: -I, PYTHONSAFEPATH.
if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import data
import fpnl


def number(kind, low, high):
    """A type for argparse: a number from low to high."""

    def parse(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, found {text}")

    return functools.update_wrapper(parse, kind, ["__name__"], [])


COUNT, SIZE, LONG, SHARE = number(int, 1, 1e6), number(float, 0, 1e38), number(float, 0, 1e6), number(float, 0, 1)
# Options that decide the weights: default, kind, help.
OPTIONS = {
    "validation": (0, number(int, 0, 1e9), "hold out the last N training images, as they lie"),
    "hidden": (fpnl.SIZES[1:-1], COUNT, "units of each hidden layer"),
    "epochs": (18.0, LONG, "passes over the training images; fractions too, 0 evaluates"),
    "batch": (1024, COUNT, "images a step"),
    "sigma": (0.015, number(float, 1e-9, 1e9), "size of a mutation of a unit's weights"),
    "block": (4, COUNT, "units mutated together: more, and a step is quicker and noisier"),
    "control_variate": (False, bool, "less noise in a block"),
    "importance": (2.0, SIZE, "measure an image with probability N (1 - p), p of its label; 0: all"),
    "lr": (2e-3, SIZE, "AdamW's learning rate, falling to zero as a cosine"),
    "weight_decay": (2.0, SIZE, "AdamW's decoupled decay"),
    "beta2": (0.99, number(float, 0, 0.999999), "AdamW's decay of the mean of squares"),
    "dropout": (0.0, number(float, 0, 0.99), "share of the hidden units that is left out"),
    "smoothing": (0.0, SHARE, "share of each label that is spread over all classes"),
    "seed": (0, number(int, 0, 2**32 - 1), "of the weights, the order of the images and the mutations"),
}
PRESETS = {"best": {"epochs": 100.0, "weight_decay": 1.0, "control_variate": True, "dropout": 0.2, "smoothing": 0.1}}
# So do these: images that are measured together (task), whose losses are looked at together (piece), of a batch for
# each mask of dropout (mask); the least probability with which an image is measured; the version of all that.
FIXED = {"version": 3, "task": 64, "piece": 256, "mask": 64, "least": 0.02}
# Random streams of a seed.
INIT, ORDER, DRAW = range(3)
# As fpnl takes it.
FTZ = {"emulated": True, "hardware": "hardware", "off": False}


def zeros(params):
    return [[np.zeros_like(a) for a in layer] for layer in params]


def fresh(settings, sets, outputs, gradient, params, update=fpnl.adamw, **state):
    """A run at its start: what is trained, how, on what, and how far it is.

    settings : what decides the weights: a checkpoint's JSON and the first line of a log.
    sets : images and labels to train on, images and labels of the other set.
    outputs : a function of params and pixels: the outputs of each layer, the last of them logits.
    gradient, update : called as `fpnl.es_gradient` and `fpnl.adamw` are.
    params : [(W, b), ...], trained in place. To them come the moments m and v, the steps done and their seconds.
    state : of a run that is further: what is then other.
    """
    run = {"settings": settings, "sets": sets, "outputs": outputs, "gradient": gradient, "update": update}
    start = {"m": zeros(params), "v": zeros(params), "step": 0, "seconds": 0.0}
    return argparse.Namespace(**run, params=params, **start | state)


# --- The loop ----------------------------------------------------------------------------------------


def steps(run, map_pieces=map, **mapping):
    """Train, a step each time that the next loss is asked for; the last loss is that of the final weights.

    A loss is the mean over the batch that comes next, before the weights change: who does not like it can stop there.
    (With importance 0 it is that which the gradient has anyway, of smoothed labels and thinned networks if there are.)
    The images that fill no batch at the end of an epoch are left out; each epoch has an order of its own.

    Importance sampling (Katharopoulos, Fleuret 2018): an image is measured with a probability q that grows with its
    loss, and counts 1 / q; so the expectation of the gradient is that of the whole batch, whatever q is.
    """
    s, first, (images, labels, *_) = run.settings, run.step, run.sets

    def losses_of(some):
        return fpnl.cross_entropy(run.outputs(run.params, data.pixels(images[some]))[-1], labels[some])

    for step in range(first, s.steps + 1):
        epoch, place = divmod(step, s.images // s.batch)
        if place == 0 or step == first:
            order = np.random.default_rng((s.seed, ORDER, epoch)).permutation(s.images)
        batch = order[place * s.batch : (place + 1) * s.batch]
        rng = np.random.default_rng((s.seed, DRAW, step))

        losses, q = None, np.ones(s.batch, np.float32)
        if s.importance:
            losses = np.concatenate([*map_pieces(losses_of, np.array_split(batch, math.ceil(s.batch / s.piece)))])
            q = np.clip(s.importance * -np.expm1(-losses), s.least, 1)
        drawn = np.flatnonzero(rng.random(s.batch) < q)

        given = run.params, data.pixels(images[batch[drawn]]), labels[batch[drawn]], rng
        how = {"weights": 1 / (q[drawn] * np.float32(s.batch)), "return_losses": True, **mapping}
        grads, measured = run.gradient(*given, **how) if len(drawn) else (zeros(run.params), losses)

        yield float(np.mean(measured if losses is None else losses))
        if step < s.steps:
            lr = s.lr * (1 + math.cos(math.pi * step / s.steps)) / 2
            run.update(run.params, grads, run.m, run.v, step + 1, lr, s.weight_decay)
            run.step = step + 1


def es(s, net):
    """Evolution strategies. A control is another function of settings and network that makes a gradient."""
    losses = functools.partial(fpnl.cross_entropy, smoothing=s.smoothing)
    how = {"sigma": s.sigma, "block": s.block, "losses": losses, "control_variate": s.control_variate}
    return functools.partial(fpnl.es_gradient, **how, task=s.task, **net)


def thinned(gradient, s):
    """Dropout (Srivastava et al. 2014) around a gradient: of networks without some hidden units, the outputs of the
    others times a gain. A batch has a network for every `mask` images; those that are drawn are dealt out to them."""

    def thinned_gradient(params, x, labels, rng, weights, return_losses, **mapping):
        tasks, places, whole = [], [], zeros(params)
        for some in np.array_split(np.arange(len(x)), min(len(x), math.ceil(s.batch / s.mask))):
            kept = [rng.permutation(n) >= min(round(s.dropout * n), n - 1) for n in s.sizes]
            kept[0][:] = kept[-1][:] = True
            places.append([(np.ix_(i, o), o, np.float32(1 / i.mean())) for i, o in zip(kept, kept[1:])])
            thin = [(W[io] * gain, b[o]) for (W, b), (io, o, gain) in zip(params, places[-1])]
            rows = {"x": x[some], "labels": labels[some], "weights": weights[some]}
            tasks.append({"params": thin, "rng": rng.spawn(1)[0], "return_losses": True, **rows})
        found = fpnl.mapped(gradient, tasks, **mapping)
        for (grads, _), place in zip(found, places):
            for (W, b), (dW, db), (io, o, gain) in zip(whole, grads, place):
                W[io] += dW * gain
                b[o] += db
        return whole, np.concatenate([losses for _, losses in found])

    return thinned_gradient


# --- A run: its start, its reports ---------------------------------------------------------------------


def begin(args, method=es, transfer=None):
    """A run as the arguments say, fresh or resumed, of fpnl's network or one with another transfer."""
    sets = data.load(args.data, args.validation)
    s = argparse.Namespace(**FIXED, **{name: getattr(args, name) for name in OPTIONS})
    s.data, s.images, s.steps = data.checksum(sets), len(sets[0]), round(s.epochs * (len(sets[0]) // s.batch))
    s.hidden, s.sizes = [*s.hidden], [sets[0].shape[1], *s.hidden, 1 + int(max(sets[1].max(), sets[3].max()))]
    s.method, s.flush = method.__name__, "off" if args.flush == "off" else "on"
    s.network = "underflow" if transfer is None else transfer.__name__
    saved = args.saved or vars(s)
    for name in {**saved, **vars(s)}:
        if (expected := saved.get(name)) != (found := getattr(s, name, None)):
            option = f"--{name.replace('_', '-')}" if hasattr(args, name) else name
            raise ValueError(f"{option}: expected {expected} as in {args.resume}, found {found}: it is fixed")
    if s.batch > s.images:
        raise ValueError(f"--batch: expected at most the {s.images} training images, found {s.batch}")
    net, update = {"ftz": FTZ[args.flush], "transfer": transfer}, functools.partial(fpnl.adamw, beta2=s.beta2)
    gradient = thinned(method(s, net), s) if s.dropout else method(s, net)
    state = args.state or {"params": fpnl.init(np.random.default_rng((s.seed, INIT)), s.sizes)}
    return fresh(s, sets, functools.partial(fpnl.activations, **net), gradient, update=update, **state)


def train(args, run):
    """Step, report and save as the arguments say -> (loss, accuracy, live units ...) on both sets."""
    s, other = run.settings, "validation" if args.validation else "test"
    count = max(args.reports, 0 if args.until_test is None else math.ceil(2 * s.epochs))
    due = {run.step, *(round(i * s.steps / count) for i in range(count + 1))}
    columns = ["epoch", "seconds", "loss", "train", other, *(f"live{l + 1}" for l in range(len(run.params)))]
    log = data.open_log(args.log or os.devnull, vars(s), columns, goes_on=args.resume)
    began, first, before, shown = time.perf_counter() - run.seconds, run.step, run.seconds, 0.0
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not args.quiet

    def say(text, end="\n"):
        if not args.quiet:
            print("\r\x1b[K" * terminal + text, end=end, flush=True)

    with engine(args) as (map_pieces, map_tasks, workers, lists), log as write, flagged() as signals:
        sizes, weights = "-".join(map(str, s.sizes)), sum(a.size for a in fpnl.leaves(run.params))
        how = f"{s.method}, seed {s.seed}, flush {args.flush}, {workers} workers"
        say(f"{sizes} network, {weights:,} weights; {s.images:,} images, {s.steps:,} steps of {s.batch}; {how}")
        say(f"{'epoch':>6} {'seconds':>8} {'loss':>8} {'train':>7} {other:>10}   live units{'left':>10}")
        for loss in steps(run, map_pieces, map_tasks=map_tasks, workers=lists):
            done, epoch = run.step - first, run.step / (s.images // s.batch)
            run.seconds, report = time.perf_counter() - began, run.step in due or signals
            left = f"{(run.seconds - before) * (s.steps - run.step) / done:8.0f} s" if done else f"{'?':>10}"
            finite = not report or all(np.isfinite(a).all() for a in fpnl.leaves([run.m, run.v]))
            if not (finite and loss <= 10 * math.log(s.sizes[-1])):
                raise ValueError(f"diverged: the loss is {loss:.4g} after {run.step} steps: try a smaller --lr")
            if not report:
                if terminal and run.seconds > shown + 0.2:
                    text, shown = f"{epoch:6.2f} {run.seconds:8.1f} {loss:8.4f}{left:>45}", run.seconds
                    say(text[: (os.get_terminal_size().columns or 80) - 1], end="")
                continue
            if args.save:
                data.save_weights(args.save, run.params, vars(s), m=run.m, v=run.v, step=run.step, seconds=run.seconds)
            trained, held = (score(run, which, map_pieces) for which in (0, 2))
            row = epoch, run.seconds, *trained[:2], held[1], *trained[2:]
            write(*row)
            say(("{:6.2f} {:8.1f} {:8.4f} {:7.4f} {:10.4f}  " + " {:.2f}" * len(run.params)).format(*row) + left)
            if run.step == s.steps or args.until_test is not None and held[1] >= args.until_test:
                break
            if signals:
                kept = f"; go on with --resume {args.save}" if args.save else ""
                raise KeyboardInterrupt(signals[0], f"interrupted after step {run.step} of {s.steps}{kept}")
    print(f"result: train {trained[1]:.4f} {other} {held[1]:.4f} seconds {time.perf_counter() - began:.0f}", flush=True)
    return trained, held


def score(run, which, map_pieces):
    """Loss, accuracy and share of live units in each layer, over the whole set whose images are in that place."""

    def look(images, y):
        *_, o = hs = run.outputs(run.params, data.pixels(images))
        return fpnl.cross_entropy(o, y), o.argmax(axis=1) == y, *(h != 0 for h in hs)

    pieces = (np.array_split(rows, math.ceil(len(rows) / 1000)) for rows in run.sets[which : which + 2])
    return [float(np.mean(np.concatenate(rows), dtype=float)) for rows in zip(*map_pieces(look, *pieces))]


@contextlib.contextmanager
def flagged():
    """A list that gets the number of a signal, Ctrl-C's or SIGTERM's; a second one ends the process, even process 1."""
    signals = []

    def note(signal_number, _):
        if signals:
            os._exit(128 + signal_number)
        signals.append(signal_number)

    with contextlib.ExitStack() as stack:
        # Only the main thread may. A handler of None is not Python's.
        with contextlib.suppress(ValueError):
            for each in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, each, signal.signal(each, note) or signal.SIG_DFL)
        yield signals


# --- What computes -------------------------------------------------------------------------------------

# BLAS threads before each run that is under way.
blas_threads = []
# Signals, which a terminal and a batch system send to all processes, are the main process's affair.
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@contextlib.contextmanager
def engine(args):
    """Maps of pieces, by threads of this process, and of tasks; workers; and how many lists the tasks are best made,
    None: each goes alone."""
    get, limit = blas()
    with contextlib.ExitStack() as stack:
        blas_threads.append(get())
        stack.callback(blas_threads.pop)
        stack.callback(lambda: limit(1 if blas_threads[1:] else blas_threads[0]))
        limit(1)
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(args.workers))
        if args.engine == "threads":
            yield threads.map, threads.map, args.workers, None
        elif args.engine == "mpi":
            from mpi4py import MPI, futures

            # Without mpi4py.futures, each of them is a main process.
            if (n := MPI.COMM_WORLD.Get_size() - 1) < 1 or MPI.COMM_WORLD.Get_rank():
                raise ValueError("--engine mpi: expected workers: mpiexec -n 3 python -m mpi4py.futures train.py ...")
            deaf = {"initializer": exec, "initargs": (DEAF,)}
            with futures.MPIPoolExecutor(main=False, path=sys.path, env=ONE_THREAD, **deaf) as pool:
                pool.bootup()
                yield threads.map, compared(pool.map), n, n
        else:
            import distributed

            own = {"n_workers": args.workers, "threads_per_worker": 1, "dashboard_address": ":0", "timeout": 60}
            with distributed.Client(**{"address": args.scheduler, "timeout": 5} if args.scheduler else own) as client:
                client.wait_for_workers(1, timeout=5)
                if not args.scheduler:
                    # Mute: errors come here anyway, and a heartbeat that finds no scheduler at the end is none.
                    mute = "import logging; logging.getLogger('distributed.worker').setLevel('CRITICAL')"
                    client.register_worker_callbacks(functools.partial(exec, f"{DEAF}; {mute}"))
                n = sum(client.nthreads().values())
                yield threads.map, compared(client.get_executor(pure=False).map), n, n


def compared(map_tasks):
    """A map whose first results are computed here as well: a worker that has other bits is named."""
    todo = [map]

    def compare(work, lists):
        found = [*map_tasks(work, lists)]
        for (who, theirs), (_, ours) in zip(found, todo.pop()(work, lists) if todo else ()):
            if any(a.tobytes() != b.tobytes() for a, b in zip(fpnl.leaves(theirs), fpnl.leaves(ours))):
                print(f"worker {who} computes other bits than this process: so will the weights be", file=sys.stderr)
        return found

    return compare


def blas():
    """Functions that tell and set its number of threads: NumPy's wheels have some, threadpoolctl those of others."""
    library = ctypes.CDLL(np._core._multiarray_umath.__file__)
    with contextlib.suppress(AttributeError):
        return library.scipy_openblas_get_num_threads64_, library.scipy_openblas_set_num_threads64_
    with contextlib.suppress(ImportError, IndexError):
        import threadpoolctl

        library = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers[0]
        return library.get_num_threads, library.set_num_threads
    if NUMPY_WAS_FIRST:
        raise ValueError("expected threadpoolctl, or train.py imported before NumPy: more BLAS threads, other bits")
    # Nobody can be asked, and nothing needs to be.
    return int, int


# --- Files ---------------------------------------------------------------------------------------------


def evaluate_file(args):
    """--evaluate: accuracy, confusion matrix and recalls of saved weights on the test set; with --predict,
    a label a line for the images of an IDX file."""
    params, others = data.load_weights(args.evaluate)
    settings = {"network": "underflow", "flush": "on"} | others["settings"]
    if settings["network"] != "underflow":
        raise ValueError(f"{args.evaluate}: expected weights of fpnl's network, found one with {settings['network']}")
    x, labels = (data.read_images(args.predict), None) if args.predict else data.load(args.data)[2:]
    x = x.reshape(len(x), math.prod(x.shape[1:]))
    if x.shape[1] != (inputs := len(params[0][0])):
        raise ValueError(f"{args.evaluate}: expected weights for {x.shape[1]} pixels, found {inputs}")
    ftz, pieces = FTZ["off" if settings["flush"] == "off" else args.flush], np.array_split(x, -(-len(x) // 1000) or 1)
    found = np.concatenate([fpnl.forward(params, data.pixels(x), ftz).argmax(axis=1) for x in pieces])
    if args.predict:
        return print("".join(f"{label}\n" for label in found), end="")
    classes = max(1 + int(labels.max()), params[-1][0].shape[1])
    table = np.bincount(labels * np.int64(classes) + found, minlength=classes**2).reshape(classes, classes)
    print("label", *range(classes), "recall", sep="\t")
    for label, row in enumerate(table):
        print(label, *row, f"{row[label] / (row.sum() or math.nan):.4f}", sep="\t")
    print(f"result: test {np.mean(labels == found):.4f}", flush=True)


# --- The command ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def command():
    """A program up to its exit status: errors are one line; standard streams may be closed, or take ASCII alone."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    # Who read it has gone: as the signal SIGPIPE.
    except BrokenPipeError:
        sys.exit(141)
    except ImportError as error:
        fail(f"{error}: pip install it (mpi4py mpich for --engine mpi, distributed for dask), also where workers are")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        fail("expected more memory: try smaller layers or batches" if isinstance(error, MemoryError) else error)
    except KeyboardInterrupt as stop:
        signal_number, says = stop.args or (signal.SIGINT, "interrupted")
        fail(says, "", 128 + signal_number)
    finally:
        # What could not be written is not tried again at the end of Python, which would tell of it.
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message, kind="error: ", status=2):
    print(f"{pathlib.Path(sys.argv[0]).name}: {kind}{' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def parse_args(argv=None):
    parser = argparse.ArgumentParser("train.py", "python train.py [options]")
    parser.error = fail
    flush, kept = "emulated", {"type": pathlib.Path, "metavar": "FILE.npz"}
    with contextlib.suppress(RuntimeError), fpnl.hardware_ftz():
        flush = "hardware"
    # fmt: off
    training, running = (parser.add_argument_group(name).add_argument for name in ("training", "running"))
    training("--data", type=pathlib.Path, default=data.MNIST, metavar="DIR", help="folder with the four files of a set")
    training("--preset", choices=PRESETS, help="other defaults: longer, and against overfitting")
    for name, (value, kind, says) in OPTIONS.items():
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": "N"}
        how |= {"nargs": "*"} if isinstance(value, tuple) else {}
        training(f"--{name.replace('_', '-')}", default=value, help=f"{says} (default: %(default)s)", **how)
    training("--flush", choices=FTZ, default=flush, help="tiny results to 0: in NumPy, by the CPU (default), or not")
    running("--engine", choices=["threads", "mpi", "dask"], default="threads", help="what computes (default: threads)")
    running("--workers", type=COUNT, metavar="N", help="how many; the weights are the same (default: all cores)")
    running("--scheduler", metavar="ADDRESS", help="of a running dask; without it, one is started here")
    running("--reports", type=COUNT, default=15, metavar="N", help="rows of the table (default: 15)")
    running("--until-test", type=SHARE, metavar="N", help="stop at the first report from this accuracy on")
    running("--quiet", action="store_true", help="print the result alone")
    running("--log", type=pathlib.Path, metavar="FILE.csv", help="write a row a report here")
    running("--save", **kept, help="write the weights here, at every report")
    running("--resume", **kept, help="go on with the run that was saved there")
    running("--evaluate", **kept, help="accuracy, confusion matrix and recalls of these weights")
    running("--predict", type=pathlib.Path, metavar="FILE.idx", help="with --evaluate: a label a line for these images")
    # fmt: on
    args = parser.parse_args(argv)
    state, saved = data.load_run(args.resume) if args.resume else ({}, {})
    values = {k: v if k in ("hidden", "control_variate") else str(v) for k, v in saved.items() if k in OPTIONS}
    parser.set_defaults(**values | PRESETS.get(args.preset, {}), flush="off" if saved.get("flush") == "off" else flush)
    # What is refused only now is a setting of the file.
    parser.error = lambda says: fail(f"{args.resume}: {says}")
    args = parser.parse_args(argv, argparse.Namespace(state=state, saved=saved))
    if args.scheduler and args.engine != "dask" or args.predict and not args.evaluate:
        fail("expected --engine dask beside --scheduler, and --evaluate beside --predict")
    if args.workers and (args.scheduler or args.engine == "mpi"):
        fail(f"expected no --workers beside workers that are there, found {args.workers}")
    if args.log and args.log.resolve() in [path.resolve() for path in (args.save, args.resume) if path]:
        fail(f"expected another file to --log than to --save and --resume, found {args.log}")
    args.workers = args.workers or data.cores()
    return args


def main(argv=None):
    with command():
        args = parse_args(argv)
        if args.evaluate:
            return evaluate_file(args)
        for path in filter(None, (args.log, args.save)):
            data.check_new_file(path, stream=path is args.log)
        _, held = train(args, begin(args))
        if args.until_test is not None and held[1] < args.until_test:
            sys.exit(f"train.py: the accuracy ended at {held[1]:.4f}, below {args.until_test}")


if __name__ == "__main__":
    main()
