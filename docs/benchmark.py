"""Ratios, measured side by side in one run: `python docs/benchmark.py [SECTION ...]`.

What is compared takes turns, and the figure is the median of the ratios of neighbours: on a noisy machine
times drift, ratios hold. Everything but threads, engines, memory and whole runs is measured on one core. A step of the
main job is one near its end, with docs/weights.npz, when few images are drawn.

arithmetic: flush-to-zero arithmetic in NumPy against the plain operation.
step: a step that measures all images against its own multiplications at the speed of np.matmul on square matrices, and
      against the emulated flush, the control variate, importance sampling, backprop and the plain statement; and what
      each part of it takes, of the main job's, too.
noise: of the estimate, by the size of the blocks and the progress of the training.
scaling: with the batch, the width, the images of a task and the threads.
memory: the peak of `python train.py` (Linux).
engines: milliseconds a step, by engine, workers and batch, and the bytes that travel.
slopes [FOLDER]: of this fpnl.py against that of another checkout, the least of 25 rounds.
against [FOLDER [OPTION ...]]: whole runs of train.py with these options, here and in another checkout.

The last two, where they come first, take what follows as their arguments; without a FOLDER, it is this checkout, which
shows the noise. `against` is not run unless it is named.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from unittest import mock

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "examples"))
import controls
import numpy as np

import data
import fpnl
import train

ROUNDS = 15


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(*functions, rounds=None):
    """Seconds of each function in each round, [functions][rounds]; every other round from the last to the first, as
    who comes later finds what they share in the cache."""
    for function in functions:
        function()
    found = []
    for i in range(rounds or ROUNDS):
        order = slice(None, None, -1 if i % 2 else 1)
        found.append([seconds(function) for function in functions[order]][order])
    return list(zip(*found))


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def arithmetic(n=512_000):
    rng = np.random.default_rng(0)
    normal, other = (rng.uniform(0.5, 2, n).astype(np.float32) for _ in range(2))
    subnormal = rng.integers(1, 1 << 23, n, dtype=np.uint32).view(np.float32)
    unit, half = rng.uniform(-1, 1, n).astype(np.float32), rng.uniform(1.5, 2.5, n).astype(np.float32)
    low, tiny = np.float32(2.0**-63), fpnl.TINY
    operations = ("add", "subtract", "multiply", "divide")
    sums = (2 * unit * tiny, unit[::-1] * tiny)
    cases = [(op, "normal numbers", (normal, other)) for op in operations]
    cases += [(op, "subnormal, normal", (subnormal, other)) for op in operations]
    cases += [(op, "half the results tiny", sums) for op in operations[:2]]
    cases += [("multiply", "half the results tiny", (unit * low, half * low))]
    cases += [("divide", "half the results tiny", (unit * low / 2, 1 / (4 * low * half)))]
    cases += [("divide", "by S, half tiny", (unit, fpnl.SCALE))]
    print(f"{f'ms on {n} float32':36} {'fpnl':>8} {'NumPy':>8} {'ratio':>8}")
    for op, case, (a, b) in cases:
        ours, plain = in_turn(*(functools.partial(getattr(m, op), a, b) for m in (fpnl, np)))
        times = [1e3 * statistics.median(times) for times in (ours, plain)]
        print(f"{op:10} {case:25} {times[0]:8.2f} {times[1]:8.2f} {ratio(ours, plain):8.2f}")


def multiplications(sizes, block, control_variate=False):
    """Floating-point operations an example in the matrix products of a step, two for each weight met."""
    weights, widths = [i * o for i, o in itertools.pairwise(sizes)], sizes[1:]
    met = 2 * sum(weights)  # forward and gradient
    above = [*weights[1:], widths[-1] ** 2]  # members of the last layer are multiplied with the identity
    for l, k in enumerate(block_sizes(sizes, block)):
        blocks = math.ceil(widths[l] / k)  # the last one filled up with zeros
        met += 2 * blocks * (k * above[l] // widths[l] + sum(weights[l + 2 :]))  # members and mirror images
        met += (control_variate and k > 1) * above[l]  # predictions
    return 2 * met


def members(sizes, block):
    """Mutated networks evaluated an example."""
    return sum(2 * math.ceil(width / k) for width, k in zip(sizes[1:], block_sizes(sizes, block)))


def block_sizes(sizes, block):
    """Units mutated together, in each layer."""
    return [min(block, width) for width in sizes[1:-2]] + [1, 1][: len(sizes) - 1]


def job(options="", method=train.es):
    """The main job near its end; if the sizes are its own, with its weights."""
    run = train.begin(train.parse_args(options.split()), method)
    run.step = run.settings.steps * 19 // 20
    if run.settings.sizes == [*fpnl.SIZES]:
        run.params, _ = data.load_weights(ROOT / "docs/weights.npz")
    return run


@contextlib.contextmanager
def stepping(options):
    """A function that makes a step of such a job, by the engine that the options name."""
    with train.engine(train.parse_args(options.split())) as (map_pieces, map_tasks, _, lists):
        yield functools.partial(next, train.steps(job(options), map_pieces, map_tasks=map_tasks, workers=lists))


def step(options=""):
    every = f"--importance 0 {options}"
    run = job(every)
    s = run.settings
    A = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    work = multiplications(s.sizes, s.block, s.control_variate) * s.batch
    product = 2 * 512**3
    count = max(1, round(work / 20 / product))  # products that take some milliseconds

    def products():
        for _ in range(count):
            A @ A

    steps, references = in_turn(functools.partial(next, train.steps(run)), products)
    each, speed = statistics.median(steps) / s.batch, count * product / statistics.median(references)
    print(f"np.matmul, 512 x 512: {speed / 1e9:.0f} GFLOP/s")
    print(f"a step of {s.batch} examples, all measured, block {s.block}: {1e3 * s.batch * each:.0f} ms")
    print(f"an example: {1e6 * each:.0f} us, {members(s.sizes, s.block)} mutated networks, ", end="")
    print(f"{work / s.batch / 1e6:.2f} MFLOP of multiplications")
    print(f"mutated networks a second: {members(s.sizes, s.block) / each:,.0f}")
    print(f"the step / its own multiplications: {ratio(steps, references) * count * product / work:.2f}")
    print(f"\n{'what each part of a step takes itself':46}  {'all measured':>17}  {'the main job':>17}")
    columns = parts(run), parts(job(options))
    for part in sorted(columns[1], key=columns[0].__getitem__, reverse=True):
        cells = (f"{1e3 * c[part]:8.2f} ms {100 * c[part] / c.total():5.1f} %" for c in columns)
        print(f"  {part:44}  {'  '.join(cells)}")

    x, y = data.pixels(run.sets[0][:128]), run.sets[1][:128]
    gradient = functools.partial(run.gradient, run.params, x, y, np.random.default_rng(0))
    by_ftz = [functools.partial(gradient, ftz=ftz) for ftz in (True, "hardware", False)]
    emulated, hardware, off, varied = in_turn(*by_ftz, functools.partial(by_ftz[1], control_variate=True))
    plain = functools.partial(fpnl.es_gradient_plain, run.params, x[:1], y[:1], np.random.default_rng(0), s.sigma)
    plains, fasts = in_turn(plain, by_ftz[1], rounds=3)
    runs = run, job(options), job(every, controls.backprop)
    es, sampled, reverse = in_turn(*(functools.partial(next, train.steps(each)) for each in runs))
    with backprop() as cases:
        loops, straights = in_turn(*cases)
    print("\nratios of times")
    print(f"  gradient, flush emulated / by the CPU        {ratio(emulated, hardware):8.2f}")
    print(f"  gradient, flush off / by the CPU             {ratio(off, hardware):8.2f}")
    print(f"  gradient, with the control variate / without {ratio(varied, hardware):8.2f}")
    print(f"  es_gradient_plain / es_gradient, an example  {ratio(plains, fasts) * len(x):8.0f}")
    print(f"  ES step / backprop step, all measured        {ratio(es, reverse):8.2f}")
    print(f"  the same, ES with importance sampling        {ratio(sampled, reverse):8.2f}")
    print(f"  backprop step / straight down, {data.cores()} cores       {ratio(loops, straights):8.2f}")


@contextlib.contextmanager
def backprop():
    """Two functions that make a step of backprop with the dead zone, by all cores: that of controls.py, and a
    forward pass, a backward pass and AdamW written straight down, where a share of the batch is a core's."""
    _, method, _, options = controls.ROWS["deadzone"]
    run = train.begin(train.parse_args(options.split()), method)
    (images, labels, *_), s, step = run.sets, run.settings, itertools.count(1)
    params = [tuple(map(np.copy, layer)) for layer in run.params]
    moments = train.zeros(params), train.zeros(params)

    def share(batch):
        x, y, ((W1, b1), (W2, b2), (W3, b3)) = data.pixels(images[batch]), labels[batch], params
        z = x @ W1
        h1 = controls.dead_zone(np.add(z, b1, out=z))
        h2 = controls.dead_zone(h1 @ W2)
        o = controls.dead_zone(h2 @ W3)
        d3 = controls.softmax_error(o, y) * (o != 0) / np.float32(s.batch)
        d2 = d3 @ W3.T * (h2 != 0)
        d1 = d2 @ W2.T * (h1 != 0)
        return [(x.T @ d1, d1.sum(axis=0)), (h1.T @ d2, np.zeros_like(b2)), (h2.T @ d3, np.zeros_like(b3))]

    def straight():
        n = next(step)
        batch = np.random.default_rng(n).integers(0, s.images, s.batch)
        found = pool.map(share, np.array_split(batch, data.cores()))
        grads = [tuple(map(sum, zip(*layer))) for layer in zip(*found)]
        fpnl.adamw(params, grads, *moments, n, s.lr, s.weight_decay)

    with concurrent.futures.ThreadPoolExecutor(data.cores()) as pool:
        loop = train.steps(run, pool.map, map_tasks=pool.map)
        yield functools.partial(next, loop), straight


