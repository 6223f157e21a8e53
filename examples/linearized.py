#!/usr/bin/env python3
"""A wide network evolves as its linearisation; does one whose transfer jumps?

In the NTK parameterisation all weights start as V ~ N(0, 1), and the scale stands in the inputs of a layer:

    z = a @ V,   a = t(z) / sqrt(width) in the next layer, an image of length 1 in the first,   f = the last z.

A wide network moves so little in training that it stays what its expansion at the start makes of it (Lee et al. 2019,
*Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent*, arXiv 1902.06720):

    f_lin(x) = f_0(x) + J(x) (theta - theta_0),   d f_lin / dt = -eta Theta dL/df,   Theta = J J^T,
    f_lin(x, t) = f_0(x) + Theta(x, X) Theta^-1 (I - exp(-eta Theta t)) (y - f_0(X))   for squared loss.

Underflow, t(z) = z where |z| >= 1/2, else 0, has two derivatives: "a.e.", 1 or 0, is blind to its jumps; "ES", what
evolution strategies measure, is not. "a.e. / ES" descends along the first and responds by the second: then Theta =
J_response J_descent^T (Eilers, Memmesheimer, Goedeke 2024, arXiv 2405.15539).

    python examples/linearized.py --log docs/runs/linearized.csv            # some minutes on 2 cores
    python examples/linearized.py --widths 128 512 --seeds 2 --members 32   # a look

x: [points, 784], the n images that are trained on first; y: [n, outputs]; f: [points, outputs].
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import os
import pathlib
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported: one thread a process
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent))
import controls
import numpy as np

import data
import fpnl
import train

IMAGES = 40  # to train on, and as many to test on
RATE = 0.5  # eta times the largest eigenvalue of Theta, if t were linear and the width infinite; above 2 it diverges
REPORTS = (0, 1, 2, 5, 10, 20, 40)  # steps at which outputs are compared
MOMENTUM = {"SGD": 0.0, "momentum": 0.9}
DRAWS = 1 << 17  # of Gaussian sums, for the kernels of infinite width


def underflow(z):
    """z where |z| >= 1/2, else 0: what flush-to-zero arithmetic leaves of z / S."""
    return fpnl.divide(z, fpnl.SCALE) * fpnl.SCALE


SHIFT = np.float32(0.25)  # of a sum by a mutation: about the sigma |a| of the main job
SLOPES = {
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "a.e.": lambda z: (underflow(z) != 0).astype(np.float32),
    "ES": lambda z: (underflow(z + SHIFT) - underflow(z - SHIFT)) / (2 * SHIFT),
}
NETWORKS = {  # transfer, and its slope in the descent and in the response
    "tanh": (np.tanh, "tanh", "tanh"),
    "underflow ES / ES": (underflow, "ES", "ES"),
    "underflow a.e. / a.e.": (underflow, "a.e.", "a.e."),
    "underflow a.e. / ES": (underflow, "a.e.", "ES"),
}


def init(rng, sizes):
    return [rng.standard_normal(shape, dtype=np.float32) for shape in itertools.pairwise(sizes)]


def scaled(function):
    """Of sums z [..., width], divided by sqrt(width): what the next layer's inputs are."""
    return lambda z: function(z) / np.float32(np.sqrt(z.shape[-1]))


def forward(weights, x, transfer):
    """Inputs a [points, fan_in] and sums z [points, width] of every layer; the last sums are the outputs."""
    return controls.forward([(V, 0) for V in weights], x, scaled(transfer))


def backward(weights, sums, slope, delta):
    """From dL/df, [..., points, outputs], the derivatives by every layer's sums, [..., points, width]."""
    return controls.backward([(V, 0) for V in weights], [scaled(SLOPES[slope])(z) for z in sums[:-1]], delta)


def tangent_kernel(weights, x, transfer, descent, response):
    """Theta [points * outputs] squared, float64, layer by layer, without J: as a derivative by a weight is its input
    times its unit's delta, the sum over a layer's weights is a a^T times delta delta^T, elementwise."""
    inputs, sums = forward(weights, x, transfer)
    delta = np.eye(sums[-1].shape[1], dtype=np.float32)[:, None].repeat(len(x), axis=1)  # of each output
    deltas = [backward(weights, sums, slope, delta) for slope in (response, descent)]
    kernel = sum((a @ a.T)[:, None] * np.tensordot(d, e, (2, 2)) for a, d, e in zip(inputs, *deltas))
    return kernel.transpose(1, 0, 3, 2).reshape(sums[-1].size, -1).astype(float)


def squared(f, y):
    """The loss of each image, |f - y|^2 / 2, and dL/df."""
    return np.square(f - y).sum(axis=1) / 2, f - y


def cross_entropy(f, y):
    """The same; y > 0 for the right class. One output is logistic: a softmax beside an output of 0."""
    right, total = (y > 0), np.exp(f).sum(axis=1, keepdims=True) + (f.shape[1] == 1)
    return np.log(total[:, 0]) - (f * right).sum(axis=1), np.exp(f) / total - right


