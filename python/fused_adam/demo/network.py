"""A multi-layer perceptron in plain NumPy, forward and backward by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# Numbers are float32 or float64, whichever the parameters are: training uses one, the gradient check
# of the tests the other.
Array: TypeAlias = npt.NDArray[Any]
# Weights "w0", "w1", ... of shape (inputs, outputs), and biases "b0", "b1", ...
Params: TypeAlias = dict[str, Array]


def new_params(sizes: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> Params:
    """Random weights and zero biases for layers of these sizes."""
    params: Params = {}
    for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
        # Of the size that He et al. (2015) advise: signals neither fade nor blow up from layer to layer.
        weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        params[f"w{layer}"] = weights.astype(dtype)
        params[f"b{layer}"] = np.zeros(outputs, dtype)
    return params


def forward(params: Params, images: Array) -> list[Array]:
    """The input of each layer, then the scores of the classes.

    Hidden layers use tanh, which is smooth. With the kinks of ReLU, a difference in the last bit can
    switch a unit, and two correct trainings part ways; here they stay together, so that comparing them
    means something.
    """
    last = len(params) // 2 - 1
    signals = [images]
    for layer in range(last + 1):
        signal = signals[-1] @ params[f"w{layer}"] + params[f"b{layer}"]
        signals.append(signal if layer == last else np.tanh(signal))
    return signals


def loss_and_grads(params: Params, images: Array, labels: Array) -> tuple[float, Params]:
    """The mean cross-entropy of the softmax, and its gradients, a dict like `params`."""
    signals = forward(params, images)
    log_probs = _log_softmax(signals[-1])
    right = np.arange(len(labels)), labels

    # The derivative by the scores: the probabilities, minus 1 for the right class.
    delta = np.exp(log_probs)
    delta[right] -= 1
    delta /= len(labels)
    grads: Params = {}
    for layer in reversed(range(len(params) // 2)):
        grads[f"w{layer}"] = signals[layer].T @ delta
        grads[f"b{layer}"] = delta.sum(axis=0)
        if layer > 0:
            # Back through the weights, then through tanh, whose derivative is 1 - tanh**2.
            delta = (delta @ params[f"w{layer}"].T) * (1 - signals[layer] ** 2)
    return -float(log_probs[right].mean()), grads


def evaluate(params: Params, images: Array, labels: Array) -> tuple[float, float]:
    """The mean cross-entropy, and the share of images whose right class has the highest score."""
    scores = forward(params, images)[-1]
    loss = -float(_log_softmax(scores)[np.arange(len(labels)), labels].mean())
    return loss, float((scores.argmax(axis=1) == labels).mean())


def _log_softmax(scores: Array) -> Array:
    # Subtracting the highest score changes nothing, but keeps exp() from overflowing.
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probs: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs
