"""fused_adam.torch: optimizers of PyTorch, compared with PyTorch's own."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam as NumpyAdam

torch = pytest.importorskip("torch")

import fused_adam.torch as fused  # noqa: E402

OURS = {"Adam": fused.Adam, "AdamW": fused.AdamW}
each_class = pytest.mark.parametrize("name", OURS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def theirs(name: str, params: Any, **options: Any) -> Any:
    return getattr(torch.optim, name)(params, fused=True, **options)


# PyTorch's vector loop takes whole multiples of these; its rest has other bits.
SHAPES = [(16, 8), (64,), (32, 4), (16,)]


def pair_of_params(dtype: Any = torch.float32, seed: int = 0) -> tuple[list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def give_grads(*params_of: list[Any], seed: int, scale: float = 1.0) -> None:
    for params in params_of:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (grad * scale).to(p.dtype)


def assert_same(a: list[Any], b: list[Any]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"parameter {i}: {(x != y).sum()} of {x.numel()} differ"


def model(seed: int = 0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)]
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(net: Any, seed: int) -> Any:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)
    return (net(x) ** 2).mean()


def train(net: Any, optimizer: Any, seeds: Iterator[int] | range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


# --- The same bits as PyTorch ------------------------------------------------------------------------


@each_class
@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"amsgrad": True, "weight_decay": 0.1},
        {"maximize": True, "betas": (0.3, 0.99)},
        {"lr": torch.tensor(0.02), "eps": 1e-3},
        {"betas": (torch.tensor(0.8), torch.tensor(0.95))},
        {"foreach": True},
        {"fused": True},
        {"foreach": False, "fused": False},
    ],
    ids=str,
)
def test_bits(name: str, dtype: Any, options: dict[str, Any]) -> None:
    a, b = pair_of_params(dtype)
    others = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
    ours, other = OURS[name](a, **options), theirs(name, b, **others)
    assert isinstance(ours, getattr(torch.optim, name))
    for seed in range(6):
        give_grads(a, b, seed=seed)
        if seed == 3:  # a parameter that is left out
            a[1].grad = b[1].grad = None
        ours.step()
        other.step()
    assert_same(a, b)
    for p, q in zip(a, b, strict=True):
        assert ours.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert torch.equal(ours.state[p][key], value) and ours.state[p][key].dtype == value.dtype


def test_pytorchs_own_tables() -> None:
    """The inputs that PyTorch tests its optimizers with, and those that it wants to be errors."""
    pytest.importorskip("expecttest")
    db = pytest.importorskip("torch.testing._internal.common_optimizers").optim_db
    ran = 0
    for info in db:
        name = info.optim_cls.__name__
        if info.optim_cls not in (torch.optim.Adam, torch.optim.AdamW):
            continue
        for case in info.optim_inputs_func(device="cpu"):
            a, b = pair_of_params(seed=1)
            options = dict(case.kwargs)
            others = {k: v for k, v in copy.deepcopy(options).items() if k not in ("foreach", "fused")}
            ours, other = OURS[name](a, **options), theirs(name, b, **others)
            for seed in range(4):
                give_grads(a, b, seed=seed)
                ours.step()
                other.step()
            assert_same(a, b)
            ran += 1
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = case.optimizer_error_input
            with (
                warnings.catch_warnings(),
                pytest.raises(case.error_type, match=case.error_regex),
            ):
                warnings.simplefilter("error")  # one of them is a warning
                OURS[name](given.params, **given.kwargs)
            ran += 1
    assert ran >= 30


@each_class
def test_every_argument_of_pytorch(name: str) -> None:
    import inspect

    wanted = inspect.signature(getattr(torch.optim, name)).parameters
    found = inspect.signature(OURS[name]).parameters
    for key, parameter in wanted.items():
        assert found[key].default == parameter.default and found[key].kind == parameter.kind, key
    assert (
        list(found)[: list(wanted).index("amsgrad") + 1] == list(wanted)[: list(wanted).index("amsgrad") + 1]
    )


@each_class
def test_state_goes_both_ways(name: str) -> None:
    a, b = pair_of_params()
    ours, other = OURS[name](a, amsgrad=True), theirs(name, b, amsgrad=True)
    for round_ in range(3):
        for seed in range(2):
            give_grads(a, b, seed=10 * round_ + seed)
            ours.step()
            other.step()
        assert_same(a, b)
        from_ours, from_theirs = ours.state_dict(), copy.deepcopy(other.state_dict())
        ours.load_state_dict(from_theirs)
        other.load_state_dict(copy.deepcopy(from_ours))
        for entry in from_theirs["state"].values():  # copied when it was loaded
            for value in entry.values():
                value.fill_(7)


@each_class
def test_copies_and_files(name: str) -> None:
    net = model()
    optimizer = OURS[name](net.parameters(), lr=0.01, max_norm=1.0)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = []
    net2 = model(1)
    net2.load_state_dict(saved["net"])
    loaded = OURS[name](net2.parameters(), lr=0.5)
    loaded.load_state_dict(saved["optimizer"])
    others.append((net2, loaded))
    others.append(copy.deepcopy((net, optimizer)))
    others.append(pickle.loads(pickle.dumps((net, optimizer))))
    for _, opt in others:
        assert opt.param_groups[0]["lr"] == 0.01 and opt.param_groups[0]["max_norm"] == 1.0
        assert opt._step_supports_amp_scaling
    train(net, optimizer, range(3, 6))
    for copied, opt in others:
        train(copied, opt, range(3, 6))
        assert_same(list(copied.parameters()), list(net.parameters()))


def test_as_the_numpy_class() -> None:
    a, _ = pair_of_params()
    arrays = [p.detach().clone().numpy() for p in a]
    options: dict[str, Any] = {"max_norm": 0.5, "ema_decay": 0.9, "amsgrad": True, "eps_mode": "hat"}
    ours, other = fused.Adam(a, weight_decay=0.1, **options), NumpyAdam(arrays, weight_decay=0.1, **options)
    for seed in range(4):
        give_grads(a, seed=seed)
        ours.step()
        info = other.step([p.grad.numpy() for p in a])
        assert ours.step_info == info
    for i, p in enumerate(a):
        assert np.array_equal(p.detach().numpy(), arrays[i])
        assert np.array_equal(ours.state[p]["ema"].numpy(), other.state[i]["ema"])


# --- How PyTorch programs use an optimizer -----------------------------------------------------------


@each_class
def test_closures_and_hooks(name: str) -> None:
    net = model()
    optimizer = OURS[name](net.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append(f"saved {len(saved['state'])}"))
    optimizer.register_load_state_dict_pre_hook(
        lambda _, saved: {**saved, "param_groups": saved["param_groups"]}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))

    def closure() -> Any:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(net, 1)
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"] * 2 + ["saved 6", "loaded"]
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert_same(list(net.parameters()), before)


@each_class
def test_groups_and_names(name: str) -> None:
    net, other_net = model(), model()
    for make in (
        lambda m: [
            {"params": m[0].parameters()},
            {"params": m[3].parameters(), "lr": 0.5, "weight_decay": 0.0},
        ],
        lambda m: m.named_parameters(),
        lambda m: [{"params": [("w", m[0].weight)], "lr": 0.1}],
    ):
        optimizer, other = OURS[name](make(net), lr=0.01), theirs(name, make(other_net), lr=0.01)
        train(net, optimizer, range(2))
        train(other_net, other, range(2))
        assert_same(list(net.parameters()), list(other_net.parameters()))
        assert [g.get("param_names") for g in optimizer.param_groups] == [
            g.get("param_names") for g in other.param_groups
        ]
    optimizer = OURS[name](net[0].parameters())
    optimizer.add_param_group({"params": net[3].weight, "lr": 0.25, "max_norm": 1.0})
    assert optimizer.param_groups[1]["lr"] == 0.25 and optimizer.param_groups[1]["state_dtype"] is None
    train(net, optimizer, range(2))
    with pytest.raises(ValueError, match=r"param_groups\[2\]\['max_norm'\] must be finite and >= 0"):
        optimizer.add_param_group({"params": net[3].bias, "max_norm": -1.0})


def test_no_decay() -> None:
    net, other_net = model(), model()
    optimizer = fused.AdamW(net.named_parameters(), weight_decay=0.5, no_decay=["bias", "2.weight"])
    rest = [p for n, p in other_net.named_parameters() if not n.endswith("bias") and n != "2.weight"]
    spared = [p for n, p in other_net.named_parameters() if n.endswith("bias") or n == "2.weight"]
    other = theirs("AdamW", [{"params": rest}, {"params": spared, "weight_decay": 0.0}], weight_decay=0.5)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(rest), len(spared)]
    train(net, optimizer, range(3))
    train(other_net, other, range(3))
    assert_same(list(net.parameters()), list(other_net.parameters()))
    by_function = fused.AdamW(net.parameters(), no_decay=lambda _, p: p.ndim < 2)
    assert [g["weight_decay"] for g in by_function.param_groups] == [1e-2, 0.0]
    optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.ones(3)))], "no_decay": "x"})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0 and "no_decay" not in optimizer.param_groups[-1]
    with pytest.raises(ValueError, match="no_decay has a pattern 'biass' that no parameter matches"):
        fused.AdamW(net.named_parameters(), no_decay="biass")


def test_frozen_tied_and_late_parameters() -> None:
    net, other_net = model(), model()
    for m in (net, other_net):
        m[0].weight.requires_grad_(False)
        m[3].weight = torch.nn.Parameter(m[3].weight.detach())
        tied = torch.nn.Linear(16, 16, bias=False)
        tied.weight = m[3].weight
        m.append(tied)
    optimizer, other = fused.AdamW(net.parameters()), theirs("AdamW", other_net.parameters())
    train(net, optimizer, range(2))
    train(other_net, other, range(2))
    for m in (net, other_net):
        m[0].weight.requires_grad_(True)
    train(net, optimizer, range(2, 5))
    train(other_net, other, range(2, 5))
    assert_same(list(net.parameters()), list(other_net.parameters()))
    assert float(optimizer.state[net[0].weight]["step"]) == 3


@pytest.mark.parametrize(
    "replace",
    [
        lambda net: [setattr(p, "data", p.data.clone() + 1) for p in net.parameters()],
        lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=False),
        lambda net: torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(net.parameters()) * 2, net.parameters()
        ),
        lambda net: net.half().float(),
        lambda net: net.share_memory(),
        lambda net: [
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone() * 2))
            for p in net.parameters()
            if p.grad is None
        ],
    ],
    ids=["data", "load_state_dict", "vector_to_parameters", "half_float", "share_memory", "swap_tensors"],
)
def test_memory_that_was_replaced(replace: Callable[[Any], Any]) -> None:
    """Noticed at the next step: what was the parameter's is not written any more."""
    net, other_net = model(), model()
    optimizer, other = fused.AdamW(net.parameters()), theirs("AdamW", other_net.parameters())
    for m, opt in ((net, optimizer), (other_net, other)):
        train(m, opt, range(2))
        opt.zero_grad()
        gc.collect()
    old = [p.data for p in net.parameters()]
    kept = [p.clone() for p in old]
    moved = [p.data_ptr() for p in net.parameters()]
    for m, opt in ((net, optimizer), (other_net, other)):
        replace(m)
        train(m, opt, range(2, 4))
    assert_same(list(net.parameters()), list(other_net.parameters()))
    for before, same, place, p in zip(old, kept, moved, net.parameters(), strict=True):
        if p.data_ptr() != place and before.data_ptr() == place:
            assert torch.equal(before, same)


