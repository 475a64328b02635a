"""`no_decay`: a group of its own for parameters that are not to decay, and gradients as if there were
none."""

from __future__ import annotations

import copy
import math
import pathlib
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW, CheckpointError, _core
from snapshots import assert_same_bits, assert_same_state, interrupt_at, map_tree, random_like, refused

RULE = ["bias", "*norm*"]
SPARED = ["encoder.0.bias", "encoder.norm.scale", "bias"]
OTHERS = ["encoder.0.weight", "head"]


def model() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "encoder": {"0": {"bias": draw(4), "weight": draw(4, 3)}, "norm": {"scale": draw(3)}},
        "bias": draw(2),
        "head": draw(3, 2),
    }


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    encoder = tree["encoder"]
    return {
        "encoder.0.bias": encoder["0"]["bias"],
        "encoder.0.weight": encoder["0"]["weight"],
        "encoder.norm.scale": encoder["norm"]["scale"],
        "bias": tree["bias"],
        "head": tree["head"],
    }


def by_hand(tree: dict[str, Any], cls: type[Adam] = AdamW, **options: Any) -> Adam:
    arrays = flat(tree)
    groups: list[dict[str, Any]] = [{"params": {k: arrays[k] for k in OTHERS}}]
    groups.append({"params": {k: arrays[k] for k in SPARED}, "weight_decay": 0.0})
    return cls(groups, **options)


def grads_by_hand(grads: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    arrays = flat(grads)
    return [{k: arrays[k] for k in OTHERS}, {k: arrays[k] for k in SPARED}]


@pytest.mark.parametrize("cls", [Adam, AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5, "amsgrad": True, "ema_decay": 0.5}], ids=["plain", "more"]
)
@pytest.mark.parametrize("rule", [RULE, lambda name, w: w.ndim < 2], ids=["patterns", "function"])
def test_as_groups_made_by_hand(rule: Any, options: dict[str, Any], cls: type[Adam]) -> None:
    params, expected = model(), model()
    opt = cls(params, lr=0.1, weight_decay=0.3, no_decay=rule, **options)
    other = by_hand(expected, cls, lr=0.1, weight_decay=0.3, **options)
    for seed in range(3):
        grads = random_like(params, seed)
        assert opt.step(grads) == other.step(grads_by_hand(grads))
    assert_same_bits(params, expected)
    assert_same_state(opt, other)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.3, 0.0]
    if options:
        theirs_by_name = {**other.ema[0], **other.ema[1]}
        assert_same_bits(flat(opt.ema), {name: theirs_by_name[name] for name in flat(opt.ema)})
    mine, theirs = opt.state_dict(), other.state_dict()
    assert [g["param_names"] for g in mine["param_groups"]] == [OTHERS, SPARED]
    assert pickle.dumps(mine["param_groups"]) == pickle.dumps(theirs["param_groups"])


RULES: dict[str, tuple[Any, list[str]]] = {
    "a text": ("bias", ["encoder.0.bias", "bias"]),
    "an end of two": (["0.bias"], ["encoder.0.bias"]),
    "a whole name": (["encoder.norm.scale"], ["encoder.norm.scale"]),
    "a star": ("enc*", ["encoder.0.bias", "encoder.0.weight", "encoder.norm.scale"]),
    "a set": ("[bh]*", ["encoder.0.bias", "bias", "head"]),
    "all": ("*", ["encoder.0.bias", "encoder.0.weight", "encoder.norm.scale", "bias", "head"]),
    "a tuple": (("head", "bias"), ["encoder.0.bias", "bias", "head"]),
    "none": ([], []),
    "None": (None, []),
    "a function of nothing": (lambda name, w: False, []),
    "a function of names": (
        lambda name, w: name.startswith("encoder.0"),
        ["encoder.0.bias", "encoder.0.weight"],
    ),
}


