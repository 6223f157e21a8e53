"""Ratios, measured side by side in one run: `python docs/benchmark.py [SECTION ...]`.

What is compared takes turns, and the figure is the median of the ratios of neighbours: on a noisy machine
times drift, ratios hold. Everything but the workers and the memory is measured on one core.

arithmetic: flush-to-zero arithmetic in NumPy against the plain operation.
step: a step of the main job against its own multiplications at the speed of np.matmul on square matrices, the share of
      each of its parts, and against the emulated flush, the control variate, backprop and the plain statement.
noise: of the estimate, by the size of the blocks and the progress of the training.
scaling: with the batch, the width and the workers.
memory: of all processes of `python train.py`, by their proportional shares (Linux).
engines: seconds a step, by engine, workers and batch; a model fitted to them, and what it says of more machines.
"""

import collections
import contextlib
import functools
import itertools
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import types
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train  # noqa: E402, I001 (first: it keeps BLAS at one thread)

import numpy as np  # noqa: E402

import data  # noqa: E402
import fpnl  # noqa: E402

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
    met = 2 * sum(weights) + control_variate * sum(weights[1:])  # forward and gradient; predictions
    above = [*weights[1:], widths[-1] ** 2]  # members of the last layer are multiplied with the identity
    for l, k in enumerate(block_sizes(sizes, block)):
        met += 2 * (above[l] + math.ceil(widths[l] / k) * sum(weights[l + 2 :]))  # members and mirror images
    return 2 * met


def members(sizes, block):
    """Mutated networks evaluated an example."""
    return sum(2 * math.ceil(width / k) for width, k in zip(sizes[1:], block_sizes(sizes, block)))


def block_sizes(sizes, block):
    """Units mutated together, in each layer."""
    return [min(block, width) for width in sizes[1:-1]] + [1]


def job(options="", steps=20):
    """The main job in this process, for one worker, some steps after its start: all that `join` takes."""
    of_job, _ = train.prepare(train.parse_args(["--workers", "1", *options.split()]))
    train.join(*of_job)
    train.begin()
    for i in range(steps):
        one_step(i)
    return of_job


def one_step(number=20, run=map):
    batch = np.random.default_rng(number).integers(0, len(train.job.sets[0]), train.job.args.batch)
    train.descend(run, number, batch, train.job.args.lr)


def step(options=""):
    args, _, sizes, _ = job(options)
    A = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    work = multiplications(sizes, args.block, args.control_variate) * args.batch
    product = 2 * 512**3
    count = max(1, round(work / 20 / product))  # products that take some milliseconds

    def products():
        for _ in range(count):
            A @ A

    steps, references = in_turn(one_step, products)
    each, speed = statistics.median(steps) / args.batch, count * product / statistics.median(references)
    print(f"np.matmul, 512 x 512: {speed / 1e9:.0f} GFLOP/s")
    print(f"a step of {args.batch} examples, block {args.block}: {1e3 * args.batch * each:.0f} ms")
    print(f"an example: {1e6 * each:.0f} us, {members(sizes, args.block)} mutated networks, ", end="")
    print(f"{work / args.batch / 1e6:.2f} MFLOP of multiplications")
    print(f"mutated networks a second: {members(sizes, args.block) / each:,.0f}")
    print(f"the step / its own multiplications: {ratio(steps, references) * count * product / work:.2f}")
    print("\nshare of each part of the step, in percent")
    for part, share in shares(one_step).most_common():
        print(f"  {part:44} {100 * share:5.1f}")

    params = [(W.copy(), b.copy()) for W, b in train.as_params(train.job.weights, sizes)]
    x, y = data.pixels(train.job.sets[0][:128]), train.job.sets[1][:128]
    gradient = functools.partial(fpnl.es_gradient, params, x, y, np.random.default_rng(0), args.sigma, args.block)
    by_ftz = [functools.partial(gradient, ftz=ftz) for ftz in (True, "hardware", False)]
    emulated, hardware, off, varied = in_turn(*by_ftz, functools.partial(by_ftz[1], control_variate=True))
    plain = functools.partial(fpnl.es_gradient_plain, params, x[:1], y[:1], np.random.default_rng(0), args.sigma)
    plains, fasts = in_turn(plain, by_ftz[1], rounds=3)

    def backprop():
        train.job.args = types.SimpleNamespace(**vars(args) | {"method": "backprop"})
        one_step()
        train.job.args = args

    es, reverse = in_turn(one_step, backprop)
    print("\nratios of times")
    print(f"  gradient, flush emulated / by the CPU        {ratio(emulated, hardware):8.2f}")
    print(f"  gradient, flush off / by the CPU             {ratio(off, hardware):8.2f}")
    print(f"  gradient, with the control variate / without {ratio(varied, hardware):8.2f}")
    print(f"  es_gradient_plain / es_gradient, an example  {ratio(plains, fasts) * len(x):8.0f}")
    print(f"  ES step / backprop step                      {ratio(es, reverse):8.2f}")


