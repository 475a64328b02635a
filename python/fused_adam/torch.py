"""Adam and AdamW for PyTorch models on CPUs: change the import, keep the program.

    from fused_adam.torch import AdamW

They are subclasses of those in :mod:`torch.optim`, with the options, state and checkpoints of those; what is
replaced is the step. It needs PyTorch, which the rest of the package does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fused_adam import _config, _core
from fused_adam._groups import DecayRule, NoDecay
from fused_adam._step_info import PLAIN_STEP, StepInfo
from fused_adam._tables import DEFAULTS, LATER, STREAMS
from fused_adam.adam import EpsMode, StateDType

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
else:
    ParamsT: TypeAlias = Any

# What torch.optim has not; each has its default in the table of options.
_OWN = LATER
_STATE = tuple(stream for stream in STREAMS if stream.ours)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BLOCK = next(stream.elements_per_entry for stream in STREAMS if stream.elements_per_entry > 1)
_NARROW = (torch.float16, torch.bfloat16)
_HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


class _FusedStep(torch.optim.Optimizer):
    """What both classes have in common: a mixin, before a class of torch.optim."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf for a step
    _own: dict[str, Any]  # options of ours that a group begins with
    _step_info: StepInfo = PLAIN_STEP
    _skipped_steps: int = 0
    _batch: _core.BatchStep | None = None

    @property
    def step_info(self) -> StepInfo:
        """Of the last step: whether it was skipped, and the norm of its gradients if that was measured."""
        return self._step_info

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out, as gradients were not finite, since this optimizer was made."""
        return self._skipped_steps

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters: a dict as in :meth:`torch.optim.Optimizer.add_param_group`."""
        own: Mapping[str, Any] = self.__dict__.get("_own", self.defaults)
        rule = DecayRule(param_group.get("no_decay"))
        for group in _divided({k: v for k, v in param_group.items() if k != "no_decay"}, rule):
            for key in _OWN:
                group.setdefault(key, own.get(key, DEFAULTS[key]))
            super().add_param_group(group)
            where = f"param_groups[{len(self.param_groups) - 1}]"
            _check(self.param_groups[-1], where)
            _refuse_modes(self.param_groups[-1], where)
        rule.require_matches()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Parameters
        ----------
        closure : function, optional
            Called first, with gradients enabled; what it returns is returned.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Something about parameters, gradients, state or edited groups is not as it has to be: nothing
            has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            self._step_info = StepInfo(skipped=True, grad_norm=None)
            self._skipped_steps = self.skipped_steps + 1
            return loss
        with torch.no_grad():
            scale = 1.0 if grad_scale is None else float(grad_scale)
            info = self._update(scale)
        self._step_info = info
        self._skipped_steps = self.skipped_steps + info.skipped
        return loss

    @contextmanager
    def step_in_backward(self) -> Iterator[None]:
        """Update each parameter as soon as ``backward()`` has its gradient, and free the gradient.

        ``with optimizer.step_in_backward(): loss.backward()``: gradients never stand in memory all at once.
        The bits are those of a step after the backward. One backward is one step: no accumulation of
        gradients, and no ``grad_scale``.

        Raises
        ------
        RuntimeError
            A group has `max_norm` or `skip_nonfinite`, which need all gradients first.
        """
        for i, group in enumerate(self.param_groups):
            for key in ("max_norm", "skip_nonfinite"):
                if group[key] not in (None, False):
                    raise RuntimeError(
                        f"param_groups[{i}] has {key}, which needs all gradients before the first parameter "
                        "is updated: step_in_backward() cannot have that."
                    )
        hooks = []
        number = 0
        try:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.requires_grad:
                        hook = partial(self._update_one, group, number)
                        hooks.append(param.register_post_accumulate_grad_hook(hook))
                    number += 1
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _update_one(self, group: dict[str, Any], number: int, param: torch.Tensor) -> None:
        with torch.no_grad():
            self._run([({**group, "params": [param]}, number)], 1.0)
        param.grad = None

    def _update(self, grad_scale: float) -> StepInfo:
        groups = []
        number = 0
        for i, group in enumerate(self.param_groups):
            _refuse_modes(group, f"param_groups[{i}]")
            groups.append((group, number))
            number += len(group["params"])
        return self._run(groups, grad_scale)

    def _run(self, numbered: list[tuple[dict[str, Any], int]], grad_scale: float) -> StepInfo:
        """A step of groups, each with the number of its first parameter among all."""
        written: list[torch.Tensor] = []
        groups = [(group, self._columns(group, written), number) for group, number in numbered]
        if self._batch is None:
            threads = _config.threads(self.defaults.get("num_threads"))
            self._batch = _core.BatchStep(_config.ISA, threads, torch.Tensor if _HAS_TABLE else None)
        try:
            report = self._batch.step(_readable(groups), grad_scale, True)
        except _core.LayoutError:
            report = self._step_of_copies(self._batch, groups, grad_scale)
        info = PLAIN_STEP if report is None else StepInfo(*report)
        if written and not info.skipped:
            torch.autograd.graph.increment_version(written)
        return info

    def _columns(self, group: dict[str, Any], written: list[torch.Tensor]) -> tuple[Any, ...]:
        """Parameters, gradients, their state and step counts, in the order of the table of streams."""
        params = group["params"]
        grads = [param.grad for param in params]
        wanted = set(_core.streams_of(group))
        wanted_by_wide = wanted - {"master_param"}
        rows: list[dict[str, Any]] = []
        for param, grad in zip(params, grads, strict=True):
            if grad is None:
                rows.append({})
                continue
            if grad.layout is not torch.strided or param.layout is not torch.strided:
                _refuse_layout(grad)
            state = self.state[param]
            here = wanted if param.dtype in _NARROW else wanted_by_wide
            if not here <= state.keys():
                self._begin(param, state, here, group)
            if "master_param" in state and "master_param" not in here:
                del state["master_param"]  # what a step has passed by is no master any more
            rows.append(state)
            written.append(param)
        if any(grad is not None and grad.is_neg() for grad in grads):
            grads = [None if grad is None else grad.resolve_neg() for grad in grads]
        state_columns = [
            [row.get(stream.name) for row in rows] if stream.name in wanted else None for stream in _STATE
        ]
        return (params, grads, *state_columns, [row.get("step") for row in rows])

    def _begin(
        self, param: torch.Tensor, state: dict[str, Any], wanted: set[str], group: Mapping[str, Any]
    ) -> None:
        """State that is not there yet, as at the beginning."""
        _refuse_param(param)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        computed = torch.float64 if param.dtype == torch.float64 else torch.float32
        stored = _stored(group, computed)
        for name in sorted(wanted - state.keys()):
            if name in ("ema", "master_param"):
                state[name] = torch.empty_like(param, dtype=computed).copy_(param)
            elif name.endswith("_scale"):
                state[name] = torch.zeros(-(-param.numel() // _BLOCK), dtype=torch.uint8)
            elif stored == torch.uint8:
                state[name] = torch.zeros(param.numel(), dtype=torch.uint8)
            else:
                state[name] = torch.zeros_like(param, dtype=stored, memory_format=torch.preserve_format)

    def _step_of_copies(self, batch: _core.BatchStep, groups: list[Any], grad_scale: float) -> Any:
        """Where something does not lie in memory as its parameter does: copies that do."""
        as_params: list[tuple[torch.Tensor, torch.Tensor]] = []  # a parameter, and what takes its place
        copied = []
        for group, (params, grads, *columns), number in groups:
            states, counts = columns[:-1], columns[-1]
            new_params, new_grads = list(params), list(grads)
            new_states = [None if column is None else list(column) for column in states]
            for i, grad in enumerate(grads):
                if grad is None:
                    continue
                param = params[i]
                dense = torch.empty_like(param, memory_format=torch.preserve_format)
                if dense.stride() != param.stride() and param.numel() > 1:
                    _refuse_overlapping(param)
                    new_params[i] = dense.copy_(param)
                    as_params.append((param, dense))
                new_grads[i] = _lying_as(dense, grad)
                for stream, column in zip(_STATE, new_states, strict=True):
                    if column is None or column[i] is None or column[i].shape != param.shape:
                        continue
                    column[i] = self.state[param][stream.name] = _lying_as(dense, column[i])
            copied.append((group, (new_params, new_grads, *new_states, counts), number))
        report = batch.step(_readable(copied), grad_scale, True)
        for param, dense in as_params:
            param.copy_(dense)
        return report

    # --- State, pickles, checkpoints ---

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key in _OWN:
                group.setdefault(key, self.defaults.get(key, DEFAULTS[key]))

    def state_dict(self) -> dict[str, Any]:
        """As that of :mod:`torch.optim`, which goes on with it; moments in 8 bits are decoded."""
        saved = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        for index, entry in saved["state"].items():
            saved["state"][index] = _decoded(params[index], entry)
        for group in saved["param_groups"]:
            group.update(foreach=None, fused=True)  # so that PyTorch goes on with the same bits
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From :meth:`state_dict`, or that of ``torch.optim.Adam`` or ``AdamW``. Copies all tensors.

        How moments are stored stays as it is here, and so do options that PyTorch has not where the
        checkpoint does not say.
        """
        kept = [{key: group[key] for key in _OWN if key in group} for group in self.param_groups]
        seen: list[dict[str, Any]] = []  # after all other hooks
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        loaded = seen[0]
        for group, own in zip(self.param_groups, kept, strict=True):
            for key, value in own.items():
                group.setdefault(key, value)
            group["state_dtype"] = own.get("state_dtype")
        ids = [index for group in loaded["param_groups"] for index in group["params"]]
        rows = [(param, group) for group in self.param_groups for param in group["params"]]
        for index, (param, group) in zip(ids, rows, strict=True):
            if index in loaded["state"]:
                # PyTorch casts them to the type of the parameter, which loses what float32 ones have.
                self.state[param] = _stored_state(param, group, loaded["state"][index])


class Adam(_FusedStep, torch.optim.Adam):
    """:class:`torch.optim.Adam`, fused and in place, with the bits of ``torch.optim.Adam(fused=True)``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in :class:`torch.optim.Adam`.
    foreach, fused : optional
        Taken, and without effect: there is one way to compute a step.
    capturable, differentiable : bool
        True is refused: no graphs of an accelerator, and no gradients through a step.
    max_norm, clip_value, skip_nonfinite, ema_decay, eps_mode, bias_correction
        As in :class:`fused_adam.Adam`. The average of a parameter is ``optimizer.state[p]["ema"]``.
    master_weights, stochastic_rounding, seed, state_dtype, num_threads
        As in :class:`fused_adam.Adam`. Moments of 16-bit parameters are float32, other than in PyTorch.
    no_decay
        As in :class:`fused_adam.Adam`, by the names of ``model.named_parameters()``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :class:`torch.optim.Adam`, and where an option of ours is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        eps_mode: EpsMode = "outside",
        bias_correction: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        state_dtype: StateDType | None = None,
        no_decay: NoDecay | None = None,
        num_threads: int | None = None,
    ) -> None:
        _set_own(self, locals())
        torch.optim.Adam.__init__(
            self,
            _groups_by(params, no_decay),
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.defaults.update(self.__dict__.pop("_own"))


class AdamW(_FusedStep, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, fused and in place, with the bits of ``torch.optim.AdamW(fused=True)``.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused
        As in :class:`Adam`.
    weight_decay : float, default 1e-2
        >= 0.
    max_norm, clip_value, skip_nonfinite, ema_decay, eps_mode, bias_correction
        As in :class:`Adam`.
    master_weights, stochastic_rounding, seed, state_dtype, no_decay, num_threads
        As in :class:`Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        eps_mode: EpsMode = "outside",
        bias_correction: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        state_dtype: StateDType | None = None,
        no_decay: NoDecay | None = None,
        num_threads: int | None = None,
    ) -> None:
        _set_own(self, locals())
        torch.optim.AdamW.__init__(
            self,
            _groups_by(params, no_decay),
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self.__dict__.pop("_own"))


def _set_own(optimizer: _FusedStep, arguments: Mapping[str, Any]) -> None:
    """Before PyTorch makes the groups, which are to have them."""
    _config.threads(arguments["num_threads"])
    optimizer._own = {key: arguments[key] for key in (*_OWN, "num_threads")}


def _check(options: Mapping[str, Any], where: str) -> None:
    """As a step checks them; their numbers may be tensors."""
    _core.check_options({**DEFAULTS, **options}, where, 0)


def _groups_by(params: Any, no_decay: NoDecay | None) -> Any:
    rule = DecayRule(no_decay)
    if not rule.is_needed:
        return params
    given: list[Any] = [params] if isinstance(params, torch.Tensor) else list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    divided = [
        part for group in groups for part in ([group] if "no_decay" in group else _divided(group, rule))
    ]
    rule.require_matches()
    return divided


def _divided(group: dict[str, Any], rule: DecayRule) -> list[dict[str, Any]]:
    """The group, or two: what decays, and what does not."""
    if not rule.is_needed:
        return [group]
    params = group["params"]
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for i, entry in enumerate(params):
        name, tensor = entry if isinstance(entry, tuple) else (str(i), entry)
        parts[not rule.spares(name, tensor)].append(entry)
    divided = []
    if parts[True]:
        divided.append({**group, "params": parts[True]})
    if parts[False]:
        divided.append({**group, "params": parts[False], "weight_decay": 0.0})
    return divided


def _readable(groups: list[Any]) -> list[Any]:
    """As the core takes them: tensors; or arrays that share their memory, for a PyTorch without the table."""
    if _HAS_TABLE:
        return groups
    return [
        (group, tuple(None if column is None else list(map(_as_array, column)) for column in columns), number)
        for group, columns, number in groups
    ]


def _as_array(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    try:
        array = tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise type(error)(f"a tensor of {tensor.dtype} on {tensor.device} has no array: {error}") from None
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise _core.LayoutError("a tensor is not one block of memory.")
    return array


def _stored(group: Mapping[str, Any], computed: torch.dtype) -> torch.dtype:
    kinds = {None: computed, "bfloat16": torch.bfloat16, "float8": torch.uint8}
    return kinds[group.get("state_dtype")]


def _lying_as(model: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.stride() == model.stride() and tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


# --- What is refused ---------------------------------------------------------------------------------


def _refuse_modes(group: Mapping[str, Any], where: str) -> None:
    for key in ("capturable", "differentiable"):
        if group.get(key):
            raise RuntimeError(
                f"{where}[{key!r}] is True: that is for "
                + ("graphs of an accelerator" if key == "capturable" else "gradients through a step")
                + ", which fused_adam has not. Use torch.optim there."
            )


def _refuse_layout(grad: torch.Tensor) -> None:
    if grad.layout is torch.strided:
        raise RuntimeError(
            "fused_adam is for dense parameters, got a sparse one. Use torch.optim.SparseAdam."
        )
    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


def _refuse_param(param: torch.Tensor) -> None:
    if param.is_complex():
        raise TypeError("fused_adam is for real parameters, got a complex one. Use torch.optim.Adam.")


def _refuse_overlapping(param: torch.Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise RuntimeError("a parameter is an expanded tensor, whose elements share memory. Use p.clone().")


# --- Moments in fewer bytes --------------------------------------------------------------------------


def _decoded(param: torch.Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    if "exp_avg_scale" not in entry:
        return entry
    decoded = dict(entry)
    for name in _MOMENTS:
        if name in entry:
            scale = decoded.pop(f"{name}_scale")
            numbers = _core.decode_moment(_config.ISA, name, entry[name].numpy(), scale.numpy())
            decoded[name] = _from_memory_order(param, torch.from_numpy(numbers))
    return decoded


def _stored_state(param: torch.Tensor, group: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint, with copies of all tensors, as it is stored here."""
    computed = torch.float64 if param.dtype == torch.float64 else torch.float32
    stored = _stored(group, computed)
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if not isinstance(value, torch.Tensor):
            state[name] = torch.tensor(float(value)) if name == "step" else value
        elif name == "step":
            state[name] = value.detach().to(dtype=torch.float32, device="cpu", copy=True)
        elif name in _MOMENTS and stored != computed:
            state.update(_encoded(param, name, value.detach().float(), stored, int(float(saved["step"]))))
        elif value.is_floating_point() and value.shape == param.shape:
            state[name] = torch.empty_like(param, dtype=computed).copy_(value)
        else:
            state[name] = value.detach().clone()
    return state


def _encoded(
    param: torch.Tensor, name: str, numbers: torch.Tensor, stored: torch.dtype, step: int
) -> dict[str, torch.Tensor]:
    flat = _in_memory_order(param, numbers).numpy()
    kind = "float8" if stored == torch.uint8 else "bfloat16"
    codes, scale = _core.encode_moment(_config.ISA, name, kind, flat, step)
    if kind == "bfloat16":
        return {name: _from_memory_order(param, torch.from_numpy(codes).view(torch.bfloat16))}
    return {name: torch.from_numpy(codes), f"{name}_scale": torch.from_numpy(scale)}


def _in_memory_order(param: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Flat, as the elements of the parameter lie in memory, or would in a dense copy."""
    dense = torch.empty_like(param, dtype=numbers.dtype).copy_(numbers)
    return dense.as_strided((dense.numel(),), (1,))


def _from_memory_order(param: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    dense = torch.empty_like(param, dtype=flat.dtype)
    dense.as_strided((dense.numel(),), (1,)).copy_(flat)
    return dense
