"""Averages of the parameters: their bits, when they begin, how they are read, and weights in their place."""

from __future__ import annotations

import copy
import pathlib
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fused_adam
import reference
from cases import DEFAULTS, Arrays, all_isas, each_dtype, each_isa, random_arrays
from cases import assert_same_arrays as assert_same_step
from cases import assert_same_bits as assert_same_array
from fused_adam import Adam, AdamW
from snapshots import (
    Scene,
    Snapshot,
    assert_same_bits,
    assert_same_state,
    assign,
    leaves,
    map_tree,
    random_like,
    refused,
    train,
)

DECAYS = (0.0, 0.3, 0.5, 0.999)  # at 0.5 one form of the average gives way to the other
each_decay = pytest.mark.parametrize("decay", DECAYS)
TILE = 512
NO_AVERAGES = "^there are no averages: Adam"
INSIDE = "^the averages are in the place of the parameters: inside `with opt.ema_weights"


def lerp(ema: np.ndarray, param: np.ndarray, decay: float) -> np.ndarray:
    return reference.lerp(ema, param, param.dtype.type(1 - decay))


# --- The bits ----------------------------------------------------------------------------------------


@each_dtype
@each_decay
def test_equals_the_reference_over_many_steps(decay: float, dtype: Any) -> None:
    opt = Adam(random_like(np.empty(1000, dtype), 1), lr=0.1, ema_decay=decay, weight_decay=0.1)
    (param,) = opt.param_groups[0]["params"]
    moments = [np.zeros(1000, dtype), np.zeros(1000, dtype)]
    expected = [param.copy(), *moments, None, param.copy()]
    options = {key: opt.param_groups[0][key] for key in DEFAULTS}
    for step in range(1, 51):
        grad = random_like(param, step)
        opt.step(grad)
        expected = list(reference.adam(expected[0], grad, *expected[1:], step=step, **options))
        assert_same_array(param, expected[0], f"param after step {step}")
        assert_same_array(opt.ema, expected[4], f"ema after step {step}")


@pytest.mark.slow
@each_dtype
@each_decay
def test_equals_torch(decay: float, dtype: Any) -> None:
    """At every size: unlike its Adam, torch's lerp computes the rest of a vector as it does the others."""
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch is not vectorized here, and multiplies and adds in two roundings")
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    params = random_like([np.empty(size, dtype) for size in (1, 3, 16, 17, 31, 1000, 4099)], 1)
    opt = Adam(params, lr=0.1, ema_decay=decay)
    model = torch.nn.ParameterList([torch.from_numpy(param) for param in params])
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # its first call only copies
    for seed in range(30):
        train(opt, params, [seed])
        averaged.update_parameters(model)
    for mine, other in zip(opt.ema, averaged.module.parameters(), strict=True):
        assert_same_array(mine, other.detach().numpy())


@each_isa
@each_dtype
@each_decay
def test_equal_for_every_isa_tile_and_number_of_threads(decay: float, dtype: Any, isa: str) -> None:
    options = {**DEFAULTS, "ema_decay": decay}
    for size in (0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 70_001):
        start = random_arrays(size, dtype, seed=size)
        expected = start.copy()
        expected.step(options, 3, all_isas()[-1], 1)
        for threads in (1, 2, 7):
            arrays = start.copy()
            arrays.step(options, 3, isa, threads)
            assert_same_step(arrays, expected, f"size {size}, {threads} threads")


def test_the_beginning_is_cut_as_the_rest() -> None:
    """Also the copy with which an average begins goes tile by tile, and through all threads."""
    whole = random_like(np.empty(70_001, np.float32), 1)
    grad = random_like(whole, 2)
    pieces = [whole[i : i + 333].copy() for i in range(0, whole.size, 333)]
    opts = [Adam(params, ema_decay=0.9, num_threads=3) for params in (whole, pieces)]
    opts[0].step(grad)
    opts[1].step([grad[i : i + 333] for i in range(0, grad.size, 333)])
    assert_same_array(np.concatenate(opts[1].ema), opts[0].ema)
    assert_same_array(np.concatenate(pieces), whole)


def test_an_average_changes_nothing_else() -> None:
    params = random_like([np.empty(2000, np.float32), np.empty(7)], 1)
    twin_params = map_tree(np.copy, params)
    opt, twin = Adam(params, ema_decay=0.9, amsgrad=True), Adam(twin_params, amsgrad=True)
    for one, arrays in ((opt, params), (twin, twin_params)):
        train(one, arrays, range(5))
    assert_same_bits(params, twin_params)
    for index, entry in twin.state.items():
        mine = opt.state[index]
        del mine["ema"]
        assert mine.pop("step") == entry.pop("step")
        assert_same_bits(mine, entry)


