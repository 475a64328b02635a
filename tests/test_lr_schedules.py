"""A function for `lr`: asked by each step, for the number of steps before it, and resumed at its place."""

from __future__ import annotations

import copy
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW, CheckpointError, adam_step
from fused_adam.schedules import Cosine, LinearWarmup, WarmupCosine
from snapshots import random_like
from test_file_faults import META, dumps, edit, forge, parts

SCHEDULE = WarmupCosine(0.5, warmup=3, steps=12, end=0.01)
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2)}


def copied() -> dict[str, np.ndarray]:
    return copy.deepcopy(PARAMS)


def grads(seed: int) -> dict[str, np.ndarray]:
    return random_like(PARAMS, seed)


def by_hand(steps: int, schedule: Callable[[int], float] = SCHEDULE) -> tuple[dict[str, np.ndarray], AdamW]:
    params = copied()
    opt = AdamW(params)
    for step in range(steps):
        opt.lr = schedule(step)
        opt.step(grads(step))
    return params, opt


def assert_same(one: Any, other: Any) -> None:
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


def test_each_step_asks_for_the_number_of_steps_before_it() -> None:
    params, asked = copied(), []

    def schedule(step: int) -> float:
        assert type(step) is int
        asked.append(step)
        return SCHEDULE(step)

    opt = AdamW(params, lr=schedule)
    asked.clear()
    for step in range(8):
        assert opt.steps == step
        opt.step(grads(step))
    assert asked == list(range(8))
    assert_same(params, by_hand(8)[0])


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.array(0.25), 1])
def test_any_number_that_lr_may_be(number: Any) -> None:
    params, other = np.ones(3), np.ones(3)
    Adam(params, lr=lambda step: number).step(np.ones(3))
    Adam(other, lr=float(number)).step(np.ones(3))
    assert params.tobytes() == other.tobytes()


def test_lr_shows_the_rate_of_the_next_step() -> None:
    opt = Adam(copied(), lr=SCHEDULE)
    for step in range(5):
        assert opt.lr == SCHEDULE(step)
        opt.step(grads(step))
    assert opt.param_groups[0]["lr"] == SCHEDULE == opt.defaults["lr"]
    assert "lr=WarmupCosine(" in repr(opt)
    opt.lr = Cosine(0.5, 10)
    assert opt.lr == Cosine(0.5, 10)(5)
    opt.lr = 0.125
    assert opt.lr == 0.125 and opt.param_groups[0]["lr"] == 0.125


def test_groups_have_functions_of_their_own_and_one_count() -> None:
    w, b, late = np.zeros(1), np.zeros(1), np.zeros(1)
    opt = Adam(
        [{"params": w}, {"params": b, "lr": LinearWarmup(1.0, 4)}],
        lr=lambda k: 2.0**-k,
        betas=(0.0, 0.0),
        eps=0,
    )
    ones = [np.ones(1)] * 2
    opt.step(ones)
    opt.step([np.ones(1), None])  # of a group that is left out time passes, too
    opt.add_param_group({"params": late})
    opt.step([*ones, np.ones(1)])
    assert [float(x[0]) for x in (w, b, late)] == [-1.75, -0.5, -0.25]
    with pytest.raises(ValueError, match=r"different learning rates, \[0.125, 0.75\]"):
        opt.lr  # noqa: B018


def test_only_steps_that_are_made_count() -> None:
    opt = Adam([np.ones(2)], lr=SCHEDULE, skip_nonfinite=True)
    opt.step([np.ones(2)])
    assert opt.step([np.array([1, np.inf])]).skipped
    with pytest.raises(TypeError):
        opt.step([np.ones(2, np.float32)])
    assert opt.steps == 1 and opt.skipped_steps == 1
    opt.step([None])
    assert opt.steps == 2


# --- What is refused, and leaves everything as it was ------------------------------------------------

BAD: list[tuple[Any, type[Exception], str]] = [
    (np.nan, ValueError, r"\['lr'\]\(2\) must be finite and >= 0, got nan"),
    (-1.0, ValueError, r"\['lr'\]\(2\) must be finite and >= 0, got -1.0"),
    (np.inf, ValueError, r"\['lr'\]\(2\) must be finite"),
    (True, TypeError, r"\['lr'\]\(2\) must be a number, got True of type bool"),
    ("0.1", TypeError, r"\['lr'\]\(2\) must be a number"),
    (None, TypeError, r"\['lr'\]\(2\) must be a number, got None"),
    (SCHEDULE, TypeError, r"\['lr'\]\(2\) must be a number"),
    (ZeroDivisionError("mine"), ZeroDivisionError, "mine"),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[str(row[0])[:12] for row in BAD])