@pytest.mark.parametrize("rule, spared", RULES.values(), ids=RULES)
def test_who_is_meant(rule: Any, spared: list[str]) -> None:
    params = model()
    opt = AdamW(params, weight_decay=0.25, no_decay=rule)
    names = {id(array): name for name, array in flat(params).items()}
    groups = [[names[id(array)] for array in group["params"]] for group in opt.param_groups]
    expected = [[name for name in flat(params) if name not in spared], spared]
    assert groups == [group for group in expected if group]
    assert [g["weight_decay"] for g in opt.param_groups] == [
        d for d, g in zip((0.25, 0.0), expected, strict=True) if g
    ]
    opt.step(random_like(params, 1))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "slip": (
        ["bias", "nrom"],
        ValueError,
        "^no_decay has a pattern 'nrom' that no parameter matches. Their names are like 'encoder.0.bias'; a "
        "pattern matches a whole name, or its end after a dot.$",
    ),
    "case": ("Bias", ValueError, "a pattern 'Bias' that no"),
    "part of a name": ("ias", ValueError, "a pattern 'ias' that no"),
    "number": (
        3,
        TypeError,
        r"^no_decay must be patterns of names, like \['\*bias', '\*norm\*'\], or a function of a",
    ),
    "numbers": ([0, 1], TypeError, "^no_decay must be patterns"),
    "dict": ({"bias": True}, TypeError, "^no_decay must be patterns"),
    "answer": (
        lambda name, w: 1,
        TypeError,
        r"^no_decay\('encoder.0.bias', ...\) must be True or False, got 1 of",
    ),
    "mask": (lambda name, w: w < 0, TypeError, r"^no_decay\('encoder.0.bias', ...\) must be True or False"),
    "an array of answers": (lambda name, w: w > 0, TypeError, r"^no_decay\('encoder.0.bias', ...\) must be"),
    "its own": (lambda name, w: 1 / 0, ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize("rule, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Adam(model(), no_decay=rule)
    opt = Adam(model())
    with refused(error, message, opt):
        opt.add_param_group({"params": model(), "no_decay": rule})


def test_structures_of_all_kinds() -> None:
    w, b = np.ones((2, 2)), np.ones(2)
    bare = Adam(w, no_decay=lambda name, array: True)
    assert [g["weight_decay"] for g in bare.param_groups] == [0.0]
    bare.step(np.ones((2, 2)))
    nested = [{"w": np.ones((2, 2)), "b": np.ones(2)}, (b, w)]
    opt = Adam(nested, weight_decay=0.5, no_decay=lambda name, array: array.ndim == 1)
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]
    opt.step([{"b": np.zeros(2), "w": np.zeros((2, 2))}, (None, np.zeros((2, 2)))])
    assert nested[0]["w"].max() < 1 and w.max() < 1 and nested[0]["b"].min() == 1 and b.min() == 1
    assert [entry["step"] for entry in opt.state.values()] == [1, 1, 1, 0]


def test_gradients_keep_the_structure_of_params() -> None:
    params = model()
    opt = AdamW(params, no_decay=RULE, ema_decay=0.5)
    buffers = opt.grads
    assert map_tree(np.shape, buffers) == map_tree(np.shape, params)
    flat(buffers)["encoder.norm.scale"] += 1
    opt.step()
    assert flat(params)["encoder.norm.scale"][0] == flat(model())["encoder.norm.scale"][0] - np.float32(1e-3)
    opt.accumulate(random_like(params, 1))
    assert_same_bits(opt.grads["head"], random_like(params, 1)["head"])
    opt.zero_grad()
    assert not opt.grads["head"].any()
    assert map_tree(np.shape, opt.ema) == map_tree(np.shape, params)
    with opt.ema_weights():
        pass
    wrong = random_like(params, 1)
    wrong["encoder"]["norm"]["scale"] = np.ones(7, np.float32)
    with refused(
        ValueError, r"^grad for params\['encoder'\]\['norm'\]\['scale'\] has shape \(7,\)", opt, params, wrong
    ):
        opt.step(wrong)
    wrong = random_like(params, 1)
    wrong["bias"] = params["head"]
    with refused(ValueError, r"^grad for params\['bias'\] has shape", opt, params):
        opt.step(wrong)


def test_state_by_name_and_index() -> None:
    params = model()
    opt = AdamW([{"params": [np.ones(2)]}, {"params": params}], no_decay=lambda name, w: name in SPARED)
    opt.step([[None], random_like(params, 1)])
    order = [*OTHERS, *SPARED]
    for index, name in enumerate(order, 1):
        assert opt.state[name]["exp_avg"].ctypes.data == opt.state[index]["exp_avg"].ctypes.data
        assert opt.state[index]["exp_avg"].shape == flat(params)[name].shape
    assert [entry["step"] for entry in opt.state.values()] == [0, 1, 1, 1, 1, 1]


def test_groups_that_were_given() -> None:
    first, second, third = model(), model(), model()
    opt = AdamW(
        [{"params": first}, {"params": second, "no_decay": None, "weight_decay": 0.5}], no_decay="bias"
    )
    opt.add_param_group({"params": third, "no_decay": ["head"]})
    assert [group["weight_decay"] for group in opt.param_groups] == [0.01, 0, 0.5, 0.01, 0]
    assert [len(group["params"]) for group in opt.param_groups] == [3, 2, 5, 4, 1]
    assert not any("no_decay" in group for group in opt.param_groups)
    assert len(opt.grads) == 3  # as they were given
    grads = [random_like(tree, seed) for seed, tree in enumerate((first, second, third))]
    opt.step(grads)
    with refused(ValueError, "^grads: expected an entry for each of the 3 param groups, got 5", opt):
        opt.step([*grads, None, None])
    with refused(ValueError, r"^grad for param_groups\[2\]\['params'\]\['head'\] has shape", opt):
        opt.step([*grads[:2], {**grads[2], "head": np.ones(9, np.float32)}])
    opt.param_groups[4]["lr"] = -1
    with refused(ValueError, r"^param_groups\[4\]\['lr'\] must be", opt):
        opt.step(grads)


def test_a_pattern_may_be_for_some_of_the_groups() -> None:
    opt = Adam(
        [{"params": {"w": np.ones(2)}}, {"params": {"b": np.ones(2)}}], no_decay=["b"], weight_decay=1.0
    )
    assert [group["weight_decay"] for group in opt.param_groups] == [1.0, 0.0]


@pytest.mark.parametrize("key", ["no_decy", "No_Decay", "no_decays", "nodecay", "no_weight_decay"])
def test_slips(key: str) -> None:
    with pytest.raises(ValueError, match=f"has a key '{key}', which is no option: did you mean 'no_decay'"):
        Adam([{"params": model(), key: ["bias"]}])


def test_what_is_no_array_is_refused_as_ever() -> None:
    with pytest.raises(TypeError, match=r"^params\['b'\] is of type float, expected numpy.ndarray"):
        Adam({"w": np.ones(2), "b": 3.0}, no_decay=lambda name, w: w.ndim < 2)


def test_answers_of_numpy() -> None:
    opt = Adam([np.ones(2), np.full(2, 5.0)], weight_decay=1.0, no_decay=lambda name, w: w.max() > 3)
    assert [group["weight_decay"] for group in opt.param_groups] == [1.0, 0.0]


def test_another_division_of_a_list_is_another_model(tmp_path: pathlib.Path) -> None:
    params = [np.ones(2), np.ones(2), np.ones(2)]
    opt = AdamW(params, no_decay="0")
    opt.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="its parameters have other names"):
        AdamW.load(tmp_path / "a", params, no_decay="2")
    with pytest.raises(ValueError, match="its parameter 0 is named '1', here it is '0'"):
        AdamW(params, no_decay="2").load_state_dict(opt.state_dict())
    AdamW.load(tmp_path / "a", params, no_decay=lambda name, w: name == "0")


