"""Whether training ends where it ends with float32 moments, and with float32 parameters.

    python -m benchmarks.parity [SEEDS]

Two models in plain NumPy: that of the demo, which reads digits, and one that guesses the next character of
Python's own source files from the 12 before it. A seed decides on the first weights and on the batches; all
ways to store are given the same seeds, and what counts is how the losses differ, on data kept aside.

The files are those of the Python that runs this: another version has other losses.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16

from fused_adam import Adam
from fused_adam.demo import network, training

Array: TypeAlias = npt.NDArray[Any]
Params: TypeAlias = dict[str, Array]


class Way(NamedTuple):
    """How a model is stored while it is trained."""

    state_dtype: Literal["bfloat16", "float8"] | None = None
    dtype: npt.DTypeLike = np.float32
    stochastic_rounding: bool = False
    master_weights: bool = False
    lr_factor: float = 1

    def optimizer(self, params: Params, lr: float, seed: int) -> Adam:
        return Adam(
            params,
            lr=lr * self.lr_factor,
            state_dtype=self.state_dtype,
            stochastic_rounding=self.stochastic_rounding,
            master_weights=self.master_weights,
            seed=seed,
        )


# On the data kept aside, after a training with this learning rate and seed.
Loss: TypeAlias = Callable[[Way, float, int], float]

MOMENTS = {"float32": Way(), "bfloat16": Way("bfloat16"), "float8": Way("float8")}
PARAMS = {
    "float32": Way(),
    "bfloat16, to the nearest": Way(dtype=bfloat16),
    "bfloat16, stochastic": Way(dtype=bfloat16, stochastic_rounding=True),
    "bfloat16, master weights": Way(dtype=bfloat16, master_weights=True),
    "bfloat16, stochastic; float8 moments": Way("float8", bfloat16, stochastic_rounding=True),
    "float32; float8 moments": Way("float8"),
    # By what updates of float8 moments are longer (benchmarks.moments): whether it is this that counts.
    "float32, learning rate 1.5 % higher": Way(lr_factor=1.015),
}


# --- Digits ------------------------------------------------------------------------------------------


def digits_loss(way: Way, lr: float, seed: int) -> float:
    digits = training.load()
    rng = np.random.default_rng(seed)
    params = network.new_params(training.SIZES, rng)
    opt = way.optimizer(params, lr, seed)
    count = len(digits.train_labels)
    for _ in range(training.EPOCHS):
        for rows in rng.permutation(count)[: count - count % training.BATCH].reshape(-1, training.BATCH):
            opt.step(network.loss_and_grads(params, digits.train_images[rows], digits.train_labels[rows])[1])
    return network.evaluate(params, digits.test_images, digits.test_labels)[0]


# --- Characters --------------------------------------------------------------------------------------

TEXT, PIECE, KEPT_ASIDE = 500_000, 1000, 10
CONTEXT, EMBEDDING, HIDDEN, BATCH, STEPS = 12, 24, 192, 128, 6000


class Text(NamedTuple):
    """Rows of characters, by number: a context and what follows. Each tenth piece is for tests."""

    train: Array
    test: Array
    kinds: int


@functools.cache
def load_text() -> Text:
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:TEXT]
    kinds, numbers = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(numbers.reshape(-1, PIECE), CONTEXT + 1, axis=1)
    for_test = np.arange(len(windows)) % KEPT_ASIDE == 0
    train, test = (windows[some].reshape(-1, CONTEXT + 1) for some in (~for_test, for_test))
    return Text(train, test, len(kinds))


def characters_loss(way: Way, lr: float, seed: int) -> float:
    text, rng = load_text(), np.random.default_rng(seed)
    params = network.new_params((CONTEXT * EMBEDDING, HIDDEN, text.kinds), rng)
    params["embedding"] = rng.standard_normal((text.kinds, EMBEDDING), np.float32)
    params = {name: param.astype(way.dtype) for name, param in params.items()}
    opt = way.optimizer(params, lr, seed)
    for _ in range(STEPS):
        rows = text.train[rng.integers(len(text.train), size=BATCH)]
        opt.step(loss_and_grads(wide(params), rows)[1])
    losses = [loss_and_grads(wide(params), rows)[0] * len(rows) for rows in np.array_split(text.test, 50)]
    return sum(losses) / len(text.test)


def wide(params: Params) -> Params:
    """To compute with; gradients are float32 in all cases."""
    return {name: param.astype(np.float32) for name, param in params.items()}


def loss_and_grads(params: Params, rows: Array) -> tuple[float, Params]:
    """Of one hidden layer, whose inputs are the embeddings of a context's characters side by side."""
    contexts, right = rows[:, :-1], (np.arange(len(rows)), rows[:, -1])
    inputs = params["embedding"][contexts].reshape(len(rows), -1)
    hidden = np.tanh(inputs @ params["w0"] + params["b0"])
    scores = hidden @ params["w1"] + params["b1"]
    delta = np.exp(scores - scores.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    loss = -float(np.log(delta[right]).mean())

    # From here on it is what the loss changes by with the scores, and then with what the tanh is of.
    delta[right] -= 1
    delta /= len(rows)
    grads = {"w1": hidden.T @ delta, "b1": delta.sum(axis=0)}
    delta = (delta @ params["w1"].T) * (1 - hidden**2)
    grads |= {"w0": inputs.T @ delta, "b0": delta.sum(axis=0)}
    which = np.eye(len(params["embedding"]), dtype=np.float32)[contexts.ravel()]
    grads["embedding"] = which.T @ (delta @ params["w0"].T).reshape(-1, EMBEDDING)
    return loss, grads


# --- Both --------------------------------------------------------------------------------------------


def compare(title: str, loss: Loss, lr: float, ways: dict[str, Way], seeds: int) -> None:
    print(f"\n{title}, learning rate {lr:g}, {seeds} seeds\n")
    print("| | loss | minus float32's | standard deviation | ratio |\n|---|---|---|---|---|")
    exact: list[float] = []
    for name, way in ways.items():
        losses = [loss(way, lr, seed) for seed in range(seeds)]
        exact = exact or losses
        differences = [a - b for a, b in zip(losses, exact, strict=True)]
        mean, ratio = statistics.mean(losses), statistics.mean(losses) / statistics.mean(exact)
        by, spread = statistics.mean(differences), statistics.stdev(differences)
        print(f"| {name} | {mean:.4f} | {by:+.5f} | {spread:.5f} | {ratio:.4f} |", flush=True)


def main(seeds: int) -> None:
    compare("Digits, moments", digits_loss, 1e-3, MOMENTS, seeds)
    compare("Characters, moments", characters_loss, 2e-3, MOMENTS, seeds)
    compare("Characters, parameters", characters_loss, 1e-4, PARAMS, seeds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