def test_bad_rate_at_a_step(bad: Any, error: type[Exception], message: str) -> None:
    def schedule(step: int) -> Any:
        if step == 2 and isinstance(bad, Exception):
            raise bad
        return bad if step == 2 else 0.1

    params = copied()
    opt = Adam(params, lr=schedule)
    for step in range(2):
        opt.step(grads(step))
    before = copy.deepcopy((params, dict(opt.state)))
    for call in (lambda: opt.step(grads(2)), opt.state_dict, lambda: opt.lr):
        with pytest.raises(error, match=message):
            call()
    assert pickle.dumps((params, dict(opt.state))) == pickle.dumps(before)
    assert opt.steps == 2


def test_bad_rate_at_construction() -> None:
    with pytest.raises(ValueError, match=r"lr\(0\) must be finite and >= 0, got -1"):
        Adam(np.ones(2), lr=lambda step: -1)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\]\(0\) must be a number, got 'x'"):
        Adam([{"params": np.ones(2), "lr": lambda step: "x"}])
    opt = Adam(np.ones(2))
    with pytest.raises(ValueError, match=r"lr\(0\) must be"):
        opt.lr = lambda step: -1.0
    assert opt.lr == 1e-3


def test_a_function_that_uses_its_optimizer() -> None:
    params = np.ones(2)
    opt = Adam(params)

    def schedule(step: int) -> float:
        opt.step(np.ones(2))
        return 0.1

    opt.param_groups[0]["lr"] = schedule
    with pytest.raises(RuntimeError, match="in use"):
        opt.step(np.ones(2))
    assert params.tolist() == [1, 1]


def test_adam_step_takes_numbers_only() -> None:
    x = np.ones(2)
    with pytest.raises(TypeError, match="lr must be a number, got"):
        adam_step(x, x.copy(), x.copy(), x.copy(), step=1, lr=SCHEDULE)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["lr_schedule", "lr_scheduler", "schedule"])
