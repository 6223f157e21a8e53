#!/usr/bin/env python3
"""The network of the main job, trained in every other way, by the same loop.

    python examples/controls.py runs                            # all rows, three seeds; says first how long that takes
    python examples/controls.py runs --rows es relu --seeds 1   # some of them
    python examples/controls.py runs --validation 5000 --workers 8      # other options are those of train.py, for each

Each run leaves its log and weights in the folder; the ES-trained weights are then evaluated under other arithmetic. The
last lines are a table, mean and standard deviation over the seeds. Settings of the controls were chosen on
`--validation 5000` (docs/RESULTS.md).

A control is another function in the place of `train.es`: it returns the inputs [fan_in + 1, n] of each layer, the last
row 1 if its bias learns, else 0, and the slopes [width, n] of the loss along its sums. The derivatives are here;
gates.py and linearized.py use `forward` and `backward`, too.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a worker
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import numpy as np

import data
import fpnl
import train

EXPONENTS = range(128)  # of the scales that the trained weights are evaluated with


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


# --- Methods: what drives the weights ------------------------------------------------------------------


def backprop(settings, net, params, x, labels, signs):
    """Every derivative is 1: right for a linear network (transfer=np.positive), blind to the flush of another."""
    return chain(settings, net, params, x, labels, lambda hs: [1] * len(hs), len(params))


def deadzone(settings, net, params, x, labels, signs):
    """The derivative of a flush is 0 where a unit is dead, and 0 for the later biases."""
    return chain(settings, net, params, x, labels, lambda hs: [h != 0 for h in hs], 1)


def relu(settings, net, params, x, labels, signs):
    """Of a ReLU network; its logits are linear."""
    return chain(settings, net, params, x, labels, lambda hs: [h != 0 for h in hs[:-1]] + [1], len(params))


def prediction(settings, net, params, x, labels, signs):
    """The control variate alone: members of the logits only, and below them the chain rule, in which the movement of
    a unit's own output across +-sigma |a|, c_j / (2 sigma |a|), is its derivative."""
    inputs, sums = forward(params, x, dead_zone)
    sizes = [np.sum(a * a, axis=1, keepdims=True) + (l == 0) for l, a in enumerate(inputs)]
    shifts = [np.float32(settings.sigma) * np.sqrt(size) for size in sizes]  # 0 where the input is: then 0 / TINY
    up, down = ([dead_zone(z + sign * s) for z, s in zip(sums, shifts)] for sign in (1, -1))
    *derivatives, _ = ((a - b) / np.maximum(2 * s, fpnl.TINY) for a, b, s in zip(up, down, shifts))
    members = np.tile(dead_zone(sums[-1]), (2, sums[-1].shape[1], 1, 1))  # [mirror, logit, n, classes]
    for j in range(members.shape[1]):
        members[:, j, :, j] = up[-1][:, j], down[-1][:, j]
    losses = train.losses(settings)(members, labels)
    delta = (losses[0] - losses[1]).T / np.maximum(2 * shifts[-1], fpnl.TINY)
    return in_columns(inputs, backward(params, derivatives, delta), 1)


def chain(settings, net, params, x, labels, derivatives, biases):
    """By the chain rule; `derivatives` makes those of all layers out of their outputs."""
    hs = fpnl.activations(params, x, **net)
    hs = hs if net["transfer"] else [h * fpnl.SCALE for h in hs]
    *hidden, last = derivatives(hs)
    deltas = backward(params, hidden, softmax_error(hs[-1], labels, settings.smoothing) * np.float32(last))
    return in_columns([x, *hs[:-1]], deltas, biases)


def in_columns(inputs, deltas, biases):
    """As the loop takes them; the biases of so many layers learn."""
    return [train.with_bias(a.T, l < biases) for l, a in enumerate(inputs)], [delta.T for delta in deltas]


def dead_zone(z):
    """What a flush does to z / S, in units of 1/S; of any framework's array."""
    return z * (abs(z) >= 0.5)


def rectify(z):
    return np.maximum(z, np.float32(0))


# --- The comparison ------------------------------------------------------------------------------------

WHOLE = "--importance 0 --batch 256"
DEADZONE = "--batch 256 --epochs 20 --weight-decay 0.3"
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
        trained, held = train.train(args, method, transfer)
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
    run, *_ = train.begin(args, method, transfer)
    with train.here(args, run) as (_, _, descend, _):
        descend(0, 1, tick=time.perf_counter)
        began = time.perf_counter()
        descend(1, 1 + steps, tick=time.perf_counter)
        return (time.perf_counter() - began) / steps * run.steps


def under_other_arithmetic(args, log, held_out):
    """(name, accuracy on both sets) of the same weights in networks that differ in nothing but their arithmetic."""
    params, _ = data.load_weights(args.save)
    sets, W, b = data.load(args.data, args.validation), np.eye(len(params[0][0])), 0
    for V, c in params:
        W, b = W @ V.astype(float), b @ V.astype(float) + c if np.ndim(b) else c.astype(float)
    flat = W.astype(np.float32), b.astype(np.float32)
    networks = {
        "flush off": lambda x: fpnl.forward(params, x, ftz=False),
        "flattened to one matrix": lambda x: x @ flat[0] + flat[1],
    }
    if args.flush == "hardware":
        networks["the CPU's own flush"] = lambda x: fpnl.forward(params, x, ftz="hardware")
        ours, cpu = (
            logits(lambda x, ftz=f: fpnl.forward(params, x, ftz), sets[2]).view("u4") for f in (True, "hardware")
        )
        print(f"logits that differ between the emulation and the CPU's flags: {np.sum(ours != cpu)} of {ours.size}")
    with open(log, "w", encoding="utf-8", errors="backslashreplace") as file:
        print(f"# {args.save} with every scale at S\nlog2S,{held_out}", file=file)
        for exponent in EXPONENTS:
            scale = np.float32(2.0**exponent)
            found = fpnl.accuracy(logits(lambda x, s=scale: fpnl.forward(params, x, scale=s), sets[2]), sets[3])
            print(exponent, found, sep=",", file=file)
    return [(name, [fpnl.accuracy(logits(f, sets[i]), sets[i + 1]) for i in (0, 2)]) for name, f in networks.items()]


def logits(network, images):
    pieces = range(0, len(images), train.PIECE)
    return np.concatenate([network(data.pixels(images[i : i + train.PIECE])) for i in pieces])


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
            raise ValueError(
                f"expected other options than --seed, --log, --save, --resume, --evaluate, found {options}"
            )
        try:
            compare(args.folder, args.rows, args.seeds, options)
        except KeyboardInterrupt as stop:
            train.fail(f"interrupted: what is done is in {args.folder}", "", stop.args[2] if stop.args else 130)


if __name__ == "__main__":
    main()
