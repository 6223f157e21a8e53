#!/usr/bin/env python3
"""The network of the main job, trained in every other way, by the same loop.

    python examples/controls.py runs                            # all rows, three seeds; says first how long that takes
    python examples/controls.py runs --rows es relu --seeds 1   # some of them
    python examples/controls.py runs --validation 5000 --workers 8      # other options are those of train.py, for each

Each run leaves its log and weights in the folder; the ES-trained weights are then evaluated under other arithmetic. The
last lines are a table, mean and standard deviation over the seeds. Settings of the controls were chosen on
`--validation 5000` (docs/RESULTS.md).

A control is another function in the place of `train.es`. It makes a `gradient`, whose slopes are derivatives: those are
here, and gates.py and linearized.py use them, too.
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent))
import numpy as np

import data
import fpnl
import train

EXPONENTS = range(127)  # of the scales that the trained weights are evaluated with
EPSILON = np.float32(0.05)  # of an interval of logits


# --- Reverse mode --------------------------------------------------------------------------------------


def forward(params, x, transfer):
    """Inputs [n, fan_in] and sums [n, width] of each layer, in any precision; the last sums are the outputs."""
    inputs, sums = [x], []
    for W, b in params:
        sums.append(inputs[-1] @ W + b)
        inputs.append(transfer(sums[-1]))
    return inputs[:-1], sums


def backward(params, derivatives, delta):
    """From dL/dz of the last layer, [..., n, width], and dh/dz [n, width] of the hidden ones: dL/dz of each layer."""
    deltas = [delta]
    for (W, _), derivative in reversed([*zip(params[1:], derivatives)]):
        deltas.insert(0, deltas[0] @ W.T * derivative)
    return deltas


def softmax_error(logits, labels, smoothing=0):
    """dL/do of each image's cross-entropy, [n, classes]: softmax minus the label, one-hot but for a smoothed share."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(p)), labels] -= 1 - smoothing
    return p - p.dtype.type(smoothing / p.shape[1])


def gradient(settings, biases, slopes, *batch, **how):
    """From other slopes than those of ES; the biases of so many layers learn. For the rest, see `in_tasks`.

    slopes : a function of params, x and labels, which returns the outputs [n, width] of each layer, the last the
        logits, and the slopes [n, width] of each image's loss along its sums. More images are taken together than by
        ES, whose products are larger.
    """
    of_task = functools.partial(weighted, slopes, biases, settings.smoothing)
    return in_tasks(of_task, 4 * settings.task, *batch, **how)


def in_tasks(of_task, size, params, x, labels, rng, weights, return_losses, **mapping):
    """As `fpnl.es_gradient` returns it, with the losses. Each task has a gradient of its own, so that workers share all
    products: `of_task` makes it, and the losses, of some images and of a random stream that is theirs alone."""
    count = min(len(x), 2 * math.ceil(len(x) / (2 * size)))  # mostly even: an odd one leaves one of two workers idle
    parts = zip(*(np.array_split(rows, count) for rows in (x, labels, weights)), rng.spawn(count))
    tasks = [{"params": params} | dict(zip(("x", "labels", "weights", "rng"), part)) for part in parts]
    grads, losses = zip(*fpnl.mapped(of_task, tasks, **mapping))
    return [tuple(map(sum, zip(*layer))) for layer in zip(*grads)], np.concatenate(losses)


def weighted(slopes, biases, smoothing, params, x, labels, weights, rng):
    """Gradient of sum_i w_i L_i, and the losses; nothing is random."""
    outputs, found = slopes(params, x, labels)
    found = [weights[:, None] * s for s in found]
    grads = [(a.T @ s, s.sum(axis=0) * (l < biases)) for l, (a, s) in enumerate(zip([x, *outputs], found))]
    return grads, fpnl.cross_entropy(outputs[-1], labels, smoothing)


def flattened(params):
    """A copy of all weights and biases in one array: W1, b1, W2, b2, ..."""
    return np.concatenate([a.ravel() for a in fpnl.leaves(params)])


def as_params(flat, sizes):
    """The inverse: [(W, b), ...], views of the flat array."""
    ends = np.cumsum([(i + 1) * o for i, o in itertools.pairwise(sizes)])
    layers = [part.reshape(-1, o) for part, o in zip(np.split(flat, ends[:-1]), sizes[1:])]
    return [(layer[:-1], layer[-1]) for layer in layers]


# --- Methods: what drives the weights ------------------------------------------------------------------


def backprop(settings, net):
    """Every derivative is 1: right for a linear network (transfer=np.positive), blind to the flush of another."""
    slopes = functools.partial(chain, np.ones_like, np.ones_like, settings, net)
    return functools.partial(gradient, settings, len(settings.sizes), slopes)


def deadzone(settings, net):
    """The derivative of a flush is 0 where a unit is dead, and 0 for the later biases."""
    return functools.partial(gradient, settings, 1, functools.partial(chain, live, live, settings, net))