def test_decay_may_change_at_every_step() -> None:
    """A schedule, which often begins lower."""
    param = random_like(np.empty(100), 1)
    opt, expected = Adam(param, lr=0.1, ema_decay=0.0), param.copy()
    for step in range(1, 10):
        decay = min(0.999, step / (step + 10))
        opt.param_groups[0]["ema_decay"] = decay
        opt.step(random_like(param, step))
        expected = lerp(expected, param, decay)
        assert_same_array(opt.ema, expected)


# --- When it begins ----------------------------------------------------------------------------------


def test_begins_as_the_params_are_when_the_first_step_begins() -> None:
    param = np.zeros(1000, np.float32)
    opt = Adam(param, ema_decay=0.9)
    param[:] = random_like(param, 1)  # weights that are loaded once the optimizer is there
    begin = param.copy()
    opt.step(random_like(param, 2))
    assert_same_array(opt.ema, lerp(begin, param, 0.9))


def test_begins_for_each_parameter_with_its_own_first_step() -> None:
    params = random_like([np.empty(5), np.empty(3)], 1)
    opt = Adam(params, lr=0.1, ema_decay=0.9)
    opt.step([np.ones(5), None])
    assert "ema" in opt.state[0] and "ema" not in opt.state[1]
    params[1][:] = 7
    assert opt.ema[1].tolist() == [7, 7, 7]
    params[1][:] = 8
    opt.step([None, np.ones(3)])
    assert_same_array(opt.ema[1], lerp(np.full(3, 8.0), params[1], 0.9))


def test_a_parameter_that_is_left_out_keeps_its_average() -> None:
    params = random_like([np.empty(5), np.empty(3)], 1)
    opt = Adam(params, lr=0.1, ema_decay=0.9)
    train(opt, params, [1])
    before = opt.ema[1].copy()
    params[1][:] = 7  # not even towards a param that changed
    opt.step([np.ones(5), None])
    assert_same_array(opt.ema[1], before)


def test_switched_on_between_steps() -> None:
    params = random_like([np.empty(5, np.float32), np.empty((2, 3), order="F")], 1)
    opt = Adam(params, lr=0.1)
    train(opt, params, [1, 2])
    opt.param_groups[0]["ema_decay"] = 0.75
    begin = map_tree(np.copy, params)
    train(opt, params, [3])
    for i in (0, 1):
        assert_same_array(opt.ema[i], lerp(begin[i], params[i], 0.75))
        assert opt.ema[i].strides == params[i].strides


def test_off_and_on_again_goes_on_with_the_old_average() -> None:
    param = random_like(np.empty(50), 1)
    opt = Adam(param, lr=0.1, ema_decay=0.75)
    train(opt, param, [1])
    kept = opt.ema.copy()
    opt.param_groups[0]["ema_decay"] = None
    train(opt, param, [2, 3])
    assert_same_array(opt.state[0]["ema"], kept)
    opt.param_groups[0]["ema_decay"] = 0.5
    assert_same_array(opt.ema, kept)
    train(opt, param, [4])
    assert_same_array(opt.ema, lerp(kept, param, 0.5))


def test_a_refused_step_begins_nothing() -> None:
    param = np.ones(3)
    opt = Adam(param, ema_decay=0.5)
    with refused(ValueError, "has shape", opt):
        opt.step(np.ones(4))
    param[:] = 5
    opt.step(np.ones(3))
    assert_same_array(opt.ema, lerp(np.full(3, 5.0), param, 0.5))


# --- Adam.ema ----------------------------------------------------------------------------------------

TREES: dict[str, Any] = {
    "array": np.empty(5, np.float32),
    "scalar": np.empty(()),
    "list": [np.empty(3), np.empty(4, np.float32)],
    "dict": {"w": np.empty((2, 3), order="F"), "b": [np.empty(2), (np.empty(1), np.empty(6))]},
}


@pytest.mark.parametrize("form", TREES)
def test_structure(form: str) -> None:
    params = random_like(TREES[form], 1)
    opt = Adam(params, lr=0.1, ema_decay=0.5)
    for _ in range(2):
        found = [(path, array.shape, array.dtype, array.strides) for path, array in leaves(opt.ema)]
        assert found == [(path, a.shape, a.dtype, a.strides) for path, a in leaves(params)]
        assert type(opt.ema) is type(params)
        train(opt, params, [1])
    assert [a.tolist() for _, a in leaves(opt.ema)] == [entry["ema"].tolist() for entry in opt.state.values()]