LOSSES = {"squared": squared, "cross-entropy": cross_entropy}


def descend(weights, kernel, x, y, transfer, slope, loss, eta, beta):
    """Full-batch descent of a network from these weights, by the loop of train.py, and of f_lin: as its weights are
    theta_0 + J_descent^T c, its outputs are f_0 + Theta c. The rate with momentum beta is eta (1 - beta).
    -> f, f_lin [reports, points, outputs]."""

    def gradient(params, x, y, rng, **_):  # of the sum over the images
        inputs, sums = forward(fpnl.leaves(params), x, transfer)
        losses, delta = loss(sums[-1], y)
        deltas = backward(fpnl.leaves(params), sums, slope, delta.astype(np.float32))
        return [[a.T @ delta] for a, delta in zip(inputs, deltas)], losses

    def update(params, grads, moments, v, step, lr, weight_decay):
        for V, g, m in zip(*map(fpnl.leaves, (params, grads, moments))):
            m *= np.float32(beta)
            m -= np.float32(rate) * g
            V += m

    n, rate, found = len(y), eta * (1 - beta), []
    settings = argparse.Namespace(steps=REPORTS[-1], images=n, batch=n, seed=0, importance=0, lr=0, weight_decay=0)
    run = train.fresh(settings, (x[:n], y), None, gradient, [[V.copy()] for V in weights], update)
    c, c_step, f0 = np.zeros(y.shape), np.zeros(y.shape), forward(weights, x, transfer)[1][-1]
    for _ in train.steps(run):
        linear = f0 + (kernel[:, : y.size] @ c.ravel()).reshape(f0.shape)
        if run.step in REPORTS:
            found.append((forward(fpnl.leaves(run.params), x, transfer)[1][-1], linear))
        c_step = beta * c_step - rate * loss(linear[:n], y)[1]
        c += c_step
    return np.array(found).swapaxes(0, 1)


def closed_form(kernel, n, eta, t):
    """P [points, n] of f_lin(t) = f_0 + P (y - f_0(X)), squared loss, the first n points trained on."""
    values, vectors = np.linalg.eig(kernel[:n, :n])  # not symmetric if the response is not the descent's own
    learnt = (vectors * ((1 - np.exp(-eta * t * values)) / values)) @ np.linalg.inv(vectors)
    return kernel[:, :n] @ learnt.real


def infinite_kernels(rng, x, hidden, transfer, descent, response):
    """Covariance K of the outputs at the start, and Theta, [points, points], of one output and infinite width:

        K' = E[t(z) t(z)^T],   Theta' = K' + E[t'(z) t'(z)^T] Theta,   z ~ N(0, K),

    a layer after the other, each expectation the mean of DRAWS samples: right to a percent, for any transfer."""
    K = theta = (x @ x.T).astype(float)
    for _ in range(hidden):
        values, vectors = np.linalg.eigh(K)
        root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        z = root @ rng.standard_normal((len(x), DRAWS), dtype=np.float32)
        h, r, d = transfer(z), SLOPES[response](z), SLOPES[descent](z)
        K = (h @ h.T).astype(float) / DRAWS
        theta = K + r @ d.T / DRAWS * theta
    return K, theta


