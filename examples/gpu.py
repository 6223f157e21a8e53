#!/usr/bin/env python3
"""The arithmetic and the network on an NVIDIA GPU: the `.ftz` operations of PTX, and CuPy's own, against `fpnl`.

    pip install cupy-cuda12x            # or that of your CUDA; an NVIDIA GPU and its driver
    python examples/gpu.py              # --weights FILE takes others than the main job's

Five operations on a million operands each, near TINY, compared bit for bit with the rule of fpnl.py: an exact result x
is flushed if and only if |x| < TINY - 2^-151. Then the network, its elementwise operations those of PTX or CuPy's, its
products literal (h @ W, of subnormal numbers) and rescaled: accuracy on the test images, and how many labels differ
from those of `fpnl.forward`.
"""

import argparse
import pathlib
import platform
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import frameworks  # noqa: E402

import fpnl  # noqa: E402
import train  # noqa: E402

INSTRUCTIONS = {
    "add": "add.rn.ftz.f32",
    "subtract": "sub.rn.ftz.f32",
    "multiply": "mul.rn.ftz.f32",
    "divide": "div.rn.ftz.f32",
    "fma": "fma.rn.ftz.f32",
}
EXACT = frameworks.OPERATIONS | {"fma": lambda a, b, c: a * b + c}  # in float64


def operands(op, n=1 << 20):
    """Float32 arrays of which float64 knows the exact result, or on which side of the threshold it is."""
    rng = np.random.default_rng(0)
    a, b = frameworks.pairs(rng, "multiply" if op == "fma" else op, n)
    if op != "fma":
        return a, b
    a, b = ((x.view(np.uint32) & 0xFFFFF000).view(np.float32) for x in (a, b))  # 12 bits each: a float32 of 24
    return a, b, frameworks.pairs(rng, "add", n)[0]


def by_the_rule(exact):
    """The float32 of exact results in float64, flushed after rounding."""
    return np.where(np.abs(exact) < fpnl.LEAST["after"], np.copysign(0, exact), exact).astype(np.float32)


def ptx(cupy, op):
    """A PTX instruction as a function of CuPy arrays."""
    name, names = INSTRUCTIONS[op], "abc" if op == "fma" else "ab"
    places = ", ".join(f"%{i}" for i in range(len(names) + 1))
    inputs = ", ".join(f'"f"({operand})' for operand in names)
    body = f'asm("{name} {places};" : "=f"(r) : {inputs});'
    return cupy.ElementwiseKernel(", ".join(f"float32 {x}" for x in names), "float32 r", body, name.replace(".", "_"))


def with_ptx(add, divide, multiply, product):
    """The network, every operation but the matrix products one of these."""

    def network(params, x, S=fpnl.SCALE):
        (W, b), *later = params
        h = divide(add(x @ W, b), S)
        for W, b in later:
            z = h @ W if product is frameworks.literal else divide(multiply(h, S) @ W, S)
            h = add(z, divide(b, S))
        return multiply(h, S)

    return network


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.error = train.fail
    frameworks.add_files(parser)
    args = parser.parse_args()
    try:
        import cupy

        gpu = cupy.cuda.runtime.getDeviceProperties(0)
    except ImportError:
        raise ValueError("expected CuPy, found none: pip install cupy-cuda12x, or that of your CUDA") from None
    except RuntimeError as error:
        raise ValueError(f"expected an NVIDIA GPU and its driver, found {error}") from error
    print(
        f"{gpu['name'].decode()}, compute capability {gpu['major']}.{gpu['minor']}, CuPy {cupy.__version__}", end=", "
    )
    print(f"CUDA {cupy.cuda.runtime.runtimeGetVersion()}, {platform.system()}\n")
    kernels = {}
    for op, name in INSTRUCTIONS.items():
        kernels[op], given = ptx(cupy, op), operands(op)
        found = cupy.asnumpy(kernels[op](*map(cupy.asarray, given)))
        with np.errstate(all="ignore"):
            expected = by_the_rule(EXACT[op](*(fpnl.flush(x).astype(np.float64) for x in given)))
        wrong = (found.view("u4") != expected.view("u4")) & ~(np.isnan(found) & np.isnan(expected))
        tiny = np.mean(expected == 0)
        print(f"{name}: {wrong.sum()} of {wrong.size:,} results differ from the rule; {tiny:.0%} are flushed or 0")
    print(f"CuPy's own operations: {frameworks.elementwise(cupy.asarray, frameworks.as_it_is, cupy.asnumpy)}\n")
    params, x, labels, ours = frameworks.reference(args.weights, args.data)
    theirs = [(cupy.asarray(W), cupy.asarray(b)) for W, b in params], cupy.asarray(x)
    print(f"fpnl.forward: {100 * np.mean(ours == labels):.2f} % of the test images right")
    for product in (frameworks.literal, frameworks.rescaled):
        own = with_ptx(kernels["add"], kernels["divide"], kernels["multiply"], product)
        for operations, network in (("PTX's .ftz operations", own), ("CuPy's own operations", product)):
            digits = cupy.asnumpy(network(*theirs).argmax(axis=1))
            print(f"{operations}, {product.__name__} product: {100 * np.mean(digits == labels):.2f} % right,", end=" ")
            print(f"{np.sum(digits != ours)} labels differ")


if __name__ == "__main__":
    with train.command():
        main()