@pytest.mark.parametrize(
    "leaves, problem",
    [
        ([[0, 1], [1]], "a leaf in two groups"),
        ([[0]], "a leaf in no group"),
        ([[0, 1], []], "a group of no leaves"),
        ([[0, 2]], None),
        ([[0, 2**63]], None),
    ],
)
def test_the_core_itself_knows_which_leaves_there_are(leaves: list[list[int]], problem: str | None) -> None:
    opt = Adam(np.ones(3))
    options = {**opt.defaults, "params": None}
    with pytest.raises((RuntimeError, IndexError), match=problem):
        structure = _core.Structure([np.ones(2), np.ones(3)])
        opt._core.add_tree(opt.param_groups, structure, [(options, own) for own in leaves], True, False)
    assert len(opt.param_groups) == len(opt.state) == opt._core.trees == 1
    opt.step(np.ones(3))


def test_a_group_with_another_weight_decay() -> None:
    """It is taken from the others of that group only."""
    opt = Adam([{"params": model(), "weight_decay": 0.5, "lr": 0.25}], no_decay=RULE)
    assert [(g["weight_decay"], g["lr"]) for g in opt.param_groups] == [(0.5, 0.25), (0.0, 0.25)]


# --- Copies and checkpoints --------------------------------------------------------------------------