def test_versions_are_counted() -> None:
    """A backward through a graph whose parameters were changed since raises, as with PyTorch's default (its
    fused one does not count).
    """
    for make in (fused.AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(16))
        optimizer = make([p])
        loss = (p**3).sum()
        loss.backward(retain_graph=True)
        version = p._version
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- Layouts: PyTorch's fused kernel is silently wrong for these -------------------------------------


def stepped(make_param: Callable[[Any], Any], make_grad: Callable[[Any], Any], **options: Any) -> Any:
    values = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(1))
    grads = [torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(i)) for i in range(2, 6)]
    p = torch.nn.Parameter(make_param(values))
    optimizer = fused.AdamW([p], lr=0.1, **options)
    for grad in grads:
        p.grad = make_grad(grad)
        optimizer.step()
    return p.detach().clone(memory_format=torch.contiguous_format)


def strided(x: Any) -> Any:
    room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99.0)
    room[..., ::2] = x
    return room[..., ::2]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "ema_decay": 0.5}, {"max_norm": 0.5}], ids=str)
def test_layouts(options: dict[str, Any]) -> None:
    contiguous = lambda x: x.clone()  # noqa: E731
    channels_last = lambda x: x.clone(memory_format=torch.channels_last)  # noqa: E731
    transposed = lambda x: x.transpose(0, 3).contiguous().transpose(0, 3)  # noqa: E731
    expected = stepped(contiguous, contiguous, **options)
    layouts = [contiguous, channels_last, transposed, strided]
    for make_param in layouts:
        for make_grad in layouts:
            assert torch.equal(stepped(make_param, make_grad, **options), expected) or "max_norm" in options
            close = stepped(make_param, make_grad, **options)
            # The norm is summed in the order of memory.
            assert torch.allclose(close, expected, rtol=1e-6, atol=1e-7)