def test_slips(key: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'lr'"):
        Adam([{"params": np.ones(2), key: SCHEDULE}])


# --- Checkpoints -------------------------------------------------------------------------------------


def through_file(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    opt.save(path)
    return AdamW.load(path, params, lr=SCHEDULE)


def through_state_dict(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    new = AdamW(params, lr=SCHEDULE)
    new.load_state_dict(opt.state_dict())
    return new


def through_pickle(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    return pickle.loads(pickle.dumps(opt))


def through_copy(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    return copy.deepcopy(opt)


@pytest.mark.parametrize("way", [through_file, through_state_dict, through_pickle, through_copy])
def test_goes_on_at_its_place(way: Callable[..., AdamW], tmp_path: pathlib.Path) -> None:
    params = copied()
    opt = AdamW(params, lr=SCHEDULE, skip_nonfinite=True)
    for step in range(5):
        opt.step(grads(step))
        opt.step({"w": None, "b": np.full(2, np.nan)})
    new = way(opt, params, tmp_path / "a")
    assert new.steps == 5 and new.lr == SCHEDULE(5)
    for step in range(5, 9):
        new.step(grads(step))
    found = dict(zip(PARAMS, new.param_groups[0]["params"], strict=True))
    assert_same(found, by_hand(9)[0])


def test_place_counts_steps_not_those_of_a_parameter(tmp_path: pathlib.Path) -> None:
    """Each parameter takes part in every second step."""
    opt = AdamW(copied(), lr=SCHEDULE)
    for step in range(6):
        opt.step({**grads(step), "w" if step % 2 else "b": None})
    assert [entry["step"] for entry in opt.state.values()] == [3, 3]
    for way in (through_file, through_state_dict, through_pickle, through_copy):
        assert way(opt, copied(), tmp_path / "a").steps == 6


def test_files_with_a_function_ask_for_it(tmp_path: pathlib.Path) -> None:
    params = copied()
    opt = AdamW(params, lr=SCHEDULE)
    for step in range(4):
        opt.step(grads(step))
    opt.save(tmp_path / "a")
    with pytest.raises(ValueError) as raised:
        AdamW.load(tmp_path / "a", params)
    assert str(raised.value) == (
        f"{tmp_path / 'a'}: its param_groups[0] was saved with a schedule as lr, WarmupCosine(lr=0.5, "
        "warmup=3, steps=12, start=0.0, end=0.01), which is code and in no checkpoint. Pass one for all "
        'groups, load(path, params, lr=...), or as "lr" of that group.'
    )
    assert AdamW.load(tmp_path / "a", params, lr=0.25).lr == 0.25
    in_group = AdamW.load(tmp_path / "a", [{"params": params, "lr": Cosine(0.5, 10)}], lr=0.25)
    assert in_group.lr == Cosine(0.5, 10)(4) and in_group.defaults["lr"] == 0.25
    # What a function of the caller says later is no matter of the file.
    late = AdamW.load(tmp_path / "a", params, lr=lambda step: -1.0 if step else 1.0)
    with pytest.raises(ValueError, match=r"lr'\]\(4\) must be finite and >= 0"):
        late.step(grads(4))


def test_files_without_a_function() -> None:
    params, opt = by_hand(4)
    saved = opt.state_dict()
    new = AdamW(params, lr=SCHEDULE)
    new.load_state_dict(saved)  # a function is code: it stays, at the place of the checkpoint
    assert new.lr == SCHEDULE(4) and "requires" not in saved


def test_load_with_another_rate(tmp_path: pathlib.Path) -> None:
    params, opt = by_hand(4)
    opt.save(tmp_path / "a")
    assert AdamW.load(tmp_path / "a", params).lr == SCHEDULE(3)
    assert AdamW.load(tmp_path / "a", params, lr=0.25).lr == 0.25
    assert AdamW.load(tmp_path / "a", params, lr=SCHEDULE).lr == SCHEDULE(4)
    assert AdamW.load(tmp_path / "a", [{"params": params, "lr": 0.5}]).lr == SCHEDULE(3)
    assert AdamW.load(tmp_path / "a", [{"params": params, "lr": 0.5}], lr=0.25).lr == 0.5


def test_state_dict_with_a_function() -> None:
    params = copied()
    opt = AdamW(params, lr=SCHEDULE)
    for step in range(4):
        opt.step(grads(step))
    saved = opt.state_dict()
    assert saved["requires"] == ["lr_schedule"]
    assert saved["param_groups"][0]["lr"] == SCHEDULE(4)
    assert saved["param_groups"][0]["lr_schedule"] == repr(SCHEDULE)
    new = AdamW(params, lr=0.125)
    with pytest.raises(ValueError, match="Give this optimizer one, or pass keep_lr=True"):
        new.load_state_dict(saved)
    assert new.steps == 0 and new.state[0]["step"] == 0
    new.load_state_dict(saved, keep_lr=True)
    assert new.lr == 0.125 and new.steps == 4 and "lr_schedule" not in new.param_groups[0]
    # A number since, and a key that somebody left there: it is theirs, and comes back.
    opt.lr = 0.5
    opt.param_groups[0]["lr_schedule"] = "mine"
    new.load_state_dict(opt.state_dict())
    assert new.lr == 0.5 and new.param_groups[0]["lr_schedule"] == "mine"


class Rate:
    """A function whose text is up to somebody."""

    def __init__(self, text: str | None = None) -> None:
        self.text = text

    def __call__(self, step: int) -> float:
        return 0.5

    def __repr__(self) -> str:
        if self.text is None:
            raise ZeroDivisionError
        return self.text


@pytest.mark.parametrize(
    "function, text",
    [
        (lambda step: 0.1, "<function <lambda>>"),
        (Rate("Rate\n\x00 \u00e4\ud800"), "Rate \x00 \\xe4\\ud800"),
        (Rate("x" * 1000), "x" * 200),
        (Rate(), "Rate"),
    ],
)
def test_text_of_a_function(function: Any, text: str, tmp_path: pathlib.Path) -> None:
    opt = Adam(copied(), lr=function)
    assert opt.state_dict()["param_groups"][0]["lr_schedule"] == text
    opt.save(tmp_path / "a")
    assert Adam.load(tmp_path / "a", copied(), lr=0.1).lr == 0.1


class Trainer:
    """Owns its optimizer, whose rate is a method of its own."""

    def __init__(self) -> None:
        self.base, self.first = 0.5, 0  # which are not there while a copy is being made
        self.params = copied()
        self.opt = AdamW(self.params, lr=self.rate)

    def rate(self, step: int) -> float:
        assert step >= self.first
        return self.base / (1 + step)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_copies_ask_nobody(twin: Any) -> None:
    trainer = Trainer()
    trainer.opt.step(grads(0))
    trainer.first = 1
    other = twin(trainer)
    for one in (trainer, other):
        one.opt.step(grads(1))
    other.base = 0.75
    assert (other.opt.lr, trainer.opt.lr) == (0.25, 0.5 / 3)
    assert_same(other.params, trainer.params)
    assert other.params["w"] is other.opt.param_groups[0]["params"][0]


def test_a_function_is_asked_once_for_all_groups() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return float(len(asked))

    def other(step: int) -> float:
        return 1.0

    params = [np.zeros(1), np.zeros(1), np.zeros(1)]
    opt = Adam([{"params": params[0]}, {"params": params[1], "lr": other}, {"params": params[2]}], lr=rate)
    asked.clear()
    opt.step([np.ones(1)] * 3)
    assert asked == [0]
    assert params[0] == params[2] == params[1]
    opt.step([np.ones(1)] * 3)
    assert asked == [0, 1] and params[0] == params[2] != params[1]


def test_defaults_ask_for_nothing(tmp_path: pathlib.Path) -> None:
    """What no group has needs no function when it is loaded."""
    params = copied()
    opt = AdamW(params, lr=SCHEDULE)
    opt.lr = 0.5
    opt.save(tmp_path / "a")
    new = AdamW.load(tmp_path / "a", params)
    assert new.lr == 0.5 and new.defaults["lr"] == SCHEDULE(0) and "lr_schedule" not in new.defaults


def test_load_with_a_function_for_one_group(tmp_path: pathlib.Path) -> None:
    w, b = np.ones(2), np.ones(2)
    opt = AdamW([{"params": w}, {"params": b, "lr": 0.007}], lr=SCHEDULE)
    opt.save(tmp_path / "a")
    new = AdamW.load(tmp_path / "a", [{"params": w, "lr": SCHEDULE}, {"params": b}])
    assert [group["lr"] for group in new.param_groups] == [SCHEDULE, 0.007]
    new = AdamW.load(tmp_path / "a", [{"params": w}, {"params": b}], lr=SCHEDULE)
    assert [group["lr"] for group in new.param_groups] == [SCHEDULE, SCHEDULE]
    new = AdamW.load(tmp_path / "a", [{"params": w}, {"params": b}], lr=0.0)
    assert new.lr == 0.0


def rewrite_metadata(path: pathlib.Path, **changes: Any) -> None:
    header, data = parts(path)
    for key, value in changes.items():
        edit(header, META, key, value=... if value is None else value)
    forge(path, dumps(header), data)


@pytest.mark.parametrize("bad", ["-1", "1.0", "", " 4", "9" * 20, str(2**62 + 1), "1_0"])
def test_bad_place_in_a_file(bad: str, tmp_path: pathlib.Path) -> None:
    by_hand(4)[1].save(tmp_path / "a")
    rewrite_metadata(tmp_path / "a", steps=bad)
    with pytest.raises(CheckpointError):
        AdamW.load(tmp_path / "a", copied())


def test_a_file_without_a_place(tmp_path: pathlib.Path) -> None:
    by_hand(4)[1].save(tmp_path / "a")
    rewrite_metadata(tmp_path / "a", steps=None)
    assert AdamW.load(tmp_path / "a", copied()).steps == 4


def test_plain_checkpoints_have_pytorchs_layout() -> None:
    assert set(by_hand(3)[1].state_dict()) == {"state", "param_groups"}


def test_a_rate_is_checked_for_the_step_that_is_next() -> None:
    opt = Adam(np.ones(2))
    opt.step(np.ones(2))
    opt.lr = lambda step: 1 / step  # there is no step 0 any more
    opt.add_param_group({"params": np.ones(2), "lr": lambda step: 1 / step})
    with pytest.raises(ValueError, match=r"lr\(1\) must be"):
        opt.lr = lambda step: -step


def test_a_detour_through_torch() -> None:
    """PyTorch keeps the text of a function in its groups, and has plain numbers."""
    torch = pytest.importorskip("torch")
    opt = AdamW([np.ones(2)], lr=SCHEDULE)
    opt.step([np.ones(2)])
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    saved = opt.state_dict()
    saved["state"] = {
        i: {key: torch.from_numpy(value) for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    theirs.load_state_dict(saved)
    new = AdamW([np.ones(2)])
    new.load_state_dict(theirs.state_dict())
    assert new.lr == SCHEDULE(1)


@pytest.mark.parametrize("steps", [-1, 1.5, "4", None, True, 2**63, np.ones(2)])
def test_bad_place(steps: Any) -> None:
    opt = by_hand(1)[1]
    with pytest.raises((TypeError, ValueError), match=r"state_dict\['steps'\] must be"):
        opt.load_state_dict({**opt.state_dict(), "steps": steps})


def test_checkpoints_without_a_place() -> None:
    """Of PyTorch, or of an older version."""
    opt = by_hand(4)[1]
    opt.step({"w": np.ones((3, 2), np.float32), "b": None})
    opt.step({"w": None, "b": np.ones(2)})
    saved = opt.state_dict()
    assert saved.pop("steps") == 6
    new = AdamW(copied(), lr=SCHEDULE)
    new.load_state_dict(saved)
    assert new.steps == 5


def test_torch_goes_on_with_the_rate_of_the_next_step() -> None:
    torch = pytest.importorskip("torch")
    opt = AdamW([np.ones(2)], lr=SCHEDULE)
    opt.step([np.ones(2)])
    saved = opt.state_dict()
    saved["state"] = {
        i: {key: torch.from_numpy(value) for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    theirs.load_state_dict(saved)
    assert theirs.param_groups[0]["lr"] == SCHEDULE(1)
    again = AdamW([np.ones(2)], lr=SCHEDULE)
    again.load_state_dict(theirs.state_dict())
    assert again.steps == 1
