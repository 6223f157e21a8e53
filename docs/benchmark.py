"""Ratios, measured side by side in one run: `python docs/benchmark.py [SECTION ...]`.

What is compared takes turns, and the figure is the median of the ratios of neighbours: on a noisy machine
times drift, ratios hold. Everything but the workers and the memory is measured on one core.

arithmetic: flush-to-zero arithmetic in NumPy against the plain operation.
step: a step that measures all images against its own multiplications at the speed of np.matmul on square matrices, the
      share of each of its parts, and against the emulated flush, the control variate, importance sampling, backprop and
      the plain statement. Step and scaling are of the main job at its end, with docs/weights.npz.
noise: of the estimate, by the size of the blocks and the progress of the training.
scaling: with the batch, the width and the workers, 1 and 2 of them; and what the parts of a step say of up to 64.
memory: of all processes of `python train.py`, by their proportional shares (Linux).
engines: seconds a step, by engine, workers and batch, and the bytes that travel.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from unittest import mock

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a process
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


def in_turn(*functions, rounds=ROUNDS):
    """Seconds of each function in each round, [functions][rounds]."""
    for function in functions:
        function()
    return list(zip(*[[seconds(function) for function in functions] for _ in range(rounds)]))


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
        met += 2 * (above[l] + math.ceil(widths[l] / k) * sum(weights[l + 2 :]))  # members and mirror images
        met += (control_variate and k > 1) * above[l]  # predictions
    return 2 * met


def members(sizes, block):
    """Mutated networks evaluated an example."""
    return sum(2 * math.ceil(width / k) for width, k in zip(sizes[1:], block_sizes(sizes, block)))


def block_sizes(sizes, block):
    """Units mutated together, in each layer."""
    return [min(block, width) for width in sizes[1:-2]] + [1, 1][: len(sizes) - 1]


def job(options="", steps=None):
    """The main job in this process, for one worker: after some steps, or, if the sizes are its own, at its end."""
    run, *_ = train.begin(train.parse_args(options.split()), train.es, None)
    if steps is None and run.settings.sizes == fpnl.SIZES:
        run.weights[...] = train.flattened(data.load_weights(ROOT / "docs/weights.npz")[0])
    train.steps(run, 0, 5 if steps is None else steps)
    return run


def one_step(run):
    train.steps(run, 20, 21)


def step(options=""):
    some, run = job(options), job(f"--importance 0 {options}")
    s = run.settings
    A = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    work = multiplications(s.sizes, s.block, s.control_variate) * s.batch
    product = 2 * 512**3
    count = max(1, round(work / 20 / product))  # products that take some milliseconds

    def products():
        for _ in range(count):
            A @ A

    steps, references = in_turn(functools.partial(one_step, run), products)
    each, speed = statistics.median(steps) / s.batch, count * product / statistics.median(references)
    print(f"np.matmul, 512 x 512: {speed / 1e9:.0f} GFLOP/s")
    print(f"a step of {s.batch} examples, all measured, block {s.block}: {1e3 * s.batch * each:.0f} ms")
    print(f"an example: {1e6 * each:.0f} us, {members(s.sizes, s.block)} mutated networks, ", end="")
    print(f"{work / s.batch / 1e6:.2f} MFLOP of multiplications")
    print(f"mutated networks a second: {members(s.sizes, s.block) / each:,.0f}")
    print(f"the step / its own multiplications: {ratio(steps, references) * count * product / work:.2f}")
    print("\nshare of each part of the step, in percent")
    for part, share in shares(run).most_common():
        print(f"  {part:44} {100 * share:5.1f}")

    params = [(W.copy(), b.copy()) for W, b in run.params]
    x, y = data.pixels(run.sets[0][:128]), run.sets[1][:128]
    gradient = functools.partial(fpnl.es_gradient, params, x, y, np.random.default_rng(0), s.sigma, s.block)
    by_ftz = [functools.partial(gradient, ftz=ftz) for ftz in (True, "hardware", False)]
    emulated, hardware, off, varied = in_turn(*by_ftz, functools.partial(by_ftz[1], control_variate=True))
    plain = functools.partial(fpnl.es_gradient_plain, params, x[:1], y[:1], np.random.default_rng(0), s.sigma)
    plains, fasts = in_turn(plain, by_ftz[1], rounds=3)
    other = dataclasses.replace(run, method=controls.backprop)
    es, sampled, reverse = in_turn(*(functools.partial(one_step, each) for each in (run, some, other)))
    print("\nratios of times")
    print(f"  gradient, flush emulated / by the CPU        {ratio(emulated, hardware):8.2f}")
    print(f"  gradient, flush off / by the CPU             {ratio(off, hardware):8.2f}")
    print(f"  gradient, with the control variate / without {ratio(varied, hardware):8.2f}")
    print(f"  es_gradient_plain / es_gradient, an example  {ratio(plains, fasts) * len(x):8.0f}")
    print(f"  ES step / backprop step, all measured        {ratio(es, reverse):8.2f}")
    print(f"  the same, ES with importance sampling        {ratio(sampled, reverse):8.2f}")


def shares(run):
    """Share of the time of a step that each part takes itself, without the parts that it calls."""
    parts = [
        (train, "steps", "gradient products, order of the images"),
        (data, "pixels", "pixels to float32"),
        (run, "update", "AdamW"),
        (fpnl, "mutation_signs", "random signs"),
        (fpnl, "_task_slopes", "forward, mutations, slopes"),
        (fpnl, "_member_losses", "members of layer {}: products, flush, losses"),
    ]
    spent, inside = collections.Counter(), [0.0]

    def timed(original, part):
        def call(*args, **options):
            inside.append(0.0)
            start = time.perf_counter()
            result = original(*args, **options)
            whole = time.perf_counter() - start
            spent[part.format(args[1] + 1) if "{}" in part else part] += whole - inside.pop()
            inside[-1] += whole
            return result

        return call

    with contextlib.ExitStack() as stack:
        for module, name, part in parts:
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name), part)))
        for _ in range(5):
            one_step(run)
    return collections.Counter({part: time / spent.total() for part, time in spent.items()})


def noise(options="", steps=(0, 30, 120, 480), batches=12):
    """Standard deviation of the gradient over the mutations, in units of that over the batches."""
    run, blocks = job(options, steps=0), (1, 2, 4, 8, 16)
    print(f"steps of training, layer, control variate, then the noise with blocks of {', '.join(map(str, blocks))}")
    print("(the last two layers have none, nor has the prediction alone)")
    for done, target in itertools.pairwise((0, *steps)):
        train.steps(run, done, target)
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
        how = {"control_variate": control_variate, "ftz": run.net["ftz"]}
        rngs = np.random.default_rng((0, i)), np.random.default_rng((1, i))
        draws = [fpnl.es_gradient(run.params, x, y, rng, s.sigma, block, **how) for rng in rngs]
        drawn.append([[dW for dW, _ in grads[:-2]] for grads in draws])
    found = []
    for a, b in ([[draws[k][l] for draws in drawn] for k in (0, 1)] for l in range(len(s.sizes) - 3)):
        by_mutation = sum(np.sum((u - v) ** 2) for u, v in zip(a, b)) / 2 / batches
        mean = sum(a) / batches
        of_both = sum(np.sum((u - mean) ** 2) for u in a) / (batches - 1)
        found.append(math.sqrt(by_mutation / max(of_both - by_mutation, 1e-30)))
    return found


def scaling(options="", batches=(64, 128, 256, 512, 1024), widths=(256, 512, 1024, 2048)):
    run = job(options)
    args = train.parse_args(["--engine", "processes", "--workers", "2", *options.split()])
    with train.here(args, run) as (_, _, descend, _):
        two, one = in_turn(lambda: descend(20, 24, tick=time.time), lambda: train.steps(run, 20, 24))
    print(f"2 workers: {ratio(one, two):.2f} times the speed of 1")
    images, labels = data.pixels(run.sets[0][: max(batches)]), run.sets[1][: max(batches)]

    def gradients(n, width):
        """Of always the same examples, in batches of n, so that all cases find the caches alike."""
        params, rng = fpnl.init(np.random.default_rng(0), (784, width, width, 10)), np.random.default_rng(0)
        for start in range(0, len(images), n):
            x, y = images[start : start + n], labels[start : start + n]
            fpnl.es_gradient(params, x, y, rng, block=run.settings.block, ftz=run.net["ftz"])

    for what, values, cases in (
        ("batch", batches, [functools.partial(gradients, n, 512) for n in batches]),
        ("width", widths, [functools.partial(gradients, 128, width) for width in widths]),
    ):
        times = in_turn(*cases, rounds=5)
        each = [ratio(case, times[1]) for case in times]
        print(f"time an example, {what} {', '.join(map(str, values))}: {', '.join(f'{r:.2f}' for r in each)}", end="")
        print(f"; exponent of the last doubling {math.log2(each[-1] / each[-2]):.2f}")
    workers = (1, 2, 3, 4, 8, 16, 32, 64)
    print("\nwhat the parts of a step, measured on one core, make of it on N cores that do not hinder one another: its")
    print("milliseconds, and how many times the speed of 1; all of this memory is shared, so no bytes travel")
    print("batch task  serial  a task   bands   a wait" + "".join(f"{f'N = {n}':>15}" for n in workers))
    for batch, task in ((512, 128), (512, 64), (512, 32), (1024, 64)):
        with mock.patch.object(train, "TASK", task):
            model(job(f"{options} --batch {batch}"), workers)


def model(run, workers):
    """A row: every worker draws order and signs, has ceil(tasks / N) tasks and its bands, and waits twice. A wait is
    measured with two processes and taken to cost in proportion to their number, as each is woken in turn."""
    s = run.settings
    images = np.arange(s.batch)

    layers = [*zip(*(train.as_layers(flat, s.sizes) for flat in (run.weights, *run.moments)))]
    drawn, tasks, bands, some = [], [], [], train.measured_columns(run)
    for _ in range(ROUNDS):
        rng = np.random.default_rng(0)
        drawn.append(seconds(lambda rng=rng: fpnl.mutation_signs(rng, run.params, s.batch)))
        tasks.append(seconds(lambda: list(train.measure(run, 0, images, 0, 1))))
        bands.append([])
        for l, band in train.bands(s.sizes):
            began = time.perf_counter()
            weights, *moments = (array[band] for array in layers[l])
            fpnl.adamw(weights, train.gradient(run, l, band, some), *moments, 1000, 0.0)
            bands[-1].append(time.perf_counter() - began)
    count = math.ceil(s.batch / train.TASK)
    serial, bands = statistics.median(drawn), [statistics.median(column) for column in zip(*bands)]
    task, wait = (statistics.median(tasks) - serial) / count, waiting()
    shares = {n: max(sum(bands[rank::n]) for rank in range(n)) for n in workers}
    steps = {n: serial + math.ceil(count / n) * task + shares[n] + (n > 1) * wait * n for n in workers}
    parts = "".join(f"{1e3 * part:8.2f}" for part in (serial, task, sum(bands))) + f"{1e3 * wait:9.3f}"
    cells = "".join(f"{f'{1e3 * steps[n]:.1f} {steps[1] / steps[n]:5.1f}x':>15}" for n in workers)
    print(f"{s.batch:5} {train.TASK:4}{parts}{cells}")


def waiting(rounds=1000):
    """Seconds that a barrier takes of two processes."""
    barrier = multiprocessing.Barrier(2)
    other = multiprocessing.Process(target=wait_at, args=(barrier, rounds))
    other.start()
    wait_at(barrier, rounds // 2)
    found = seconds(functools.partial(wait_at, barrier, rounds // 2))
    other.join()
    return found / (rounds // 2)


def wait_at(barrier, rounds):
    for _ in range(rounds):
        barrier.wait()


def memory(options="--epochs 0.2"):
    """Peak of the sum over all processes of what each has of its own and its part of what they share."""
    command = [sys.executable, train.__file__, "--reports", "1", "--quiet", *options.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_bytes, family(process.pid))))
            time.sleep(0.05)
    print(f"`train.py`, {train.cores()} workers: peak memory {peak / 1e6:.0f} MB")


def engines(options="", batches=(128, 256, 512, 1024)):
    """Each case in processes of its own, started as the README says."""
    mpiexec = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    # The workers import train. MPICH takes the network's way on one machine too, as between machines.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPIR_CVAR_NOLOCAL": "1"}
    print(f"engine     workers   ms a step with batches of {', '.join(map(str, batches))}")
    for engine, workers in itertools.product(("processes", "mpi", "dask"), (1, 2)):
        times = []
        for batch in batches:
            start = [sys.executable, __file__]
            if engine == "mpi":
                start = [mpiexec, "-n", str(workers + 1), sys.executable, "-m", "mpi4py.futures", __file__]
            case = f"--engine {engine} --workers {workers} --batch {batch} {options}"
            done = subprocess.run([*start, "engine_step", case], env=environment, check=True, stdout=-1, text=True)
            times.append(f"{1e3 * float(done.stdout):8.1f}")
        print(f"{engine:10} {workers:7}{''.join(times)}")
    run = job(options, steps=0)
    sizes = run.settings.sizes
    there, back = 4 * run.weights.size, 4 * (sum(i + 1 for i in sizes[:-1]) + sum(sizes[1:]))
    print(f"between mpi or dask and its workers: {there:,} bytes to each a step, {back:,} back for each image")


def engine_step(options):
    """Prints the median of the seconds of a step of the main job."""
    args = train.parse_args(options.split())
    run, *_ = train.begin(args, train.es, None)
    crew = train.elsewhere if args.engine in train.REMOTE else train.here
    with crew(args, run) as (_, _, descend, _):
        times = [seconds(lambda k=k: descend(k, k + 1, tick=time.time)) for k in range(3 + ROUNDS)]
    print(statistics.median(times[3:]))


def family(pid):
    """A process and all that descend from it."""
    with contextlib.suppress(OSError):
        yield pid
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from family(int(child))


def proportional_bytes(pid):
    with contextlib.suppress(OSError):  # it may have ended
        return int(pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) * 1024
    return 0


def main():
    sections = {function.__name__: function for function in (arithmetic, step, noise, scaling, memory, engines)}
    for name in (chosen := sys.argv[1:] or [*sections]):
        if name not in sections:
            raise ValueError(f"expected sections, of {', '.join(sections)}, found {name}")
    print(data.provenance())
    for name in chosen:
        print(f"\n--- {name}")
        sections[name]()


if __name__ == "__main__":
    with train.command():
        engine_step(*sys.argv[2:]) if sys.argv[1:2] == ["engine_step"] else main()