def shares(function):
    """Share of the time of `function` that each part takes itself, without the parts that it calls."""
    parts = [
        (train, "gradient", "gradients into shared memory"),
        (train, "update", "sum of the gradients"),
        (data, "pixels", "pixels to float32"),
        (fpnl, "adamw", "AdamW"),
        (fpnl, "es_gradient", "gradient products"),
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
            function()
    return collections.Counter({part: time / spent.total() for part, time in spent.items()})


def noise(options="", steps=(0, 30, 120, 480), batches=12):
    """Standard deviation of the gradient over the mutations, in units of that over the batches."""
    args, _, sizes, _ = job(options, steps=0)
    images, labels = train.job.sets[:2]
    params = train.as_params(train.job.weights, sizes)
    print("steps of training, layer, then the noise with blocks of 1, 2, 4, 8, 16")
    for done, target in itertools.pairwise((0, *steps)):
        for number in range(done, target):
            one_step(number)
        ratios = []
        for block in (1, 2, 4, 8, 16):
            drawn = []  # [batches][2 draws of mutations][layers]
            for i in range(batches):
                rows = slice(i * args.batch, (i + 1) * args.batch)
                x, y = data.pixels(images[rows]), labels[rows]
                rngs = np.random.default_rng((0, i)), np.random.default_rng((1, i))
                options = {"control_variate": args.control_variate, "ftz": train.ftz()}
                draws = [fpnl.es_gradient(params, x, y, rng, args.sigma, block, **options) for rng in rngs]
                drawn.append([[dW for dW, _ in grads[:-1]] for grads in draws])
            for_layers = []
            for a, b in ([[draws[k][l] for draws in drawn] for k in (0, 1)] for l in range(len(sizes) - 2)):
                by_mutation = sum(np.sum((u - v) ** 2) for u, v in zip(a, b)) / 2 / batches
                mean = sum(a) / batches
                of_both = sum(np.sum((u - mean) ** 2) for u in a) / (batches - 1)
                for_layers.append(math.sqrt(by_mutation / max(of_both - by_mutation, 1e-30)))
            ratios.append(for_layers)
        for l, row in enumerate(zip(*ratios)):
            print(f"{target:6} {l + 1:6}      " + "".join(f"{value:8.2f}" for value in row))


def scaling(options="", batches=(64, 128, 256, 512, 1024), widths=(256, 512, 1024, 2048)):
    of_job = job(f"--workers 2 {options}")
    with train.workers(*of_job) as run:

        def steps(run, workers):
            train.job.args.workers = workers
            for _ in range(4):
                one_step(run=run)

        two, one = in_turn(functools.partial(steps, run, 2), functools.partial(steps, map, 1))
    print(f"2 workers: {ratio(one, two):.2f} times the speed of 1")
    images, labels = data.pixels(train.job.sets[0][: max(batches)]), train.job.sets[1][: max(batches)]

    def gradients(n, width):
        """Of always the same examples, in batches of n, so that all cases find the caches alike."""
        params, rng = fpnl.init(np.random.default_rng(0), (784, width, width, 10)), np.random.default_rng(0)
        for start in range(0, len(images), n):
            x, y = images[start : start + n], labels[start : start + n]
            fpnl.es_gradient(params, x, y, rng, block=of_job[0].block, ftz=train.ftz())

    for what, values, cases in (
        ("batch", batches, [functools.partial(gradients, n, 512) for n in batches]),
        ("width", widths, [functools.partial(gradients, 128, width) for width in widths]),
    ):
        times = in_turn(*cases, rounds=5)
        each = [ratio(case, times[1]) for case in times]
        print(f"time an example, {what} {', '.join(map(str, values))}: {', '.join(f'{r:.2f}' for r in each)}", end="")
        print(f"; exponent of the last doubling {math.log2(each[-1] / each[-2]):.2f}")


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
    """Each case in processes of its own, started as the README says; `predict` explains the model."""
    args, _, sizes, _ = job(options)
    split = shares(one_step)
    again = split["forward, mutations, slopes"] + split["gradient products"]  # what does not need the members' losses
    folder = str(train.RUNS.parents[1])
    mpiexec = shutil.which("mpiexec", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    # The workers import train. MPICH takes the network's way on one machine too, as between machines.
    environment = os.environ | {"PYTHONPATH": folder, "MPIR_CVAR_NOLOCAL": "1"}
    print(f"engine     workers   ms a step with batches of {', '.join(map(str, batches))}: measured; fitted")
    costs = {}
    for engine in ("processes", "mpi", "dask"):
        cases, terms, measured = [*itertools.product((1, 2), batches)], [], []
        for workers, batch in cases:
            start = [sys.executable, __file__]
            if engine == "mpi":
                start = [mpiexec, "-n", str(workers + 1), sys.executable, "-m", "mpi4py.futures", __file__]
            case = f"--engine {engine} --workers {workers} --batch {batch} {options}"
            done = subprocess.run([*start, "engine_step", case], env=environment, check=True, stdout=-1, text=True)
            slices = math.ceil(batch / train.SLICE)
            terms.append((math.ceil(slices / workers), workers, slices, 1))
            measured.append(float(done.stdout))
        costs[engine] = fit(terms, measured)
        for workers in (1, 2):
            rows = [i for i, case in enumerate(cases) if case[0] == workers]
            times = ["".join(f"{1e3 * row[i]:7.1f}" for i in rows) for row in (measured, terms @ costs[engine])]
            print(f"{engine:10} {workers:7}{times[0]}  ;{times[1]}")
        print("{:>18}c {:.1f} d {:.1f} r {:.1f} u {:.1f} ms".format("", *1e3 * costs[engine]))
    predict(costs["mpi"], again, sum((i + 1) * o for i, o in itertools.pairwise(sizes)), members(sizes, args.block))


def fit(terms, measured):
    """Costs with the least relative errors; one that comes out below 0 is noise, and the others are fitted without."""
    relative, kept = np.array(terms) / np.array(measured)[:, None], np.ones(len(terms[0]), bool)
    while True:
        costs = np.zeros(len(kept))
        costs[kept], *_ = np.linalg.lstsq(relative[:, kept], np.ones(len(measured)), rcond=None)
        if costs.min() >= 0:
            return costs
        kept[costs.argmin()] = False


def engine_step(options):
    """Prints the median of the seconds of a step of the main job, its weights those of the start."""
    with train.workers(*job(options, steps=0)) as run:
        times = [seconds(functools.partial(one_step, number, run)) for number in range(3 + ROUNDS)]
    print(statistics.median(times[3:]))


def predict(costs, again, weights, networks, latency=50e-6):
    """From which batch on N workers pay: do at least half of N times the images a second that one does alone.

    A step of s slices takes ceil(s/N) c + exchange + u seconds: c to compute a slice, u once a step. The exchange,
    w being the time of 4 bytes a weight on a link, of which every machine has one, to a switch:

        as it is       N (d + w) + s (r + w): d to send the weights to a worker, r to receive and add a slice's
                       gradient, as measured within this machine, which is processor time on any
        sums           N (d + w) + N (r + w): a worker adds the gradients of its slices
        all-reduce     d + r + 2 (N-1) (latency + w/N), in a ring, or 2 log2(N) (latency + w), in a tree, whichever
                       is less; the weights never travel
        shared seeds   N latency + the time of a loss difference for every pair of members on a link; but then every
                       worker makes the whole gradient of them, `again` being that share of c
    """
    c, d, r, u = costs

    def exchanges(s, n, link):
        w = 4 * weights / link
        return {
            "as it is": n * (d + w) + s * (r + w),
            "sums": n * (d + w) + n * (r + w),
            "all-reduce": d + r + 2 * min((n - 1) * (latency + w / n), math.log2(n) * (latency + w)),
            "shared seeds": n * latency
            + 4 * s * train.SLICE * networks / 2 / link
            + (s - math.ceil(s / n)) * c * again,
        }

    print("\nthe batch from which they pay, with the costs of mpi (in brackets: none, and the largest gain)")
    print("     link  workers" + "".join(f"{scheme:>18}" for scheme in exchanges(1, 1, 1)))
    for gigabits, n in itertools.product((1, 10, 100), (10, 100, 1000)):
        gains = collections.defaultdict(dict)
        for s in (n * 2**k for k in range(20)):
            for scheme, exchange in exchanges(s, n, gigabits * 1e9 / 8).items():
                gains[scheme][s] = (s * c + u) / (math.ceil(s / n) * c + exchange + u)
        pays = [[s for s, gain in gain_of.items() if gain >= n / 2] for gain_of in gains.values()]
        cells = [
            f"{train.SLICE * s[0]:,}" if s else f"({max(gain_of.values()):.1f} times)"
            for s, gain_of in zip(pays, gains.values())
        ]
        print(f"{gigabits:4} Gb/s {n:8}" + "".join(f"{cell:>18}" for cell in cells))


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


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine_step"]:
        sys.exit(engine_step(*sys.argv[2:]))
    print(train.provenance())
    for section in sys.argv[1:] or ("arithmetic", "step", "noise", "scaling", "memory", "engines"):
        print(f"\n--- {section}")
        globals()[section]()
