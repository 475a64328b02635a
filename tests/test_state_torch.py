"""Checkpoints between PyTorch and this package, both ways: training goes on with the same bits.

Numbers of elements are multiples of 16: PyTorch computes the rest of an array by another formula.
"""

from __future__ import annotations

import inspect
import io
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW
from fused_adam._tables import LATER
from snapshots import Snapshot, assert_same_bits, assert_same_state, map_tree, random_like, refused, train

torch = pytest.importorskip("torch")

SHAPES = [((16,), "f4"), ((4, 8), "f4"), ((3, 4, 4), "f8"), ((32,), "f8")]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"weight_decay": 0.1, "lr": 0.05},
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.75)},
    "maximize": {"maximize": True, "eps": 1e-3},
    "all": {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.3, 0.9)},
}
CLASSES = {"Adam": (Adam, torch.optim.Adam), "AdamW": (AdamW, torch.optim.AdamW)}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
classes = pytest.mark.parametrize(("ours", "theirs"), CLASSES.values(), ids=CLASSES)
# The promise is about its vectorized code.
same_bits_as_torch = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch is not vectorized here"
)


def new_arrays(seed: int = 1) -> list[np.ndarray]:
    return random_like([np.empty(shape, dtype) for shape, dtype in SHAPES], seed)


def tensors(tree: Any) -> Any:
    """Tensors that share the memory of arrays."""
    return map_tree(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def train_torch(optimizer: Any, seeds: Any) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in seeds:
        for param, grad in zip(params, random_like([p.detach().numpy() for p in params], seed), strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step()


def new_torch(theirs: Any, arrays: list[np.ndarray], **options: Any) -> Any:
    """Trains the arrays themselves."""
    return theirs([torch.nn.Parameter(torch.from_numpy(array)) for array in arrays], **options)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@same_bits_as_torch
@classes
@options
@pytest.mark.parametrize("steps", [0, 3])
def test_torch_to_ours(ours: Any, theirs: Any, options: dict[str, Any], steps: int) -> None:
    arrays = new_arrays()
    optimizer = new_torch(theirs, arrays, fused=True, **options)
    train_torch(optimizer, range(steps))
    params = [array.copy() for array in arrays]
    opt = ours(params, lr=0.7)
    saved = optimizer.state_dict()
    opt.load_state_dict(saved)
    assert [entry["step"] for entry in opt.state.values()] == [steps] * len(params)
    assert opt.lr == optimizer.param_groups[0]["lr"]
    train(opt, params, range(10, 13))
    train_torch(optimizer, range(10, 13))
    assert_same_bits(params, arrays)
    for index, entry in optimizer.state_dict()["state"].items():
        moments = {name: tensor.numpy() for name, tensor in entry.items() if name != "step"}
        assert_same_bits([opt.state[index][name] for name in moments], list(moments.values()))


@same_bits_as_torch
@classes
@options
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "default"])
def test_ours_to_torch(ours: Any, theirs: Any, options: dict[str, Any], fused: bool | None) -> None:
    params = new_arrays()
    opt = ours(params, **options)
    train(opt, params, range(3))
    arrays = [param.copy() for param in params]
    optimizer = new_torch(theirs, arrays, fused=fused, lr=0.7)
    optimizer.load_state_dict(tensors(opt.state_dict()))
    assert optimizer.param_groups[0]["fused"] is True
    train(opt, params, range(10, 13))
    train_torch(optimizer, range(10, 13))
    assert_same_bits(arrays, params)