def parts(run):
    """Seconds of a step that each part takes itself, without the parts that it calls."""
    found, inside = collections.Counter(), [0.0]

    def timed(original, part):
        def call(*args, **options):
            inside.append(0.0)
            start = time.perf_counter()
            result = original(*args, **options)
            whole = time.perf_counter() - start
            found[part.format(len(args[0]), len(args[2])) if "{}" in part else part] += (whole - inside.pop()) / ROUNDS
            inside[-1] += whole
            return result

        return call

    with contextlib.ExitStack() as stack:
        for module, name, part in [
            (run, "update", "AdamW"),
            (run, "gradient", "checks, tasks, gradient products"),
            (data, "pixels", "pixels to float32"),
            (fpnl, "mutation_signs", "random signs"),
            (fpnl, "es_slopes", "forward, mutations, slopes"),
            (fpnl, "_member_losses", "members, {} -> {} units: products, flush, losses"),
        ]:
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name), part)))
        losses = timed(lambda *args: [*map(*args)], "losses, for the probabilities")
        one_step = timed(functools.partial(next, train.steps(run, losses)), "order, draw, checks")
        one_step()
        found.clear()
        for _ in range(ROUNDS):
            one_step()
    return found


def noise(options="", steps=(0, 30, 120, 480), batches=12):
    """Standard deviation of the gradient over the mutations, in units of that over the batches."""
    run, blocks = train.begin(train.parse_args(options.split())), (1, 2, 4, 8, 16)
    trained = train.steps(run)
    print(f"steps of training, layer, control variate, then the noise with blocks of {', '.join(map(str, blocks))}")
    print("(the last two layers have none, nor has the prediction alone)")
    for target in steps:
        while run.step < target:
            next(trained)
        for name, control_variate in (("no", False), ("yes", True)):
            columns = [noise_of_layers(run, batches, block, control_variate) for block in blocks]
            for l, row in enumerate(zip(*columns)):
                print(f"{target:6} {l + 1:6} {name:>6}    " + "".join(f"{value:8.2f}" for value in row))