def through_file(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    opt.save(path)
    return AdamW.load(path, params, no_decay=RULE)


def through_state_dict(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    new = AdamW(params, no_decay=lambda name, w: w.ndim < 2)
    new.load_state_dict(opt.state_dict())
    return new


def through_pickle(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    new = pickle.loads(pickle.dumps(opt))
    for group, copies in zip(opt.param_groups, new.param_groups, strict=True):
        for array, twin in zip(group["params"], copies["params"], strict=True):
            array[...] = -1  # the copy has arrays of its own
            del array
            assert twin.min() != -1
    return new


def through_copy(opt: AdamW, params: Any, path: pathlib.Path) -> AdamW:
    return copy.copy(opt)


@pytest.mark.parametrize("way", [through_file, through_state_dict, through_pickle, through_copy])
def test_goes_on_with_the_same_bits(way: Callable[..., AdamW], tmp_path: pathlib.Path) -> None:
    params, expected = model(), model()
    opt = AdamW(params, weight_decay=0.5, no_decay=RULE)
    other = by_hand(expected, weight_decay=0.5)
    new = opt
    for seed in range(4):
        if seed == 2:
            new = way(opt, params, tmp_path / "a")
        grads = random_like(model(), seed)
        new.step(grads)
        other.step(grads_by_hand(grads))
    for group, theirs in zip(new.param_groups, other.param_groups, strict=True):
        assert_same_bits(list(group["params"]), list(theirs["params"]))
    assert map_tree(np.shape, new.grads) == map_tree(np.shape, params)


def test_files_of_groups_made_by_hand_are_the_same(tmp_path: pathlib.Path) -> None:
    params = model()
    AdamW(params, no_decay=RULE).save(tmp_path / "a")
    by_hand(params).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"it has 2 parameter groups, but params has 1\..* and its no_decay,"
    ):
        AdamW.load(tmp_path / "a", params)
    with pytest.raises(ValueError, match="has 2 param groups, the optimizer has 1"):
        AdamW(params).load_state_dict(by_hand(params).state_dict())


def test_torch_goes_on_with_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    # Of 16 elements: PyTorch computes what is left behind its vectors in another way.
    arrays = {"w": np.ones((4, 4), np.float32), "b": np.ones(16, np.float32)}
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    opt = AdamW(arrays, weight_decay=0.5, no_decay="b")
    opt.step(random_like(arrays, 1))
    groups = [{"params": [tensors["w"]]}, {"params": [tensors["b"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, fused=True)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry.update({key: torch.from_numpy(np.array(value)) for key, value in entry.items()})
        entry["step"] = entry["step"].float()
    theirs.load_state_dict(saved)
    grads = random_like(arrays, 2)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name]))
            tensor.grad = torch.from_numpy(grads[name].copy())
    theirs.step()
    opt.step(grads)
    assert_same_bits(arrays, {name: tensor.detach().numpy() for name, tensor in tensors.items()})


def test_interrupted_anywhere_it_is_added_whole_or_not_at_all() -> None:
    for event in range(1, 10_000):
        opt = Adam(np.ones(2))
        more = model()
        group = {"params": more, "no_decay": RULE}
        done = not interrupt_at(event, partial(opt.add_param_group, group))
        assert len(opt.param_groups) in (1, 3)
        opt.step([np.ones(2), random_like(more, 1)] if len(opt.param_groups) == 3 else np.ones(2))
        if done:
            break
    else:
        raise AssertionError("it never came to an end")
    assert event > 20


def test_norm_is_that_of_groups_made_by_hand() -> None:
    params = model()
    opt = AdamW(params, no_decay=RULE)
    grads = random_like(params, 3)
    norm = opt.step(grads, max_norm=math.inf).grad_norm
    assert norm == by_hand(model()).step(grads_by_hand(grads), max_norm=math.inf).grad_norm
