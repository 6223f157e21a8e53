#!/usr/bin/env python3
"""The post's network in other people's software: who flushes, who keeps subnormals, whose compiler folds them away.

    pip install torch --index-url https://download.pytorch.org/whl/cpu     # on Linux, to leave CUDA out
    pip install '.[frameworks]'                # PyTorch, whose compiler needs one of C++, and JAX; TensorFlow may join
    python examples/frameworks.py              # a minute; --weights FILE takes others than the main job's

In each framework that is installed, as it comes and with the switches that it has: the four operations on a million
pairs near TINY, compared bit for bit with `fpnl`; then the network, its products literal (h @ W, of subnormal numbers)
and rescaled ((h S) @ W / S), eager and compiled, with its accuracy on the test images and, in brackets, how many of its
labels differ from those of `fpnl.forward`. Every row is a process of its own, as flags and switches stay.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import operator
import os
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import fpnl  # noqa: E402
import train  # noqa: E402

# --- The network, in any framework ---------------------------------------------------------------------


S = float(fpnl.SCALE)  # a number of the program, as in the post: a compiler sees it


def literal(params, x):
    """The post's lines as they stand; `params` and x are arrays of the framework."""
    (W, b), *later = params
    h = (x @ W + b) / S
    for W, b in later:
        h = h @ W + b / S
    return h * S


def rescaled(params, x):
    """The same, its later products as `fpnl.forward` computes them."""
    (W, b), *later = params
    h = (x @ W + b) / S
    for W, b in later:
        h = h * S @ W / S + b / S
    return h * S


# --- Frameworks: version, array from NumPy's, {"eager": decorator, "compiled": decorator} ---------------


def in_numpy(switch):
    def eager(function, *args):
        with fpnl.hardware_ftz(ftz=bool(switch), daz=bool(switch)):
            return function(*args)

    return np.__version__, np.asarray, {"eager": lambda function: functools.partial(eager, function)}


def in_torch(switch):
    import torch

    torch.set_flush_denormal(bool(switch))
    return torch.__version__, torch.tensor, {"eager": as_it_is, "compiled": torch.compile}


def in_jax(switch):
    os.environ["XLA_FLAGS"] = switch.removeprefix("XLA_FLAGS=")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    return jax.__version__, jax.numpy.asarray, {"eager": as_it_is, "compiled": jax.jit}


def in_tensorflow(switch):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    ways = {"eager": as_it_is, "compiled": functools.partial(tf.function, jit_compile=True)}
    return tf.__version__, tf.constant, ways


def as_it_is(function):
    return function


SYSTEMS = [  # name, module, opener, switch
    ("NumPy", "numpy", in_numpy, ""),
    ("NumPy", "numpy", in_numpy, "fpnl.hardware_ftz()"),
    ("PyTorch", "torch", in_torch, ""),
    ("PyTorch", "torch", in_torch, "torch.set_flush_denormal(True)"),
    ("JAX", "jax", in_jax, ""),
    ("JAX", "jax", in_jax, "XLA_FLAGS=--xla_disable_hlo_passes=algsimp"),
    ("TensorFlow", "tensorflow", in_tensorflow, ""),
]
COLUMNS = [(product, way) for product in (rescaled, literal) for way in ("eager", "compiled")]


# --- The measurement -----------------------------------------------------------------------------------

OPERATIONS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv}


def pairs(rng, op, n=1 << 18):
    """Float32 pairs of random significands and signs, the result of the operation within 2^+-4 of TINY."""
    exponent, near = rng.integers(0, 254, n), rng.integers(-4, 5, n)
    other = {"multiply": 128 - exponent, "divide": exponent + 126}.get(op, 1 + 0 * exponent) + near
    if op in ("add", "subtract"):
        exponent = 1 + rng.integers(-4, 5, n)
    fields = [np.clip(e, 0, 254).astype(np.uint32) << 23 for e in (exponent, other)]
    return [(field | rng.integers(0, 1 << 32, n, np.uint32) & 0x807FFFFF).view(np.float32) for field in fields]


def elementwise(array, eager, back=np.asarray):
    """What the framework does to subnormals in single operations."""
    found = {}
    for op, function in OPERATIONS.items():
        a, b = pairs(np.random.default_rng(0), op)
        result = back(eager(function)(array(a), array(b)))
        with np.errstate(all="ignore"), fpnl.hardware_ftz(daz=False, ftz=False):
            modes = {"keeps": getattr(np, op)(a, b), "flushes operands": getattr(np, op)(fpnl.flush(a), fpnl.flush(b))}
        modes |= {"flushes results": getattr(fpnl, op)(a, b, daz=False), "flushes": getattr(fpnl, op)(a, b)}
        same = {mode: np.sum(expected.view("u4") != result.view("u4")) for mode, expected in modes.items()}
        found[op] = next((mode for mode, wrong in same.items() if not wrong), f"neither: {min(same.values())} differ")
    kinds = {*found.values()}
    return kinds.pop() if len(kinds) == 1 else "; ".join(f"{op} {mode}" for op, mode in found.items())


def measure(system, params, x, labels, ours):
    """The cells of a row."""
    name, _, opener, switch = system
    version, array, ways = opener(switch)
    cells = [f"{name} {version}", f"`{switch}`" if switch else "as it comes", elementwise(array, ways["eager"])]
    theirs = [(array(W), array(b)) for W, b in params], array(x)
    for product, way in COLUMNS:
        if way in ways:
            digits = np.asarray(ways[way](product)(*theirs)).argmax(axis=1)
            cells.append(f"{100 * np.mean(digits == labels):.2f} ({np.sum(digits != ours)})")
        else:
            cells.append("")
    return cells


def reference(weights, folder):
    params, _ = data.load_weights(weights)
    _, _, images, labels = data.load(folder)
    x = data.pixels(images)
    return params, x, labels, fpnl.forward(params, x).argmax(axis=1)


def add_files(parser):
    add = parser.add_argument
    add("--weights", type=pathlib.Path, default=ROOT / "docs" / "weights.npz", help="of train.py --save (%(default)s)")
    add("--data", type=pathlib.Path, default=ROOT / "mnist", help="folder of IDX files (%(default)s)")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.error = train.fail
    add_files(parser)
    args = parser.parse_args()
    params, x, labels, ours = reference(args.weights, args.data)
    linear = fpnl.forward(params, x, ftz=False).argmax(axis=1)
    print(data.provenance())
    print(f"{args.weights}: with the flush {100 * np.mean(ours == labels):.2f} % right, without it", end=" ")
    print(f"{100 * np.mean(linear == labels):.2f} % ({np.sum(linear != ours)} labels differ)\n")
    print("| framework | | elementwise |", " | ".join(f"{p.__name__}, {way}" for p, way in COLUMNS), "|")
    print("|---" * (3 + len(COLUMNS)) + "|", flush=True)
    for system in SYSTEMS:
        if importlib.util.find_spec(system[1]):
            spawned = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, spawned) as process:
                cells = process.submit(measure, system, params, x, labels, ours).result()
            print(f"| {' | '.join(cells)} |", flush=True)
        else:
            print(f"| {system[0]} | not installed |" + " |" * (1 + len(COLUMNS)))


if __name__ == "__main__":
    with train.command():
        main()
