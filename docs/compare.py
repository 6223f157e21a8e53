"""The main job beside its controls: `python train.py --compare`.

Each run writes its log and its weights to the folder; the ES-trained weights are then evaluated under
other arithmetic. The last lines are the README's table: mean and standard deviation over SEEDS seeds.
Settings of the controls were chosen on `--validation 5000` (docs/RESULTS.md).
"""

import functools
import statistics

import numpy as np

import data
import fpnl
import train

SEEDS = 3
EXPONENTS = range(128)  # of the scales that the trained weights are evaluated with
RUNS = {  # name of the log: row of the table, its options
    "es": ("ES, flush-to-zero", ""),
    "es-cv": ("ES with the control variate", "--control-variate"),
    "es-off": ("ES, gradual underflow", "--flush off"),
    "linear": (
        "backprop, linear network",
        "--method backprop --flush off --epochs 8 --batch 256 --lr 1e-3 --weight-decay 0",
    ),
    "logistic": (
        "logistic regression",
        "--method backprop --flush off --hidden --epochs 20 --batch 256 --lr 3e-3 --weight-decay 0",
    ),
    "straight": (
        "backprop through the flush, blind to it",
        "--method backprop --epochs 20 --batch 256 --lr 1e-3 --weight-decay 0.1",
    ),
    "deadzone": (
        "backprop that knows the dead zone",
        "--method deadzone --epochs 20 --batch 256 --lr 1e-3 --weight-decay 0.3",
    ),
    "relu": (
        "backprop, ReLU network",
        "--method relu --flush off --epochs 20 --batch 256 --lr 1e-3 --weight-decay 0.1",
    ),
}
POST = {"es": "> 99 / 96.7", "linear": "94 / 92"}


def compare(args):
    """Run everything, a seed after the other; print a table of train and test accuracy in percent."""
    args.compare.mkdir(parents=True, exist_ok=True)
    sets, table, post = data.load(args.data), {}, {}
    for seed in range(args.seed, args.seed + SEEDS):
        for name, (row, options) in RUNS.items():
            stem = args.compare / f"{name}-{seed}"
            command = [*options.split(), "--seed", str(seed)]
            print(f"\n{row}: python train.py {' '.join(command)}")
            files = ["--data", str(args.data), "--workers", str(args.workers)]
            files += ["--log", f"{stem}.csv", "--save", f"{stem}.npz"]
            trained, held = train.train(train.parse_args(files + command))
            table.setdefault(row, []).append((trained[1], held[1]))
            post[row] = POST.get(name, "")
        params, _ = train.read_weights(args.compare / f"es-{seed}.npz")
        for row, network in other_arithmetic(params).items():
            score = [fpnl.accuracy(logits(network, sets[i]), sets[i + 1]) for i in (0, 2)]
            table.setdefault(f"  its weights, {row}", []).append(score)
        both = [logits(functools.partial(fpnl.forward, params, ftz=ftz), sets[2]) for ftz in (True, "hardware")]
        different = np.sum(both[0].view(np.uint32) != both[1].view(np.uint32))
        print(f"\ntest logits that differ between the emulation and the CPU's own flags: {different} of {both[0].size}")
        with open(args.compare / f"scale-{seed}.csv", "w") as log:
            print(f"# es-{seed}.npz evaluated with every scale at S", "log2S,test", sep="\n", file=log)
            for exponent in EXPONENTS:
                network = functools.partial(fpnl.forward, params, scale=np.float32(2.0**exponent))
                print(exponent, fpnl.accuracy(logits(network, sets[2]), sets[3]), sep=",", file=log)
    print(f"\n{'accuracy in percent, ' + str(SEEDS) + ' seeds':44} {'train':>14} {'test':>14}   the post")
    for row, scores in table.items():
        columns = [[100 * score for score in column] for column in zip(*scores)]
        spread = [f"{statistics.mean(column):7.2f} ± {statistics.stdev(column):4.2f}" for column in columns]
        print(f"{row:44} {spread[0]} {spread[1]}   {post.get(row, '')}")


def other_arithmetic(params):
    """The same weights in networks that differ in nothing but their arithmetic."""
    (W1, b1), (W2, b2), (W3, b3) = [[a.astype(np.float64) for a in layer] for layer in params]
    W, b = (W1 @ W2 @ W3).astype(np.float32), ((b1 @ W2 + b2) @ W3 + b3).astype(np.float32)
    return {
        "flush off": lambda x: fpnl.forward(params, x, ftz=False),
        "flattened to one matrix": lambda x: x @ W + b,
        "the CPU's own flush": lambda x: fpnl.forward(params, x, ftz="hardware"),
    }


def logits(network, x):
    return np.concatenate([network(data.pixels(x[i : i + 1000])) for i in range(0, len(x), 1000)])