def noise_of_layers(run, batches, block, control_variate):
    """Of each layer below the last two, which have none, from two draws of mutations for each batch."""
    s, drawn = run.settings, []  # [batches][2 draws][layers]
    for i in range(batches):
        rows = slice(i * s.batch, (i + 1) * s.batch)
        x, y = data.pixels(run.sets[0][rows]), run.sets[1][rows]
        how = {"block": block, "control_variate": control_variate}
        draws = [run.gradient(run.params, x, y, np.random.default_rng((k, i)), **how) for k in (0, 1)]
        drawn.append([[dW for dW, _ in grads[:-2]] for grads in draws])
    found = []
    for a, b in ([[draws[k][l] for draws in drawn] for k in (0, 1)] for l in range(len(s.sizes) - 3)):
        by_mutation = sum(np.sum((u - v) ** 2) for u, v in zip(a, b)) / 2 / batches
        mean = sum(a) / batches
        of_both = sum(np.sum((u - mean) ** 2) for u in a) / (batches - 1)
        found.append(math.sqrt(by_mutation / max(of_both - by_mutation, 1e-30)))
    return found


def scaling(options="", batches=(64, 128, 256, 512, 1024), widths=(256, 512, 1024, 2048)):
    run, tasks = job(options), (4, 8, 16, 32, 64, 128)
    images, labels = data.pixels(run.sets[0][: max(batches)]), run.sets[1][: max(batches)]

    def gradients(n, width):
        """Of always the same examples, in batches of n, so that all cases find the caches alike."""
        params, rng = fpnl.init(np.random.default_rng(0), (784, width, width, 10)), np.random.default_rng(0)
        for start in range(0, len(images), n):
            run.gradient(params, images[start : start + n], labels[start : start + n], rng)

    for what, values, cases in (
        ("batch", batches, [functools.partial(gradients, n, 512) for n in batches]),
        ("width", widths, [functools.partial(gradients, 128, width) for width in widths]),
    ):
        times = in_turn(*cases, rounds=5)
        each = [ratio(case, times[1]) for case in times]
        print(f"time an example, {what} {', '.join(map(str, values))}: {', '.join(f'{r:.2f}' for r in each)}", end="")
        print(f"; exponent of the last doubling {math.log2(each[-1] / each[-2]):.2f}")
    times = zip(tasks, in_turn(*(slopes_of(fpnl, run, n, ftz="hardware") for n in tasks)))
    each = ", ".join(f"{1e6 * statistics.median(case) / n:.0f}" for n, case in times)
    print(f"us an example, slopes of a task of {', '.join(map(str, tasks))}: {each}")
    threads = [n for n in (1, 2, 4, 8, 16) if n <= data.cores()]
    print(f"\nms a step on one thread, and times its speed on {', '.join(map(str, threads))}")
    for case in ("", "--importance 0", "--importance 0 --batch 2048"):
        with contextlib.ExitStack() as stack:
            steps = [stack.enter_context(stepping(f"{options} {case} --workers {n}")) for n in threads]
            times = in_turn(*steps)
        gains = "".join(f"{ratio(times[0], each):8.2f}" for each in times)
        print(f"{case or 'the main job':30} {1e3 * statistics.median(times[0]):8.1f}{gains}")