def test_strided_parameters_leave_their_neighbours_alone() -> None:
    room = torch.full((64, 64), 3.0)
    p = torch.nn.Parameter(room[:, ::2])
    optimizer = fused.AdamW([p], lr=0.1)
    (p * 2).sum().backward()
    optimizer.step()
    assert (room[:, 1::2] == 3).all() and (room[:, ::2] < 3).all()


def test_expanded_gradients_and_negative_views() -> None:
    a, b = torch.nn.Parameter(torch.ones(32, 16)), torch.nn.Parameter(torch.ones(32, 16))
    ours, other = fused.Adam([a]), fused.Adam([b])
    a.grad, b.grad = torch.ones(1, 1).expand(32, 16), torch.ones(32, 16)
    ours.step()
    other.step()
    assert torch.equal(a, b)
    complex_numbers = torch.complex(torch.zeros(32, 16), torch.ones(32, 16))
    a.grad, b.grad = complex_numbers.conj().imag, torch.full((32, 16), -1.0)
    assert a.grad.is_neg()
    ours.step()
    other.step()
    assert torch.equal(a, b)


def test_a_layout_that_changes_in_the_middle() -> None:
    values = torch.randn(4, 6, 5, 3)
    p, q = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    optimizer, other = fused.AdamW([p, q]), fused.AdamW([q])
    del other
    for step in range(4):
        grad = torch.randn(4, 6, 5, 3)
        p.grad, q.grad = grad.clone(), grad.clone()
        if step == 2:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        optimizer.step()
    assert torch.equal(p, q)