def relu(settings, net):
    """Of a ReLU network; its logits are linear."""
    slopes = functools.partial(chain, live, np.ones_like, settings, net)
    return functools.partial(gradient, settings, len(settings.sizes), slopes)


def prediction(settings, net):
    """The control variate alone."""
    return functools.partial(gradient, settings, 1, functools.partial(predicted, settings))


live = functools.partial(np.not_equal, 0)


def chain(of_hidden, of_last, settings, net, params, x, labels):
    """By the chain rule, from what makes derivatives out of the outputs of a layer."""
    *hidden, logits = fpnl.activations(params, x, **net)
    delta = softmax_error(logits, labels, settings.smoothing) * of_last(logits)
    return [*hidden, logits], backward(params, map(of_hidden, hidden), delta)


def predicted(settings, params, x, labels):
    """The chain rule, in which the movement of a unit's own output across +-sigma |a|, c_j / (2 sigma |a|), is its
    derivative; what the loss does along the outputs of the last layer is measured, over +-EPSILON.

    That interval does not grow with |a|. The slopes of `fpnl.es_slopes`, over +-sigma |a|, do not add up to 0, as the
    derivatives of cross-entropy along all logits do: if all move alike, it stays. The chain rule takes what is left for
    a reason to move all logits, no loss contradicts, |a| grows and with it what is left: on Fashion-MNIST the network
    fell apart.
    """
    inputs, sums = forward(params, x, dead_zone)
    sizes = [np.sum(a * a, axis=1, keepdims=True) + (l == 0) for l, a in enumerate(inputs)]
    shifts = [np.float32(settings.sigma) * np.sqrt(size) for size in sizes]  # 0 where the input is: then 0 / TINY
    up, down = ([dead_zone(z + sign * s) for z, s in zip(sums, shifts)] for sign in (1, -1))
    *derivatives, last = ((a - b) / np.maximum(2 * s, fpnl.TINY) for a, b, s in zip(up, down, shifts))
    outputs = [*inputs[1:], dead_zone(sums[-1])]
    steps = EPSILON * np.eye(outputs[-1].shape[1], dtype=np.float32)[:, None]
    losses = [fpnl.cross_entropy(outputs[-1] + sign * steps, labels, settings.smoothing) for sign in (1, -1)]
    delta = (losses[0] - losses[1]).T / (2 * EPSILON) * last
    return outputs, backward(params, derivatives, delta)


def dead_zone(z):
    """What a flush does to z / S, in units of 1/S; of any framework's array."""
    return z * (abs(z) >= 0.5)


def rectify(z):
    return np.maximum(z, np.float32(0))


# --- The comparison ------------------------------------------------------------------------------------

BACKPROP = "--batch 256 --lr 1e-3 --beta2 0.999"
WHOLE = f"{BACKPROP} --importance 0"
DEADZONE = f"{BACKPROP} --epochs 20 --weight-decay 0.3"
LINEAR = f"{WHOLE} --flush off --weight-decay 0"
ROWS = {  # name of the log: row of the table, method, transfer, options of train.py
    "linear": ("linear network, backprop", backprop, np.positive, f"{LINEAR} --epochs 8"),
    "logistic": ("logistic regression", backprop, np.positive, f"{LINEAR} --hidden --epochs 20 --lr 3e-3"),
    "es-off": ("ES, gradual underflow", train.es, None, "--flush off"),
    "es": ("ES, flush to zero: the main job", train.es, None, ""),
    "es-all": ("ES, every image measured", train.es, None, "--importance 0"),
    "es-cv": ("ES with the control variate", train.es, None, "--control-variate"),
    "prediction": ("the prediction alone", prediction, None, ""),
    "blind": ("backprop, blind to the flush", backprop, None, f"{WHOLE} --epochs 20 --weight-decay 0.1"),
    "deadzone": ("backprop that knows the dead zone", deadzone, None, f"{DEADZONE} --importance 0"),
    "deadzone-some": ("backprop, dead zone, importance sampling", deadzone, None, DEADZONE),
    "relu": ("ReLU network, backprop", relu, rectify, f"{WHOLE} --flush off --epochs 20 --weight-decay 0.1"),
}
POST = {"es": "> 99 / 96.7", "linear": "94 / 92"}


