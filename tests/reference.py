"""The formula in plain NumPy, to the last bit: what every kernel is compared with.

Slow and obvious where the kernels are fast. Nothing here comes from the package.
"""

from __future__ import annotations

import contextlib
import decimal
import math
from typing import NamedTuple

import numpy as np

_DECIMAL = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


# What elements of each stored type are computed in.
COMPUTED_IN = {np.dtype(stored): np.dtype(stored) for stored in (np.float32, np.float64)}
COMPUTED_IN[np.dtype(np.float16)] = np.dtype(np.float32)
with contextlib.suppress(ImportError):
    import ml_dtypes

    COMPUTED_IN[np.dtype(ml_dtypes.bfloat16)] = np.dtype(np.float32)


class Coefficients(NamedTuple):
    """What one step needs of the options, each computed in float64 and narrowed once."""

    grad_sign: np.floating
    l2_decay: np.floating
    param_decay: np.floating
    one_minus_beta1: np.floating
    one_minus_beta2: np.floating
    beta2: np.floating
    sqrt_correction2: np.floating
    eps_root: np.floating
    eps: np.floating
    neg_step_size: np.floating
    ema_weight: np.floating | None


def adam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    ema,
    master_param=None,
    *,
    step,
    lr,
    betas,
    eps,
    weight_decay,
    amsgrad,
    maximize,
    decoupled_weight_decay,
    ema_decay,
    max_norm,
    clip_value,
    skip_nonfinite,
    eps_mode,
    bias_correction,
    master_weights,
    stochastic_rounding,
    seed,
    state_dtype,
    grad_scale=None,
    grad_norm=None,
    number=0,
):
    """One step: the new param, exp_avg, exp_avg_sq, max_exp_avg_sq (without amsgrad: the old one), ema
    (without ema_decay: the old one) and master_param (likewise, or where param is computed in itself).

    grad_norm: of all gradients, where this one is not the only one. number: of the parameter. With a
    state_dtype, the moments are of type Moment.
    """
    stored, all_given = param.dtype, (param, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, master_param)
    if state_dtype is not None:
        exp_avg, exp_avg_sq = decoded_moment(exp_avg, True), decoded_moment(exp_avg_sq, False)
        max_exp_avg_sq = decoded_moment(max_exp_avg_sq, False) if amsgrad else max_exp_avg_sq
    has_master = master_weights and stored != COMPUTED_IN[stored]
    param, grad = master_param if has_master else decoded(param), decoded(grad)
    grad = unscaled(grad, grad_scale)
    if skip_nonfinite and not np.isfinite(grad).all():
        return all_given
    if max_norm is not None and grad_norm is None:
        grad_norm = global_norm([grad])
    grad = clipped(grad, max_norm, clip_value, grad_norm)
    k = coefficients(
        param.dtype,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
        ema_decay=ema_decay,
        eps_mode=eps_mode,
        bias_correction=bias_correction,
    )
    with np.errstate(all="ignore"):
        grad = grad * k.grad_sign
        if weight_decay != 0 and not decoupled_weight_decay:
            grad = fma(param, k.l2_decay, grad)
        param = param * k.param_decay
        exp_avg = lerp(exp_avg, grad, k.one_minus_beta1)
        exp_avg_sq = fma(k.one_minus_beta2 * grad, grad, exp_avg_sq * k.beta2)
        second_moment = exp_avg_sq
        if amsgrad:
            keep = (max_exp_avg_sq > exp_avg_sq) | np.isnan(max_exp_avg_sq)
            second_moment = max_exp_avg_sq = np.where(keep, max_exp_avg_sq, exp_avg_sq)
        root = np.sqrt(second_moment + k.eps_root)
        if state_dtype is None:
            denominator = root / k.sqrt_correction2 + k.eps
        else:
            denominator = fma(root, k.sqrt_correction2.dtype.type(1) / k.sqrt_correction2, k.eps)
        param = param + k.neg_step_size * exp_avg / denominator
        if ema_decay is not None:
            ema = lerp(ema, param, k.ema_weight)
    master_param = param if has_master else master_param
    if state_dtype is not None:
        exp_avg = encoded_moment(exp_avg, state_dtype, step, 0)
        exp_avg_sq = encoded_moment(exp_avg_sq, state_dtype, step, 1)
        max_exp_avg_sq = encoded_moment(max_exp_avg_sq, state_dtype, step, 2) if amsgrad else max_exp_avg_sq
    if stochastic_rounding and stored != COMPUTED_IN[stored]:
        param = stochastically_rounded(param, stored, param_key(seed, number), step)
    return encoded(param, stored), exp_avg, exp_avg_sq, max_exp_avg_sq, ema, master_param


