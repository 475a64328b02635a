"""The reference itself: against exact rational arithmetic, and against an example worked by hand."""

import inspect
from fractions import Fraction

import numpy as np
import pytest

import reference
from cases import DEFAULTS, Arrays, assert_same_bits, awkward_values, each_dtype
from fused_adam import Adam, adam_step

# --- fma -------------------------------------------------------------------------------------------


def nearest(x, dtype):
    """The Fraction x as a dtype: to nearest, ties to even, with subnormals and overflow."""
    info = np.finfo(dtype)
    bits = info.nmant + 1
    smallest = int(info.minexp) - info.nmant
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length() - bits - 1
    exponent = max(exponent, smallest)
    while abs(x) >= Fraction(2) ** (exponent + bits):
        exponent += 1
    with np.errstate(over="ignore"):  # Python's round() breaks ties to even
        size = np.ldexp(dtype(round(abs(x) / Fraction(2) ** exponent)), exponent)
    return -size if x < 0 else size


def fma_by_fractions(a, b, c):
    dtype = type(c)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact:
        return nearest(exact, dtype)
    product_is_negative = np.signbit(a) != np.signbit(b)
    return dtype(-0.0) if product_is_negative and np.signbit(c) else dtype(0.0)


def numbers(rng, count, dtype, low, high):
    """Between 2**low and 2**high in size, with few and with many bits."""
    bits = rng.integers(1, 54, count)
    fractions = np.round(rng.uniform(-1, 1, count) * 2.0**bits) * 2.0**-bits
    with np.errstate(all="ignore"):
        return np.ldexp(fractions, rng.integers(low, high, count)).astype(dtype)