def slopes_of(module, run, n, **how):
    """A function that measures those of n images, by one fpnl or another."""
    signs = fpnl.mutation_signs(np.random.default_rng(0), run.params, n)
    rows = data.pixels(run.sets[0][:n]), run.sets[1][:n], signs
    return functools.partial(module.es_slopes, run.params, *rows, **how)


def slopes(folder=ROOT, options="", rounds=25):
    spec = importlib.util.spec_from_file_location("other", pathlib.Path(folder) / "fpnl.py")
    other, run = importlib.util.module_from_spec(spec), job(options)
    spec.loader.exec_module(other)
    print(f"us an example          here    there    ratio   ({folder})")
    for n, ftz, control_variate in itertools.product((32, 64, 128), (True, "hardware"), (False, True)):
        cases = (slopes_of(module, run, n, ftz=ftz, control_variate=control_variate) for module in (fpnl, other))
        here, there = (1e6 * min(times) / n for times in in_turn(*cases, rounds=rounds))
        case = f"{n} {'emulated' if ftz is True else 'flags'}{', cv' * control_variate}"
        print(f"{case:18} {here:8.1f} {there:8.1f} {here / there:8.3f}")


def against(folder=ROOT, *options, rounds=3):
    programs = [pathlib.Path(place, "train.py").resolve(strict=True) for place in (ROOT, folder)]

    def spent(program):
        before = os.times()
        subprocess.run([sys.executable, program, "--quiet", *options], check=True)
        after = os.times()
        return after.elapsed - before.elapsed, sum(after[2:4]) - sum(before[2:4])  # CPU time of processes that ended

    here, there = zip(*[[spent(program) for program in programs] for _ in range(rounds)])
    print(f"seconds of a run       here    there    ratio   ({folder})")
    for what, ours, theirs in zip(("of the clock", "of the CPU"), zip(*here), zip(*there)):
        cells = statistics.median(ours), statistics.median(theirs), ratio(ours, theirs)
        print("{:18} {:8.1f} {:8.1f} {:8.3f}".format(what, *cells))


