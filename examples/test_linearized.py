"""The tests of linearized.py."""

import re

import linearized as L
import numpy as np
import pytest
from helpers import PYTHON, RNG, assert_same_bits, run

import data
import fpnl

LINEARIZED = [*PYTHON, "examples/linearized.py"]


def tiny_network(sizes=(5, 4, 3, 2), kind=np.float64):
    """Weights, six images of length sqrt(fan_in), targets of the first four; in float64, for finite differences."""
    rng = RNG(12)
    x, weights, y = rng.standard_normal((6, sizes[0])), L.init(rng, sizes), rng.choice([-1.0, 1.0], (4, sizes[-1]))
    return [V.astype(kind) for V in weights], x.astype(kind), y.astype(kind)


def jacobian(outputs, weights, h=1e-6):
    """[points * outputs, weights] by central differences."""
    columns = []
    for V in weights:
        for i in np.ndindex(*V.shape):
            kept, found = V[i], []
            for V[i] in (kept + h, kept - h):
                found.append(outputs().ravel())
            V[i] = kept
            columns.append((found[0] - found[1]) / (2 * h))
    return np.array(columns).T


def test_kernel_is_the_product_of_jacobians():
    weights, x, _ = tiny_network()
    J = jacobian(lambda: L.forward(weights, x, np.tanh)[1][-1], weights)
    kernel = L.tangent_kernel(weights, x, np.tanh, "tanh", "tanh")
    np.testing.assert_allclose(kernel, J @ J.T, rtol=1e-6, atol=1e-8)
    # Underflow has no derivative to measure: J of either slope, written out. The descent comes first.
    weights, x, _ = tiny_network(kind=np.float32)
    inputs, sums = L.forward(weights, x, L.underflow)
    J = {}
    for slope in ("ES", "a.e."):
        rows = []
        for output in np.eye(2, dtype=np.float32):
            deltas = L.backward(weights, sums, slope, np.tile(output, (len(x), 1)))
            rows.append(np.hstack([(a[:, :, None] * d[:, None]).reshape(len(x), -1) for a, d in zip(inputs, deltas)]))
        J[slope] = np.stack(rows, axis=1).reshape(2 * len(x), -1)
    kernel = L.tangent_kernel(weights, x, L.underflow, "a.e.", "ES")
    np.testing.assert_allclose(kernel, J["ES"] @ J["a.e."].T, rtol=1e-4, atol=1e-5)
    assert np.abs(kernel - kernel.T).max() > 0.1


def test_descent_in_function_space_is_descent_of_the_weights():
    """Cross-entropy and momentum, in the weights of f_lin and through Theta; the network itself goes elsewhere."""
    weights, x, y = tiny_network()
    eta, beta, found = 0.3, 0.9, []
    f0 = L.forward(weights, x, np.tanh)[1][-1]
    J = jacobian(lambda: L.forward(weights, x, np.tanh)[1][-1], weights)
    theta, v = np.zeros(J.shape[1]), np.zeros(J.shape[1])
    for step in range(L.REPORTS[-1] + 1):
        f = f0 + (J @ theta).reshape(f0.shape)
        if step in L.REPORTS:
            found.append(f)
        v = beta * v + eta * (1 - beta) * J[: y.size].T @ L.cross_entropy(f[: len(y)], y)[1].ravel()
        theta = theta - v
    weights, x, y = tiny_network(kind=np.float32)
    real, linear = L.descend(weights, J @ J.T, x, y, np.tanh, "tanh", L.cross_entropy, eta, beta)
    np.testing.assert_allclose(linear, found, atol=1e-6)  # f_0 is float32
    assert np.abs(real[-1] - linear[-1]).max() > 0.01
    assert_same_bits(L.forward(weights, x, np.tanh)[1][-1], real[0].astype(np.float32))  # where it started
    layer, x, y = tiny_network((5, 2), np.float32)  # a network of one layer is its linearisation
    kernel = L.tangent_kernel(layer, x, np.tanh, "tanh", "tanh")
    real, linear = L.descend(layer, kernel, x, y, np.tanh, "tanh", L.squared, 0.1, beta)
    np.testing.assert_allclose(real, linear, atol=1e-5)
    assert np.abs(real[-1] - real[0]).max() > 0.1