def decoded(array):
    return array.astype(COMPUTED_IN[array.dtype])


def encoded(array, dtype):
    """To the nearest, of two equally near ones to the even one."""
    with np.errstate(all="ignore"):
        return array.astype(dtype)


def unscaled(grad, grad_scale):
    with np.errstate(all="ignore"):
        return grad if grad_scale is None else grad / grad.dtype.type(grad_scale)


def clipped(grad, max_norm, clip_value, grad_norm):
    narrow = grad.dtype.type
    with np.errstate(all="ignore"):
        if clip_value is not None:
            # Not np.clip: of two zeros, which one it takes depends on NumPy's version.
            bound = narrow(clip_value)
            grad = np.where(-bound > grad, -bound, grad)
            grad = np.where(grad > bound, bound, grad)
        if max_norm is not None:
            coefficient = np.float64(max_norm) / (np.float64(grad_norm) + 1e-6)
            grad = grad * narrow(1 if coefficient > 1 else coefficient)
    return grad


NORM_BLOCK, NORM_LANES = 4096, 16


def global_norm(grads):
    """The 2-norm over all elements, one array after the other, each as it lies in memory."""
    with np.errstate(all="ignore"):
        grads = [decoded(grad) for grad in grads]
        wide = [grad.ravel(order="K").astype(np.float64) for grad in grads]
        total = sum_of_squares(wide)
        if np.isnan(total) or 2.0**-900 < total < np.inf or all(grad.dtype == np.float32 for grad in grads):
            return np.sqrt(total)
        # Squares of float64 numbers over- or underflowed: those of numbers of another size.
        factor = 2.0**600 if total < 1 else 2.0**-600
        others = 1.0 if total < 1 else 0.0  # of no account then
        sizes = [others if grad.dtype == np.float32 else factor for grad in grads]
        scaled = sum_of_squares([x * size for x, size in zip(wide, sizes, strict=True)])
        return np.sqrt(scaled) / factor if np.isfinite(scaled) else total


