"""Parameters and gradients in float16 and bfloat16: decoded, the step of float32, encoded to the nearest."""

from __future__ import annotations

import copy
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

import reference
from cases import (
    FORMS,
    LINE,
    OPTIONS,
    Arrays,
    all_isas,
    assert_same_arrays,
    assert_same_bits,
    each_isa,
    random_arrays,
)
from fused_adam import Adam, AdamW, CheckpointError, adam_step
from snapshots import assert_same_state, refused

ml_dtypes = pytest.importorskip("ml_dtypes")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
each_stored = pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16], ids=str)
each_grad = pytest.mark.parametrize("grad_kind", ["same", "float32"])


def all_numbers(stored: np.dtype) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(stored)


def arrays_of(size: int, stored: np.dtype, grad_dtype: Any, seed: int = 0) -> Arrays:
    arrays = random_arrays(size, stored.type, seed)
    return arrays._replace(grad=arrays.grad.astype(grad_dtype))


def grad_dtype_of(stored: np.dtype, grad_kind: str) -> Any:
    return stored if grad_kind == "same" else np.float32


# --- Conversions -------------------------------------------------------------------------------------


@each_isa
@each_stored
def test_decoding_is_exact_for_every_number(stored: np.dtype, isa: str) -> None:
    numbers = all_numbers(stored)
    options = {**OPTIONS["betas=0"], "lr": 0.0}
    for offset in (0, 1, 7):  # elsewhere in vectors and tiles
        grad = numbers[offset:].copy()
        zeros = np.zeros(grad.size, np.float32)
        arrays = Arrays(grad.copy(), grad, *(zeros.copy() for _ in Arrays._fields[2:]))
        arrays.step(options, 1, isa)
        with np.errstate(all="ignore"):
            decoded = grad.astype(np.float32)
            squares = decoded**2
        finite = np.isfinite(decoded) & (decoded != 0)  # 0 + -0 is 0
        assert_same_bits(arrays.exp_avg[finite], decoded[finite])
        assert_same_bits(arrays.exp_avg_sq, squares)
        finite &= np.isfinite(squares)  # a param that is added to NaN is NaN
        assert_same_bits(arrays.param[finite], grad[finite])


def hard_to_round(stored: np.dtype) -> np.ndarray:
    """What lies half-way between two neighbours, beside that, and of any bits."""
    numbers = all_numbers(stored).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    half_way = (numbers[:-1].astype(np.float64) + numbers[1:]) / 2
    # float32 holds all of them: it has at least one bit more.
    half_way = np.concatenate([numbers, half_way.astype(np.float32)])
    beside = [np.nextafter(half_way, np.float32(end)) for end in (-np.inf, np.inf)]
    rng = np.random.default_rng(3)
    any_bits = rng.integers(0, 2**32, 2_000_000, np.uint32).view(np.float32)
    awkward = np.array([65504, 65519.996, 65520, 65536, 3.4e38, np.inf, np.nan, 1e-45, 2.0**-25], np.float32)
    return np.concatenate([half_way, *beside, any_bits, awkward, -awkward])