def test_structure_of_groups() -> None:
    params = random_like([{"w": np.empty(3)}, [np.empty(2), np.empty(4)], np.empty(5)], 1)
    groups = [{"params": tree} for tree in params]
    groups[0]["ema_decay"], groups[1]["ema_decay"] = 0.5, None
    opt = Adam(groups, ema_decay=0.75)
    train(opt, params, [1])
    first, none, last = opt.ema
    assert list(first) == ["w"] and none == [None, None] and last.shape == (5,)
    assert ["ema" in entry for entry in opt.state.values()] == [True, False, False, True]
    opt.param_groups[0]["ema_decay"] = None  # what it had stays, for when it is switched on again
    assert opt.ema[0] == {"w": None} and opt.ema[2].shape == (5,)
    assert "ema" in opt.state[0]
    opt.param_groups[2]["ema_decay"] = None
    with refused(ValueError, NO_AVERAGES, opt):
        opt.ema  # noqa: B018
    opt.add_param_group({"params": np.ones(2)})  # 0.75, the default
    assert opt.ema[:2] == [{"w": None}, [None, None]] and opt.ema[3].tolist() == [1, 1]


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_there_are_none_where_none_are_asked_for(cls: type[Adam]) -> None:
    opt = cls([np.ones(3)])
    for _ in range(2):
        with refused(ValueError, NO_AVERAGES, opt):
            opt.ema  # noqa: B018
        with refused(ValueError, NO_AVERAGES, opt), opt.ema_weights():
            pass
        opt.step([np.ones(3)])
    opt.param_groups[0]["ema_decay"] = 0.5
    assert opt.ema[0].tolist() == opt.param_groups[0]["params"][0].tolist()


def test_before_the_first_step_it_follows_the_params() -> None:
    param = np.ones(3)
    opt = Adam(param, ema_decay=0.5)
    for value in (1, 2):
        param[:] = value
        assert opt.ema.tolist() == [value] * 3
    assert "ema" not in opt.state[0]
    view = opt.ema
    opt.step(np.ones(3))
    assert np.shares_memory(view, opt.ema)
    assert_same_array(view, lerp(np.full(3, 2.0), param, 0.5))


def test_live_views() -> None:
    """As those of opt.state: what is written to them counts, what is done to their flags does not."""
    param = np.ones(4)
    opt = Adam(param, ema_decay=0.5)
    opt.step(np.ones(4))
    view = opt.ema
    assert np.shares_memory(view, opt.state[0]["ema"])
    view.setflags(write=False)
    assert opt.ema.flags.writeable
    assign(view, "shape", (2, 2))
    assert opt.ema.shape == (4,)
    opt.ema[:] = 3
    opt.step(np.ones(4))
    assert_same_array(opt.ema, lerp(np.full(4, 3.0), param, 0.5))
    with pytest.raises(ValueError, match="resize"):
        opt.ema.resize(400, refcheck=False)


def test_a_frozen_param_has_an_average_to_read() -> None:
    param = np.ones(3)
    opt = Adam([param, np.ones(2)], ema_decay=0.5)
    param.setflags(write=False)
    assert opt.ema[0].tolist() == [1, 1, 1]
    opt.step([None, np.ones(2)])
    assert opt.ema[0].tolist() == [1, 1, 1]
    with opt.ema_weights():  # nothing is to be written to it
        assert param.tolist() == [1, 1, 1]


def test_groups_that_are_no_longer_right() -> None:
    opt = Adam([np.ones(3)], ema_decay=0.5)
    for value, error in ((1.0, ValueError), ("0.5", TypeError), (True, TypeError), (-0.5, ValueError)):
        opt.param_groups[0]["ema_decay"] = value
        with refused(error, r"^param_groups\[0\]\['ema_decay'\] ?must be", opt):
            opt.ema  # noqa: B018
        with refused(error, r"^param_groups\[0\]\['ema_decay'\] ?must be", opt), opt.ema_weights():
            pass
    opt.param_groups.append({})
    with pytest.raises(ValueError, match="param_groups has 2 groups"):
        opt.ema  # noqa: B018


def test_overlap_with_an_average_is_refused() -> None:
    opt = Adam([np.ones(3), np.ones(3)], ema_decay=0.5)
    ema = opt.ema[0]
    with refused(ValueError, r"^grad for params\[1\] shares memory with the state of params\[0\]", opt):
        opt.step([np.ones(3), ema])
    with refused(ValueError, "shares memory with the state of", opt):
        opt.add_param_group({"params": ema})


