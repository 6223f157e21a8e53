#!/usr/bin/env python3
"""The post's two examples near TINY = 2^-126, emulated and on this machine's CPU, with every setting of its flags.

    python examples/underflow.py

Addition is not associative as soon as results are flushed (FTZ). That multiplication is not distributive shows only
while operands are not (no DAZ), which would read 0.4 TINY and 0.5 TINY as zeros everywhere.
"""

import functools
import pathlib
import platform
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fpnl  # noqa: E402

A, B, C, D, E = (np.float32(k) * fpnl.TINY for k in (2.5, -1.6, 1, 0.4, 0.5))
LARGE = 1 / fpnl.TINY
EXAMPLES = {
    "(2.5 TINY + -1.6 TINY) + TINY": lambda add, mul: add(add(A, B), C),
    "(-1.6 TINY + TINY) + 2.5 TINY": lambda add, mul: add(add(B, C), A),
    "(0.4 TINY + 0.5 TINY) * 1/TINY": lambda add, mul: mul(add(D, E), LARGE),
    "0.4 TINY * 1/TINY + 0.5 TINY * 1/TINY": lambda add, mul: add(mul(D, LARGE), mul(E, LARGE)),
}
FLAGS = {"none": (False, False), "DAZ": (False, True), "FTZ": (True, False), "FTZ and DAZ": (True, True)}


def emulated(example, ftz, daz):
    if ftz:
        return example(functools.partial(fpnl.add, daz=daz), functools.partial(fpnl.multiply, daz=daz))
    read = fpnl.flush if daz else np.positive
    return example(*[lambda a, b, op=op: op(read(a), read(b)) for op in (np.add, np.multiply)])


def on_the_cpu(example, ftz, daz):
    with fpnl.hardware_ftz(daz, ftz):
        return example(np.add, np.multiply)


def main():
    system = f"{platform.system()} {platform.machine()}, NumPy {np.__version__}"
    print(f"The post's examples near TINY = 2^-126 on {system}\n")
    print(f"{'':38} {'flags':12}{'emulated':>14}{'CPU':>14}")
    for text, example in EXAMPLES.items():
        for flags, mode in FLAGS.items():
            cells = []
            for compute in (emulated, on_the_cpu):
                try:
                    value = float(compute(example, *mode))
                    cells.append(f"{value:.4g}" if "*" in text else f"{value * 2.0**126:.4g} TINY")
                except RuntimeError:  # this CPU, or this program, cannot switch these flags
                    cells.append("unknown")
            print(f"{text:38} {flags:12}{cells[0]:>14}{cells[1]:>14}")
        print()


if __name__ == "__main__":
    main()