@each_isa
@each_stored
def test_encoding_is_to_the_nearest(stored: np.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = hard_to_round(stored)
    monkeypatch.setattr("fused_adam._config.ISA", isa)
    opt = Adam(np.zeros(values.size, stored))
    opt.grads = np.zeros(values.size, stored)
    with np.errstate(all="ignore"):
        opt.accumulate(values)  # encodes 0 + grad
        expected = (values + np.float32(0)).astype(stored)
    assert_same_bits(opt.grads, expected)


# --- The step ----------------------------------------------------------------------------------------


@each_isa
@each_grad
@each_stored
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("name", FORMS)
def test_as_the_reference(name: str, masters: bool, stored: np.dtype, grad_kind: str, isa: str) -> None:
    options = {**OPTIONS[name], "master_weights": masters}
    for size in (0, 1, 2, 15, 16, 17, 31, 33, 511, 512, 513, 1100):
        arrays = arrays_of(size, stored, grad_dtype_of(stored, grad_kind), size)
        expected = reference.adam(*arrays, step=3, **options)
        arrays.step(options, 3, isa)
        assert_same_arrays(arrays, expected, f"size {size}")


@each_isa
@each_stored
def test_awkward_numbers(stored: np.dtype, isa: str) -> None:
    """All numbers as parameters, with gradients of all kinds in another order."""
    rng = np.random.default_rng(1)
    numbers = all_numbers(stored)
    for name in ("plain-beta1=0.9", "l2-amsgrad-beta1=0.3", "clip_value"):
        arrays = arrays_of(2**16, stored, stored)._replace(
            param=numbers.copy(), grad=rng.permutation(numbers)
        )
        expected = reference.adam(*arrays, step=2, grad_scale=3.0, **OPTIONS[name])
        arrays.step(OPTIONS[name], 2, isa, grad_scale=3.0)
        assert_same_arrays(arrays, expected, name)


@each_stored
def test_any_place_in_memory(stored: np.dtype) -> None:
    """Aligned to 2 bytes only, with guards around it."""
    for offset in range(0, LINE, 2):
        room = np.full(200, -7, stored)
        start = (-room.ctypes.data % LINE + offset) // 2
        param = room[start : start + 77]
        arrays = arrays_of(77, stored, stored)
        param[...] = arrays.param
        expected = reference.adam(*arrays, step=1, **OPTIONS["ema=0.3"])
        arrays._replace(param=param).step(OPTIONS["ema=0.3"], 1)
        assert_same_bits(param, expected[0])
        assert (room[:start] == -7).all() and (room[start + 77 :] == -7).all()


@each_grad
@each_stored
def test_threads_and_cuts(stored: np.dtype, grad_kind: str) -> None:
    rng = np.random.default_rng(2)
    size = 300_001
    whole = rng.standard_normal(size).astype(np.float32).astype(stored)
    grads = [rng.standard_normal(size).astype(grad_dtype_of(stored, grad_kind)) for _ in range(3)]
    options: dict[str, Any] = {"max_norm": 1.0, "ema_decay": 0.9, "amsgrad": True}

    def trained(bounds: list[int], num_threads: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
        params = [part.copy() for part in np.split(whole, bounds)]
        opt = Adam(params, num_threads=num_threads, **options)
        norms = [opt.step([part.copy() for part in np.split(g, bounds)]).grad_norm for g in grads]
        return np.concatenate(params), np.concatenate(opt.ema), norms

    expected = trained([], 1)
    for bounds, num_threads in (([], 2), ([], 7), ([1, 31, 513, 4096 * 9 + 5, 200_000], 3)):
        param, ema, norms = trained(bounds, num_threads)
        assert_same_bits(param, expected[0])
        assert_same_bits(ema, expected[1])
        assert norms == expected[2]


# --- The class ---------------------------------------------------------------------------------------


def scene(stored: np.dtype, **options: Any) -> tuple[dict[str, np.ndarray], AdamW]:
    rng = np.random.default_rng(4)
    params = {"w": rng.standard_normal((5, 4)).astype(stored), "b": np.zeros(3, stored), "x": np.ones(2)}
    return params, AdamW(params, lr=0.05, **options)


def grads_for(params: dict[str, np.ndarray], seed: int, dtype: Any = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = {k: rng.standard_normal(p.shape) for k, p in params.items()}
    return {k: g.astype(params[k].dtype if dtype is None or k == "x" else dtype) for k, g in draw.items()}


@each_stored
def test_state_is_float32(stored: np.dtype) -> None:
    params, opt = scene(stored, amsgrad=True, ema_decay=0.9)
    opt.step(grads_for(params, 1))
    entry = opt.state["w"]
    assert {name: array.dtype for name, array in entry.items() if name != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema"), np.dtype(np.float32)
    )
    assert opt.grads["w"].dtype == opt.ema["w"].dtype == np.float32 and opt.grads["x"].dtype == np.float64
    assert params["w"].dtype == stored


@each_stored
def test_buffers_accumulate_what_16_bits_would_lose(stored: np.dtype) -> None:
    param = np.zeros(4, stored)
    opt = Adam(param)
    for _ in range(1000):
        opt.accumulate(np.full(4, 0.001, stored))
    exactly = 1000 * np.float64(stored.type(0.001))
    assert opt.grads == pytest.approx(exactly, rel=1e-5)
    opt.step(zero_grad=True)
    assert not opt.grads.any() and (param < 0).all()


@each_stored
def test_zero_grad_of_either_type(stored: np.dtype) -> None:
    for dtype in (None, np.float32):
        params, opt = scene(stored)
        grads = grads_for(params, 1, dtype)
        opt.step(grads, zero_grad=True)
        assert not any(grad.any() for grad in grads.values())
        grads = grads_for(params, 2, dtype)
        opt.grads = grads
        opt.zero_grad()
        assert not any(grad.any() for grad in grads.values())


@each_stored
def test_skips_and_norms(stored: np.dtype) -> None:
    params, opt = scene(stored, skip_nonfinite=True)
    grads = grads_for(params, 1)
    assert opt.step(grads, grad_scale=2.0).grad_norm == reference.global_norm(
        [reference.unscaled(reference.decoded(grad), 2.0) for grad in grads.values()]
    )
    grads["b"][1] = np.inf
    before = copy.deepcopy(params)
    assert opt.step(grads).skipped
    assert all(same.tobytes() == params[k].tobytes() for k, same in before.items())


@each_stored
def test_averages_are_as_exact_as_float32(stored: np.dtype) -> None:
    """They move by what 16 bits would lose, as of numbers that are not rounded yet."""
    params, opt = scene(stored, ema_decay=0.999)
    assert_same_bits(opt.ema["w"], params["w"].astype(np.float32))
    averages = opt.ema["w"].copy()
    for seed in range(5):
        opt.step(grads_for(params, seed))
        assert (opt.ema["w"] != averages).all()
        averages = opt.ema["w"].copy()


@each_stored
def test_averages_in_the_place_of_params(stored: np.dtype) -> None:
    params, opt = scene(stored, ema_decay=0.5)
    for seed in range(3):
        opt.step(grads_for(params, seed))
    before, averages = copy.deepcopy(params), copy.deepcopy(opt.ema)
    with opt.ema_weights():
        for key, average in averages.items():
            assert_same_bits(params[key], average.astype(params[key].dtype))
    for key in params:
        assert_same_bits(params[key], before[key])
        assert_same_bits(opt.ema[key], averages[key])
    opt.step(grads_for(params, 4))
    kept = params["b"].astype(np.float32)
    with pytest.raises(ValueError, match="has shape"), opt.ema_weights():
        params["b"].resize(7, refcheck=False)
    assert_same_bits(opt.state["b"]["ema"], kept)  # its own numbers, which have no place any more


@each_stored
def test_checkpoints(stored: np.dtype, tmp_path: pathlib.Path) -> None:
    params, opt = scene(stored, amsgrad=True, ema_decay=0.9)
    for seed in range(3):
        opt.step(grads_for(params, seed))
    opt.save(tmp_path / "a")
    copies = [copy.deepcopy(params) for _ in range(2)]
    loaded = AdamW.load(tmp_path / "a", copies[0])
    taken = AdamW(copies[1])
    taken.load_state_dict(opt.state_dict())
    pickled = pickle.loads(pickle.dumps(opt))
    for other in (loaded, taken, pickled, copy.deepcopy(opt)):
        assert_same_state(other, opt)
    for other in (loaded, taken, opt):
        other.step(grads_for(params, 9))
    for other in copies:
        for key in params:
            assert_same_bits(other[key], params[key])
    wider = {key: array.astype(np.float32) for key, array in params.items()}
    with pytest.raises(CheckpointError, match=f"parameter 'w' is float32 of shape .* but {stored} of shape"):
        AdamW.load(tmp_path / "a", {**wider, "x": params["x"]})


@each_stored
def test_state_of_torch(stored: np.dtype) -> None:
    """Its moments are stored as the parameter; loaded, they are exact."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Parameter(torch.ones(20, dtype=getattr(torch, str(stored))))
    optimizer = torch.optim.AdamW([theirs], lr=0.25, amsgrad=True, fused=True)
    theirs.grad = torch.linspace(-1, 1, 20).to(theirs.dtype)
    optimizer.step()
    opt = AdamW([np.ones(20, stored)])
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == theirs.dtype
    opt.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_same_bits(opt.state[0][name], saved["state"][0][name].float().numpy())
    back = copy.deepcopy(saved)
    for entry in back["state"].values():
        entry["exp_avg"] = entry["exp_avg"].float().numpy().astype(stored)
    opt.load_state_dict(back)
    assert_same_bits(opt.state[0]["exp_avg"], saved["state"][0]["exp_avg"].float().numpy())
    ours = opt.state_dict()
    for entry in ours["state"].values():
        entry.update({key: torch.from_numpy(np.array(value)) for key, value in entry.items()})
    optimizer.load_state_dict(ours)  # PyTorch stores them as its parameter again
    optimizer.step()
    other = {np.dtype(np.float16): "bfloat16", BFLOAT16: "float16"}[stored]
    saved["state"][0]["exp_avg"] = torch.ones(20, dtype=getattr(torch, other))
    with pytest.raises(TypeError, match=f"has dtype (torch.)?{other}"):
        opt.load_state_dict(saved)


@each_stored
def test_functional(stored: np.dtype) -> None:
    arrays = arrays_of(100, stored, stored)
    expected = reference.adam(*arrays, step=5, **{**OPTIONS["plain-beta1=0.9"], "lr": 0.1})
    adam_step(arrays.param, arrays.grad, arrays.exp_avg, arrays.exp_avg_sq, step=5, lr=0.1)
    assert_same_bits(arrays.param, expected[0])
    assert_same_bits(arrays.exp_avg_sq, expected[2])


# --- Master weights ----------------------------------------------------------------------------------


@each_stored
def test_masters_train_where_16_bits_stand_still(stored: np.dtype) -> None:
    """200 steps of 1e-4: below 1.0 the last bit of a bfloat16 is 0.004, that of a float16 0.0005."""
    still, moving, wide = np.ones(3, stored), np.ones(3, stored), np.ones(3, np.float32)
    optimizers = [Adam(still, lr=1e-4), Adam(moving, lr=1e-4, master_weights=True), Adam(wide, lr=1e-4)]
    for _ in range(200):
        for opt in optimizers:
            opt.step(np.ones(3, opt.param_groups[0]["params"][0].dtype))
    assert (still == 1).all() and (wide < 0.981).all()
    assert_same_bits(optimizers[1].state[0]["master_param"], wide)
    assert_same_bits(moving, wide.astype(stored))


@each_stored
def test_masters_begin_with_the_first_step_and_decide_from_then_on(stored: np.dtype) -> None:
    params, opt = scene(stored, master_weights=True)
    params["w"][...] = 2  # weights that are loaded after construction count
    assert "master_param" not in opt.state["w"]
    opt.step({**grads_for(params, 1), "b": None})
    assert set(opt.state["w"]) - set(opt.state["x"]) == {"master_param"}
    assert "master_param" not in opt.state["b"]
    master = opt.state["w"]["master_param"].copy()
    assert master.dtype == np.float32 and abs(master - 2).max() < 0.1
    assert_same_bits(params["w"], master.astype(stored))
    params["w"][...] = -5
    opt.step({key: np.zeros_like(param) for key, param in params.items()})
    assert abs(params["w"].astype(np.float32) - 2).max() < 0.2


@each_stored
def test_masters_that_were_passed_by_begin_anew(stored: np.dtype) -> None:
    """Switched off and on again: what they were would take the parameter back to where it was."""
    params, opt = scene(stored, master_weights=True, ema_decay=0.5)
    opt.step(grads_for(params, 1))
    opt.param_groups[0]["master_weights"] = False
    plain = copy.deepcopy(params)
    other = AdamW(plain, lr=0.05, ema_decay=0.5)
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.pop("master_param", None)
    other.load_state_dict(state)
    for seed in range(2, 6):
        opt.step(grads_for(params, seed))
        other.step(grads_for(params, seed))
    assert "master_param" not in opt.state["w"] and opt.state_dict()["requires"] == ["ema_decay", "ema"]
    for one in (opt, other):
        one.param_groups[0]["master_weights"] = True
        one.step(grads_for(params, 6))
    assert_same_state(opt, other)
    for key in params:
        assert_same_bits(params[key], plain[key])


@each_stored
def test_an_average_that_is_switched_on_begins_as_the_master(stored: np.dtype) -> None:
    param = np.ones(3, stored)
    opt = Adam(param, lr=1e-4, master_weights=True)
    opt.step(np.ones(3, stored))
    opt.param_groups[0]["ema_decay"] = 0.5
    assert_same_bits(opt.ema, opt.state[0]["master_param"])
    assert (opt.ema < 1).all() and (param == 1).all()


def test_masters_are_nothing_to_wider_parameters() -> None:
    params, opt = scene(FLOAT16, master_weights=True)
    opt.step(grads_for(params, 1))
    wider = {key: param.astype(np.float64 if key == "x" else np.float32) for key, param in params.items()}
    other = AdamW(wider)
    other.load_state_dict(opt.state_dict())
    assert all("master_param" not in entry for entry in other.state.values())


@each_stored
def test_checkpoints_of_masters(stored: np.dtype, tmp_path: pathlib.Path) -> None:
    params, opt = scene(stored, master_weights=True, ema_decay=0.5)
    for seed in range(3):
        opt.step(grads_for(params, seed))
    saved = opt.state_dict()
    assert saved["requires"] == ["ema_decay", "master_weights", "ema", "master_param"]
    opt.save(tmp_path / "a")
    copies = [copy.deepcopy(params) for _ in range(2)]
    loaded = AdamW.load(tmp_path / "a", copies[0])
    taken = AdamW(copies[1])
    taken.load_state_dict(saved)
    pickled = pickle.loads(pickle.dumps(opt))
    for other in (loaded, taken, pickled):
        assert_same_state(other, opt)
        assert other.param_groups[0]["master_weights"]
    for other in (loaded, taken, opt):
        other.step(grads_for(params, 9))
    assert_same_state(loaded, opt)
    for other in copies:
        for key in params:
            assert_same_bits(other[key], params[key])


def test_masters_of_others_cost_nothing() -> None:
    params = [np.ones(3, np.float32), np.ones(3)]
    opt = Adam(params, master_weights=True)
    opt.step([np.ones(3, np.float32), np.ones(3)])
    assert all("master_param" not in entry for entry in opt.state.values())


@each_stored
def test_masters_in_a_functional_step(stored: np.dtype) -> None:
    arrays = arrays_of(40, stored, stored)
    options = {**OPTIONS["plain-beta1=0.9"], "master_weights": True}
    expected = reference.adam(*arrays, step=5, **options)
    moments = (arrays.param, arrays.grad, arrays.exp_avg, arrays.exp_avg_sq)
    with pytest.raises(ValueError, match=r"^master_weights needs master_param\.$"):
        adam_step(*moments, step=5, master_weights=True)
    adam_step(*moments, step=5, master_weights=True, master_param=arrays.master_param)
    assert_same_bits(arrays.param, expected[0])
    assert_same_bits(arrays.master_param, expected[-1])


# --- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, grad, message",
    [
        (FLOAT16, BFLOAT16, "has dtype bfloat16, but params has float16. It must be that, or float32."),
        (BFLOAT16, FLOAT16, "has dtype float16, but params has bfloat16. It must be that, or float32."),
        (BFLOAT16, np.float64, "has dtype float64, but params has bfloat16. It must be that, or float32."),
        (
            np.float32,
            FLOAT16,
            r"has dtype float16, but params has float32. Adam\(..., allow_mixed=True\) takes it.",
        ),
        (np.float64, BFLOAT16, "has dtype bfloat16, but params has float64. Both must be the same."),
        (np.float64, np.float32, "has dtype float32, but params has float64. Both must be the same."),
    ],
)
def test_other_gradients(stored: Any, grad: Any, message: str) -> None:
    param, array = np.ones(3, stored), np.ones(3, grad)
    opt = Adam(param)
    with refused(TypeError, f"^grad for params {message}$", opt, param, array):
        opt.step(array)


@each_isa
@each_stored
def test_mixed(stored: np.dtype, isa: str, tmp_path: pathlib.Path) -> None:
    """A float32 parameter takes the numbers that its gradient of 16 bits stands for."""
    rng = np.random.default_rng(6)
    grads = [rng.standard_normal(1100).astype(stored) for _ in range(3)]
    options: dict[str, Any] = {"max_norm": 1.0, "ema_decay": 0.9}
    mixed, wide = np.ones(1100, np.float32), np.ones(1100, np.float32)
    opt, other = Adam(mixed, allow_mixed=True, **options), Adam(wide, **options)
    for grad in grads[:2]:
        assert opt.step(grad, grad_scale=3.0) == other.step(grad.astype(np.float32), grad_scale=3.0)
    opt.save(tmp_path / "a")
    pickled = pickle.loads(pickle.dumps(opt))
    pickled.step(grads[2], zero_grad=False)
    copied = mixed.copy()
    Adam.load(tmp_path / "a", copied, allow_mixed=True).step(grads[2])
    opt.accumulate(grads[2])
    opt.step()
    other.step(grads[2].astype(np.float32))
    for param in (mixed, copied, pickled.param_groups[0]["params"][0]):
        assert_same_bits(param, wide)
    with pytest.raises(TypeError, match="Both must be the same"):
        Adam(np.ones(2), allow_mixed=True).step(np.ones(2, stored))
    arrays = random_arrays(300, np.float32)._replace(grad=grads[0][:300])
    expected = reference.adam(*arrays, step=2, **OPTIONS["plain-beta1=0.9"])
    arrays.step(OPTIONS["plain-beta1=0.9"], 2, isa, allow_mixed=True)
    assert_same_arrays(arrays, expected)
    with pytest.raises(TypeError, match="allow_mixed must be True or False, got 1"):
        Adam(np.ones(2), allow_mixed=1)  # type: ignore[arg-type]


def test_moments_of_16_bits() -> None:
    x = np.ones(3, BFLOAT16)
    with pytest.raises(
        TypeError, match=r"^exp_avg has dtype bfloat16, expected float32 for a param of bfloat16\.$"
    ):
        adam_step(x, x.copy(), x.copy(), x.copy(), step=1)


@each_stored
def test_shared_memory_is_found_between_types(stored: np.dtype) -> None:
    memory = np.zeros(64, np.float32)
    param = memory.view(stored)[:8]
    opt = Adam(param)
    with refused(ValueError, "^grad for params shares memory with params, which a step writes", opt, memory):
        opt.step(memory[3:11])
    opt.step(memory[4:12])


@each_stored
def test_byte_swapped(stored: np.dtype) -> None:
    swapped = np.array([1, 2, 3], stored).view(np.uint16).byteswap().view(stored.newbyteorder())
    with pytest.raises(ValueError, match=r"^params has byte-swapped elements"):
        Adam(swapped)
    opt = Adam(np.ones(3, stored))
    with refused(ValueError, "^grad for params has byte-swapped elements", opt):
        opt.step(swapped)


def test_types_without_a_number() -> None:
    """Those of the newest kind all have -1."""
    umath = pytest.importorskip("numpy._core._multiarray_umath")
    scaled = np.ones(4).view(umath._get_sfloat_dtype()(1.0))
    assert scaled.dtype.num == -1
    with pytest.raises(
        TypeError, match=r"^params has dtype .*, expected float32, float64, float16 or bfloat16"
    ):
        Adam(scaled)


def test_another_type_of_16_bits() -> None:
    for other in (ml_dtypes.float8_e4m3fn, np.int16, np.uint16):
        with pytest.raises(TypeError, match="expected float32, float64, float16 or bfloat16"):
            Adam(np.ones(3, other))


@each_stored
def test_isas_agree(stored: np.dtype) -> None:
    results = []
    for isa in all_isas():
        arrays = arrays_of(5000, stored, stored)
        arrays.step(OPTIONS["max_norm-skip_nonfinite-ema=0.9-l2-amsgrad"], 7, isa, grad_scale=5.0)
        results.append(arrays)
    for other in results[1:]:
        assert_same_arrays(other, results[0])