# --- Weights in the place of the parameters -----------------------------------------------------------


class Trained:
    """Two groups, the second of which keeps no averages, after two steps."""

    def __init__(self) -> None:
        self.params = random_like([{"w": np.empty((3, 4), np.float32), "b": np.empty(5)}, np.empty(3)], 1)
        first, second = self.params
        groups = [{"params": first, "ema_decay": 0.5}, {"params": second}]
        self.opt = Adam(groups, lr=0.1)
        train(self.opt, self.params, [2, 3])
        self.averages = [map_tree(np.copy, self.opt.ema[0]), second.copy()]
        self.before = map_tree(np.copy, self.params)

    def assert_back(self) -> None:
        assert_same_bits(self.params, self.before)
        assert_same_bits(self.opt.ema[0], self.averages[0])
        self.opt.step(random_like(self.params, 4))


def test_in_and_back() -> None:
    trained = Trained()
    snapshot = Snapshot(trained.opt, trained.params)
    for _ in range(2):
        with trained.opt.ema_weights() as nothing:
            assert nothing is None
            assert_same_bits(trained.params, trained.averages)
        snapshot.assert_unchanged()
    trained.assert_back()


def test_the_same_block_again() -> None:
    trained = Trained()
    block = trained.opt.ema_weights()
    for _ in range(2):
        with block:
            assert_same_bits(trained.params, trained.averages)
    trained.assert_back()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_back_after_an_exception(error: type[BaseException]) -> None:
    trained = Trained()
    with pytest.raises(error, match="of the body"), trained.opt.ema_weights():
        raise error("of the body")
    trained.assert_back()


def test_before_the_first_step_weights_are_the_params() -> None:
    param = np.ones(3)
    opt = Adam(param, ema_decay=0.5)
    with opt.ema_weights():
        assert param.tolist() == [1, 1, 1]
    param[:] = 2
    opt.step(np.ones(3))
    assert_same_array(opt.ema, lerp(np.full(3, 2.0), param, 0.5))


def test_what_is_written_inside_goes_into_the_average() -> None:
    """An exchange, not a copy: nothing is lost that somebody wrote."""
    trained = Trained()
    with trained.opt.ema_weights():
        trained.params[0]["b"][:] = 7
    assert trained.opt.ema[0]["b"].tolist() == [7] * 5
    assert_same_bits(trained.params, trained.before)


def test_switched_off_means_that_the_params_stay() -> None:
    """Those of opt.ema are those that are exchanged, also where there are older ones."""
    opt = Adam([{"params": np.ones(3)}, {"params": np.ones(3)}], lr=0.5, eps=0.0, ema_decay=0.5)
    opt.step([np.ones(3)] * 2)
    opt.param_groups[1]["ema_decay"] = None
    first, second = (group["params"][0] for group in opt.param_groups)
    with opt.ema_weights():
        assert first.tolist() == [0.75] * 3 and second.tolist() == [0.5] * 3
        opt.param_groups[1]["ema_decay"] = 0.5  # too late for this block
        opt.param_groups[0]["ema_decay"] = None
    assert first.tolist() == second.tolist() == [0.5] * 3
    opt.param_groups[1]["ema_decay"] = None
    with refused(ValueError, NO_AVERAGES, opt), opt.ema_weights():
        pass