# --- 16 bits, fewer bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16
    for options in (
        {},
        {"master_weights": True},
        {"stochastic_rounding": True, "seed": 5},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "float8"},
    ):
        a, _ = pair_of_params(dtype)
        arrays = [p.detach().float().numpy().astype(stored) for p in a]
        ours, other = (
            fused.AdamW(a, **options),
            NumpyAdam(arrays, weight_decay=1e-2, decoupled_weight_decay=True, **options),
        )
        for seed in range(4):
            give_grads(a, seed=seed)
            ours.step()
            other.step([p.grad.float().numpy().astype(stored) for p in a])
        for i, p in enumerate(a):
            assert np.array_equal(p.detach().float().numpy(), arrays[i].astype(np.float32)), options
            if not options:
                assert ours.state[p]["exp_avg"].dtype == torch.float32
        saved = ours.state_dict()
        for index, entry in saved["state"].items():
            for name, value in entry.items():
                if name != "step":
                    assert np.array_equal(value.float().numpy(), other.state[index][name]), name
        b = [torch.nn.Parameter(p.detach().clone()) for p in a]
        resumed = fused.AdamW(b, **options)
        resumed.load_state_dict(copy.deepcopy(saved))
        give_grads(a, b, seed=9)
        ours.step()
        resumed.step()
        assert_same(a, b)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float8"])