@pytest.mark.parametrize("loss", L.LOSSES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_losses_are_the_derivatives(loss, outputs):
    rng = RNG(13)
    f, y = rng.standard_normal((5, outputs)), np.full((5, outputs), -1.0)
    y[np.arange(5), rng.integers(0, outputs, 5)] *= rng.choice([-1, 1], 5) if outputs == 1 else -1

    def losses(f):
        if loss == "squared":
            return np.square(f - y).sum(axis=1) / 2
        if outputs == 1:
            return np.log1p(np.exp(-y * f))[:, 0]
        return np.log(np.exp(f).sum(axis=1)) - f[y > 0]

    numeric = [(losses(f + e) - losses(f - e)).sum() / 2e-6 for e in 1e-6 * np.eye(f.size).reshape(-1, *f.shape)]
    for found, expected in zip(L.LOSSES[loss](f, y), (losses(f), np.reshape(numeric, f.shape)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_closed_form_solves_its_equation():
    """P(0) = 0 and dP/dt = eta Theta(x, X) (1 - P(X)), also for a Theta that is not symmetric."""
    rng = RNG(14)
    J, other = rng.standard_normal((7, 30)), 0.1 * rng.standard_normal((7, 30))
    theta, n, eta = (J + other) @ J.T, 4, 0.01
    assert not L.closed_form(theta, n, eta, 0).any()
    for t in (1, 10, 50):
        slope = (L.closed_form(theta, n, eta, t + 1e-4) - L.closed_form(theta, n, eta, t - 1e-4)) / 2e-4
        right = eta * theta[:, :n] @ (np.eye(n) - L.closed_form(theta, n, eta, t)[:n])
        np.testing.assert_allclose(slope, right, atol=1e-7)


def test_infinite_kernels_are_the_arc_cosine_kernels_for_relu(monkeypatch):
    """Cho and Saul 2009: E[t t'] = |u||v| (sin a + (pi - a) cos a) / 2 pi, E of the slopes (pi - a) / 2 pi."""
    monkeypatch.setitem(L.SLOPES, "ReLU", lambda z: (z > 0).astype(np.float32))
    x = RNG(15).standard_normal((4, 30), dtype=np.float32) / np.float32(np.sqrt(30))
    K, theta = L.infinite_kernels(RNG(16), x, 2, lambda z: np.maximum(z, 0), "ReLU", "ReLU")
    exact = exact_theta = x @ x.T
    for _ in range(2):
        size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        angle = np.arccos(np.clip(exact / size, -1, 1))
        exact = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        exact_theta = exact + (np.pi - angle) / (2 * np.pi) * exact_theta
    np.testing.assert_allclose(K, exact, rtol=0.03)  # a standard deviation of the mean: 0.9 %
    np.testing.assert_allclose(theta, exact_theta, rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("classes, digits", [(2, [3, 8]), (10, range(10))])
def test_problem_has_the_digits_it_says(classes, digits):
    x, y, K, _, eta = L.problem(classes, "tanh", 1)
    n = L.IMAGES
    assert x.dtype == y.dtype == np.float32 and x.shape == (2 * n, 784)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)
    assert eta * 2 * np.linalg.eigvalsh(K[:n, :n])[-1] == pytest.approx(L.RATE)
    train_x, train_y, test_x, test_y = data.load()
    for ours, images, labels in ((x[:n], train_x[:500], train_y), (x[n:], test_x[:500], test_y)):
        same = np.corrcoef(ours, data.pixels(images))[:n, n:]  # 1 where it is the same image
        assert same.max(axis=1).min() > 1 - 1e-5 and len({*same.argmax(axis=1)}) == n
        found = labels[same.argmax(axis=1)]
        np.testing.assert_array_equal(found, np.repeat(digits, n // classes))
    hot = np.repeat(digits, n // classes)[:, None] == np.array(digits)
    np.testing.assert_allclose(y, hot - 0.1 if classes == 10 else np.where(hot[:, 1:], 1, -1), atol=1e-6)


def test_underflow_is_the_networks_own():
    z, one = RNG(18).uniform(-1, 1, (1000, 1)).astype(np.float32), (np.ones((1, 1), "f"), np.zeros(1, "f"))
    assert_same_bits(L.underflow(z), fpnl.forward([one], z))
    assert 0.4 < np.mean(L.underflow(z) == 0) < 0.6


def test_es_slope_is_what_evolution_strategies_measure():
    """In units one by one, whose inputs all have one length, up to the curvature of the loss."""
    x, y, *_ = L.problem(10, "tanh", 1)
    n, weights = len(y), L.init(RNG(19), (784, 512, 10))
    scales = 1, np.float32(np.sqrt(512))
    params = [(V / scale, np.zeros(V.shape[1], np.float32)) for V, scale in zip(weights, scales)]
    sigma = L.SHIFT / np.sqrt(2)  # an input of length 1, and the bias
    es = fpnl.es_gradient(params, x[:n], y.argmax(axis=1), RNG(0), sigma=sigma, block=1, transfer=L.underflow)
    inputs, sums = L.forward(weights, x[:n], L.underflow)
    for slope, least, most in (("ES", 0, 0.02), ("a.e.", 0.2, 1)):
        delta = L.backward(weights, sums, slope, L.cross_entropy(sums[-1], y)[1].astype(np.float32))[0]
        error = np.linalg.norm(x[:n].T @ delta / n - es[0][0]) / np.linalg.norm(es[0][0])
        assert least < error < most, error


@pytest.mark.slow
def test_ensemble_has_the_closed_forms_mean_and_covariance():
    """As nearly as draws of it do."""
    found = {}
    for measure, _, width, _, value in L.ensemble("tanh", 1, 512, 60):
        found.setdefault((measure, width), []).append(value)
    for measure in ("error of mean", "error of covariance"):
        assert len(found[measure, np.inf]) == 20
        assert found[measure, 512] == pytest.approx([np.mean(found[measure, np.inf])], rel=0.4)


@pytest.mark.slow
def test_tells_tanh_from_underflow(tmp_path):
    small = "--seeds 2 --widths 64 256 --members 4 --log".split()
    done = run(*small, tmp_path / "log.csv", program=LINEARIZED)
    comment, header, *rows = (tmp_path / "log.csv").read_text("utf-8").splitlines()
    assert comment.startswith("# python examples/linearized.py --seeds 2") and header.count(",") == rows[0].count(",")
    assert len(done.stdout.splitlines()) == 1 + 8 * 4 + 2 * 4 + 2 * 4 + 2 * 4  # RMSE, closed form, pace, ensemble
    found = re.findall(r"^RMSE .*: (tanh|underflow ES / ES) .* (-?\d\.\d\d) ± \d\.\d\d$", done.stdout, re.M)
    for name, low, high in (("tanh", -1.5, -0.6), ("underflow ES / ES", -0.5, -0.05)):  # eight, and two closed forms
        assert [low < float(power) < high for n, power in found if n == name] == 10 * [True], found
    wide = {name: [] for name in ("tanh", "underflow ES / ES", "underflow a.e. / a.e.")}
    for measure, setting, width, _, value in (row.rsplit(",", 4) for row in rows):
        name = setting.partition(": ")[2]
        if measure == "pace" and setting.startswith("10") and width == "256" and name in wide:
            wide[name].append(float(value))
    tanh, es, blind = (np.mean(values) for values in wide.values())
    assert tanh == pytest.approx(1, abs=0.02) and es == pytest.approx(1, abs=0.03) and blind > 1.02


def test_bad_input_ends_in_one_line(tmp_path):
    for options, says in ((["--widths", "128"], "expected two --widths"), (["--log", tmp_path], "Is a directory")):
        done = run(*options, program=LINEARIZED, check=False)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
