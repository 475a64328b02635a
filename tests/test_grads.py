"""What gradients go through before the rule: unscaled, measured, clipped; and steps that are left out."""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

import reference
from cases import (
    DEFAULTS,
    OPTIONS,
    all_isas,
    assert_same_arrays,
    awkward_values,
    each_dtype,
    each_isa,
    random_arrays,
)
from fused_adam import Adam, AdamW, StepInfo, adam_step
from snapshots import Snapshot, assert_same_bits, assert_same_state, random_like, refused, train

BLOCK, LANES, TILE = 4096, 16, 512
NAN, INF = math.nan, math.inf
SIZES = (0, 1, 15, LANES, 17, TILE + 3, BLOCK - 1, BLOCK, BLOCK + 9, 4 * BLOCK, 5 * BLOCK + 77, 9 * BLOCK + 1)


def measured(grads: list[np.ndarray], **options: Any) -> float:
    """What a step reports as their norm."""
    opt = Adam([np.zeros_like(grad) for grad in grads], lr=0.0, max_norm=1.0, **options)
    norm = opt.step(grads).grad_norm
    assert norm is not None
    return norm


def assert_same_number(found: Any, expected: Any) -> None:
    assert np.float64(found).tobytes() == np.float64(expected).tobytes(), (found, expected)


# --- The norm -----------------------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_norm_equals_the_reference(size: int, dtype: Any, isa: str) -> None:
    arrays = random_arrays(size, dtype, seed=size)
    expected = reference.global_norm([arrays.grad])
    for threads in (1, 2, 7):
        report = arrays.copy().step({**DEFAULTS, "max_norm": 1.0}, 1, isa, threads)
        assert report is not None
        assert_same_number(report[1], expected)


@pytest.mark.parametrize("seed", range(8))
def test_norm_does_not_depend_on_how_arrays_are_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = (10 ** rng.uniform(-3, 3, 6 * BLOCK + 123) * rng.standard_normal(6 * BLOCK + 123)).astype(
        np.float32
    )
    expected = reference.global_norm([whole])
    assert abs(expected / math.sqrt(math.fsum(x * x for x in whole.tolist())) - 1) < 1e-15
    for count in (1, 2, 30, 900):
        cuts = np.sort(rng.integers(0, whole.size, count))
        for threads in (1, 3):
            assert_same_number(measured(np.split(whole, cuts), num_threads=threads), expected)


def test_norm_of_both_dtypes_and_orders() -> None:
    grads = [
        random_like(np.empty((33, 65), np.float32, order="F"), 1),
        random_like(np.empty(5000), 2),
        random_like(np.empty((), np.float32), 3),
        np.zeros((0, 3)),
        random_like(np.empty((64, 64)), 4),
    ]
    assert_same_number(measured(grads), reference.global_norm(grads))


def test_norm_of_large_arrays_by_several_threads() -> None:
    grads = [random_like(np.empty(300_001, np.float32), 1), random_like(np.empty(70_003), 2)]
    expected = reference.global_norm(grads)
    for threads in (1, 2, 5):
        assert_same_number(measured(grads, num_threads=threads), expected)


def test_norm_is_over_all_groups_and_what_takes_part() -> None:
    params = [np.zeros(2), np.zeros(2), np.zeros(1)]
    opt = Adam([{"params": params[:2]}, {"params": params[2:], "max_norm": 1.0}])
    info = opt.step([[np.array([2.0, 0.0]), None], [np.array([-1.5])]])
    assert info == StepInfo(False, 2.5)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3e200, 4e200], 5e200),
        ([3e-200, 4e-200], 5e-200),
        ([1e308] * 4, INF),  # as the norm itself is
        ([1e307] * 4, 2e307),
        ([5e-324], 5e-324),
        ([3e-156, 4e-156], 5e-156),  # whose squares are subnormal
        ([3e-160, 4e-160], 5e-160),
        ([3e-140, 4e-140], 5e-140),
        ([0.0, -0.0], 0.0),
        ([1e300, INF], INF),
        ([1e300, NAN], NAN),
        ([NAN, INF], NAN),
        ([1.0, 2.0, 2.0], 3.0),
    ],
    ids=repr,
)
def test_norms_that_float64_can_hold(values: list[float], expected: float) -> None:
    for size in (len(values), 3 * BLOCK):
        grad = np.zeros(size)
        grad[-len(values) :] = values
        assert_same_number(measured([grad]), reference.global_norm([grad]))
        np.testing.assert_allclose(measured([grad]), expected, rtol=1e-15)
        beside = [np.zeros(1, np.float32), grad]
        np.testing.assert_allclose(measured(beside), expected, rtol=1e-15)


