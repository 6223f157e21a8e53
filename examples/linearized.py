#!/usr/bin/env python3
"""A wide network evolves as its linearisation; does one whose transfer jumps?

In the NTK parameterisation the weights V ~ N(0, 1) of a layer, its bias the last row, have their scale in the input:

    a = (sigma_w / sqrt(width) h, sigma_b),   z = a @ V,   h = t(z) in the next layer,   outputs f = the last z.

A wide network moves so little in training that it stays what its expansion at the start makes of it (Lee et al. 2019,
*Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent*, arXiv 1902.06720):

    f_lin(x) = f_0(x) + J(x) (theta - theta_0),   d f_lin / dt = -eta Theta dL/df,   Theta = J J^T,
    f_lin(x, t) = f_0(x) + Theta(x, X) Theta^-1 (I - exp(-eta Theta t)) (y - f_0(X))   for squared loss.

Underflow, t(z) = z where |z| >= 1/2, else 0, jumps. If the sums of N units move by O(1/sqrt(N)), O(sqrt(N)) of them
cross the threshold, each for O(1/sqrt(N)) of a sum of the next layer: that is O(1) where they agree, as much as in all
other units together, and O(N^(1/4) / N^(1/2)) where their signs are random. Through that, O(N^(3/4)) units of a second
hidden layer cross, for O(N^(-1/8)) of the outputs: an estimate, not a proof. "a.e.", t' = 1 where |z| >= 1/2, else 0,
is blind to all this; "ES", t' = (t(z + s) - t(z - s)) / 2s, what evolution strategies measure, sees the part that
agrees. With one in the descent and the other in the response, Theta = J_r J_d^T (Eilers, Memmesheimer, Goedeke 2024,
arXiv 2405.15539): "underflow a.e. / ES" is a network that descends along a.e., against a linearisation whose response
is that of ES.

    python examples/linearized.py --log docs/runs/linearized.csv            # minutes on 2 cores
    python examples/linearized.py --widths 128 512 --seeds 2 --members 32   # a look

x: [images, 784], the n that are trained on first; y, f: [images, outputs]; V: [fan_in + 1, width].
"""

import os

os.environ.update({f"{blas}_THREADS": "1" for blas in ("OPENBLAS_NUM", "MKL_NUM", "OMP_NUM", "VECLIB_MAXIMUM")})

import argparse
import collections
import concurrent.futures
import functools
import itertools
import pathlib
import platform
import shlex
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import fpnl  # noqa: E402

SIGMA_W, SIGMA_B = 1.0, 0.1
S = np.float32(0.25)  # what a mutation shifts a sum by: about the sigma |a| of the main job
RATE = 0.5  # eta times the largest eigenvalue of Theta at infinite width; descent diverges above 2
REPORTS = (0, 1, 2, 5, 10, 20, 40)  # steps at which outputs are compared
MOMENTUM = {"SGD": 0.0, "momentum": 0.9}
DRAWS, CHUNK = 1 << 18, 1 << 14  # of Gaussian sums, for the kernels of infinite width


def underflow(z):
    """z where |z| >= 1/2, else 0: what flush-to-zero arithmetic leaves of z / S."""
    return fpnl.divide(z, fpnl.SCALE) * fpnl.SCALE


def alive(z):
    return (underflow(z) != 0).astype(np.float32)


def es_slope(z, s=S):
    """What mutations of single units, by fpnl.es_gradient with block=1, measure in the last hidden layer; further down,
    where ES measures through the jumps above, it is what the layer above predicts in step 5 of its comment."""
    return (underflow(z + s) - underflow(z - s)) / (2 * s)


def tanh_slope(z):
    return 1 - np.tanh(z) ** 2


Network = collections.namedtuple("Network", "transfer descent responses limit")
NETWORKS = {  # the first response is the descent's own; "limit": the derivative that also knows where the jumps are
    "tanh": Network(np.tanh, tanh_slope, {"tanh": tanh_slope}, tanh_slope),
    "underflow ES": Network(underflow, es_slope, {"ES": es_slope}, functools.partial(es_slope, s=S / 5)),
    "underflow a.e.": Network(underflow, alive, {"a.e.": alive, "ES": es_slope}, functools.partial(es_slope, s=S / 5)),
}