def test_stored_moments(state_dtype: str) -> None:
    net, net2 = model(), model()
    optimizer = fused.AdamW(net.parameters(), state_dtype=state_dtype)
    train(net, optimizer, range(3))
    entry = optimizer.state[net[0].weight]
    size = net[0].weight.numel()
    if state_dtype == "float8":
        assert entry["exp_avg"].dtype == torch.uint8 and entry["exp_avg_scale"].shape == (
            math.ceil(size / 128),
        )
    else:
        assert entry["exp_avg"].dtype == torch.bfloat16
    net2.load_state_dict(net.state_dict())
    plain = theirs("AdamW", net2.parameters())
    plain.load_state_dict(optimizer.state_dict())  # PyTorch goes on in float32
    train(net2, plain, range(3, 5))
    back = fused.AdamW(net.parameters(), state_dtype=state_dtype)
    back.load_state_dict(plain.state_dict())
    assert back.param_groups[0]["state_dtype"] == state_dtype
    train(net, back, range(3, 5))
    copied_net, copied = copy.deepcopy((net, back))
    train(net, back, range(5, 7))
    train(copied_net, copied, range(5, 7))
    assert_same(list(net.parameters()), list(copied_net.parameters()))


# --- Schedulers, scalers, averages -------------------------------------------------------------------


def schedulers(optimizer: Any) -> dict[str, Any]:
    from torch.optim import lr_scheduler as s

    return {
        "LambdaLR": lambda: s.LambdaLR(optimizer, lambda t: 0.9**t),
        "MultiplicativeLR": lambda: s.MultiplicativeLR(optimizer, lambda t: 0.9),
        "StepLR": lambda: s.StepLR(optimizer, 2),
        "MultiStepLR": lambda: s.MultiStepLR(optimizer, [2, 4]),
        "ConstantLR": lambda: s.ConstantLR(optimizer),
        "LinearLR": lambda: s.LinearLR(optimizer),
        "ExponentialLR": lambda: s.ExponentialLR(optimizer, 0.9),
        "CosineAnnealingLR": lambda: s.CosineAnnealingLR(optimizer, 5),
        "CosineAnnealingWarmRestarts": lambda: s.CosineAnnealingWarmRestarts(optimizer, 3),
        "OneCycleLR": lambda: s.OneCycleLR(optimizer, 0.1, total_steps=10),
        "CyclicLR": lambda: s.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
        "PolynomialLR": lambda: s.PolynomialLR(optimizer, 6),
        "ReduceLROnPlateau": lambda: s.ReduceLROnPlateau(optimizer, patience=0),
        "SequentialLR": lambda: s.SequentialLR(
            optimizer, [s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)], [3]
        ),
        "ChainedScheduler": lambda: s.ChainedScheduler(
            [s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)]
        ),
    }


