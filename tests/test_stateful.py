"""Any sequence of steps, edits, copies and checkpoints gives what the steps and edits alone give."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cases import DEFAULTS
from fused_adam import Adam, AdamW
from snapshots import assert_same_bits, leaves, map_tree, random_like

FORMS: dict[str, Any] = {
    "array": np.empty(5, np.float32),
    "dict": {"w": np.empty((3, 4)), "b": [np.empty((2, 3), np.float32, order="F"), np.empty(())]},
    "list": [np.empty(17), np.empty((0, 2), np.float32), np.empty(1, np.float32)],
    "large": {"w": np.empty(50_000, np.float32)},  # enough for several threads
}
VALUES: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.5, np.float32(0.1)],
    "betas": [(0.9, 0.999), (0.0, 0.5), [0.5, 0.9]],
    "eps": [0.0, 1e-8, 0.1],
    "weight_decay": [0.0, 0.1],
    "amsgrad": [False, True],
    "maximize": [False, True],
    "ema_decay": [None, 0.0, 0.3, 0.999],
    "max_norm": [None, 0.0, 0.5, 100.0],
    "skip_nonfinite": [False, True],
    "eps_mode": ["outside", "hat", "root"],
    "bias_correction": [True, False],
    "initial_lr": [None, 1.5],  # of others; it is kept
}
options = st.sampled_from(list(VALUES)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from(VALUES[key]))
)
seeds = st.integers(0, 2**32 - 1)


class One:
    """An optimizer and the trees of its params, one for each group."""

    def __init__(self, cls: type[Adam], form: str, seed: int, grouped: bool) -> None:
        self.trees = [random_like(FORMS[form], seed)]
        self.grouped = grouped
        self.opt = cls(self.groups() if grouped else self.trees[0], num_threads=2)

    def groups(self) -> Any:
        return [{"params": tree} for tree in self.trees]

    def grads(self, seed: int, missing: int) -> Any:
        """Every `missing`th gradient is None; for 0, none of them is. step(None) would ask for buffers."""
        grads = [random_like(tree, seed + i) for i, tree in enumerate(self.trees)]
        count = iter(range(1000))

        def drop(grad: Any) -> Any:
            k = next(count)
            return None if missing and k % missing == 0 else grad

        dropped = map_tree(drop, grads)
        if self.grouped:
            return dropped
        return grads[0] if dropped[0] is None else dropped[0]

    def step(self, seed: int, missing: int, zero_grad: bool = False) -> None:
        grads = self.grads(seed, missing)
        self.opt.step(grads, zero_grad=zero_grad)
        if zero_grad:
            assert not any(grad is not None and grad.any() for _, grad in leaves(grads))

    def add(self, form: str, seed: int) -> None:
        tree = random_like(FORMS[form], seed)
        # With all options but the one that AdamW fixes: defaults of a constructor are no part of this.
        options = {key: value for key, value in DEFAULTS.items() if key != "decoupled_weight_decay"}
        self.opt.add_param_group({"params": tree, **options, "lr": 0.01})
        self.trees.append(tree)
        self.grouped = True

    def copy_trees(self) -> None:
        self.trees = map_tree(lambda array: array.copy(order="K"), self.trees)

    def keeps_ema(self) -> bool:
        return any(group["ema_decay"] is not None for group in self.opt.param_groups)

    def arrays(self) -> list[np.ndarray]:
        return [array for _, array in leaves(self.trees)]


class Machine(RuleBasedStateMachine):
    @initialize(
        cls=st.sampled_from([Adam, AdamW]),
        form=st.sampled_from(list(FORMS)),
        seed=seeds,
        grouped=st.booleans(),
    )
    def start(self, cls: type[Adam], form: str, seed: int, grouped: bool) -> None:
        self.cls = cls
        self.one, self.twin = (One(cls, form, seed, grouped) for _ in range(2))
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name) / "adam.safetensors"

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # --- What both do ---

    @rule(seed=seeds, missing=st.integers(0, 3))
    def step(self, seed: int, missing: int) -> None:
        for each in (self.one, self.twin):
            each.step(seed, missing)

    @precondition(lambda self: len(self.one.trees) < 3)
    @rule(form=st.sampled_from(list(FORMS)), seed=seeds)
    def add_group(self, form: str, seed: int) -> None:
        for each in (self.one, self.twin):
            each.add(form, seed)

    @rule(which=st.integers(0, 2), option=options)
    def edit(self, which: int, option: tuple[str, Any]) -> None:
        key, value = option
        for each in (self.one, self.twin):
            groups = each.opt.param_groups
            groups[which % len(groups)][key] = value

    # --- What only one does ---

    @rule(seed=seeds, missing=st.integers(0, 3))
    def step_of_which_one_clears(self, seed: int, missing: int) -> None:
        self.one.step(seed, missing, zero_grad=True)
        self.twin.step(seed, missing)

    @precondition(lambda self: self.one.keeps_ema())
    @rule()
    def read_averages(self) -> None:
        """Which makes them, and lets none begin."""
        assert len(list(leaves(self.one.opt.ema))) == len(self.one.opt.state)
        with self.one.opt.ema_weights():
            pass

    @rule()
    def state_dict(self) -> None:
        one = self.one
        saved = one.opt.state_dict()
        one.copy_trees()
        one.opt = self.cls(one.groups() if one.grouped else one.trees[0], lr=0.7, num_threads=1)
        one.opt.load_state_dict(saved)

    @rule()
    def load_own_state_dict(self) -> None:
        self.one.opt.load_state_dict(self.one.opt.state_dict())

    @rule()
    def file(self) -> None:
        one = self.one
        one.opt.save(self.path)
        assert os.listdir(self.folder.name) == [self.path.name]
        one.copy_trees()
        one.opt = self.cls.load(self.path, one.groups() if one.grouped else one.trees[0], num_threads=2)

    @precondition(lambda self: self.path.exists())
    @rule()
    def save_only(self) -> None:
        self.one.opt.save(self.path)

    @rule(protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
    def pickle(self, protocol: int) -> None:
        self.one = pickle.loads(pickle.dumps(self.one, protocol))

    @rule()
    def deepcopy(self) -> None:
        self.one = copy.deepcopy(self.one)

    @precondition(lambda self: hasattr(os, "fork") and sys.platform != "darwin")
    @rule(seed=seeds, missing=st.integers(0, 3))
    def step_in_a_fork(self, seed: int, missing: int) -> None:
        """The child sends back what the step made; here it is only taken over."""
        with tempfile.TemporaryFile() as result:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks while there are threads
                child = os.fork()
            if not child:
                status = 1
                try:
                    self.one.step(seed, missing)
                    pickle.dump((self.one.arrays(), self.one.opt.state_dict()), result)
                    result.flush()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            result.seek(0)
            arrays, saved = pickle.load(result)
        for mine, made in zip(self.one.arrays(), arrays, strict=True):
            mine[...] = made
        self.one.opt.load_state_dict(saved)
        self.twin.step(seed, missing)

    # --- Always ---

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "one"):
            return
        one, twin = self.one, self.twin
        assert_same_bits(one.trees, twin.trees)
        assert len(one.opt.state) == len(twin.opt.state)
        for index, expected in twin.opt.state.items():
            found = one.opt.state[index]
            assert found.pop("step") == expected.pop("step")
            for entry in (found, expected):  # one that was not needed yet is one of zeros
                entry.setdefault("max_exp_avg_sq", np.zeros_like(entry["exp_avg"]))
            assert found.keys() == expected.keys()
            assert_same_bits(found, {name: expected[name] for name in found})
        for a, b in zip(one.opt.param_groups, twin.opt.param_groups, strict=True):
            assert {**a, "params": 0, "betas": tuple(a["betas"])} == {
                **b,
                "params": 0,
                "betas": tuple(b["betas"]),
            }


TestStateful = Machine.TestCase
TestStateful.settings = settings(
    max_examples=settings.default.max_examples // 2,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