def memory(options="--epochs 0.2"):
    code = "import sys, train; train.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "--reports", "1", "--quiet", *options.split()]
    status = subprocess.run(command, cwd=ROOT, check=True, stdout=-1, text=True).stdout
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(f"`train.py`, {data.cores()} workers: peak memory {peak / 1e6:.0f} MB")


def engines(options="", batches=(128, 256, 512, 1024)):
    """Each case in processes of its own, started as the README says."""
    mpiexec = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment = os.environ | {"MPIR_CVAR_NOLOCAL": "1"}  # MPICH takes the network's way, as between machines
    cases = ["", *(f"--importance 0 --batch {batch}" for batch in batches)]
    print(f"ms a step: the main job's; with --importance 0 and batches of {', '.join(map(str, batches))}")
    for engine, workers in itertools.product(("threads", "mpi", "dask"), (1, 2)):
        times = []
        for case in cases:
            start, how = [sys.executable, __file__], f"--workers {workers}"
            if engine == "mpi":
                start, how = [mpiexec, "-n", str(workers + 1), sys.executable, "-m", "mpi4py.futures", __file__], ""
            start += ["engine_step", f"--engine {engine} {how} {case} {options}"]
            done = subprocess.run(start, env=environment, check=True, stdout=-1, text=True)
            times.append(f"{1e3 * float(done.stdout):8.1f}")
        print(f"{engine:10} {workers:7}{''.join(times)}")

    def counting(work, lists):
        found = [*map(work, lists)]
        there, back = (len(pickle.dumps(each)) for each in ((work, lists[0]), found))
        print(f"{case or 'the main job'}: {there:,} bytes to each of two workers a step, {back:,} back from both")
        return found

    for case in cases[:1] + cases[-1:]:
        next(train.steps(job(f"{case} {options}"), map_tasks=counting, workers=2))


def engine_step(options):
    """Prints the median of the seconds of a step of the main job."""
    with stepping(options) as one_step:
        times = [seconds(one_step) for _ in range(3 + ROUNDS)]
    print(statistics.median(times[3:]))


def main():
    functions = arithmetic, step, noise, scaling, memory, engines, slopes, against
    sections = {function.__name__: function for function in functions}
    chosen, arguments = sys.argv[1:] or [*sections][:-1], []
    if chosen[0] in ("slopes", "against"):
        chosen, arguments = chosen[:1], chosen[1:]
    for name in chosen:
        if name not in sections:
            raise ValueError(f"expected sections, of {', '.join(sections)}, found {name}")
    print(data.provenance())
    for name in chosen:
        print(f"\n--- {name}", flush=True)
        sections[name](*arguments)


if __name__ == "__main__":
    with train.command():
        engine_step(*sys.argv[2:]) if sys.argv[1:2] == ["engine_step"] else main()