def sum_of_squares(arrays):
    """In blocks, whose lanes are summed each in its order; then always two neighbours, until one is left."""
    flat = np.concatenate([*arrays, np.zeros(0)])
    flat = np.concatenate([flat, np.zeros(-flat.size % NORM_BLOCK)])
    rows = flat.reshape(-1, NORM_BLOCK // NORM_LANES, NORM_LANES).swapaxes(0, 1)
    squares_are_exact = (flat == flat.astype(np.float32)).all()
    lanes = np.zeros(rows.shape[1:])
    for row in rows:
        lanes = lanes + row * row if squares_are_exact else fma64(row, row, lanes)
    return sum_of_pairs([sum_of_pairs(block) for block in lanes])


def sum_of_pairs(values):
    values = list(values) or [np.float64(0)]
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[0::2], values[1::2], strict=False)]
        values = pairs + values[len(values) // 2 * 2 :]
    return values[0]


def coefficients(
    dtype,
    *,
    step,
    lr,
    betas,
    eps,
    weight_decay,
    maximize,
    decoupled_weight_decay,
    ema_decay,
    eps_mode,
    bias_correction,
):
    beta1, beta2 = betas
    correction1, correction2 = (1 - power(beta, step) if bias_correction else 1.0 for beta in betas)
    narrow = np.dtype(dtype).type
    with np.errstate(over="ignore", under="ignore"):
        outside = {"outside": eps, "hat": eps / math.sqrt(correction2), "root": 0.0}
        return Coefficients(
            grad_sign=narrow(-1 if maximize else 1),
            l2_decay=narrow(weight_decay),
            param_decay=narrow(fma64(-lr, weight_decay, 1.0) if decoupled_weight_decay else 1),
            one_minus_beta1=narrow(1 - beta1),
            one_minus_beta2=narrow(1 - beta2),
            beta2=narrow(beta2),
            sqrt_correction2=narrow(math.sqrt(correction2)),
            eps_root=narrow(eps * correction2 if eps_mode == "root" else 0),
            eps=narrow(outside[eps_mode]),
            neg_step_size=narrow(-lr / correction1),
            ema_weight=None if ema_decay is None else narrow(1 - ema_decay),
        )


def power(base, exponent):
    """base**exponent, correctly rounded; the C library's pow need not be."""
    return float(_DECIMAL.power(decimal.Decimal(base), exponent))


def lerp(start, end, weight):
    """start + weight * (end - start), from the end that is nearer: torch.lerp."""
    if weight < 0.5:
        return fma(weight, end - start, start)
    return fma(weight - weight.dtype.type(1), end - start, end)


# --- Numbers in fewer bytes --------------------------------------------------------------------------


class Moment(NamedTuple):
    codes: np.ndarray  # uint16: the upper halves of float32 numbers; uint8: see below
    exponents: np.ndarray | None = None  # uint8, of each block of 128 codes


BLOCK = 128
NAN = 0x7FC00000


def u32(x):
    return np.asarray(x).astype(np.uint32)


def hash32(x):
    # In uint64, and with constants of that type: before NumPy 2, an integer beside a scalar made it int64.
    u64 = np.uint64
    x = np.asarray(x).astype(u64)
    with np.errstate(over="ignore"):
        x = (x ^ x >> u64(16)) * u64(0x85EBCA6B) & u64(0xFFFFFFFF)
        x = (x ^ x >> u64(13)) * u64(0xC2B2AE35) & u64(0xFFFFFFFF)
    return u32(x ^ x >> u64(16))


def net_of(i):
    """The second of Sobol's sequences."""
    bits, v = 0, 1 << 31
    while i:
        bits, v, i = bits ^ (v if i & 1 else 0), v ^ v >> 1, i >> 1
    return u32(bits)


def dither(count, bits, key, step):
    """What is added to the bits of each element that are cut off: so many."""
    of_step = hash32((int(hash32(u32(step >> 32) ^ key)) + step) & 0xFFFFFFFF)
    net = np.array([net_of(i) for i in range(BLOCK)])
    i = np.arange(count)
    return (net[i % BLOCK] ^ hash32(u32(i // BLOCK) ^ of_step)) >> (32 - bits)


def moment_key(moment):
    return hash32(1 + moment)


def param_key(seed, number):
    low = hash32((seed + 0x9E3779B9) & 0xFFFFFFFF)
    return hash32((int(hash32(low ^ u32(seed >> 32))) + number) & 0xFFFFFFFF)


def flat_bits(array):
    """The bits of float32 numbers, as they lie in memory."""
    return np.asarray(array, np.float32).ravel(order="K").view(np.uint32)


def stochastically_rounded(array, stored, key, step):
    """float32 numbers that the stored type holds: one of the two neighbours of each."""
    bits, added = flat_bits(array), dither(array.size, 16, key, step)
    if stored != np.float16:
        rounded = (bits + added & 0xFFFF0000).view(np.float32)
    else:
        size, small = bits & 0x7FFFFFFF, (bits & 0x7FFFFFFF) < 0x38800000
        with np.errstate(all="ignore"):
            normal = (size + (added >> 3) & ~np.uint32(0x1FFF)).view(np.float32)
            units, more = (
                size.view(np.float32) * np.float32(2**24),
                added.astype(np.float32) * np.float32(2**-16),
            )
            whole = np.floor(units)
            whole = whole + np.floor((units - whole) + more)
            rounded = np.where(small, whole * np.float32(2**-24), normal)
            rounded = np.where(rounded > 65504, np.float32(np.inf), rounded)
            rounded = np.where(bits >> 31, -rounded, rounded)
    rounded = np.where(np.isnan(bits.view(np.float32)), np.float32(np.nan), rounded)
    return rounded.astype(np.float32).reshape(array.shape, order="F" if array.flags.fnc else "C")


# Floats of 8 bits whose exponents count from one that a block shares: what is left of the bits of a float32
# above a base, in units of 2**20. With a sign, 4 bits of exponent and 3 of fraction; or 5 and 3.


def base_of(exponents, signed):
    e = np.repeat(exponents.astype(np.int64), BLOCK)
    return np.maximum(e - (15 if signed else 31), 0) << 23


def decoded_moment(moment, signed):
    codes, exponents = moment
    if exponents is None:
        return u32(codes.astype(np.int64) << 16).view(np.float32)
    base, codes = base_of(exponents, signed)[: codes.size], codes.astype(np.int64)
    if not signed:
        return u32((codes << 20) + base).view(np.float32)
    size = np.where(codes & 127, ((codes & 127) << 20) + base, 0)
    return u32((codes >> 7 << 31) | size).view(np.float32)


def encoded_moment(array, state_dtype, step, moment):
    """moment: 0 for exp_avg, 1 for exp_avg_sq, 2 for max_exp_avg_sq."""
    bits, key, signed = flat_bits(array), moment_key(moment), moment == 0
    size = (bits & 0x7FFFFFFF).astype(np.int64)
    nan = size > 0x7F800000
    if state_dtype == "bfloat16":
        rounded = np.where(nan, NAN, bits.astype(np.int64) + dither(bits.size, 16, key, step))
        return Moment((rounded >> 16).astype(np.uint16).reshape(array.shape))
    blocks = np.concatenate([size, np.zeros(-size.size % BLOCK, np.int64)]).reshape(-1, BLOCK)
    exponents = np.minimum((blocks.max(axis=1) + 0xFFFFF) >> 23, 255).astype(np.uint8)
    above = size - base_of(exponents, signed)[: size.size] + dither(size.size, 20, key, step)
    codes = np.clip(above >> 20, 0, 127 if signed else 255)
    codes = np.where(nan, 127 if signed else 255, codes | (bits >> 31 << 7 if signed else 0))
    return Moment(codes.astype(np.uint8), exponents)


# --- a * b + c with one rounding -------------------------------------------------------------------
#
# Both round the exact sum "to odd" first: to the neighbour whose last bit is 1, where it is not exact.
# With two bits to spare, the odd bit then breaks or keeps every tie of the one real rounding after it
# (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).


def fma(a, b, c):
    return (fma32 if np.asarray(c).dtype == np.float32 else fma64)(a, b, c)


def fma32(a, b, c):
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)  # exact: 24 and 24 bits
        return round_to_odd(*two_sum(product, np.float64(c))).astype(np.float32)


def fma64(a, b, c):
    with np.errstate(all="ignore"):
        # Fractions and exponents apart, so that nothing in between can overflow or underflow.
        (a, a_exponent), (b, b_exponent), (c, c_exponent) = map(np.frexp, (a, b, c))
        product, product_low = two_product(a, b)

        # All is computed in units of 2**scale. What lies far enough below the rest, or below the smallest
        # subnormal number, only breaks a tie: it may as well lie a little less far below.
        product_exponent = np.where(product == 0, c_exponent, a_exponent + b_exponent)
        c_exponent = np.where(c == 0, product_exponent, c_exponent)
        scale = np.maximum(np.maximum(product_exponent, c_exponent - 120), -1200)
        c = np.ldexp(c, np.maximum(c_exponent - scale, -120))
        plain = product + c  # right where the result is 0, infinite or NaN, signs included

        c, c_low = two_sum(c, product_low)
        high, low = two_sum(product, c)
        low = round_to_odd(*two_sum(low, c_low))
        total = high + low  # rounded once, as if there were no smallest exponent

        # The last bit of a subnormal result is that of the smallest normal number: as part of a sum with
        # it, a result loses the bits that it cannot have.
        smallest_normal = np.ldexp(1.0, -1022 - scale)
        bias = np.copysign(smallest_normal, total)
        high, high_low = two_sum(bias, high)
        subnormal = high + round_to_odd(*two_sum(high_low, low)) - bias

        is_subnormal = np.abs(total) < smallest_normal
        result = np.ldexp(np.where(is_subnormal, np.copysign(subnormal, total), total), scale)
        return np.where((total == 0) | ~np.isfinite(plain), plain, result)


def two_sum(a, b):
    """a + b as an unevaluated sum of its rounded value and the exact error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def two_product(a, b):
    """a * b likewise (Dekker), for factors and products far from the ends of the exponent range."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def split(a):
    """float64 as a sum of two numbers with 26 bits each (Veltkamp)."""
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


def round_to_odd(total, error):
    """total + error, of two_sum, rounded to odd."""
    inexact = (error != 0) & np.isfinite(total)
    is_even = np.asarray(total).view(np.int64) & 1 == 0
    return np.where(inexact & is_even, np.nextafter(total, np.copysign(np.inf, error)), total)