def init(rng, sizes):
    return [rng.standard_normal((i + 1, o), dtype=np.float32) for i, o in itertools.pairwise(sizes)]


def forward(weights, x, transfer):
    """Inputs a [images, fan_in + 1] and sums z [images, width] of every layer; the last sums are the outputs."""
    h, inputs, sums = x, [], []
    for V in weights:
        scale, bias = np.float32(SIGMA_W / np.sqrt(h.shape[1])), np.full((len(h), 1), SIGMA_B, np.float32)
        inputs.append(np.hstack([scale * h, bias]))
        sums.append(inputs[-1] @ V)
        h = transfer(sums[-1]) if len(sums) < len(weights) else None
    return inputs, sums


def backward(weights, sums, slope, delta):
    """From the derivative by the outputs, [..., images, outputs], that by every layer's sums, [..., images, width]."""
    deltas = [delta]
    for V, z in zip(weights[:0:-1], sums[-2::-1]):
        scale = np.float32(SIGMA_W / np.sqrt(z.shape[1]))
        deltas.insert(0, deltas[0] @ V[:-1].T * (scale * slope(z)))
    return deltas


def tangent_kernel(weights, x, transfer, response, descent):
    """Theta = J_response J_descent^T, [images * outputs] squared, float64, without J, which has a column a weight:
    as a derivative by a weight is its input times its unit's delta, the sum over a layer's weights is a a^T times
    delta delta^T, elementwise."""
    inputs, sums = forward(weights, x, transfer)
    n, outputs = sums[-1].shape
    delta = np.repeat(np.eye(outputs, dtype=np.float32)[:, None], n, axis=1)  # of each output: [outputs, n, outputs]
    kernel = np.zeros((outputs, n, outputs, n))
    for a, *deltas in zip(inputs, *(backward(weights, sums, slope, delta) for slope in (response, descent))):
        left, right = (d.reshape(outputs * n, -1) for d in deltas)
        kernel += (a @ a.T)[:, None] * (left @ right.T).reshape(kernel.shape)
    return kernel.transpose(1, 0, 3, 2).reshape(n * outputs, -1)


def squared(f, y):
    """dL/df of L = |f - y|^2 / 2, a sum over images and outputs."""
    return f - y


def cross_entropy(f, y):
    """dL/df of the cross-entropy, a sum over images; targets are positive for the right class. One output: logistic."""
    p = np.exp(f - f.max(axis=1, keepdims=True)) if f.shape[1] > 1 else 1 / (1 + np.exp(-f))
    return (p / p.sum(axis=1, keepdims=True) if f.shape[1] > 1 else p) - (y > 0)


LOSSES = {"squared": squared, "cross-entropy": cross_entropy}


def descend(weights, x, y, transfer, slope, loss, eta, beta):
    """Full-batch descent on the first len(y) images, in place. Outputs of all images at REPORTS, [reports, images,
    outputs] float64. The rate with momentum beta is eta (1 - beta): the same time in the same steps."""
    found, velocity = [], [np.zeros_like(V) for V in weights] if beta else weights
    for step in range(REPORTS[-1] + 1):
        if step in REPORTS:
            found.append(forward(weights, x, transfer)[1][-1].astype(float))
        inputs, sums = forward(weights, x[: len(y)], transfer)
        deltas = backward(weights, sums, slope, loss(sums[-1], y).astype(np.float32))
        for V, v, a, delta in zip(weights, velocity, inputs, deltas):
            change = (np.float32(eta * (1 - beta)) * a).T @ delta
            if beta:
                v *= np.float32(beta)
                v += change
            V -= v if beta else change
    return np.array(found)


def descend_linearised(kernel, f0, y, loss, eta, beta):
    """The same descent of f_lin: its weights are theta_0 - J_descent^T c, so its outputs are f_0 - Theta c."""
    c, v, found = np.zeros_like(y), np.zeros_like(y), []
    for step in range(REPORTS[-1] + 1):
        f = f0 - (kernel[:, : y.size] @ c.ravel()).reshape(f0.shape)
        if step in REPORTS:
            found.append(f)
        v = beta * v + eta * (1 - beta) * loss(f[: len(y)], y)
        c = c + v
    return np.array(found)


