"""Adam, with the interface of torch.optim and NumPy arrays for tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fused_adam import _checkpoint, _config, _core
from fused_adam._groups import DecayRule, NoDecay, is_groups
from fused_adam._state import OptimizerState
from fused_adam._step_info import PLAIN_STEP, StepInfo
from fused_adam._tables import DEFAULTS, options_in, refuse_slips, used

if TYPE_CHECKING:
    from typing_extensions import Self

EpsMode: TypeAlias = Literal["outside", "hat", "root"]
StateDType: TypeAlias = Literal["bfloat16", "float8"]
# Or of ml_dtypes.bfloat16, of which type checkers know nothing here.
Array: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64] | npt.NDArray[np.float16]
LearningRate: TypeAlias = "float | Callable[[int], float]"
# One array, or containers of arrays.
Params: TypeAlias = "Array | Iterable[Params] | Mapping[Any, Params]"
# The same with None where a parameter has no gradient in this step.
Grads: TypeAlias = "Array | Iterable[Grads] | Mapping[Any, Grads] | None"


class _Grads(NamedTuple):
    """What :attr:`Adam.grads` holds, and for how many groups; those of later ones are still to be made."""

    tree: Any
    grouped: bool  # a list with a tree for each group that was given
    trees: int


class Adam:
    r"""Adam [1]_ for NumPy arrays, fused and in place.

    With :math:`g` the gradient (negated for `maximize`; plus `weight_decay` times the parameter, in the
    L2 form) and :math:`t` the number of the step, counted from 1 for each parameter::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        param -= lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    The float32 and float64 operations and their order are those of ``torch.optim.Adam(fused=True)``,
    which gives the same bits; they do not depend on threads, instruction set, alignment or on how arrays
    are split.

    Parameters
    ----------
    params : array, list, tuple or dict
        The arrays to train, updated in place: one array; lists, tuples and dicts of arrays, nested as
        you like; or parameter groups, a list of dicts with a key ``"params"`` and options of their own.
        Arrays are float32, float64, float16 or bfloat16 (of ml_dtypes), in C or Fortran order, aligned,
        writeable, of native byte order. For those of 16 bits the step is that of float32, with moments and
        averages in float32, and what comes out is rounded to the nearest, of two equally near ones to the
        even one.
    lr : float or function, default 1e-3
        Learning rate, >= 0. Or a function that gives it for the number of steps made before, from 0, as
        those of :mod:`fused_adam.schedules`: each step asks it once, with :attr:`steps`. Construction,
        :attr:`lr` and checkpoints ask it, too: its rate should depend on nothing else.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the averages of the gradient and of its square, in [0, 1).
    eps : float, default 1e-8
        Added to the denominator, outside the square root and after the bias correction, unless `eps_mode`
        says otherwise. >= 0.
    weight_decay : float, default 0
        >= 0. Added to the gradient as ``weight_decay * param`` (L2), or see `decoupled_weight_decay`.
    amsgrad : bool, default False
        Divide by the largest second moment so far [2]_ instead of the present one.
    maximize : bool, default False
        Step uphill.
    decoupled_weight_decay : bool, default False
        Shrink the parameter by ``1 - lr * weight_decay`` before the step instead of adding to the
        gradient [3]_: AdamW.
    ema_decay : float, optional
        In [0, 1). Keep an average of the parameters, ``ema += (1 - ema_decay) * (param - ema)`` after each
        step, computed as :func:`torch.lerp` does: see :attr:`ema`. 0.999 is usual.
    max_norm : float, optional
        >= 0. Clip the gradients by their global norm, as :func:`torch.nn.utils.clip_grad_norm_` does:
        multiply them by ``max_norm / (norm + 1e-6)`` where that is below 1. The norm is the 2-norm over
        all gradients of all groups, also of those that are not clipped; it is summed in float64 (PyTorch:
        in the dtype of the gradients), in an order that does not depend on threads, instruction set or
        how arrays are split. The gradients themselves are not written.
    clip_value : float, optional
        >= 0. Clip each element of the gradients to ``[-clip_value, clip_value]``, as
        :func:`torch.nn.utils.clip_grad_value_` does. Not together with `max_norm`: which of the two came
        first would decide what comes out.
    skip_nonfinite : bool, default False
        Where any gradient of any group has an infinity or a NaN, leave the step out: no parameter, no
        state and no step count changes. It is counted in :attr:`skipped_steps`, and no error. True in one
        group counts for all, also where that group has no gradients.
    eps_mode : {"outside", "hat", "root"}, default "outside"
        Where `eps` stands, with ``v_hat = v / (1 - beta2**t)``. "outside": ``sqrt(v_hat) + eps``, as in
        PyTorch. "hat": ``(sqrt(v) + eps) / sqrt(1 - beta2**t)``, the epsilon-hat of [1]_, as in Keras,
        scikit-learn and thinc. "root": ``sqrt(v_hat + eps)``, as optax's `eps_root`; the denominator is never
        below ``sqrt(eps)`` then.
    bias_correction : bool, default True
        False: take both averages as they are, although they started at zero: ``1 - beta1**t`` and
        ``1 - beta2**t`` are 1.
    master_weights : bool, default False
        For parameters of 16 bits, keep a float32 copy, ``opt.state[i]["master_param"]``, which is what
        steps update; the parameter is rounded from it after each step, and is read only as the first of
        these steps begins. Other parameters need none.
    stochastic_rounding : bool, default False
        Round parameters of 16 bits to one of the two neighbours instead of the nearest, so that what is lost
        is nothing on average: steps that are smaller than half of the last bit count, too. Which one
        depends on `seed`, the index of the parameter, the step and the element, and on nothing else. Not
        together with `master_weights`. Other parameters need none.
    seed : int, default 0
        Of `stochastic_rounding`: >= 0 and < 2**63.
    state_dtype : {"bfloat16", "float8"}, optional
        Store both moments in fewer bytes, for parameters of float32 and 16 bits. They are decoded to float32
        before each step, and encoded after it with a dither, since rounded to the nearest they would stand
        still. "bfloat16": 4 bytes for each element of a parameter in the place of 8; single second moments
        scatter by 4 % around those in float32 (with beta2 = 0.999), and their means are right. "float8":
        2.016 bytes, 20 %; floats of 8 bits, for the first moment with a sign, 4 bits of exponent and 3 of
        fraction (E4M3), for squares with 5 and 3 (E5M3), and in each block of 128 elements the exponents
        count from one that they share. Not together with `amsgrad`, whose largest second moment would rise
        for ever; in bfloat16 it does by 6 % in 20,000 steps. See the notes. Fixed once a group is made; a
        checkpoint of :meth:`state_dict` has them in float32, and loads into any.
    no_decay : str, list of str or function, optional
        Parameters that are not to decay, biases and norms usually. Patterns of their names as in
        :attr:`state` (in lists, indices), ``["bias", "*norm*"]``: each matches a whole name or its end after
        a dot, with ``*``, ``?`` and ``[...]``. Or a function ``(name, array) -> bool``: ``lambda name, w:
        w.ndim < 2``. They become a group of their own, with ``weight_decay=0``, behind the others that they
        were given with; gradients keep the structure of `params`. Also a key of a group, in the place of
        this; for groups that are added later it is the only way.
    allow_mixed : bool, default False
        Take gradients of 16 bits for parameters of float32, too: they are decoded. By default that is an
        error, since it may be a slip.
    num_threads : int, optional
        The most threads that a step uses. By default what OpenMP, CPU affinity and the cgroup allow, or
        the environment variable ``FUSED_ADAM_NUM_THREADS``. Results do not depend on it.

    Attributes
    ----------
    param_groups : list of dict
        The groups: their arrays (a flat tuple, fixed) under ``"params"``, and their options, which may
        be edited between steps and are checked again at each.
    defaults : dict
        The options of groups that do not give their own.

    Raises
    ------
    TypeError
        Something that is not an array, another dtype, an option of the wrong type.
    ValueError
        An array that cannot be updated in place (strided, unaligned, byte-swapped, read-only, masked),
        memory that is used twice, an option out of range, no arrays at all, keys of a dict that are
        different but have the same repr. A key of a group that is nearly the name of an option, as
        ``weigth_decay``; others are kept. A pattern of `no_decay` that no parameter matches.

    Notes
    -----
    How moments are stored with a `state_dtype`. Of an element i in step t, r is a number from
    ``reversed bits of (i % 128) ^ hash of (i // 128, t, moment)``: even over each block of 128, by chance
    over steps. It is added to the bits of the float32 number below those that are kept, and the rest is cut
    off, so that the mean of what is stored is the number. "bfloat16" keeps the upper 16 bits. In "float8"
    each block has an exponent E, that of its largest number x (the next one where x is above 1.875 times its
    power of two). What is kept is ``(bits - base + r) >> 20``, with r of 20 bits and ``base = max(E - 15, 0)
    << 23`` for the first moment, without its sign, ``max(E - 31, 0) << 23`` for squares; it is 0 where that
    is negative, which decodes to 0 for the first moment and to the base for squares. The bits are not those
    of a step on float32 moments, and the denominator is ``fma(sqrt(v), 1 / sqrt(1 - beta2**t), eps)``, with
    one rounding less.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015,
       https://arxiv.org/abs/1412.6980
    .. [2] S. J. Reddi, S. Kale and S. Kumar, "On the Convergence of Adam and Beyond", ICLR 2018,
       https://arxiv.org/abs/1904.09237
    .. [3] I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
       https://arxiv.org/abs/1711.05101

    Examples
    --------
    >>> import numpy as np
    >>> theta = np.array([2.0])
    >>> opt = Adam(theta)
    >>> for _ in range(2):
    ...     info = opt.step(np.array([3.0]))
    ...     print(theta)
    [1.999]
    [1.998]
    """

    # Options that a subclass does not let a checkpoint change.
    _fixed_options: ClassVar[Mapping[str, Any]] = {}
    _grads: _Grads | None
    _allow_mixed = False  # also of pickles of a version that did not have it

    def __init__(
        self,
        params: Params | Sequence[dict[str, Any]],
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        ema_decay: float | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        eps_mode: EpsMode = "outside",
        bias_correction: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        state_dtype: StateDType | None = None,
        no_decay: NoDecay | None = None,
        allow_mixed: bool = False,
        num_threads: int | None = None,
    ) -> None:
        self.defaults: dict[str, Any] = options_in(locals())
        _core.check_options(self.defaults, "", 0)
        self.defaults["betas"] = tuple(betas)
        self.param_groups: list[dict[str, Any]] = []
        _config.require_flag("allow_mixed", allow_mixed)
        self._allow_mixed, self._num_threads = allow_mixed, num_threads
        self._new_core()
        if isinstance(params, Iterator):
            params = list(params)
        grouped = is_groups(params)
        groups: Any = params if grouped else [{"params": params}]
        rule = DecayRule(no_decay)
        for group in groups:
            self._add_group(group, grouped, rule)
        rule.require_matches()

    def step(
        self,
        grads: Grads | Sequence[Grads] = None,
        *,
        zero_grad: bool = False,
        grad_scale: float | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool | None = None,
    ) -> StepInfo:
        """Update all parameters in place.

        Parameters
        ----------
        grads : like params
            The gradients, in the structure of `params` and with their dtypes (or float32, where these are of
            16 bits); with parameter groups, a list with an entry for each group. A parameter whose entry is
            None is left out: it, its state and its step count stay as they are. By default the buffers of
            :attr:`grads`.
        zero_grad : bool, default False
            Set the gradients to zeros as soon as they are used, in the same pass over memory. They are
            written then, so they must be writeable, and no two may share memory. Also where the step is
            skipped.
        grad_scale : float, optional
            What the loss was multiplied by: the gradients are divided by it first, as PyTorch's fused
            step does. They are not written.
        max_norm, clip_value : float, optional
            For this step, in the place of what all groups say, of either kind: see :class:`Adam`.
            ``max_norm=math.inf`` clips nothing, and measures.
        skip_nonfinite : bool, optional
            For this step, in the place of what the groups say.

        Returns
        -------
        StepInfo

        Raises
        ------
        TypeError, ValueError
            Something about gradients, parameters or edited groups is not as it has to be; the message
            names it. Nothing has changed then: no array, no step count.
        RuntimeError
            Another thread is inside a step of this optimizer.

        Examples
        --------
        >>> import numpy as np
        >>> w = np.zeros(2)
        >>> opt = Adam(w)
        >>> opt.step(np.array([3.0, 4.0]), max_norm=1.0)
        StepInfo(skipped=False, grad_norm=5.0)
        >>> opt.step(np.array([3.0, np.nan]), skip_nonfinite=True).skipped, opt.skipped_steps
        (True, 1)
        """
        if grads is None:
            if self._grads is None:
                raise ValueError("step() needs grads: pass them, or fill the buffers opt.grads before it.")
            grads = self.grads
        if zero_grad is not False:
            _config.require_flag("zero_grad", zero_grad)
        report = self._core.step(
            grads, self.param_groups, zero_grad, grad_scale, max_norm, clip_value, skip_nonfinite
        )
        return PLAIN_STEP if report is None else StepInfo(*report)

    @property
    def steps(self) -> int:
        """How many steps were made, those left out not counted: what a function for `lr` is called with.

        Checkpoints have it. Loaded from one that does not, of PyTorch or of an older version, it is the
        largest of the step counts of the parameters.
        """
        return self._core.steps

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out, as gradients were not finite.

        Since this optimizer was made; pickles and copies have it, checkpoints do not.
        """
        return self._core.skipped_steps

    @property
    def grads(self) -> Any:
        """Gradients in the structure of `params`: buffers of zeros, made on first use, or what you set.

        Those that are made are float32 for parameters of 16 bits: many small gradients can be added up.

        ``opt.zero_grad()``, then ``opt.grads["w"] += ...``, then ``opt.step()``.
        """
        held = self._grads or _Grads([], True, 0)
        is_list = isinstance(held.tree, (list, tuple))  # else the next step refuses what was set here
        if held.trees < self._core.trees and (is_list or not held.grouped):
            with _core.ExclusiveUse(self._core):
                self._core.check_groups(self.param_groups)
                trees = list(held.tree) if held.grouped else [held.tree]
                trees += self._core.new_grads(held.trees)
                grouped = self._core.grouped
            held = self._grads = _Grads(trees if grouped else trees[0], grouped, len(trees))
        return held.tree

    @grads.setter
    def grads(self, grads: Any) -> None:
        # Checked by each step, like any. `opt.grads += g` on one array ends here too.
        tree = list(grads) if isinstance(grads, Iterator) else grads
        held = _Grads(tree, self._core.grouped, self._core.trees)
        self._grads = None if grads is None else held

    def accumulate(self, grads: Grads | Sequence[Grads]) -> None:
        """Add gradients to the buffers of :attr:`grads`, as over the micro-batches of a step.

        Parameters
        ----------
        grads : like params
            As in :meth:`step`. Where an entry is None, nothing is added.

        Raises
        ------
        TypeError, ValueError
            Something about gradients or buffers is not as it has to be; a gradient that shares memory with
            a buffer. Nothing has changed then.
        RuntimeError
            Another thread is inside a step of this optimizer.

        Examples
        --------
        >>> import numpy as np
        >>> w = np.zeros(2)
        >>> opt = Adam(w, max_norm=1.0)
        >>> for grad in (np.array([1.0, 2.0]), np.array([5.0, 6.0])):  # two micro-batches
        ...     opt.accumulate(grad)
        >>> opt.step(grad_scale=2.0, zero_grad=True)  # by their mean
        StepInfo(skipped=False, grad_norm=5.0)
        """
        held = self._grads
        try:
            self._core.accumulate(self.grads, grads)
        except BaseException:
            self._grads = held  # a call that is refused makes no buffers
            raise

    def zero_grad(self) -> None:
        """Fill the buffers of :attr:`grads` with zeros."""
        if self._grads is not None:
            self._core.zero(self.grads)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more arrays from now on.

        Parameters
        ----------
        param_group : dict
            ``"params"``, as at construction, and options that differ from :attr:`defaults`, or `no_decay`.
            From now on `grads` is a list with an entry for each group that was given.

        Raises
        ------
        TypeError, ValueError
            As at construction. The optimizer is as it was then.
        """
        self._add_group(param_group, True, DecayRule(None))

    @property
    def lr(self) -> float:
        """The learning rate of all groups in the next step; setting it sets it in each."""
        groups = self._group_dicts()
        names = [f"param_groups[{i}]" for i in range(len(groups))]
        rates = set(_core.learning_rates(groups, names, self.steps))
        if not rates:
            raise ValueError("the optimizer has no groups: its construction was refused.")
        if len(rates) > 1:
            raise ValueError(
                f"the groups have different learning rates, {sorted(rates)}: see opt.param_groups[i]['lr']."
            )
        return rates.pop()

    @lr.setter
    def lr(self, lr: LearningRate) -> None:
        _core.check_options({**self.defaults, "lr": lr}, "", self.steps)
        for group in self._group_dicts():
            group["lr"] = lr

    @property
    def state(self) -> OptimizerState:
        """The moments and step counts of each parameter, by name (``"encoder.0"``) or by index.

        Where two names would be the same, as in ``{"a.b": x, "a": {"b": y}}`` or for the keys ``1`` and
        ``"1"``, all names of that group are paths as Python writes them: ``"['a.b']"``, ``"['a']['b']"``.
        (Also where a key has both halves of a surrogate pair next to each other.)

        ``opt.state["w"]`` is a dict with ``"step"``, an int, and live views ``"exp_avg"``,
        ``"exp_avg_sq"``, with amsgrad ``"max_exp_avg_sq"``, and with `ema_decay`, from the first step on,
        ``"ema"``. With a `state_dtype` the moments are read-only copies, decoded to float32 each time.
        """
        return self._state

    @property
    def ema(self) -> Any:
        """The averages of the parameters, live views in the structure of `params`.

        They begin as copies of the parameters as these are when the first step begins, so that weights that
        are loaded after construction count. A parameter that is left out of a step (None) keeps its
        average as it is, and so does a group whose `ema_decay` becomes None, until it is a number again.
        None in the place of those whose group has no `ema_decay`.

        Raises
        ------
        ValueError
            No group has an `ema_decay`.
        """
        trees = self._core.averages(self.param_groups)
        return trees if self._core.grouped else trees[0]

    def ema_weights(self) -> AbstractContextManager[None]:
        """Evaluate with the averages: ``with opt.ema_weights(): ...`` has them in the parameters' place.

        The parameters come back at the end of the block, after an exception too. Inside it the optimizer can
        do nothing else. Where a group has no `ema_decay`, its parameters stay.

        Raises
        ------
        ValueError
            When the block is entered: there are no averages, or a parameter cannot be written. When it ends:
            a parameter was resized in it. All others come back; its values are in ``opt.state[i]["ema"]``,
            and the optimizer does nothing else any more.
        RuntimeError
            Another thread is inside a step; a step, a checkpoint or another block inside this one.

        Examples
        --------
        >>> import numpy as np
        >>> w = np.array([1.0])
        >>> opt = Adam(w, lr=0.5, ema_decay=0.5)
        >>> info = opt.step(np.array([1.0]))
        >>> with opt.ema_weights():
        ...     print(w)
        [0.75]
        >>> print(w)
        [0.5]
        """
        return _core.EmaWeights(self._core, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint in the layout of PyTorch, with copies of all arrays.

        Returns
        -------
        dict
            ``"state"``: for each parameter, by its index over all groups, ``"step"`` (an int64 array of
            shape ()), ``"exp_avg"``, ``"exp_avg_sq"``, with amsgrad ``"max_exp_avg_sq"``, and ``"ema"``
            where there is an average.
            ``"param_groups"``: for each group its options and, under ``"params"``, indices; for
            parameters in dicts also ``"param_names"``. ``"steps"``, where :attr:`steps` is more than any
            parameter's count. ``"requires"``, where it is there: what a reader must know beyond PyTorch's
            Adam, like ``"ema"``.

        Notes
        -----
        ``torch.optim.Adam`` loads it once the arrays are tensors (``torch.from_numpy`` on each) and goes
        on with the same bits: the options say ``fused=True``, as these numbers are. But not where there is
        a ``"requires"``, which it does not look at: it goes on without those options, and with the rate of
        the next step for all steps where `lr` is a function (``"lr_schedule"``).
        """
        with _core.ExclusiveUse(self._core):
            self._core.check_groups(self.param_groups)
            return _checkpoint.state_dict(self._core, self.param_groups, self._core.names)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, keep_lr: bool = False) -> None:
        """Take over moments, step counts and options; the next step goes on with the same bits.

        Parameters
        ----------
        state_dict : dict
            From :meth:`state_dict`, or from ``torch.optim.Adam`` or ``AdamW`` (CPU tensors or arrays).
            The arrays are copied; where there is a `state_dtype`, they are encoded, which loses nothing of
            what was encoded before. A parameter without an entry starts afresh, and so does an average that
            it does not have. An option that it does not have is the default from then on; other keys of the
            groups stay. A function for `lr` stays, too, and goes on where the saved one was; no checkpoint
            holds one.
        keep_lr : bool, default False
            Keep the learning rates of this optimizer instead of those of the checkpoint.

        Raises
        ------
        TypeError, ValueError
            Another number of groups or parameters, other names, shapes or dtypes, an option out of
            range, something missing or unknown; a rate that was a function, where this one is a number.
            Nothing has changed then.
        """
        with _core.ExclusiveUse(self._core):
            self._core.check_groups(self.param_groups)
            _checkpoint.load_state_dict(
                self._core,
                self.param_groups,
                self._core.names,
                state_dict,
                keep_lr=keep_lr,
                fixed_options=self._fixed_options,
            )

    def save(
        self, path: str | os.PathLike[str], *, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Save moments, step counts, options and names in a file; parameters are for you to save.

        The names are those of :attr:`state`; where `params` has dicts, they are compared when it is loaded.

        The file takes the place of an older one only when it is whole and on the disk: whatever happens
        meanwhile, there is the old checkpoint or the new one.

        Parameters
        ----------
        path : path-like
            The file, in the safetensors format: other tools can read it. Every array has a checksum.
        progress : function, optional
            Called as ``progress(done, total)``, in bytes, for every MiB or so. An exception that it
            raises ends the saving and leaves the old file.

        Raises
        ------
        OSError
            No space, no permission, no such directory. The old file is as it was.
        TypeError, ValueError
            An option of the groups is out of range, or of a type that has no place in JSON.
        RuntimeError
            Another thread is inside a step. Steps are refused in the same way until this returns.

        Notes
        -----
        It needs memory for some MiB and about 1 kB for each parameter, and the time to write what
        :attr:`state` holds: 8 bytes for each float32 element, 4 more with amsgrad and with an average; with a
        `state_dtype`, moments as they are stored, 4 bytes or 2.02. Do not
        write to the views of :attr:`state` meanwhile: what is written and what is hashed would differ, and
        the file would not load.

        Examples
        --------
        >>> import numpy as np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "adam.safetensors")
        >>> w = np.ones(3)
        >>> Adam({"w": w}, lr=0.1).save(path)
        >>> Adam.load(path, {"w": w}).lr
        0.1
        """
        from fused_adam import _file  # with what it imports it takes a third of the time of the package

        with _core.ExclusiveUse(self._core):
            self._core.check_groups(self.param_groups)
            _file.save(path, self._core, self.param_groups, self._core.names, progress, self.defaults)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        params: Params | Sequence[dict[str, Any]],
        *,
        lr: LearningRate | None = None,
        no_decay: NoDecay | None = None,
        allow_mixed: bool = False,
        num_threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Make an optimizer that goes on where the saved one was, with the same bits.

        Parameters
        ----------
        path : path-like
            A file of :meth:`save`.
        params : like the params of the saved optimizer
            The arrays to train, as they were when it was saved: nothing is written to them. Where it
            had several groups, a list with a dict ``{"params": ...}`` for each. Options in these dicts
            do not count, those of the file do; but for a function as ``"lr"``, and `no_decay`.
        lr : float or function, optional
            Learning rate of all groups from here on, in the place of what the file has; a group's own
            ``"lr"`` counts then. Where the optimizer that was saved had a function, which is code and in no
            file, one has to be given.
        no_decay, allow_mixed, num_threads : optional
            As at construction. The parameters of `no_decay` are a group in the file, so it has to be given
            again.
        progress : function, optional
            Called as ``progress(done, total)``, in bytes.

        Returns
        -------
        Adam
            Of the class that this is called on, with the options of the file.

        Raises
        ------
        CheckpointError
            A ValueError: the file is cut off, damaged by as little as one bit, no checkpoint, written
            by a newer version, of parameters with other names, shapes or dtypes, or of an optimizer with a
            function for `lr` where none is given here.
        OSError
            The file cannot be read.
        TypeError, ValueError
            As at construction.
        """
        from fused_adam import _file

        given: dict[str, Any] = {
            "lr": lr,
            "no_decay": no_decay,
            "allow_mixed": allow_mixed or None,
            "num_threads": num_threads,
        }
        opt = cls(params, **{key: value for key, value in given.items() if value is not None})
        with _core.ExclusiveUse(opt._core):
            _file.load(
                path,
                opt._core,
                opt.param_groups,
                opt._core.names,
                cls._fixed_options,
                progress,
                opt.defaults,
                keep_lr=lr is not None,
            )
        return opt

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}("]
        for i, group in enumerate(self.param_groups):
            count = len(group["params"])
            size = sum(param.size for param in group["params"])
            options = ", ".join(f"{key}={value!r}" for key, value in used(group).items() if key != "params")
            lines.append(f"  group {i}: {count} array{'s' * (count != 1)}, {size:,} elements, {options}")
        return "\n".join([*lines, ")"])

    # Arrays pickle and deep-copy as NumPy does: the params of the copy are copies, unless they were
    # copied together with whatever else refers to them.

    def __getstate__(self) -> dict[str, Any]:
        grads = None if self._grads is None else self.grads
        with _core.ExclusiveUse(self._core):
            self._core.check_groups(self.param_groups)
            for i, group in enumerate(self.param_groups):
                _core.check_options(group, f"param_groups[{i}]", None)  # what is pickled must load
            saved = {
                "trees": self._core.params(),
                "members": self._core.members(),
                "state": _checkpoint.stored_state(self._core),
                "steps": self._core.steps,
                "skipped_steps": self._core.skipped_steps,
            }
            state = {**self.__dict__, "_core": saved, "_grouped": self._core.grouped, "_grads": grads}
        del state["_state"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {**state}
        saved, grouped, grads = (state.pop(key) for key in ("_core", "_grouped", "_grads"))
        self.__dict__.update(state)
        self.defaults = {**DEFAULTS, **self.defaults}  # an older version did not have all of them
        self._new_core()
        groups = iter(self.param_groups)
        self.param_groups = []  # the dicts of a shallow copy stay its original's
        members = saved.get("members")  # an older version had one group for each tree
        for i, tree in enumerate(saved["trees"]):
            structure = _core.Structure(tree)
            leaves = members[i] if members else [list(range(len(structure)))]
            new_groups = [({**self.defaults, **next(groups)}, own) for own in leaves]
            self._core.add_tree(self.param_groups, structure, new_groups, grouped, frozen=True)
        with _core.ExclusiveUse(self._core):
            # An older version did not have these numbers.
            _checkpoint.restore_state(self._core, self._core.kinds(), saved["state"], [], saved.get("steps"))
            self._core.skipped_steps = saved.get("skipped_steps", 0)
        self.grads = grads

    # --- private ---

    def _new_core(self) -> None:
        threads = _config.threads(self._num_threads)
        self._core = _core.Optimizer(_config.ISA, threads, self._allow_mixed)
        self._state = OptimizerState(self._core)
        self._grads = None

    def _add_group(self, param_group: Mapping[str, Any], grouped: bool, rule: DecayRule) -> None:
        where = f"param_groups[{self._core.trees}]"
        if not isinstance(param_group, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(param_group).__name__}.")
        if "params" not in param_group:
            raise ValueError(f"{where} has no key 'params'.")
        refuse_slips(param_group, where)
        options = {**self.defaults, **param_group}
        own_rule = DecayRule(options.pop("no_decay")) if "no_decay" in param_group else rule
        for key, value in options.items():
            if key != "params" and isinstance(value, np.ndarray) and value.size > 1:
                raise ValueError(f"{where}[{key!r}] is an array: arrays to train belong under 'params'.")
        _core.check_options(options, where, self.steps)
        for key, value in self._fixed_options.items():
            if options[key] != value:
                raise ValueError(f"{where}[{key!r}] must be {value} in {type(self).__name__}. Use Adam.")
        options["betas"] = tuple(options["betas"])
        structure = _core.Structure(options["params"])
        new_groups = []
        for decays, leaves in own_rule.divided(structure):
            new_groups.append(({**options, **({} if decays else {"weight_decay": 0.0})}, leaves))
        if own_rule is not rule:
            own_rule.require_matches()
        self._core.add_tree(self.param_groups, structure, new_groups, grouped, frozen=False)

    def _group_dicts(self) -> list[dict[str, Any]]:
        """The groups, which may have been edited, where as many as there were still are dicts."""
        count = self._core.groups
        if len(self.param_groups) != count:
            raise ValueError(
                f"param_groups has {len(self.param_groups)} groups, but the optimizer was given {count}."
            )
        for i, group in enumerate(self.param_groups):
            if not isinstance(group, dict):
                raise TypeError(f"param_groups[{i}] must be a dict, got {type(group).__name__}.")
        return self.param_groups