@classes
def test_layout_is_that_of_torch(ours: Any, theirs: Any) -> None:
    arrays = new_arrays()
    optimizer, opt = new_torch(theirs, arrays, amsgrad=True), ours(new_arrays(), amsgrad=True)
    train_torch(optimizer, [1])
    train(opt, new_arrays(), [1])
    saved, expected = opt.state_dict(), optimizer.state_dict()
    assert saved.keys() == expected.keys()
    assert saved["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert saved["state"][index].keys() == entry.keys()
    for ours_, theirs_ in zip(saved["param_groups"], expected["param_groups"], strict=True):
        assert ours_.keys() == theirs_.keys()
        different = {key for key in theirs_ if ours_[key] != theirs_[key]}
        assert different == {"fused"}


def test_file_of_torch() -> None:
    """Its loader of "weights only" is the default, and takes what we give it."""
    opt = Adam({"w": np.ones(16)})
    opt.step({"w": np.ones(16)})
    other = Adam({"w": np.zeros(16)})
    other.load_state_dict(through_a_file(tensors(opt.state_dict())))
    assert_same_state(other, opt)


def test_moments_of_unfused_torch() -> None:
    arrays = new_arrays()
    optimizer = new_torch(torch.optim.Adam, arrays, fused=False, foreach=True, amsgrad=True)
    train_torch(optimizer, range(3))
    opt = Adam(new_arrays())
    opt.load_state_dict(optimizer.state_dict())
    for index, entry in optimizer.state_dict()["state"].items():
        assert_same_bits(opt.state[index]["max_exp_avg_sq"], entry["max_exp_avg_sq"].numpy())
    assert not {"foreach", "fused"} & set(opt.param_groups[0])


def test_param_that_never_had_a_gradient() -> None:
    arrays = new_arrays()
    optimizer = new_torch(torch.optim.Adam, arrays, fused=True)
    optimizer.param_groups[0]["params"][2].grad = torch.ones(3, 4, 4, dtype=torch.float64)
    optimizer.step()
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [2]
    opt = Adam(new_arrays())
    opt.load_state_dict(saved)
    assert [entry["step"] for entry in opt.state.values()] == [0, 0, 1, 0]


def test_adamw_loads_adam_as_torch_does() -> None:
    saved = new_torch(torch.optim.Adam, new_arrays(), weight_decay=0.25).state_dict()
    opt, optimizer = AdamW(new_arrays()), new_torch(torch.optim.AdamW, new_arrays())
    opt.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    for key in ("decoupled_weight_decay", "weight_decay"):
        assert opt.param_groups[0][key] == optimizer.param_groups[0][key]
    adam = Adam(new_arrays())
    adam.load_state_dict(optimizer.state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True


def test_lr_and_betas_as_tensors() -> None:
    optimizer = new_torch(torch.optim.Adam, new_arrays(), fused=True, lr=torch.tensor(0.25))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = (torch.tensor(0.5), torch.tensor(0.75))
    opt = Adam(new_arrays())
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    assert type(group["lr"]) is type(group["betas"][0]) is float


def test_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))
    names = ["0.weight", "0.bias", "1.weight"]
    saved = torch.optim.Adam(model.named_parameters()).state_dict()
    if "param_names" not in saved["param_groups"][0]:
        pytest.skip("this version of torch saves no names")
    shapes = [(4, 4), (4,), (4, 4)]
    flat = dict(zip(names, (np.ones(shape, np.float32) for shape in shapes), strict=True))
    nested = {"0": {"weight": flat["0.weight"], "bias": flat["0.bias"]}, "1": {"weight": flat["1.weight"]}}
    for params in (flat, nested, list(flat.values())):
        opt = Adam(params)
        opt.load_state_dict(saved)
        torch.optim.Adam(model.named_parameters()).load_state_dict(tensors(opt.state_dict()))
    renamed = Adam({"0.weight": np.ones((4, 4)), "0.bias": np.ones(4), "2.weight": np.ones((4, 4))})
    message = (
        r"^state_dict\['param_groups'\]\[0\]: its parameter 2 is named '1.weight', here it is '2.weight'"
    )
    with refused(ValueError, message, renamed):
        renamed.load_state_dict(saved)


def test_options_of_a_scheduler() -> None:
    optimizer = new_torch(torch.optim.Adam, new_arrays(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train_torch(optimizer, [1])
    scheduler.step()
    opt, other = Adam(new_arrays()), new_torch(torch.optim.Adam, new_arrays())
    opt.load_state_dict(optimizer.state_dict())
    assert (opt.lr, opt.param_groups[0]["initial_lr"]) == (0.25, 0.5)
    other.load_state_dict(tensors(opt.state_dict()))
    assert other.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("exp_avg", torch.ones(4, 4), ValueError, r"has shape \(4, 4\), expected \(16,\)"),
        (
            "exp_avg_sq",
            torch.ones(16, dtype=torch.float64),
            TypeError,
            "has dtype float64, expected float32",
        ),
        (
            "exp_avg",
            torch.ones(16, dtype=torch.float16),
            TypeError,
            "has dtype float16, expected float32",
        ),
        ("exp_avg", torch.ones(16, dtype=torch.bfloat16), TypeError, "has dtype torch.bfloat16"),
        ("step", torch.tensor(1.5), ValueError, "must be a whole number >= 0, got 1.5"),
        ("step", torch.tensor(float("nan")), ValueError, "must be a whole number >= 0, got nan"),
        ("step", torch.tensor(True), TypeError, "must be a number, got True"),
        ("step", torch.tensor([3.0]), TypeError, "must be a number"),
    ],
    ids=["shape", "float64", "float16", "bfloat16", "fraction", "nan", "bool", "one-element"],
)
def test_refuses_tensor(name: str, value: Any, error: type[Exception], message: str) -> None:
    optimizer = new_torch(torch.optim.Adam, new_arrays(), fused=True)
    train_torch(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"][0][name] = value
    opt = Adam(new_arrays())
    with refused(error, rf"^state_dict\['state'\]\[0\]\['{name}'\] {message}", opt):
        opt.load_state_dict(saved)


def test_loading_copies_tensors() -> None:
    optimizer = new_torch(torch.optim.Adam, new_arrays(), fused=True)
    train_torch(optimizer, range(2))
    opt = Adam(new_arrays())
    opt.load_state_dict(optimizer.state_dict())
    before = Snapshot(opt)
    train_torch(optimizer, range(2))
    before.assert_unchanged()


@classes
def test_defaults_and_names_are_those_of_torch(ours: Any, theirs: Any) -> None:
    parameters = inspect.signature(theirs).parameters
    not_torchs = {"no_decay", "allow_mixed", "num_threads", *LATER}
    for name, parameter in inspect.signature(ours).parameters.items():
        if name not in not_torchs:
            assert parameter.default == parameters[name].default, name


def test_tensors_over_live_moments_change_places() -> None:
    opt = Adam([np.ones(3), np.ones(3)])
    opt.step([np.full(3, 2.0), np.full(3, 5.0)])
    expected = [np.array(opt.state[i]["exp_avg"]) for i in (1, 0)]
    saved = opt.state_dict()
    for i in (0, 1):
        saved["state"][i]["exp_avg"] = torch.from_numpy(opt.state[1 - i]["exp_avg"])
    opt.load_state_dict(saved)
    for i in (0, 1):
        np.testing.assert_array_equal(opt.state[i]["exp_avg"], expected[i])