def closed_form(kernel, n, eta, t):
    """P [points, n] of f_lin(t) = f_0 + P (y - f_0(X)), squared loss, the first n points trained on."""
    values, vectors = np.linalg.eig(kernel[:n, :n])  # not symmetric if the response is not the descent's own
    learnt = (vectors * ((1 - np.exp(-eta * t * values)) / values)) @ np.linalg.inv(vectors)
    return kernel[:, :n] @ learnt.real


def infinite_kernels(rng, x, hidden, transfer, response, descent):
    """K, the covariance of the outputs at the start, and Theta, of one output and infinite width, [images, images]:

        K' = sigma_w^2 E[t(z) t(z)^T] + sigma_b^2,   Theta' = K' + sigma_w^2 E[t'(z) t'(z)^T] Theta,   z ~ N(0, K),

    a layer after the other, each expectation the mean of DRAWS samples: right to half a percent, for any transfer."""
    K = theta = SIGMA_W**2 / x.shape[1] * (x @ x.T).astype(float) + SIGMA_B**2
    for _ in range(hidden):
        values, vectors = np.linalg.eigh(K)
        root, K, slopes = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32), 0.0, 0.0
        for _ in range(DRAWS // CHUNK):
            z = root @ rng.standard_normal((len(x), CHUNK), dtype=np.float32)
            h = transfer(z)
            K, slopes = K + (h @ h.T).astype(float), slopes + (response(z) @ descent(z).T).astype(float)
        K = SIGMA_W**2 / DRAWS * K + SIGMA_B**2
        theta = K + SIGMA_W**2 / DRAWS * slopes * theta
    return K, theta


@functools.cache
def images(classes, n):
    """x: n training and n test images, in equal parts of each class, all of length sqrt(784), which makes K_0 their
    cosines. y [n, outputs]: -1 or 1 for two classes, one-hot minus 1/10 for ten."""
    digits, sets, x, y = {2: (3, 8), 10: range(10)}[classes], data.load(), [], []
    for pixels, labels in (sets[:2], sets[2:]):
        rows = np.stack([np.flatnonzero(labels == digit)[: n // classes] for digit in digits], axis=1).ravel()
        x.append(data.pixels(pixels[rows]))
        y.append(labels[rows][:, None] == np.array(digits))
    x = np.concatenate(x)
    x -= x.mean()
    hot = y[0].astype(float)
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True)), hot - 0.1 if classes == 10 else 2 * hot[:, 1:] - 1


def pace(moved, predicted):
    """What share of a predicted change of the outputs happens: random errors cancel, systematic ones remain."""
    return np.sum(moved * predicted) / np.sum(predicted**2)


def train(classes, loss, optimizer, name, width, seed, eta, n, hidden):
    """A network, trained, and its linearisations: outputs [reports, images, outputs], {(measure, response): value}."""
    (x, y), (transfer, descent, responses, _), beta = images(classes, n), NETWORKS[name], MOMENTUM[optimizer]
    weights = init(np.random.default_rng((seed, width)), (x.shape[1], *hidden * [width], y.shape[1]))
    kernels = {key: tangent_kernel(weights, x, transfer, slope, descent) for key, slope in responses.items()}
    before = forward(weights, x, transfer)[0]
    f, values = descend(weights, x, y, transfer, descent, LOSSES[loss], eta, beta), {}
    for key, kernel in kernels.items():
        linear = descend_linearised(kernel, f[0], y, LOSSES[loss], eta, beta)
        values["rmse", key] = np.sqrt(np.square(f - linear)[:, n:].mean(axis=(1, 2))).max()
        values["pace", key] = pace(*(a[1:, n:] - f[0, n:] for a in (f, linear)))
        if (loss, optimizer) == ("squared", "SGD"):
            closed = f[0].ravel() + closed_form(kernel, y.size, eta, REPORTS[-1]) @ (y - f[0, :n]).ravel()
            values["closed", key] = np.sqrt(np.square(f[-1].ravel() - closed)[y.size :].mean())
    if name != "tanh":
        after = forward(weights, x, transfer)[0]
        for l, (a, b) in enumerate(zip(after[1:], before[1:]), 1):
            values["crossed", f"layer {l}"] = np.mean((a != 0) != (b != 0))
    return f, values


def power(widths, values):
    """The exponent of the width that fits the values, and its standard error."""
    (slope, _), covariance = np.polyfit(np.log(widths), np.log(values), 1, cov=True)
    return slope, np.sqrt(covariance[0, 0])


def print_table(title, rows, widths, last, theory=None):
    """Rows: label -> [(width, value), ...]: mean and standard deviation over seeds, and in the last column what theory
    (label -> value) says, or the fitted power of the width."""
    print(f"\n{title:58}" + "".join(f"{width:^16}" for width in widths) + f"   {last}")
    for label, found in sorted(rows.items()):
        groups = [[value for w, value in found if w == width] for width in widths]
        cells = "".join(f"{np.mean(group):8.4f} ±{np.std(group, ddof=1):6.4f}" for group in groups)
        print(
            f"{label:58}{cells}   "
            + (f"{theory[label]:.4f}" if theory else "{:5.2f} ± {:.2f}".format(*power(*zip(*found))))
        )


def theoretical_pace(K, theta, limit, y, eta):
    """The pace at infinite width of a network whose outputs move by Theta = `limit`, if `theta` predicts it."""
    n, products = len(y), []
    second = y.shape[1] * K[:n, :n] + y @ y.T  # expectation, over initialisations, of what the closed forms act on
    for step in REPORTS:
        P, Q = (closed_form(kernel, n, eta, step)[n:] for kernel in (theta, limit))
        products.append([np.trace(Q @ second @ P.T), np.trace(P @ second @ P.T)])
    return np.divide(*np.sum(products, axis=0))


def print_ensemble(label, outputs, K, theta, y, eta):
    """One output of many networks, [members, reports, images], on the test images, against mean and covariance of
    f_lin over all initialisations; in brackets what as many draws of f_lin would be off by."""
    n, members = len(y), len(outputs)
    for i in (0, -1):
        f, P = outputs[:, i, n:], closed_form(theta, n, eta, REPORTS[i])
        A = np.eye(len(K)) - np.pad(P, [(0, 0), (0, len(K) - n)])  # f_lin = A f_0 + P y
        mean, covariance = (P @ y)[n:, 0], (A @ K @ A.T)[n:, n:]
        trace, norm = np.trace(covariance), np.linalg.norm(covariance)
        off = np.sqrt(np.mean((f.mean(axis=0) - mean) ** 2)), np.linalg.norm(np.cov(f.T) - covariance) / norm
        drawn = np.sqrt(trace / len(mean) / members), np.sqrt((1 + (trace / norm) ** 2) / (members - 1))
        spread = np.sqrt(f.var(axis=0, ddof=1).sum() / trace)
        print(f"{label:26}{REPORTS[i]:6}{off[0]:15.3f} ({drawn[0]:.3f}){spread:13.3f}{off[1]:15.2f} ({drawn[1]:.2f})")


def main():
    args, began = parse_args(), time.perf_counter()
    log = open(args.log or os.devnull, "w")
    widths, kernels, etas, tasks, theory = sorted(args.widths), {}, {}, [], {}
    for classes, (name, (transfer, descent, responses, limit)) in itertools.product((2, 10), NETWORKS.items()):
        x, y = images(classes, args.images)
        infinite = kernels[classes, name] = {
            key: infinite_kernels(np.random.default_rng(args.seed), x, args.hidden, transfer, slope, descent)
            for key, slope in {**responses, "limit": limit}.items()
        }
        own = infinite[next(iter(responses))][1]
        etas[classes, name] = RATE / np.linalg.eigvalsh(own[: len(y), : len(y)])[-1]
        for key in responses:
            pair = *infinite[key], infinite["limit"][1]
            theory[classes, "squared", "SGD", name, key] = theoretical_pace(*pair, y, etas[classes, name])
    for width in reversed(widths):
        seeds = range(args.seed, args.seed + args.seeds * min(max(2048 // width, 1), 4))  # more where they are cheap
        tasks += itertools.product((2, 10), LOSSES, MOMENTUM, NETWORKS, [width], seeds)
    members = range(args.seed + 1000, args.seed + 1000 + args.members)
    middle = min(widths, key=lambda width: abs(width - 512))
    ensemble = itertools.product([2], ["squared"], ["SGD"], NETWORKS, [middle], members)
    calls = [(*task, etas[task[0], task[3]], args.images, args.hidden) for task in [*tasks, *ensemble]]
    with concurrent.futures.ProcessPoolExecutor(args.workers) as pool:
        results = [*pool.map(train, *zip(*calls))]

    tables, rows = collections.defaultdict(lambda: collections.defaultdict(list)), []
    for (*setting, width, seed), (_, values) in zip(tasks, results):
        for (measure, key), value in values.items():
            rows.append((measure, *setting, key, width, seed, value))
            if measure == "rmse" or setting[1:3] == ["squared", "SGD"]:
                tables[measure][row_label(*setting, key)].append((width, value))
    rows += [("pace", *setting, np.inf, "", value) for setting, value in theory.items()]
    print_table("RMSE to the linearisation, the largest over time", tables["rmse"], widths, "exponent")
    print_table("RMSE to its closed form, at the end", tables["closed"], widths, "exponent")
    print_table("hidden outputs that become 0 or leave it", tables["crossed"], widths, "exponent")
    limits = {row_label(*setting): value for setting, value in theory.items()}
    print_table("pace: share of the predicted change", tables["pace"], widths, "at infinity", limits)
    print(f"\n{args.members} networks of width {middle} against f_lin of infinite width: 2 classes, squared, SGD")
    print(f"{'':26}{'step':>6}{'error of mean':>23}{'std / std':>13}{'error of covariance':>22}")
    y, outputs = images(2, args.images)[1], np.array([f[:, :, 0] for f, _ in results[len(tasks) :]])
    for f, (name, network) in zip(np.split(outputs, len(NETWORKS)), NETWORKS.items()):
        for key in network.responses:
            print_ensemble(f"{name} / {key}", f, *kernels[2, name][key], y, etas[2, name])
    with log:
        versions = f"Python {platform.python_version()}, NumPy {np.__version__}; {platform.platform()}"
        print(f"# python {shlex.join(sys.argv)}; {versions}; {time.strftime('%Y-%m-%d')}", file=log)
        print("measure,classes,loss,optimizer,network,linearisation,width,seed,value", file=log)
        for *row, value in rows:
            print(*row, f"{value:.6g}", sep=",", file=log)
    print(f"\n{len(calls)} networks, {time.perf_counter() - began:.0f} seconds")


def row_label(classes, loss, optimizer, name, key):
    return f"{classes:>2} classes, {loss}, {optimizer}: {name} / {key}"


def parse_args():
    parser = argparse.ArgumentParser(
        description="Wide networks against their linearisation.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="of the hidden layers")
    add("--hidden", type=int, default=2, help="hidden layers")
    add("--images", type=int, default=40, help="images to train on, and as many to test on: tens")
    add("--seeds", type=int, default=3, help="initialisations; more, up to four times, below width 2048")
    add("--seed", type=int, default=0, help="the first of them")
    add("--members", type=int, default=200, help="networks in the ensemble")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--log", type=pathlib.Path, help="a CSV file to write")
    args = parser.parse_args()
    if len(set(args.widths)) < 2 or min(args.widths) < 1:
        says = f"expected two different --widths or more, all positive, found {args.widths}"
    elif min(args.seeds, args.members) < 2 or min(args.seed, args.hidden - 1, args.workers - 1) < 0:
        says = "expected --seeds and --members of 2 or more, --hidden and --workers of 1 or more, --seed of 0 or more"
    elif args.images < 10 or args.images % 10:
        says = f"expected --images in tens, found {args.images}"
    else:
        return args
    parser.exit(2, f"linearized.py: error: {says}\n")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"linearized.py: error: {error}")