def compare(folder, rows, seeds, options):
    """Run everything, a seed after the other; print a table of train and test accuracy in percent."""
    held_out = "validation" if train.parse_args(options).validation else "test"
    tasks = {(seed, row): arguments(folder, row, seed, options) for seed in range(seeds) for row in rows}
    minutes = seeds * sum(seconds(tasks[0, row], *ROWS[row][1:3]) for row in rows) / 60
    print(f"{len(tasks)} runs, at most about {minutes:.0f} minutes; logs and weights go to {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    table, post = {}, {}
    for (seed, row), args in tasks.items():
        says, method, transfer, _ = ROWS[row]
        print(f"\n{says}, seed {seed}")
        trained, held = train.train(args, train.begin(args, method, transfer))
        table.setdefault(says, []).append((trained[1], held[1]))
        post[says] = POST.get(row, "")
        if row == "es":
            for name, score in under_other_arithmetic(args, folder / f"scale-{seed}.csv", held_out):
                table.setdefault(f"  its weights, {name}", []).append(score)
    print_table(table, held_out, {says: f"   {found}" for says, found in post.items()}, "   the post")


def print_table(table, held_out, notes, title=""):
    """Of {row: [(train, other) of each seed, ...]} mean and standard deviation, and a note a row."""
    seeds = max(map(len, table.values()))
    print(f"\n{f'accuracy in percent, {seeds} seeds':44} {'train':>14} {held_out:>14}{title}")
    for says, scores in table.items():
        columns = [[100 * score for score in column] for column in zip(*scores)]
        cells = [f"{statistics.mean(c):7.2f} ± {statistics.stdev(c) if c[1:] else 0:4.2f}" for c in columns]
        print(f"{says:44} {cells[0]} {cells[1]}{notes.get(says, '')}")


def arguments(folder, row, seed, options):
    files = ["--log", f"{folder / row}-{seed}.csv", "--save", f"{folder / row}-{seed}.npz"]
    return train.parse_args([*ROWS[row][3].split(), *options, "--seed", str(seed), *files])


def seconds(args, method, transfer, steps=3):
    """That a run will take, its reports left out: from its first steps, in which nearly all images are measured."""
    run = train.begin(args, method, transfer)
    with train.engine(args) as (map_pieces, map_tasks, _, lists):
        loop = train.steps(run, map_pieces, map_tasks=map_tasks, workers=lists)
        next(loop)
        began = time.perf_counter()
        done = len([*itertools.islice(loop, steps)])
        return (time.perf_counter() - began) / max(done, 1) * run.settings.steps


def under_other_arithmetic(args, log, held_out):
    """(name, accuracy on both sets) of the same weights in networks that differ in nothing but their arithmetic."""
    params, _ = data.load_weights(args.save)
    sets, network = data.load(args.data, args.validation), functools.partial(fpnl.forward, params)
    W, b = np.eye(sets[0].shape[1]), np.zeros(sets[0].shape[1])
    for V, c in params:
        W, b = W @ V.astype(float), b @ V.astype(float) + c
    flat = functools.partial(fpnl.forward, [(W.astype(np.float32), b.astype(np.float32))], transfer=np.positive)
    networks = {"flush off": functools.partial(network, ftz=False), "flattened to one matrix": flat}
    if args.flush == "hardware":
        networks["the CPU's own flush"] = functools.partial(network, ftz="hardware")
        ours, cpu = (logits(f, sets[2]).view("u4") for f in (network, networks["the CPU's own flush"]))
        print(f"logits that differ between the emulation and the CPU's flags: {np.sum(ours != cpu)} of {ours.size}")
    with open(log, "w", encoding="utf-8", errors="backslashreplace") as file:
        print(f"# {args.save} with every scale at S\nlog2S,{held_out}", file=file)
        for exponent in EXPONENTS:
            scaled = functools.partial(network, scale=np.float32(2.0**exponent))
            print(exponent, accuracy(scaled, *sets[2:]), sep=",", file=file)
    return [(name, [accuracy(f, *sets[i : i + 2]) for i in (0, 2)]) for name, f in networks.items()]


def accuracy(network, images, labels):
    return np.mean(logits(network, images).argmax(axis=1) == labels)


def logits(network, images):
    pieces = (data.pixels(images[i : i + 1000]) for i in range(0, len(images), 1000))
    return np.concatenate([*map(network, pieces)])


def main():
    says = "Train the network in every other way. Other options are those of train.py, for each run."
    parser = argparse.ArgumentParser(description=says, allow_abbrev=False)
    parser.error = train.fail
    parser.add_argument("folder", type=pathlib.Path, help="for logs and weights")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=train.COUNT, default=3, metavar="N", help="0, 1, ... of them (default: 3)")
    args, options = parser.parse_known_args()
    with train.command():
        given = train.parse_args(options)
        if given.seed or any((given.log, given.save, given.resume, given.evaluate)):
            says = "expected other options than --seed, --log, --save, --resume, --evaluate"
            raise ValueError(f"{says}, found {options}")
        try:
            compare(args.folder, args.rows, args.seeds, options)
        except KeyboardInterrupt as stop:
            train.fail(f"interrupted: what is done is in {args.folder}", "", 128 + (*stop.args, train.signal.SIGINT)[0])


if __name__ == "__main__":
    import controls  # by this name its functions are known to workers elsewhere

    controls.main()