CALLS: dict[str, Callable[[Trained, pathlib.Path], Any]] = {
    "step": lambda t, _: t.opt.step(random_like(t.params, 4)),
    "step zero_grad": lambda t, _: t.opt.step(random_like(t.params, 4), zero_grad=True),
    "zero_grad": lambda t, _: t.opt.zero_grad(),
    "state_dict": lambda t, _: t.opt.state_dict(),
    "load_state_dict": lambda t, _: t.opt.load_state_dict(Trained().opt.state_dict()),
    "save": lambda t, path: t.opt.save(path / "a"),
    "pickle": lambda t, _: pickle.dumps(t.opt),
    "copy": lambda t, _: copy.copy(t.opt),
    "deepcopy": lambda t, _: copy.deepcopy(t.opt),
    "add_param_group": lambda t, _: t.opt.add_param_group({"params": np.ones(2)}),
    "ema": lambda t, _: t.opt.ema,
    "ema_weights": lambda t, _: t.opt.ema_weights().__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_else_inside(call: str, tmp_path: pathlib.Path) -> None:
    trained = Trained()
    trained.opt.grads  # noqa: B018  (made before, so that there is something to be cleared)
    with trained.opt.ema_weights():
        with refused(RuntimeError, INSIDE, trained.opt, trained.params):
            CALLS[call](trained, tmp_path)
        assert_same_bits(trained.params, trained.averages)
    assert not list(tmp_path.iterdir())
    trained.assert_back()


def test_nested_blocks_are_refused_and_leave_the_outer_one() -> None:
    trained = Trained()
    with trained.opt.ema_weights():
        with pytest.raises(RuntimeError, match=INSIDE), trained.opt.ema_weights():
            pytest.fail("entered")
        assert_same_bits(trained.params, trained.averages)
    trained.assert_back()


def test_an_end_without_a_beginning() -> None:
    trained = Trained()
    block = trained.opt.ema_weights()
    with refused(RuntimeError, "^the averages are not in the place of the param", trained.opt):
        block.__exit__(None, None, None)
    with block:
        pass
    with refused(RuntimeError, "^the averages are not in the place of the param", trained.opt):
        block.__exit__(None, None, None)
    trained.assert_back()


@pytest.mark.parametrize("file", [fused_adam.adam.__file__, __file__], ids=["package", "block"])
def test_wherever_it_is_interrupted(file: str) -> None:
    """At each line, of the package and of the block itself: the params are back, or were never away."""

    def block(opt: Adam) -> None:
        with opt.ema_weights():
            inside = 1
            inside += 1
            del inside

    event, interrupted = 0, True
    while interrupted:
        event += 1
        trained = Trained()
        interrupted = interrupt_at(event, file, block, trained.opt)
        trained.assert_back()
    assert event == (5 if file == __file__ else 2)


def interrupt_at(event: int, file: str, call: Callable[[Adam], None], opt: Adam) -> bool:
    """KeyboardInterrupt at a line of a file, the first time that it is come to.

    The line of a `with` comes once more when its block ends. What a tracer raises there no context manager
    sees; a signal is never handled there.
    """
    seen = set()

    def trace(frame: Any, kind: str, _: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if kind == "line" and frame.f_lineno not in seen:
            seen.add(frame.f_lineno)
            if len(seen) == event:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call(opt)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_read_only_param_is_refused_before_anything_is_exchanged() -> None:
    trained = Trained()
    trained.params[0]["b"].setflags(write=False)
    with refused(ValueError, r"\['b'\] is read-only", trained.opt), trained.opt.ema_weights():
        pytest.fail("entered")
    trained.params[0]["b"].setflags(write=True)
    trained.assert_back()


def test_a_param_that_is_made_read_only_inside_comes_back() -> None:
    """To protect the averages, say; what it was must not be lost by it."""
    trained = Trained()
    with trained.opt.ema_weights():
        trained.params[0]["b"].setflags(write=False)
    assert not trained.params[0]["b"].flags.writeable
    trained.params[0]["b"].setflags(write=True)
    trained.assert_back()


def test_a_param_that_moves_inside_comes_back() -> None:
    trained = Trained()
    moved = trained.params[0]["b"]
    with trained.opt.ema_weights():
        moved.resize(1_000_000, refcheck=False)
        moved.resize(5, refcheck=False)
    trained.assert_back()


def test_a_param_that_moves_and_is_read_only_then_is_not_written() -> None:
    """Nobody knows what that memory is."""
    trained = Trained()
    block = trained.opt.ema_weights()
    moved = trained.params[0]["b"]
    with pytest.raises(ValueError, match=r"\['b'\] is read-only"), block:
        moved.resize(1_000_000, refcheck=False)
        moved.resize(5, refcheck=False)
        moved.setflags(write=False)
        inside = moved.tolist()
    assert moved.tolist() == inside
    assert_same_bits(trained.params[0]["w"], trained.before[0]["w"])
    moved.setflags(write=True)
    block.__exit__(None, None, None)
    trained.assert_back()


def test_a_param_that_is_resized_inside() -> None:
    """All others come back. Its own values are not lost, and nothing goes on without them."""
    trained = Trained()
    block = trained.opt.ema_weights()
    resized = trained.params[0]["b"]
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(6,\), but it had \(5,\) when"), block:
        resized.resize(6, refcheck=False)
    assert_same_bits(trained.params[0]["w"], trained.before[0]["w"])
    assert_same_bits(trained.opt.state[1]["ema"], trained.before[0]["b"])
    for call in ("step", "state_dict", "ema_weights"):
        with pytest.raises(RuntimeError, match=INSIDE):
            CALLS[call](trained, pathlib.Path())
    # Whoever has the block, and mends it, can end it once more.
    resized.resize(5, refcheck=False)
    block.__exit__(None, None, None)
    trained.assert_back()


def test_a_block_that_is_lost_ends() -> None:
    """From Python 3.14 on an interruption may come after entering and before the protected body."""
    trained = Trained()
    block = trained.opt.ema_weights()
    block.__enter__()
    assert_same_bits(trained.params, trained.averages)
    del block
    trained.assert_back()
    trained = Trained()
    with pytest.raises(KeyboardInterrupt):
        enter_and_lose(trained)
    trained.assert_back()


def enter_and_lose(trained: Trained) -> None:
    trained.opt.ema_weights().__enter__()
    raise KeyboardInterrupt


def test_who_did_not_enter_cannot_end() -> None:
    trained = Trained()
    block = trained.opt.ema_weights()
    block.__enter__()
    with pytest.raises(RuntimeError, match=r"^the averages are not in the place of the parameters"):
        trained.opt.ema_weights().__exit__(None, None, None)
    assert_same_bits(trained.params, trained.averages)
    del block
    trained.assert_back()


def test_a_lost_block_that_cannot_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    trained = Trained()
    block = trained.opt.ema_weights()
    block.__enter__()
    trained.params[0]["b"].resize(1, refcheck=False)
    del block
    assert [type(found.exc_value) for found in told] == [ValueError]
    with pytest.raises(RuntimeError, match=INSIDE):
        trained.opt.state_dict()


def test_from_two_threads() -> None:
    """One is inside: the other is refused, at once."""
    trained = Trained()
    refusals: list[str] = []

    def other() -> None:
        for call in (lambda: trained.opt.ema_weights().__enter__(), trained.opt.state_dict):
            try:
                call()
            except RuntimeError as error:
                refusals.append(str(error))

    with trained.opt.ema_weights():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert_same_bits(trained.params, trained.averages)
    assert len(refusals) == 2 and all("averages are in the place" in text for text in refusals)
    trained.assert_back()


def test_blocks_and_steps_of_many_threads() -> None:
    """Each either happens as a whole or is refused; after them everything is at its place."""
    param = np.zeros(200_000, np.float32)
    opt = Adam(param, lr=1.0, ema_decay=0.0, betas=(0.0, 0.0), eps=0.0)
    grad = -np.ones_like(param)  # each step adds 1
    opt.step(grad)
    opt.ema[:] = -1
    done, failures = [0] * 4, []

    def work(k: int) -> None:
        for _ in range(50):
            try:
                if k % 2:
                    with opt.ema_weights():
                        values = {float(param[0]), float(param[-1])}
                        if len(values) != 1:
                            failures.append(values)
                else:
                    opt.step(grad)
                done[k] += 1
            except RuntimeError:
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    steps = opt.state[0]["step"]
    assert steps == 1 + done[0] + done[2]
    assert np.all(param == steps) and np.all(opt.ema == (steps if steps > 1 else -1))
    opt.step(grad)


def test_copies_have_blocks_of_their_own() -> None:
    trained = Trained()
    other = copy.deepcopy(trained.opt)
    with trained.opt.ema_weights(), other.ema_weights():
        assert_same_bits(other.param_groups[0]["params"][0], trained.averages[0]["w"])
    trained.assert_back()
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(trained.opt.ema_weights())


# --- Checkpoints -------------------------------------------------------------------------------------


def through_state_dict(opt: Adam, params: Any, path: pathlib.Path) -> Adam:
    new = Adam(params, lr=0.7)  # which keeps no averages of its own
    new.load_state_dict(opt.state_dict())
    return new


def through_a_file(opt: Adam, params: Any, path: pathlib.Path) -> Adam:
    opt.save(path)
    return Adam.load(path, params)


def through_pickle(opt: Adam, params: Any, path: pathlib.Path) -> Adam:
    return pickle.loads(pickle.dumps(opt))


def through_deepcopy(opt: Adam, params: Any, path: pathlib.Path) -> Adam:
    return copy.deepcopy(opt)


WAYS = (through_state_dict, through_a_file, through_pickle, through_deepcopy)
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
EMPTY = {"w": np.empty((3, 4), np.float32), "b": [np.empty(5), np.empty((2, 3), order="F")]}


def arrays_of(opt: Adam) -> list[np.ndarray]:
    return [array for group in opt.param_groups for array in group["params"]]


@each_way
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_resumes_with_the_same_bits(way: Any, steps: int, amsgrad: bool, tmp_path: pathlib.Path) -> None:
    params = random_like(EMPTY, 1)
    opt = Adam(params, lr=0.1, ema_decay=0.75, amsgrad=amsgrad)
    for seed in range(steps):
        grads = random_like(EMPTY, seed)
        grads["b"][1] = None  # its average has not begun
        opt.step(grads)
    twin = way(opt, map_tree(lambda a: a.copy(order="K"), params), tmp_path / "a")
    assert_same_state(twin, opt)
    assert ["ema" in entry for entry in twin.state.values()] == [steps > 0, steps > 0, False]
    for one in (opt, twin):
        train(one, EMPTY, range(10, 13))
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert_same_state(twin, opt)
    assert_same_bits(twin.ema, opt.ema)


@each_way
def test_before_the_first_step_it_still_follows_the_params(way: Any, tmp_path: pathlib.Path) -> None:
    opt = Adam([np.ones(3)], ema_decay=0.5)
    opt.ema  # noqa: B018  (there is memory for it, which holds no average yet)
    twin = way(opt, [np.ones(3)], tmp_path / "a")
    (param,) = arrays_of(twin)
    param[:] = 5
    assert twin.ema[0].tolist() == [5, 5, 5]
    twin.step([np.ones(3)])
    assert_same_array(twin.ema[0], lerp(np.full(3, 5.0), param, 0.5))


def test_loaded_where_another_average_was() -> None:
    """That of the checkpoint takes its place, also where the checkpoint's has not begun."""
    opt, fresh = Adam([np.ones(3), np.ones(2)], ema_decay=0.5), Adam([np.ones(3), np.ones(2)], ema_decay=0.5)
    train(opt, arrays_of(opt), [1])
    fresh.step([np.ones(3), None])
    opt.load_state_dict(fresh.state_dict())
    assert_same_state(opt, fresh)
    param = arrays_of(opt)[1]
    param[:] = 9
    opt.step([None, np.ones(2)])
    assert_same_array(opt.ema[1], lerp(np.full(2, 9.0), param, 0.5))


def test_loaded_without_ends_the_average() -> None:
    """A checkpoint that has no ema_decay is of a training without."""
    plain, opt = Adam([np.ones(3)]), Adam([np.ones(3)], ema_decay=0.5)
    for one in (plain, opt):
        one.step([np.ones(3)])
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["ema_decay"] is None and "ema" not in opt.state[0]
    for use in (lambda: opt.ema, lambda: opt.ema_weights().__enter__()):
        with pytest.raises(ValueError, match=NO_AVERAGES):
            use()
    (param,) = arrays_of(opt)
    opt.param_groups[0]["ema_decay"], before = 0.5, param.copy()
    opt.step([np.ones(3)])  # switched on again, it begins anew
    assert_same_array(opt.ema[0], lerp(before, param, 0.5))


def test_an_average_that_was_switched_off_is_kept(tmp_path: pathlib.Path) -> None:
    for way in WAYS:
        opt = Adam([np.ones(3)], lr=0.5, eps=0.0, ema_decay=0.5)
        opt.step([np.ones(3)])
        opt.param_groups[0]["ema_decay"] = None
        assert opt.state_dict()["requires"] == ["ema"]
        twin = way(opt, [np.full(3, 0.5)], tmp_path / "a")
        assert twin.state[0]["ema"].tolist() == [0.75] * 3
        twin.param_groups[0]["ema_decay"] = 0.5
        assert twin.ema[0].tolist() == [0.75] * 3


def test_a_state_dict_is_a_copy() -> None:
    opt = Adam([np.ones(3)], ema_decay=0.5)
    opt.step([np.ones(3)])
    saved = opt.state_dict()
    before = saved["state"][0]["ema"].copy()
    opt.step([np.ones(3)])
    assert_same_array(saved["state"][0]["ema"], before)
    saved["state"][0]["ema"][:] = 7
    assert (opt.ema[0] != 7).all()


def test_without_the_entry_it_begins_anew() -> None:
    opt = Adam([np.ones(3)], ema_decay=0.5)
    opt.step([np.ones(3)])
    saved = opt.state_dict()
    del saved["state"][0]["ema"]
    opt.load_state_dict(saved)
    (param,) = arrays_of(opt)
    param[:] = 4
    opt.step([np.ones(3)])
    assert opt.state[0]["step"] == 2
    assert_same_array(opt.ema[0], lerp(np.full(3, 4.0), param, 0.5))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.ones(4), ValueError, "has shape"),
        (np.ones(3, np.float32), TypeError, "has dtype"),
        (None, TypeError, "must be an array"),
    ],
)
def test_a_wrong_average_is_refused(value: Any, error: type[Exception], message: str) -> None:
    opt = Adam([np.ones(3)], ema_decay=0.5)
    opt.step([np.ones(3)])
    saved = opt.state_dict()
    saved["state"][0]["ema"] = value
    with refused(error, rf"^state_dict\['state'\]\[0\]\['ema'\] {message}", opt):
        opt.load_state_dict(saved)


