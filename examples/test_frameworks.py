"""The tests of frameworks.py, and of what gpu.py has that runs without a GPU."""

import frameworks
import gpu
import numpy as np
import pytest
from helpers import PYTHON, RNG, assert_same_bits, needs_hardware, run

import fpnl
from test_fpnl import all_modes, cpu_mode

KINDS = {(False, False): "keeps", (False, True): "flushes operands", (True, False): "flushes results"}


@needs_hardware
@all_modes
def test_what_arithmetic_does_is_recognised(ftz, daz):
    found = frameworks.elementwise(np.asarray, cpu_mode(ftz, daz))
    assert found == KINDS.get((ftz, daz), "flushes")


def test_what_is_neither_is_said():
    """One product in a million that is wrong; and operations that differ."""

    def almost(function):
        def flushing(a, b):
            result = getattr(fpnl, next(op for op, f in frameworks.OPERATIONS.items() if f is function))(a, b)
            result[-1:] += np.float32(function is frameworks.OPERATIONS["multiply"])
            return result

        return flushing

    says = "add flushes; subtract flushes; multiply neither: 1 differ; divide flushes"
    assert frameworks.elementwise(np.asarray, almost) == says


@needs_hardware
@pytest.mark.parametrize("product", [frameworks.literal, frameworks.rescaled])
def test_the_networks_are_those_of_the_post(product):
    """Without the flush, both are linear; on the CPU's own, whose products flush too, the rescaled one is fpnl's."""
    params, x = fpnl.init(RNG(0), (30, 20, 20, 10)), RNG(1).random((200, 30), np.float32)
    with fpnl.hardware_ftz(daz=False, ftz=False):
        linear = product(params, x)
    np.testing.assert_allclose(linear, fpnl.forward(params, x, ftz=False), atol=1e-5)
    if product is frameworks.rescaled:
        with fpnl.hardware_ftz():
            flushed = product(params, x)
        assert_same_bits(flushed, fpnl.forward(params, x))


@pytest.mark.parametrize("op", gpu.INSTRUCTIONS)
def test_the_rule_is_fpnls(op):
    """What a GPU is held against."""
    a, b, *c = gpu.operands(op, 1 << 14)
    with np.errstate(all="ignore"):
        expected = gpu.by_the_rule(gpu.EXACT[op](*(fpnl.flush(x).astype(float) for x in (a, b, *c))))
    if c:  # the product is a float32 if it is no subnormal
        whole = np.abs(a.astype(float) * b) >= fpnl.TINY
        assert_same_bits(expected[whole], fpnl.add(fpnl.multiply(a, b), *c)[whole])
    else:
        assert_same_bits(expected, getattr(fpnl, op)(a, b))
    assert 0.1 < np.mean(expected == 0) < 0.9


@pytest.mark.slow
@needs_hardware
def test_the_table():
    """What this machine's PyTorch and JAX do: the claims of the README. JAX's compiler takes the nonlinearity away."""
    for module in ("torch", "jax"):
        pytest.importorskip(module, reason=f"needs {module}: pip install '.[frameworks]'")
    done = run("examples/frameworks.py", program=PYTHON, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines() if row[:1] == "|"]
    rows = {(row[0].split()[0], row[1]): row[2:] for row in rows[2:]}
    assert rows["NumPy", "as it comes"][0] == rows["PyTorch", "as it comes"][0] == "keeps"
    flag, jax = rows["PyTorch", "`torch.set_flush_denormal(True)`"], rows["JAX", "as it comes"]
    assert rows["NumPy", "`fpnl.hardware_ftz()`"][0] == flag[0] == jax[0] == "flushes"
    cells = rows["NumPy", "as it comes"][1], flag[1], *jax[1:3]
    linear, network, eager, compiled = (float(cell.split()[0]) for cell in cells)
    assert network > 97 > 90 > linear and abs(eager - network) < 0.1 and abs(compiled - linear) < 0.5