def test_norm_of_huge_float32_gradients() -> None:
    grad = np.full(100_000, np.finfo(np.float32).max)
    assert measured([grad]) == pytest.approx(float(grad[0]) * math.sqrt(grad.size), rel=1e-14)
    tiny = np.full(4, np.finfo(np.float32).smallest_subnormal)
    assert measured([tiny]) == 2 * float(tiny[0])


def test_float32_infinities_beside_huge_float64_numbers() -> None:
    huge = np.array([1e300])
    assert measured([huge, np.array([INF], np.float32)]) == INF
    assert math.isnan(measured([huge, np.array([NAN], np.float32)]))
    assert measured([huge, np.array([3e38], np.float32)]) == pytest.approx(1e300, rel=1e-15)


# --- Clipping ------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 0.5, 3.0, 1e30])
def test_clipping_equals_a_step_on_clipped_gradients(max_norm: float, dtype: Any) -> None:
    shapes = [np.empty((40, 50), dtype), np.empty(3 * BLOCK + 5, dtype), np.empty((), dtype)]
    params = [random_like(shape, 1) for shape in shapes]
    twins = [param.copy() for param in params]
    opt, twin = Adam(params, lr=0.1, max_norm=max_norm), Adam(twins, lr=0.1)
    for seed in range(3):
        grads = [random_like(shape, seed + 2) for shape in shapes]
        before = [grad.copy() for grad in grads]
        norm = reference.global_norm(grads)
        assert opt.step(grads) == StepInfo(False, float(norm))
        assert_same_bits(grads, before)
        twin.step([np.asarray(reference.clipped(grad, max_norm, None, norm)) for grad in grads])
        assert_same_bits(params, twins)
        assert_same_state(opt, twin)


@each_dtype
@pytest.mark.parametrize("clip_value", [0.0, 1e-30, 0.5, 1e30])
def test_clipping_by_value(clip_value: float, dtype: Any) -> None:
    start = random_arrays(1000, dtype)
    start.grad[: awkward_values(dtype).size] = awkward_values(dtype)
    for isa in all_isas():
        one, two = start.copy(), start.copy()
        narrow = np.dtype(dtype).type(clip_value)
        two.grad[...] = np.clip(two.grad, -narrow, narrow)
        assert one.step({**DEFAULTS, "clip_value": clip_value}, 3, isa) is None
        two.step(DEFAULTS, 3, isa)
        assert_same_arrays(one, two._replace(grad=one.grad), isa)
        assert_same_bits(one.grad, start.grad)


def test_groups_have_clips_of_their_own() -> None:
    params = [np.zeros(2) for _ in range(3)]
    options = [{"max_norm": 1.0}, {}, {"clip_value": 0.25}]
    opt = Adam([{"params": p, **o} for p, o in zip(params, options, strict=True)], betas=(0.0, 0.0), eps=1.0)
    grad = np.array([2.0, -1.0])
    info = opt.step([grad] * 3)
    norm = reference.global_norm([grad] * 3)
    assert info.grad_norm == norm
    clipped = [grad * (1.0 / (norm + 1e-6)), grad, np.array([0.25, -0.25])]
    twins = [np.zeros(2) for _ in range(3)]
    Adam(twins, betas=(0.0, 0.0), eps=1.0).step(clipped)
    assert_same_bits(params, twins)


def test_what_is_not_finite_clips_as_in_torch() -> None:
    """An infinite norm makes zeros of all but the infinities; a NaN makes everything NaN."""
    for bad, others in ((INF, 0.0), (NAN, NAN)):
        param = np.zeros(3)
        opt = Adam(param, lr=1.0, betas=(0.0, 0.0), max_norm=1.0)
        info = opt.step(np.array([1.0, bad, -2.0]))
        np.testing.assert_equal(info.grad_norm, bad)
        np.testing.assert_equal(opt.state[0]["exp_avg"], [others, NAN, others])