def factors_and_addend(kind, dtype, count=4000):
    """Random a, b, c of one kind, finite."""
    rng = np.random.default_rng(len(kind))
    info = np.finfo(dtype)
    low, high = int(info.minexp) - info.nmant, int(info.maxexp)
    near_one = numbers(rng, count, dtype, -3, 3), numbers(rng, count, dtype, -3, 3)
    with np.errstate(all="ignore"):
        if kind == "any exponents":
            a, b, c = (numbers(rng, count, dtype, low, high) for _ in range(3))
        elif kind == "overlapping":
            a, b = near_one
            c = numbers(rng, count, dtype, -2 * info.nmant - 5, 2 * info.nmant + 5)
        elif kind == "cancelling":
            a, b = near_one
            c = -(a * b)
        elif kind == "ties":  # c + half a unit in its last place, give or take almost nothing or nothing
            c = near_one[0] + dtype(8)
            a = np.spacing(c) * rng.choice([1, 1 + info.eps, -1, -1 - info.eps], count).astype(dtype)
            b = rng.choice([0.5, 0.5 - info.epsneg], count).astype(dtype)
        elif kind == "subnormal results":
            a, b = (numbers(rng, count, dtype, low // 2 - 30, low // 2 + 30) for _ in range(2))
            c = numbers(rng, count, dtype, low, low + 60)
        elif kind == "subnormal ties":
            half_root = dtype(2) ** (low // 2)
            a = half_root * rng.integers(1, 64, count).astype(dtype) / 8
            b = half_root * rng.integers(1, 64, count).astype(dtype) / 8
            c = info.smallest_subnormal * rng.integers(-99, 99, count).astype(dtype)
        else:
            assert kind == "overflow"
            a, b = (numbers(rng, count, dtype, high // 2 - 5, high // 2 + 3) for _ in range(2))
            c = numbers(rng, count, dtype, high - 60, high)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    assert finite.sum() > count / 2
    return a[finite], b[finite], c[finite]


KINDS = (
    "any exponents",
    "overlapping",
    "cancelling",
    "ties",
    "subnormal results",
    "subnormal ties",
    "overflow",
)


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_fma_is_exact(kind, dtype):
    a, b, c = factors_and_addend(kind, dtype)
    expected = np.array([fma_by_fractions(*abc) for abc in zip(a, b, c, strict=True)], dtype)
    assert_same_bits(reference.fma(a, b, c), expected)


@each_dtype
def test_fma_of_special_values(dtype):
    values = awkward_values(dtype)
    a, b, c = (axis.ravel() for axis in np.meshgrid(values, values, values))
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    result = reference.fma(a, b, c)

    some = np.flatnonzero(finite)[:: 1 if dtype == np.float32 else 3]
    expected = np.array([fma_by_fractions(a[i], b[i], c[i]) for i in some], dtype)
    assert_same_bits(result[some], expected)

    # With an infinity or a NaN the rounding does not matter, but a product must not become infinite.
    with np.errstate(all="ignore"):
        expected = np.where(np.isfinite(a) & np.isfinite(b), c, a * b + c)
    assert_same_bits(result[~finite], expected[~finite])


@each_dtype
def test_fma_differs_from_two_roundings(dtype):
    """The test above could not fail if these inputs were easy."""
    a, b, c = factors_and_addend("overlapping", dtype)
    assert np.mean(reference.fma(a, b, c) != a * b + c) > 0.01
    if dtype == np.float32:
        a, b, c = factors_and_addend("ties", dtype)
        through_float64 = (np.float64(a) * b + c).astype(dtype)
        assert np.any(reference.fma(a, b, c) != through_float64)


def test_power_is_rounded_once():
    assert reference.power(0.5, 1074) == 5e-324
    assert reference.power(0.5, 1076) == 0.0
    assert reference.power(0.5, 2**40) == 0.0
    assert reference.power(0.0, 1) == 0.0
    assert reference.power(0.25, 0) == 1.0
    for base in (0.9, 0.999, 0.1):
        for exponent in (1, 2, 3, 50, 1000):
            exact = Fraction(base) ** exponent
            assert reference.power(base, exponent) == float(exact)


# --- an example by hand ----------------------------------------------------------------------------
#
# alpha = 0.001, beta1 = 0.9, beta2 = 0.999, eps = 1e-8; theta = 2, m = v = 0; the gradient is 3, twice.

# (m, v, m_hat, v_hat, theta) after each step
BY_HAND = (
    (0.3, 0.009, 3.0, 9.0, 1.999),
    (0.57, 0.017991, 3.0, 9.0, 1.998),
)
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-8}  # relative; 1 - 0.999 alone is off by 1.3e-5 in float32


def by_reference(theta, gradients, **options):
    """theta, m, v after each step."""
    m = v = np.zeros_like(theta)
    for step, gradient in enumerate(gradients, 1):
        grad = np.full_like(theta, gradient)
        arrays = Arrays(theta, grad, m, v)
        theta, m, v, *_ = reference.adam(*arrays, step=step, **{**DEFAULTS, **options})
        yield theta, m, v


def by_function(theta, gradients, **options):
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for step, gradient in enumerate(gradients, 1):
        adam_step(theta, np.full_like(theta, gradient), m, v, step=step, **options)
        yield theta, m, v


def by_class(theta, gradients, **options):
    optimizer = Adam(theta, **options)
    for gradient in gradients:
        optimizer.step(np.full_like(theta, gradient))
        yield theta, optimizer.state[0]["exp_avg"], optimizer.state[0]["exp_avg_sq"]


each_way = pytest.mark.parametrize("way", [by_reference, by_function, by_class])


@each_way
@each_dtype
def test_worked_example(way, dtype):
    close = {"rel": TOLERANCE[dtype]}
    start = np.full(1, 2.0, dtype)
    steps = way(start, [3.0, 3.0])
    for t, ((theta, m, v), expected) in enumerate(zip(steps, BY_HAND, strict=True), 1):
        m_hat = m.item() / (1 - 0.9**t)
        v_hat = v.item() / (1 - 0.999**t)
        assert (m.item(), v.item(), m_hat, v_hat, theta.item()) == pytest.approx(expected, **close)


@each_way
def test_constant_gradients_give_steps_of_alpha(way):
    for gradient in (3.0, -0.02, 1e-3):
        previous = 2.0
        for theta, _, _ in way(np.full(1, 2.0), [gradient] * 100, lr=1e-3):
            assert previous - theta.item() == pytest.approx(np.sign(gradient) * 1e-3, rel=2e-5)
            previous = theta.item()


@each_way
def test_the_first_step_is_of_the_whole_gradient(way):
    """Bias correction makes of m = (1 - beta1) g the gradient, whatever the betas are."""
    for betas in ((0.9, 0.999), (0.5, 0.9), (0.99, 0.9999), (0.0, 0.0)):
        # An eps that drowns v makes the step proportional to m_hat.
        start = np.zeros(3)
        start_and_step = way(start, [0.25], betas=betas, eps=1e9, lr=1e9)
        theta, m, _ = next(iter(start_and_step))
        assert theta == pytest.approx([-0.25] * 3, rel=1e-8)
        assert m == pytest.approx([0.25 * (1 - betas[0])] * 3)


def test_bias_correction_fades():
    corrections = [1 - reference.power(0.9, t) for t in (1, 2, 50, 1000)]
    assert [round(c, 3) for c in corrections] == [0.1, 0.19, 0.995, 1.0]
    assert corrections[-1] == 1.0


@each_dtype
def test_coefficients_are_narrowed_once(dtype):
    options = {**DEFAULTS, "weight_decay": 0.9, "lr": 0.7, "decoupled_weight_decay": True, "ema_decay": 0.9}
    needed = inspect.signature(reference.coefficients).parameters.keys() & options.keys()
    k = reference.coefficients(dtype, step=7, **{name: options[name] for name in needed})
    assert {type(x) for x in k} == {dtype}
    assert k.param_decay == dtype(1 - Fraction(0.7) * Fraction(0.9))
    assert float(1 - Fraction(0.7) * Fraction(0.9)) != 1 - 0.7 * 0.9  # by a rounding of its own
    assert k.one_minus_beta2 == dtype(1 - 0.999)
    assert k.neg_step_size == dtype(-0.7 / (1 - 0.9**7))