@functools.cache
def problem(classes, network, hidden):
    """x: images to train on and to test on, in equal parts of each class, of length 1. y: -1 or 1 for two classes,
    one-hot minus 1/10 for ten. K, Theta of infinite width, and eta."""
    train_x, train_y, test_x, test_y = data.load()
    parts = itertools.product([(train_x, train_y), (test_x, test_y)], {2: (3, 8), 10: range(10)}[classes])
    x = np.concatenate([data.pixels(x[labels == digit][: IMAGES // classes]) for (x, labels), digit in parts])
    x -= x.mean()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    hot = np.eye(classes, dtype=np.float32).repeat(IMAGES // classes, axis=0)
    y = hot - np.float32(0.1) if classes == 10 else 2 * hot[:, 1:] - 1
    K, theta = infinite_kernels(np.random.default_rng(0), x, hidden, *NETWORKS[network])
    return x, y, K, theta, RATE / (hidden + 1) / float(np.linalg.eigvalsh(K[:IMAGES, :IMAGES])[-1])


def rms(a, axis=None):
    return np.sqrt(np.mean(np.square(a), axis))


def study(classes, network, hidden, width, seed):
    """Rows (measure, setting, width, seed, value) of one network against its linearisation, on the test images. Pace:
    the share of a predicted change that happens; errors of random sign cancel in it, systematic ones remain."""
    (transfer, descent, response), (x, y, _, _, eta) = NETWORKS[network], problem(classes, network, hidden)
    start = init(np.random.default_rng((seed, width)), (x.shape[1], *hidden * [width], y.shape[1]))
    kernel, rows = tangent_kernel(start, x, transfer, descent, response), []
    for (loss, by_f), (optimizer, beta) in itertools.product(LOSSES.items(), MOMENTUM.items()):
        f, linear = descend(start, kernel, x, y, transfer, descent, by_f, eta, beta)
        setting = f"{classes:2} classes {loss} {optimizer}: {network}", width, seed
        rows.append(("RMSE", *setting, rms((f - linear)[:, IMAGES:], (1, 2)).max()))
        if (loss, optimizer) == ("squared", "SGD"):
            closed = f[0].ravel() + closed_form(kernel, y.size, eta, REPORTS[-1]) @ (y - f[0, :IMAGES]).ravel()
            rows.append(("RMSE closed form", *setting, rms((f[-1].ravel() - closed)[y.size :])))
            moved, predicted = (f - f[0])[:, IMAGES:], (linear - f[0])[:, IMAGES:]
            rows.append(("pace", *setting, np.sum(moved * predicted) / np.sum(predicted**2)))
    return rows


def ensemble(network, hidden, width, members):
    """Rows that compare trained outputs of many networks, one output each, with the closed form's mean and covariance
    over all initialisations; of infinite width: the same of as many draws of the closed form, 20 times."""
    (transfer, descent, _), (x, y, K, theta, eta) = NETWORKS[network], problem(2, network, hidden)
    P = closed_form(theta, IMAGES, eta, REPORTS[-1])
    A = np.eye(len(x)) - np.pad(P, [(0, 0), (0, IMAGES)])  # f_lin = A f_0 + P y
    mean, covariance = (P @ y)[IMAGES:, 0], (A @ K @ A.T)[IMAGES:, IMAGES:]
    trained, rows = [], []
    for seed in range(members):
        weights = init(np.random.default_rng((1000 + seed, width)), (x.shape[1], *hidden * [width], 1))
        trained.append(descend(weights, 0 * theta, x, y, transfer, descent, squared, eta, 0)[0, -1, IMAGES:, 0])
    drawn = np.random.default_rng(1).multivariate_normal(mean, covariance, (20, members))
    for at, f in ((width, np.array(trained)), *((np.inf, f) for f in drawn)):
        errors = {"mean": f.mean(axis=0) - mean, "covariance": np.cov(f.T) - covariance}
        rows += [(f"error of {k}", f" 2 classes squared SGD: {network}", at, "", rms(e)) for k, e in errors.items()]
    return rows


def power(widths, values):
    """The exponent of the width that fits the values, and its standard error."""
    (slope, _), covariance = np.polyfit(np.log(widths), np.log(values), 1, cov=True)
    return slope, np.sqrt(covariance[0, 0])


def print_table(rows, widths):
    """Mean ± standard deviation over the seeds; last, draws of the closed form or the fitted power of the width."""
    print(f"{'':78}" + "".join(f"{width:^17}" for width in widths), "draws or exponent")
    for line in sorted({row[:2] for row in rows}):
        found = [(row[2], row[4]) for row in rows if row[:2] == line]
        groups = [[value for w, value in found if w == width] for width in (*widths, np.inf)]
        groups = [(np.mean(g), np.std(g, ddof=1)) if len(g) > 1 else g for g in groups]
        *cells, last = [" ± ".join(map("{:.4f}".format, group)) for group in groups]
        last = last or "{:.2f} ± {:.2f}".format(*power(*zip(*found)))
        print("{:20}{:58}".format(*line) + "".join(f"{text:^17}" for text in cells), last)


def main():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="of the hidden layers")
    add("--hidden", type=int, default=2, help="hidden layers")
    add("--seeds", type=int, default=3, help="initialisations; more, up to four times, below width 2048")
    add("--members", type=int, default=200, help="networks in the ensemble, of a middle width")
    add("--log", default=os.devnull, help="FILE.csv: every number")
    parser.error = train.fail
    args = parser.parse_args()
    widths = sorted(set(args.widths))
    if len(widths) < 2 or widths[0] < 64 or min(args.seeds, args.members) < 2 or args.hidden < 1:
        says = "expected two --widths from 64 on, --seeds and --members from 2 on, --hidden from 1 on"
        raise ValueError(f"{says}, found {' '.join(sys.argv[1:])}")
    tasks = [(ensemble, network, args.hidden, widths[len(widths) // 2 - 1], args.members) for network in NETWORKS]
    for width, classes, network in itertools.product(widths[::-1], (2, 10), NETWORKS):
        seeds = range(args.seeds * min(max(2048 // width, 1), 4))
        tasks += [(study, classes, network, args.hidden, width, seed) for seed in seeds]
    data.load()  # a damaged set ends here and not in a worker
    log = open(args.log, "w", encoding="utf-8", errors="backslashreplace")
    with log, concurrent.futures.ProcessPoolExecutor() as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # an error or Ctrl-C ends it
        print(
            f"# python {' '.join(sys.argv)}; {data.provenance()}\nmeasure,setting,width,seed,value",
            file=log,
            flush=True,
        )
        rows = [row for future in [pool.submit(*task) for task in tasks] for row in future.result()]
        print(*(",".join(map(str, row[:-1])) + f",{row[-1]:.6g}" for row in rows), sep="\n", file=log)
    print_table(rows, widths)


if __name__ == "__main__":
    with train.command():
        main()