def test_an_infinite_max_norm_clips_nothing() -> None:
    for grad in ([INF, 1.0], [1.7e308, 1.7e308], [NAN, 1.0], [3.0, 4.0]):
        one, two = np.zeros(2), np.zeros(2)
        Adam(one).step(np.array(grad), max_norm=INF)
        Adam(two).step(np.array(grad))
        np.testing.assert_equal(one, two)


def test_options_of_a_step_take_the_place_of_those_of_groups() -> None:
    grad = np.array([3.0, 4.0])
    plain, opt, fixed = (Adam(np.zeros(2), **o) for o in ({}, {}, {"max_norm": 0.5}))
    assert plain.step(grad) is plain.step(grad)
    assert opt.step(grad, max_norm=0.5) == fixed.step(grad) == StepInfo(False, 5.0)
    assert_same_state(opt, fixed)
    assert opt.step(grad, clip_value=1.0) == StepInfo()
    assert opt.param_groups[0]["max_norm"] is opt.param_groups[0]["clip_value"] is None
    assert fixed.step(grad, clip_value=1.0) == StepInfo()  # in the place of its max_norm
    assert_same_state(fixed, opt)
    assert fixed.step(grad, max_norm=INF) == StepInfo(False, 5.0)  # which measures, and clips nothing
    opt.step(grad)
    assert_same_state(fixed, opt)
    with pytest.raises(ValueError, match=r"^max_norm and clip_value exclude each other"):
        fixed.step(grad, clip_value=1.0, max_norm=1.0)
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: max_norm and clip_value exclude each other"):
        Adam(np.ones(2), max_norm=1.0).add_param_group({"params": np.ones(2), "clip_value": 1.0})


# --- Scales --------------------------------------------------------------------------------------------

SCALES = (1.0, 65536.0, 65536.0 * (1 + 1e-9), 2.0**-20, 2.0**127, 2.0**-126, 3.0, 0.1, 1e-37, 3.3e38)


@each_isa
@each_dtype
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_divided(scale: float, dtype: Any, isa: str) -> None:
    """Also where a product with the reciprocal would be another number, also where it is no normal one."""
    start = random_arrays(3 * TILE + 11, dtype)
    values = awkward_values(dtype)
    start.grad[: values.size] = values
    start.grad[values.size : 2 * values.size] = values * np.dtype(dtype).type(0.9)
    for name in ("plain-beta1=0.9", "l2-amsgrad-maximize-beta1=0.3", "clip_value", "skip_nonfinite"):
        expected = reference.adam(*start, step=3, grad_scale=scale, **OPTIONS[name])
        found = start.copy()
        found.step(OPTIONS[name], 3, isa, 2, grad_scale=scale)
        assert_same_arrays(found, expected, name)
        assert_same_bits(found.grad, start.grad)


@each_dtype
@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_the_norm_is_that_of_unscaled_gradients(scale: float, dtype: Any) -> None:
    grads = [random_like(np.empty(5 * BLOCK + 99, dtype), 1), random_like(np.empty((7, 9), dtype), 2)]
    params = [np.zeros_like(grad) for grad in grads]
    opt = Adam(params, max_norm=0.5)
    info = opt.step(grads, grad_scale=scale)
    unscaled = [reference.unscaled(grad, scale) for grad in grads]
    assert_same_number(info.grad_norm, reference.global_norm(unscaled))
    twins = [np.zeros_like(grad) for grad in grads]
    twin = Adam(twins, max_norm=0.5)
    assert twin.step(unscaled) == info
    assert_same_bits(params, twins)
    assert_same_state(opt, twin)


BAD_SCALES = [
    (0.0, ValueError),
    (-1.0, ValueError),
    (NAN, ValueError),
    (INF, ValueError),
    (1e-39, ValueError),
]
BAD_SCALES += [
    (1e39, ValueError),
    (10**400, ValueError),
    ("2", TypeError),
    (True, TypeError),
    (1j, TypeError),
]


@pytest.mark.parametrize("scale, error", BAD_SCALES, ids=repr)
def test_scales_that_are_refused(scale: Any, error: type[Exception]) -> None:
    param, grad = np.ones(3), np.ones(3)
    opt = Adam(param)
    before = Snapshot(opt)
    with pytest.raises(error, match=r"^grad_scale "):
        opt.step(grad, grad_scale=scale)
    before.assert_unchanged()
    with pytest.raises(error, match=r"^grad_scale "):
        adam_step(param, grad, np.zeros(3), np.zeros(3), step=1, grad_scale=scale)