@pytest.mark.parametrize("kind", schedulers(None))
def test_schedulers(kind: str) -> None:
    a, b = pair_of_params()
    pairs = []
    for params, optimizer in ((a, fused.AdamW(a, lr=0.05)), (b, theirs("AdamW", b, lr=0.05))):
        pairs.append((params, optimizer, schedulers(optimizer)[kind]()))
    for seed in range(6):
        for params, optimizer, scheduler in pairs:
            give_grads(params, seed=seed)
            optimizer.step()
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    assert_same(a, b)
    assert pairs[0][1].param_groups[0]["lr"] == pairs[1][1].param_groups[0]["lr"]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first: bool) -> None:
    a, b = pair_of_params()
    pairs = [(a, fused.AdamW(a)), (b, theirs("AdamW", b))]
    scales = []
    for params, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for seed in range(7):
            give_grads(params, seed=seed, scale=scaler.get_scale())
            if seed == 3:
                params[1].grad[2] = math.inf
            scaler.scale(torch.tensor(1.0))
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert_same(a, b)
    assert scales[0] == scales[1]
    assert float(pairs[0][1].state[a[0]]["step"]) == 6
    assert pairs[0][1].skipped_steps == 1


def test_skips_and_norms() -> None:
    a, b = pair_of_params()
    optimizer, other = fused.AdamW(a, max_norm=1.0, skip_nonfinite=True), theirs("AdamW", b)
    give_grads(a, b, seed=1)
    norm = torch.nn.utils.clip_grad_norm_(b, 1.0)
    optimizer.step()
    other.step()
    assert optimizer.step_info.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(a, b, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=0)
    a[0].grad[0] = math.nan
    before = [p.detach().clone() for p in a]
    optimizer.step()
    assert optimizer.step_info.skipped and optimizer.skipped_steps == 1
    assert_same(a, before)
    assert float(optimizer.state[a[0]]["step"]) == 1


def test_averages_of_pytorch() -> None:
    nets = [model(), model()]
    averaged = []
    for net, make in zip(nets, (fused.AdamW, lambda p: theirs("AdamW", p)), strict=True):
        optimizer = make(net.parameters())
        swa = torch.optim.swa_utils.AveragedModel(net)
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
        for seed in range(4):
            train(net, optimizer, range(seed, seed + 1))
            swa.update_parameters(net)
            scheduler.step()
        averaged.append(list(swa.module.parameters()))
    assert_same(*averaged)


# --- In the backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"ema_decay": 0.9, "amsgrad": True}, {"clip_value": 0.01}, {"state_dtype": "float8"}],
    ids=str,
)
def test_step_in_backward(options: dict[str, Any]) -> None:
    nets = [model(), model()]
    optimizers = [fused.AdamW(net.parameters(), **options) for net in nets]
    for seed in range(4):
        loss_of(nets[0], seed).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        with optimizers[1].step_in_backward():
            loss_of(nets[1], seed).backward()
        assert all(p.grad is None for p in nets[1].parameters())
    assert_same(list(nets[0].parameters()), list(nets[1].parameters()))
    loss_of(nets[1], 1).backward()  # the hooks are gone
    assert all(p.grad is not None for p in nets[1].parameters())
    for key, value in (("max_norm", 1.0), ("skip_nonfinite", True)):
        optimizer = fused.AdamW(nets[0].parameters(), **{key: value})
        with (
            pytest.raises(RuntimeError, match=rf"param_groups\[0\] has {key}, which needs all gradients"),
            optimizer.step_in_backward(),
        ):
            pass


def test_step_in_backward_rounds_by_the_index() -> None:
    nets = [model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)]
    optimizers = [
        fused.AdamW(
            [{"params": net[0].parameters()}, {"params": net[3].parameters()}],
            stochastic_rounding=True,
            seed=3,
        )
        for net in nets
    ]
    for seed in range(3):
        nets[0].zero_grad()
        loss_of(nets[0], seed).backward()
        optimizers[0].step()
        with optimizers[1].step_in_backward():
            loss_of(nets[1], seed).backward()
    assert_same(list(nets[0].parameters()), list(nets[1].parameters()))


# --- What is refused, with nothing changed -----------------------------------------------------------


