"""Ratios, measured side by side in one run: `python docs/benchmark.py`.

Flush-to-zero arithmetic in NumPy against the plain operation, each on 10^6 float32 and one thread. The two
take turns, and the figure is the median of the ratios of neighbours: on a noisy machine times drift, ratios hold.
"""

import functools
import pathlib
import platform
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fpnl  # noqa: E402

ROUNDS = 15


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(first, second):
    """Median milliseconds of both and the median ratio first / second of pairs in turn."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    a, b = ([1e3 * side for side in sides] for sides in zip(*pairs))
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in zip(a, b))


def arithmetic(n=10**6):
    rng = np.random.default_rng(0)
    normal, other = (rng.uniform(0.5, 2, n).astype(np.float32) for _ in range(2))
    subnormal = rng.integers(1, 1 << 23, n, dtype=np.uint32).view(np.float32)
    unit = rng.uniform(-1, 1, n).astype(np.float32)  # over 2^125, half of the results are subnormal
    inputs = {
        "normal numbers": (normal, other),
        "subnormal, normal": (subnormal, other),
        "half the results subnormal": (unit, fpnl.SCALE),
    }
    print(f"{'ms on 10^6 float32':10} {'':25} {'fpnl':>8} {'NumPy':>8} {'ratio':>8}")
    for case, (a, b) in inputs.items():
        for name in ("divide",) if "half" in case else ("add", "subtract", "multiply", "divide"):
            out = np.empty_like(a)
            ours = functools.partial(getattr(fpnl, name), a, b, out=out)
            plain = functools.partial(getattr(np, name), a, b, out=out)
            print(f"{name:10} {case:33} {{:8.2f}} {{:8.2f}} {{:8.2f}}".format(*compare(ours, plain)))


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.platform()}")
    arithmetic()
