"""The figures, drawn from the logs of the examples: docs/runs, that of `python examples/controls.py docs/runs` first.

python docs/figures.py        needs matplotlib: pip install '.[docs]'
"""

import pathlib
import sys

import matplotlib
import numpy as np

DOCS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
sys.path.insert(1, str(DOCS.parent / "examples"))
import recurrent as rows
from linearized import power

import data
import fpnl

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch

# Okabe and Ito's colours, which a colour-blind reader can tell apart; line styles differ too.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
plt.rcParams.update({"figure.figsize": (7.2, 3.4), "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"svg.hashsalt": "fpnl", "axes.spines.top": False, "axes.spines.right": False})
GREY = "#888888"
RUNS = {  # in the order of their final errors
    "es-off": ("ES, gradual underflow", ORANGE, (0, (1, 1))),
    "linear": ("backprop, linear", RED, "--"),
    "deadzone": ("backprop, dead zone known", BLACK, "-."),
    "es": ("ES, flush to zero", BLUE, "-"),
    "relu": ("backprop, ReLU", GREEN, ":"),
}
PEERS = {  # logs of docs/peers.py
    "peers-main": ("the main job", BLUE, "-"),
    "peers-signs": ("population ES, signs", ORANGE, "-"),
    "peers-signs-256": ("the same, 256 members", ORANGE, ":"),
    "peers-signs-hour": ("the same, falling rate", "#CC79A7", "-"),
    "peers-gaussians": ("population ES, Gaussians", ORANGE, "--"),
    "peers-open-es": ("evosax Open_ES", GREEN, "-"),
    "hour/peers-open-es-hour": ("the same, falling rate, machine A", GREEN, ":"),
    "peers-pgpe": ("evosax PGPE", GREEN, "--"),
    "peers-torch-pgpe": ("evotorch PGPE", RED, "--"),
    "peers-torch-snes": ("evotorch SNES", RED, ":"),
}
UNITS = {
    "identity": (BLACK, "-"),
    "dead zone": (BLUE, "-"),
    "ReLU": (GREEN, "-"),
    "ESP": (RED, "-"),
    "sigmoid": (ORANGE, "--"),
    "tanh": ("#CC79A7", "--"),
}


def transfer(axes):
    """What (x * w + 0) / S really gives in float32, near 2^-126."""
    z = np.linspace(-1.5, 1.5, 3001, dtype=np.float32)
    one = [(np.ones((1, 1), np.float32), np.zeros(1, np.float32))]
    for ftz, label, colour, style in ((False, "gradual underflow", ORANGE, "--"), (True, "flush to zero", BLUE, "-")):
        h = 2 * fpnl.activations(one, z[:, None], ftz)[0][:, 0]
        axes.plot(z, h, style, color=colour, label=label, linewidth=1.8)
    axes.set(xlabel="z = x @ W + b", ylabel="z / S in float32, in units of 2$^{-126}$")
    axes.legend(frameon=False, loc="upper left")


def learning(axes):
    """Test error against seconds, all seeds."""
    for name, (label, colour, style) in RUNS.items():
        for i, path in enumerate(sorted((DOCS / "runs").glob(f"{name}-[0-9].csv"))):
            log = read(path)
            axes.plot(
                log["seconds"], 100 - 100 * log["test"], linestyle=style, color=colour, label=None if i else label
            )
    axes.axhline(100 - 96.7, color=GREY, linewidth=1, label="the post's ES: 3.3 %")
    axes.set(xlabel="seconds, 2 cores", ylabel="test error, percent", yscale="log", ylim=(1, 20))
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")


def peers(axes):
    """docs/peers.py: test accuracy against seconds, of population ES and of the main job."""
    for name, (label, colour, style) in PEERS.items():
        log = read(DOCS / "runs" / f"{name}-0.csv")
        axes.plot(log["seconds"], 100 * log["test"], linestyle=style, color=colour, label=label)
    axes.set(xlabel="seconds, 2 cores", ylabel="test accuracy, percent", xscale="log", xlim=(0.2, 3600), ylim=(0, 100))
    axes.set_xticks([1, 10, 60, 300, 3600], ["1", "10", "60", "300", "3600"])
    axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")


def scale(axes):
    """Test accuracy of ES-trained weights when every scale of the network is moved; the end of it enlarged."""
    inset = axes.inset_axes((0.1, 0.12, 0.5, 0.5))
    for path in sorted((DOCS / "runs").glob("scale-[0-9].csv")):
        log = read(path)
        axes.plot(log["log2S"], 100 * log["test"], color=BLUE)
        inset.plot(log["log2S"], 100 * log["test"], "o-", color=BLUE, markersize=4)
    axes.axvline(125, color=BLACK, linewidth=0.8, linestyle=":")
    inset.axvline(125, color=BLACK, linewidth=0.8, linestyle=":")
    inset.set(xlim=(117.5, 127.5), ylim=(0, 104), xticks=range(118, 128, 2))
    inset.text(124.8, 20, "trained here", ha="right")
    axes.set(xlabel="log$_2$ S", ylabel="test accuracy, percent", ylim=(0, 104), xlim=(-2, 130))


def plane(figure, points=240):
    """The digits that the main job's network sees on the plane through three test images, with and without the flush:
    the first of three digits that are right with it and wrong without."""
    params, _ = data.load_weights(DOCS / "weights.npz")
    _, _, images, labels = data.load()
    images = data.pixels(images)
    right, wrong = (fpnl.forward(params, images, ftz).argmax(axis=1) == labels for ftz in (True, False))
    chosen = {}
    for i in np.flatnonzero(right & ~wrong):
        chosen.setdefault(labels[i], i)
    origin, *others = images[[*chosen.values()][:3]]
    basis, place = np.linalg.qr((others - origin).T)  # columns across the plane; where the others are in it
    corners = np.vstack([np.zeros(2), place.T])
    middle, reach = (corners.max(axis=0) + corners.min(axis=0)) / 2, 0.8 * np.ptp(corners, axis=0).max()
    across, up = (np.linspace(c - reach, c + reach, points) for c in middle)
    grid = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2) @ basis.T + origin
    colours, seen = plt.get_cmap("tab10"), set()
    panels = zip(figure.subplots(1, 2), ((True, "flush to zero"), (False, "gradual underflow: the same weights")))
    for axes, (ftz, title) in panels:
        found = fpnl.forward(params, grid.astype(np.float32), ftz).argmax(axis=1).reshape(points, points)
        extent = across[0], across[-1], up[0], up[-1]
        axes.imshow(colours(found)[..., :3], origin="lower", extent=extent, interpolation="nearest", alpha=0.75)
        for i, corner in zip(chosen.values(), corners):
            picture = OffsetImage(1 - images[i].reshape(28, 28), zoom=1.1, cmap="gray")
            axes.add_artist(AnnotationBbox(picture, corner, pad=0.1))
        seen |= {*found.flat}
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
    patches = [Patch(color=colours(digit), alpha=0.75, label=digit) for digit in sorted(seen)]
    figure.legend(
        handles=patches, frameon=False, loc="outside lower center", ncols=10, columnspacing=1.2, handlelength=1
    )


def gates(figure):
    """examples/gates.py: what arrives in ten layers, all seeds; where trainings pass on the surface of the loss."""
    log = read(DOCS / "runs" / "gates.csv", dtype=None, encoding="utf-8")
    top, bottom = figure.subplots(2, 2)
    for unit, (colour, style) in UNITS.items():
        for seed in range(log["seed"].max() + 1):
            ours = log[(log["unit"] == unit) & (log["seed"] == seed)]
            found = {measure: ours[ours["measure"] == measure] for measure in np.unique(ours["measure"])}
            label = None if seed else unit
            for axes, measure in zip(top, ("signal 10 layers", "gradient 10 layers")):
                axes.plot(found[measure]["at"], found[measure]["value"], style, color=colour, label=label)
            for axes, measure in zip(bottom, ("alpha 1e-06 %", "gamma 1e-06 %")):
                loss, share = found["loss"]["value"], found[measure]["value"]
                axes.plot(loss, share, style, color=colour, linewidth=0.8, alpha=0.6)
                axes.plot(loss[-1], share[-1], "o" if style == "-" else "s", color=colour, markersize=5)
    for axes, passed, up in zip(top, ("signal", "gradient"), ("pixels up", "logits down")):
        axes.set(xlabel=f"layers passed, from the {up}", ylabel=f"variance of the {passed}", yscale="log")
    for axes, share in zip(bottom, ("alpha: negative", "gamma: zero")):
        axes.set(xlabel="loss on 8x8 images", ylabel=f"{share}, percent", xscale="log")
        axes.set_xticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
        axes.set_xticks([], minor=True)
    figure.legend(*top[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=6)


def linearized(figure):
    """examples/linearized.py, ten classes, squared loss, SGD: the distance of a network from its linearisation against
    its width, with the fitted power and its standard error, and the share of the predicted change of the outputs."""
    left, right = figure.subplots(1, 2)
    log = read(DOCS / "runs" / "linearized.csv", dtype=None, encoding="utf-8")
    curves = {
        "underflow a.e. / a.e.": ("underflow, blind to its jumps", RED, "--", "s"),
        "underflow a.e. / ES": ("its response alone sees them", ORANGE, ":", "^"),
        "underflow ES / ES": ("underflow, ES sees them", BLUE, "-", "o"),
        "tanh": ("tanh", BLACK, "-.", "v"),
    }
    for i, (network, (label, colour, style, marker)) in enumerate(curves.items()):
        curve = log[log["setting"] == f"10 classes squared SGD: {network}"]
        rmse = curve[curve["measure"] == "RMSE"]
        exponent, error = power(rmse["width"], rmse["value"])
        label += f": N$^{{{exponent:.2f} \\pm {error:.2f}}}$"
        widths = np.unique(rmse["width"])
        for axes, measure in ((left, "RMSE"), (right, "pace")):
            found = curve[curve["measure"] == measure]
            groups = [found["value"][found["width"] == width] for width in widths]
            axes.errorbar(
                widths * 1.04 ** (i - 1.5),  # beside one another
                [np.mean(group) for group in groups],
                [np.std(group, ddof=1) for group in groups],
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=4,
                capsize=2,
                label=label,
            )
    for axes in (left, right):
        axes.set(xscale="log", xlabel="width N")
        axes.set_xticks(widths, [f"{width:.0f}" for width in widths], rotation=45)
        axes.minorticks_off()
    left.set(yscale="log", ylabel="RMSE to the linearisation")
    right.set(ylabel="share of the predicted change")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)


def recurrent(figure, digits=(0, 1, 2, 3, 4)):
    """examples/recurrent.py, the published weights: which features are live as the rows of an image are read, of the
    first test image of each digit; those that are live most often stand on the left."""
    params, (_, _, images, labels) = rows.load_weights(DOCS / "recurrent.npz"), data.load()
    x = data.pixels(images[[np.flatnonzero(labels == digit)[0] for digit in digits]])
    live = np.stack(rows.forward(params, x)[0], axis=1) != 0  # [digits, rows, features]
    order = np.argsort(-live.mean(axis=(0, 1)), kind="stable")
    pictures, features = figure.subplots(2, len(digits), sharey=True)
    for top, bottom, image, of_image in zip(pictures, features, x, live):
        top.imshow(1 - image.reshape(len(live[0]), -1), cmap="gray")
        bottom.imshow(of_image[:, order], cmap="Blues", aspect="auto", vmax=1.4, interpolation="nearest")
        bottom.set(xlabel="features")
        for axes in (top, bottom):
            axes.set(xticks=[], yticks=[0, 9, 18, 27], yticklabels=[1, 10, 19, 28])
            axes.grid(False)
    pictures[0].set(ylabel="row")
    features[0].set(ylabel="after row")


def read(path, **options):
    comments = sum(line.startswith("#") for line in path.read_text(encoding="utf-8").splitlines())
    return np.genfromtxt(path, delimiter=",", names=True, skip_header=comments, **options)


def main():
    for name, draw in {"transfer": transfer, "learning": learning, "peers": peers, "scale": scale}.items():
        figure, axes = plt.subplots(layout="constrained")
        draw(axes)
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
    others = {"gates": (gates, 5.6), "linearized": (linearized, 3.8), "plane": (plane, 4), "recurrent": (recurrent, 4)}
    for name, (draw, height) in others.items():
        figure = plt.figure(figsize=(7.2, height), layout="constrained")
        draw(figure)
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
