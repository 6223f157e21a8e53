#!/usr/bin/env python3
"""The main job's network, trained by backprop that knows the dead zone and by population ES: in a few lines of this
project, by evosax and by evotorch.

    pip install -e '.[peers]'
    python docs/peers.py docs/runs                      # the main job and all peers, 300 seconds each
    python docs/peers.py docs/runs --peers signs-hour --seconds 3600
    python docs/peers.py docs/runs/hour --peers main open-es-hour --seconds 3600
    python docs/peers.py docs/runs/race --peers main deadzone deadzone-long deadzone-some --seeds 0 1 2
    python docs/peers.py runs --validation 5000 --seconds 60 --peers signs --members 16 64 256 --sigma 0.01 0.02

Population ES mutates all 669,706 weights at once and looks at the loss of a batch, the same for all members of a step.
Each trainer has the same network, with the same flush, all cores of this machine and the same seconds. Its clock stands
still while it compiles and while `fpnl.forward` evaluates its weights on the test set (or what is held out). A log a
trainer goes to the folder; the last lines say how long each took to an accuracy, and how many times as long as the
main job. With several values of an option, all combinations are run: so the settings below were chosen.

The flush of a framework is looked at first, in the program that is timed: XLA folds (z / S) * S into z, and there the
dead zone is a mask, z where |z| >= 1/2, else 0.
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import os
import pathlib
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "examples"))
import controls
import numpy as np

import data
import fpnl
import train

MARKS = 0.80, 0.85, 0.90, 0.967, 0.975


# --- Trainers: generators of functions that return weights [(W, b), ...], a step apart --------------------------------


def loop(row, sets, options, seed, **settings):
    """A row of controls.py, by the loop of train.py, with other settings if there are some."""
    _, method, transfer, chosen = controls.ROWS[row]
    given = [f"--{name.replace('_', '-')}={value:g}" for name, value in settings.items()]
    args = train.parse_args([*chosen.split(), *given, *options, "--seed", str(seed)])
    run = train.begin(args, method, transfer)
    with train.engine(args) as (map_pieces, map_tasks, _, lists):
        for _ in train.steps(run, map_pieces, map_tasks=map_tasks, workers=lists):
            yield lambda: run.params


def population(draw, sets, seed, members, sigma, lr, weight_decay, batch, steps=math.inf, **_):
    """g = E[(L(w + sigma e) - L(w - sigma e)) e] / (2 sigma) over pairs of members, a share of them a thread; AdamW."""
    rng, threads = np.random.default_rng(seed), data.cores()
    w = controls.flattened(fpnl.init(rng))
    m, v = np.zeros_like(w), np.zeros_like(w)

    def share(x, y, pairs, rng):
        g = np.zeros_like(w)
        for e in (draw(rng, w.size) for _ in range(pairs)):
            losses = [np.mean(fpnl.cross_entropy(network(w + step * e, x), y)) for step in np.float32([sigma, -sigma])]
            g += (losses[0] - losses[1]) * e
        return g

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for step in itertools.count(1):
            images = rng.integers(0, len(sets[1]), batch)
            x, y = data.pixels(sets[0][images]), sets[1][images]
            pairs = [len(part) for part in np.array_split(np.arange(members // 2), threads)]
            g = sum(pool.map(functools.partial(share, x, y), pairs, rng.spawn(threads)))
            rate = lr * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
            fpnl.adamw(w, g / np.float32(2 * sigma * (members // 2)), m, v, step, rate, weight_decay)
            yield lambda: controls.as_params(w, fpnl.SIZES)


def network(w, x):
    return fpnl.forward(controls.as_params(w, fpnl.SIZES), x, ftz="hardware")


def random_signs(rng, n):
    return np.unpackbits(np.frombuffer(rng.bytes(-(-n // 8)), np.uint8), count=n) * np.float32(2) - np.float32(1)


def gaussians(rng, n):
    return rng.standard_normal(n, np.float32)


def evosax(name, sets, seed, members, sigma, lr, weight_decay, batch, steps=math.inf, **_):
    import jax
    import jax.numpy as jnp
    import optax
    from evosax import algorithms

    t = flush_of("evosax", lambda z: z / fpnl.SCALE * fpnl.SCALE, jnp.asarray, jax.jit)
    start = [(jnp.asarray(W), jnp.asarray(b)) for W, b in fpnl.init(np.random.default_rng(seed))]
    schedule = {"std_schedule": optax.constant_schedule(sigma)} if name == "Open_ES" else {}
    rate = optax.cosine_decay_schedule(lr, steps)
    es = getattr(algorithms, name)(members, start, optimizer=optax.adamw(rate, weight_decay=weight_decay), **schedule)
    how = es.default_params.replace(std_init=sigma) if name != "Open_ES" else es.default_params

    @jax.jit
    def step(key, state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(outputs(params, x, t), y).mean()

        ask, tell = jax.random.split(key)
        found, state = es.ask(ask, state, how)
        return es.tell(tell, found, jax.lax.map(loss, found), state, how)[0]

    def weights(state):
        return [(np.asarray(W), np.asarray(b)) for W, b in es.get_mean(state)]

    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    state = es.init(key, start, how)
    for i in itertools.count():
        images = rng.integers(0, len(sets[1]), batch)
        x, y = data.pixels(sets[0][images]), sets[1][images].astype(np.int32)
        state = jax.block_until_ready(step(jax.random.fold_in(key, i), state, x, y))
        yield functools.partial(weights, state)


def evotorch(name, sets, seed, members, sigma, lr, batch, **_):
    import logging

    import evotorch.algorithms
    import torch

    logging.getLogger("evotorch").setLevel(logging.WARNING)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    scale, rng = torch.tensor(fpnl.SCALE), np.random.default_rng(seed)
    t = flush_of("evotorch", lambda z: z / scale * scale, torch.from_numpy)
    shapes = [shape for i, o in itertools.pairwise(fpnl.SIZES) for shape in ((i, o), (o,))]

    class Losses(evotorch.Problem):
        def _evaluate_batch(self, members):
            images = rng.integers(0, len(sets[1]), batch)
            x, y = torch.from_numpy(data.pixels(sets[0][images])), torch.from_numpy(sets[1][images].astype(np.int64))
            losses = []
            for w in members.values:
                flat = zip(w.split([math.prod(shape) for shape in shapes]), shapes)
                parts = [part.reshape(shape) for part, shape in flat]
                losses.append(torch.nn.functional.cross_entropy(outputs([*zip(parts[::2], parts[1::2])], x, t), y))
            members.set_evals(torch.stack(losses))

    start = torch.from_numpy(controls.flattened(fpnl.init(rng)))
    how = {"popsize": members, "stdev_init": sigma, "center_init": start, "center_learning_rate": lr}
    how |= {"stdev_learning_rate": 0.1, "optimizer": "adam"} if name == "PGPE" else {}
    problem = Losses("min", solution_length=len(start), dtype=torch.float32)
    searcher = getattr(evotorch.algorithms, name)(problem, **how)
    while True:
        searcher.step()
        yield lambda: controls.as_params(searcher.status["center"].clone().numpy(), fpnl.SIZES)


def outputs(params, x, t):
    """The network in units of 1/S, in any framework; its later biases flush before they are added."""
    (W, b), *later = params
    h = t(x @ W + b)
    for W, _ in later:
        h = t(h @ W)
    return h


def flush_of(name, scaled, array, compiled=lambda function: function):
    """`scaled`, z / S * S in a framework, if it flushes in its programs and in all its threads, else the dead zone.

    Raises RuntimeError if the framework's network is not that of fpnl.forward.
    """
    rng = np.random.default_rng(0)
    z, params, x = rng.uniform(-1, 1, 1 << 20).astype(np.float32), fpnl.init(rng), rng.random((256, 784), np.float32)
    good = np.array_equal(compiled(scaled)(array(z)), controls.dead_zone(z))
    print(f"{name}: z / S * S {'flushes' if good else 'does not flush: a mask'}", flush=True)
    t = scaled if good else controls.dead_zone
    ours = [(array(W), array(b)) for W, b in params]
    found = np.asarray(compiled(lambda x: outputs(ours, x, t))(array(x)))
    error = np.abs(found - fpnl.forward(params, x))
    if np.mean(error > 1e-4) > 0.01:  # a sum at the threshold may fall on either side
        raise RuntimeError(f"{name}: expected the outputs of fpnl.forward, found others, {error.max()} away")
    return t


POPULATION = {"members": 64, "sigma": 0.02, "lr": 3e-3, "weight_decay": 0, "batch": 256}
# Of an hour, in which the rate falls as half a cosine.
SIGNS_HOUR, OPEN_ES_HOUR = POPULATION | {"members": 256, "steps": 4600}, POPULATION | {"steps": 4500}
EVOTORCH = {"members": 64, "sigma": 0.02, "lr": 1e-2, "batch": 256}
BACKPROP = {"batch": 512, "lr": 2e-3, "weight_decay": 1, "beta2": 0.999, "epochs": 6}
LONGER = BACKPROP | {"lr": 3e-3, "epochs": 14}
PEERS = {  # name of the log: row of the table, trainer, its settings; of the main job, its own
    "main": ("the main job", functools.partial(loop, "es"), {}),
    "deadzone": ("backprop that knows the dead zone", functools.partial(loop, "deadzone"), BACKPROP),
    "deadzone-long": ("the same, for more epochs", functools.partial(loop, "deadzone"), LONGER),
    "deadzone-some": ("backprop, dead zone, importance sampling", functools.partial(loop, "deadzone-some"), BACKPROP),
    "signs": ("population ES, signs", functools.partial(population, random_signs), POPULATION),
    "signs-256": ("population ES, signs", functools.partial(population, random_signs), POPULATION | {"members": 256}),
    "gaussians": ("population ES, Gaussians", functools.partial(population, gaussians), POPULATION),
    "open-es": ("evosax Open_ES", functools.partial(evosax, "Open_ES"), POPULATION),
    "pgpe": ("evosax PGPE", functools.partial(evosax, "PGPE"), POPULATION | {"members": 128, "lr": 1e-2}),
    "torch-pgpe": ("evotorch PGPE", functools.partial(evotorch, "PGPE"), EVOTORCH),
    "torch-snes": ("evotorch SNES", functools.partial(evotorch, "SNES"), EVOTORCH | {"lr": 3}),
    "open-es-hour": ("evosax Open_ES", functools.partial(evosax, "Open_ES"), OPEN_ES_HOUR),
    "signs-hour": ("population ES, signs", functools.partial(population, random_signs), SIGNS_HOUR),
}


# --- The race -----------------------------------------------------------------------------------------


def race(steps, seconds, images, labels, write):
    """Rows (seconds, accuracy) of a trainer, whose first two steps, in which it compiles, are not counted."""
    next(steps), next(steps)
    spent, looked, rows = 0.0, 0.0, []
    while spent < seconds:
        began = time.perf_counter()
        weights = next(steps, None)
        spent += time.perf_counter() - began
        if weights is None:
            break
        if spent >= min(1.05 * looked + 0.2, seconds):
            forward = functools.partial(fpnl.forward, weights(), ftz="hardware")
            rows.append((spent, controls.accuracy(forward, images, labels)))
            write(*rows[-1])
            looked = spent
    return rows


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.error = train.fail
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="for the logs")
    short = [name for name in PEERS if "hour" not in name]
    add("--peers", nargs="+", choices=PEERS, default=short, metavar="NAME", help=f"of {', '.join(PEERS)}")
    add("--seconds", type=train.LONG, default=300, help="of each (default: 300)")
    says = "hold out so many training images, and evaluate on them"
    add("--validation", type=train.number(int, 0, 1e6), default=0, help=says)
    add("--seeds", type=train.number(int, 0, math.inf), nargs="+", default=[0], help="one after the other")
    add("--marks", type=train.SHARE, nargs="+", default=MARKS, help="accuracies to be timed (default: %(default)s)")
    kinds = {name: train.COUNT for name in ("members", "batch", "steps")}
    kinds |= {name: train.SIZE for name in ("sigma", "lr", "weight_decay", "beta2", "epochs")}
    for name, kind in kinds.items():
        says = "instead of the settings chosen; several: all combinations"
        add(f"--{name.replace('_', '-')}", type=kind, nargs="+", help=says)
    args = parser.parse_args()
    if odd := [n for n in args.members or [] if n % 2]:
        raise ValueError(f"--members: expected even numbers, for pairs, found {odd}")
    args.folder.mkdir(parents=True, exist_ok=True)
    *sets, images, labels = data.load(validation=args.validation)
    reached, ended = {}, {}
    for seed, name in itertools.product(args.seeds, args.peers):
        says, trainer, chosen = PEERS[name]
        given = {option: values for option in chosen if (values := getattr(args, option))}
        for values in itertools.product(*given.values()):
            settings = chosen | dict(zip(given, values))
            label = ", ".join([says, *(f"{k} {v:g}" for k, v in settings.items())])
            options = ["--validation", str(args.validation)]
            steps = trainer(sets=sets, options=options, seed=seed, **settings)
            held = "validation" if args.validation else "test"
            log = data.open_log(args.folder / f"peers-{name}-{seed}.csv", {"trainer": label}, ("seconds", held))
            with log as write:
                rows = race(steps, args.seconds, images, labels, write)
            steps.close()
            found = [next((at for at, score in rows if score >= mark), math.inf) for mark in args.marks]
            reached.setdefault(label, []).append(found)
            ended.setdefault(label, []).append(rows[-1][0])
            print(f"{label:85} {100 * rows[-1][1]:6.2f} after {rows[-1][0]:4.0f} s", flush=True)
    reached, ended = ({label: np.mean(of_seeds, axis=0) for label, of_seeds in of.items()} for of in (reached, ended))
    base = reached.get(PEERS["main"][0])
    print(
        f"\n{f'seconds to an accuracy of, mean of {len(args.seeds)} seeds':85}"
        + "".join(f"{m:>19.1%}" for m in args.marks)
    )
    for label, seconds in reached.items():
        least = [("" if at < math.inf else "> ", min(at, ended[label])) for at in seconds]
        cells = [f"{more}{at:.1f}" for more, at in least]
        if base is not None and max(base) < math.inf:
            cells = [f"{cell} ({more}{at / own:.3g}x)" for cell, (more, at), own in zip(cells, least, base)]
        print(f"{label:85}" + "".join(f"{cell:>19}" for cell in cells))


if __name__ == "__main__":
    with train.command():
        main()