def test_modes_that_are_not_there() -> None:
    p = [torch.nn.Parameter(torch.ones(3))]
    for mode in ("capturable", "differentiable"):
        with pytest.raises(
            RuntimeError, match=rf"param_groups\[0\]\['{mode}'\] is True: .* Use torch\.optim there"
        ):
            fused.Adam(p, **{mode: True})
        optimizer = fused.Adam(p)
        optimizer.param_groups[0][mode] = True
        p[0].grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=mode):
            optimizer.step()
    with pytest.raises(ValueError, match=r"max_norm'\] must be finite and >= 0"):
        fused.Adam(p, max_norm=-1.0)
    with pytest.raises(TypeError, match="num_threads"):
        fused.Adam(p, num_threads="two")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), TypeError, "complex"),
        (lambda: torch.ones(3, device="meta"), (ValueError, RuntimeError), "meta"),
        (lambda: torch.ones(3, dtype=torch.float8_e4m3fn), TypeError, "float8_e4m3fn, expected float32"),
        (lambda: torch.ones(3).expand(4, 3), RuntimeError, "expanded"),
    ],
    ids=["complex", "meta", "float8", "expanded"],
)
def test_parameters_that_are_refused(make: Callable[[], Any], error: Any, message: str) -> None:
    good, bad = torch.nn.Parameter(torch.ones(16)), torch.nn.Parameter(make(), requires_grad=False)
    bad.requires_grad_(bad.dtype.is_floating_point or bad.dtype.is_complex)
    optimizer = fused.AdamW([good, bad])
    good.grad, bad.grad = torch.ones(16), torch.ones_like(bad)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert (good == 1).all()


def test_sparse_gradients() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = fused.Adam(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients, please consider SparseAdam"):
        optimizer.step()


def test_shared_memory() -> None:
    memory = torch.ones(32)
    overlapping = [torch.nn.Parameter(memory[:20]), torch.nn.Parameter(memory[10:30])]
    optimizer = fused.Adam(overlapping)
    for p in overlapping:
        p.grad = torch.ones(20)
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[1\] shares memory with param_groups\[0\]"
    ):
        optimizer.step()
    p = torch.nn.Parameter(torch.ones(16))
    optimizer = fused.Adam([p])
    p.grad = p.detach()
    with pytest.raises(ValueError, match=r"the gradient of .* shares memory with"):
        optimizer.step()
    assert (p == 1).all() and (memory == 1).all()


def test_state_that_was_edited() -> None:
    """A step count that is set by hand counts; state of another shape or type is refused."""
    a, b = pair_of_params()
    ours, other = fused.Adam(a), theirs("Adam", b)
    for seed in range(4):
        give_grads(a, b, seed=seed)
        ours.step()
        other.step()
        if seed == 1:
            for p, q in zip(a, b, strict=True):
                ours.state[p]["step"].fill_(100)
                other.state[q]["step"].fill_(100)
                ours.state[p]["exp_avg"] = other.state[q]["exp_avg"].clone()
    assert_same(a, b)
    before = [p.detach().clone() for p in a]
    for value, error, message in (
        (torch.ones(3), ValueError, r"its exp_avg has shape \(3,\), but the parameter has \(16, 8\)"),
        (
            torch.ones(16, 8, dtype=torch.float64),
            TypeError,
            "its exp_avg has dtype float64, expected float32",
        ),
    ):
        good = ours.state[a[0]]["exp_avg"]
        ours.state[a[0]]["exp_avg"] = value
        with pytest.raises(error, match=message):
            ours.step()
        ours.state[a[0]]["exp_avg"] = good
    ours.state[a[0]]["step"].fill_(-1)
    with pytest.raises(ValueError, match="a step count must be a whole number >= 0, got -1"):
        ours.step()
    assert_same(a, before)


def test_without_the_table_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch before it had one: by way of NumPy."""
    monkeypatch.setattr(fused, "_HAS_TABLE", False)
    a, b = pair_of_params()
    ours, other = fused.AdamW(a, amsgrad=True), theirs("AdamW", b, amsgrad=True)
    for seed in range(3):
        give_grads(a, b, seed=seed)
        ours.step()
        other.step()
    assert_same(a, b)