# --- Steps that are left out ------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("size", [1, 9, 5 * BLOCK + 3, 70_001])
def test_a_skipped_step_changes_nothing(size: int, bad: float, dtype: Any) -> None:
    params = {"w": random_like(np.empty(size, dtype), 1), "b": np.ones(3, np.float32)}
    opt = AdamW(params, amsgrad=True, ema_decay=0.5, skip_nonfinite=True, num_threads=2)
    train(opt, params, [1])
    assert opt.skipped_steps == 0
    before = Snapshot(opt)
    for place in {0, size // 2, size - 1}:
        grads = {"w": random_like(params["w"], 2), "b": np.ones(3, np.float32)}
        grads["w"][place] = bad
        info = opt.step(grads)
        assert info.skipped
        before.assert_unchanged()
    grads["w"][:] = 1
    assert not opt.step(grads).skipped
    assert opt.skipped_steps == len({0, size // 2, size - 1})


def test_huge_is_not_infinite() -> None:
    """The norm overflows, and yet every gradient is a number."""
    opt = Adam(np.zeros(4), skip_nonfinite=True)
    assert opt.step(np.full(4, 1.7e308)) == StepInfo(False, INF)
    assert opt.step(np.full(4, 1e200)).skipped is False
    assert opt.step(np.full(4, 1e300), grad_scale=1e-30).skipped is True
    assert opt.skipped_steps == 1 and opt.state[0]["step"] == 2


def test_one_group_that_skips_skips_all() -> None:
    params = [np.zeros(2), np.zeros(2)]
    for which in (0, 1):
        opt = Adam([{"params": param, "skip_nonfinite": i == which} for i, param in enumerate(params)])
        for grads in itertools.permutations([np.array([1.0, NAN]), np.ones(2)]):
            assert opt.step(list(grads)).skipped
        # Also where that group has no gradients.
        grads = [np.array([1.0, NAN])] * 2
        grads[which] = None
        assert opt.step(grads).skipped
        assert not np.any(params)
        assert not opt.step(grads, skip_nonfinite=False).skipped
        assert np.isnan(params[1 - which][1])
        params = [np.zeros(2), np.zeros(2)]


def test_a_norm_of_nothing_is_zero() -> None:
    for params, grads in (([np.ones(2)], [None]), ([np.ones(0)], [np.ones(0)])):
        opt = Adam(params, max_norm=1.0)
        assert opt.step(grads) == Adam(params).step(grads, max_norm=1.0) == StepInfo(False, 0.0)


def test_a_skipped_step_makes_no_streams() -> None:
    opt = Adam(np.ones(2), skip_nonfinite=True)
    opt.param_groups[0]["amsgrad"] = True
    before = Snapshot(opt)
    assert opt.step(np.array([NAN, 1.0])).skipped
    before.assert_unchanged()
    opt.step(np.ones(2))
    assert opt.state[0]["max_exp_avg_sq"].all()


def test_a_scale_is_of_one_step() -> None:
    one, two = (Adam(np.ones(3)) for _ in range(2))
    one.step(np.full(3, 8.0), grad_scale=8.0)
    two.step(np.ones(3))
    for opt in (one, two):
        opt.step(np.ones(3))
    assert_same_state(one, two)


def test_arguments_of_a_step_are_read_once() -> None:
    class Limit:
        calls = 0

        def __float__(self) -> float:
            Limit.calls += 1
            return 1.0

    opt = Adam([{"params": np.ones(2)} for _ in range(3)])
    opt.step([np.ones(2)] * 3, max_norm=Limit())  # type: ignore[arg-type]
    assert Limit.calls == 1
    for bad, error in ((NAN, ValueError), (-1.0, ValueError), ("1", TypeError), (True, TypeError)):
        for name in ("max_norm", "clip_value"):
            with refused(error, f"^{name} must be ", opt):
                opt.step([np.ones(2)] * 3, **{name: bad})  # type: ignore[arg-type]
    with refused(TypeError, "^skip_nonfinite must be True or False", opt):
        opt.step([np.ones(2)] * 3, skip_nonfinite=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("skipped", [False, True])
def test_gradients_of_a_skipped_step_are_cleared_if_asked_for(skipped: bool) -> None:
    for size, threads in ((5, 1), (50_000, 1), (200_000, 2), (200_000, 7)):
        opt = Adam([np.zeros(3), np.zeros(size)], max_norm=1.0, skip_nonfinite=True, num_threads=threads)
        for _ in range(5):  # not all of them are shared among threads where the machine is busy
            grads = [np.ones(3), np.ones(size)]
            grads[1][3] = NAN if skipped else 1
            assert opt.step(grads, zero_grad=True).skipped is skipped
            assert not any(grad.any() for grad in grads)


def test_averages_begin_with_the_first_step_that_is_made() -> None:
    param = np.ones(2)
    opt = Adam(param, ema_decay=0.5, skip_nonfinite=True)
    opt.step(np.array([NAN, 1.0]))
    assert "ema" not in opt.state[0]
    param[:] = 3.0
    opt.step(np.ones(2))
    assert_same_bits(opt.ema, (np.full(2, 3.0) + param) / 2)


def test_adam_step_reports() -> None:
    arrays = random_arrays(10, np.float32)
    before = arrays.copy()
    arrays.grad[3] = before.grad[3] = INF
    info = adam_step(*arrays[:4], step=1, skip_nonfinite=True)
    assert info.skipped and info.grad_norm == INF
    assert_same_arrays(arrays, before)
    arrays.grad[3] = 1
    assert adam_step(*arrays[:4], step=1, max_norm=1.0) == (False, reference.global_norm([arrays.grad]))


# --- Options ---------------------------------------------------------------------------------------------


def test_kept_by_checkpoints_and_copies(tmp_path: pathlib.Path) -> None:
    params = [np.ones(3)]
    opt = Adam(params, max_norm=0.5, skip_nonfinite=True)
    opt.step([np.full(3, NAN)])
    train(opt, params, [1])
    opt.save(tmp_path / "a")
    again = Adam([np.ones(3)])
    again.load_state_dict(opt.state_dict())
    copies = [
        again,
        Adam.load(tmp_path / "a", [np.ones(3)]),
        pickle.loads(pickle.dumps(opt)),
        copy.deepcopy(opt),
    ]
    for one in copies:
        assert one.param_groups[0]["max_norm"] == 0.5 and one.param_groups[0]["skip_nonfinite"] is True
        assert_same_state(one, opt)
    assert [one.skipped_steps for one in copies] == [0, 0, 1, 1]
    assert set(opt.state_dict()["requires"]) == {"max_norm", "skip_nonfinite"}


def test_steps_of_all_options_compose() -> None:
    """Any combination gives the bits of the operations, one after the other."""
    shapes = [np.empty(BLOCK + 5, np.float32), np.empty((30, 20))]
    for l2, amsgrad, ema, clip, skip, scale, zero in itertools.product(*[(False, True)] * 7):
        options: dict[str, Any] = {"weight_decay": 0.1 * l2, "amsgrad": amsgrad, "skip_nonfinite": skip}
        options |= {"ema_decay": 0.9 if ema else None, "max_norm": 2.0 if clip else None}
        params = [random_like(shape, 1) for shape in shapes]
        expected = [(p.copy(), *(np.zeros_like(p) for _ in range(3)), p.copy()) for p in params]
        opt = Adam(params, lr=0.1, **options)
        for step in (1, 2):
            grads = [random_like(shape, step + 1) for shape in shapes]
            grad_scale = 48.0 if scale else None
            norm = reference.global_norm([reference.unscaled(grad, grad_scale) for grad in grads])
            every = {**DEFAULTS, **options, "lr": 0.1, "grad_scale": grad_scale, "grad_norm": norm}
            expected = [
                reference.adam(p, grad, *rest, step=step, **every)
                for (p, *rest), grad in zip(expected, grads, strict=True)
            ]
            info = opt.step(grads, grad_scale=grad_scale, zero_grad=zero)
            assert info == (StepInfo(False, float(norm)) if clip or skip else StepInfo())
            assert zero != any(grad.any() for grad in grads)
        for param, entry, (p, m, v, v_max, average, _) in zip(
            params, opt.state.values(), expected, strict=True
        ):
            assert_same_bits([param, entry["exp_avg"], entry["exp_avg_sq"]], [p, m, v])
            assert not amsgrad or entry["max_exp_avg_sq"].tobytes() == v_max.tobytes()
            assert not ema or entry["ema"].tobytes() == average.tobytes()