def test_what_a_reader_must_know() -> None:
    """An older version would load less than there is; a newer one may ask for what this one has not."""
    opt = Adam([np.ones(3)], ema_decay=0.5)
    assert opt.state_dict()["requires"] == ["ema_decay"]
    opt.step([np.ones(3)])
    saved = opt.state_dict()
    assert saved["requires"] == ["ema_decay", "ema"]
    saved["requires"] = ["ema", "master weights"]
    with refused(ValueError, r"^state_dict needs \['master weights'\], which fused-adam .* Upgrade it", opt):
        opt.load_state_dict(saved)
    saved["requires"] = "ema"
    with refused(TypeError, r"^state_dict\['requires'\] must be a list", opt):
        opt.load_state_dict(saved)


@pytest.mark.slow
def test_with_torch_both_ways() -> None:
    """What torch does not know does not disturb it; what it does not have begins anew."""
    torch = pytest.importorskip("torch")
    arrays = random_like([np.empty(16, np.float32), np.empty((4, 8), np.float32)], 1)
    opt = Adam(arrays, lr=0.1, ema_decay=0.5)
    train(opt, arrays, [1, 2])
    copies = map_tree(np.copy, arrays)
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.from_numpy(array)) for array in copies])
    saved = opt.state_dict()
    as_tensors = map_tree(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, saved["state"])
    theirs.load_state_dict({**saved, "state": as_tensors})
    back = theirs.state_dict()
    assert back["param_groups"][0]["ema_decay"] == 0.5
    other = Adam(map_tree(np.copy, arrays))
    other.load_state_dict(back)
    assert_same_state(other, opt)

    plain = torch.optim.Adam([torch.nn.Parameter(torch.from_numpy(array)) for array in copies], fused=True)
    for param in plain.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    plain.step()
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["ema_decay"] is None and "ema" not in opt.state[0]
    opt.param_groups[0]["ema_decay"] = 0.5
    begin = map_tree(np.copy, arrays)
    train(opt, arrays, [3])
    for i in (0, 1):
        assert_same_array(opt.ema[i], lerp(begin[i], arrays[i], 0.5))


# --- The function, and the rest ------------------------------------------------------------------------


def test_adam_step() -> None:
    arrays = random_arrays(100, np.float32)
    expected = reference.adam(*arrays, step=3, **{**DEFAULTS, "ema_decay": 0.9})
    fused_adam.adam_step(*arrays[:4], ema=arrays.ema, ema_decay=0.9, step=3)
    assert_same_array(arrays.ema, expected[4])
    before = arrays.ema.copy()
    fused_adam.adam_step(*arrays[:4], ema=arrays.ema, step=4)  # there, but not asked for
    assert_same_array(arrays.ema, before)
    with refused(ValueError, "^ema_decay needs ema", None, list(arrays)):
        fused_adam.adam_step(*arrays[:4], ema_decay=0.9, step=3)
    with refused(ValueError, "^ema shares memory with param", None, list(arrays)):
        fused_adam.adam_step(*arrays[:4], ema=arrays.param, ema_decay=0.9, step=3)


def test_all_options_together() -> None:
    """The last stream is used by a step that uses all of them, at each step."""
    options = {**DEFAULTS, "ema_decay": 0.9, "amsgrad": True, "weight_decay": 0.1}
    expected = tuple(random_arrays(TILE + 9, np.float64))
    arrays = Arrays(*expected).copy()
    for step in (1, 2, 3):
        param, *moments = reference.adam(*expected, step=step, **options)
        expected = (param, expected[1], *moments)
        arrays.step(options, step)
        assert_same_step(arrays, expected)


def test_scene_goes_on_after_refusals() -> None:
    scene = Scene(grouped=True)
    for use in (lambda: scene.opt.ema, lambda: scene.opt.ema_weights().__enter__()):
        with refused(ValueError, NO_AVERAGES, scene.opt):
            use()
    scene.goes_on()


def test_repr_says_the_decay_where_there_is_one() -> None:
    assert "ema_decay=0.5" in repr(Adam(np.ones(2), ema_decay=0.5))
    assert "ema_decay" not in repr(Adam(np.ones(2)))
