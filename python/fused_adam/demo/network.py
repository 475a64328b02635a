"""A multi-layer perceptron in plain NumPy, forward and backward by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# float32 or float64, as the parameters are: training uses float32, the gradient check float64.
Array: TypeAlias = npt.NDArray[Any]
# "w0", "b0", "w1", "b1", ...: the weights (inputs x outputs) and biases of the layers.
Params: TypeAlias = dict[str, Array]


def new_params(sizes: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> Params:
    """Weights drawn as He et al. advise for ReLU, and zero biases, for layers of these sizes."""
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        weights = rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / fan_in)
        params[f"w{layer}"] = weights.astype(dtype)
        params[f"b{layer}"] = np.zeros(fan_out, dtype)
    return params


def forward(params: Params, images: Array) -> list[Array]:
    """The input of every layer, and last the logits: one score for each class."""
    layers = len(params) // 2
    signals = [images]
    for layer in range(layers):
        signal = signals[-1] @ params[f"w{layer}"] + params[f"b{layer}"]
        signals.append(np.maximum(signal, 0) if layer < layers - 1 else signal)
    return signals


def loss_and_grads(params: Params, images: Array, labels: Array) -> tuple[float, Params]:
    """The mean softmax cross-entropy of a batch, and its gradients in the structure of `params`."""
    signals = forward(params, images)
    log_probs = _log_softmax(signals[-1])
    rows = np.arange(len(labels))
    loss = -float(log_probs[rows, labels].mean())

    grads: Params = {}
    # With respect to the logits: the probabilities, less 1 for the right class, over the batch size.
    delta = np.exp(log_probs)
    delta[rows, labels] -= 1
    delta /= len(labels)
    for layer in reversed(range(len(params) // 2)):
        grads[f"w{layer}"] = signals[layer].T @ delta
        grads[f"b{layer}"] = delta.sum(axis=0)
        if layer > 0:
            # A ReLU passes the gradient on where it let its signal through.
            delta = (delta @ params[f"w{layer}"].T) * (signals[layer] > 0)
    return loss, grads


def mean_loss(params: Params, images: Array, labels: Array) -> float:
    """The mean softmax cross-entropy alone."""
    return -float(_log_softmax(forward(params, images)[-1])[np.arange(len(labels)), labels].mean())


def accuracy(params: Params, images: Array, labels: Array) -> float:
    """The share of images whose label has the highest score."""
    return float((forward(params, images)[-1].argmax(axis=1) == labels).mean())


def _log_softmax(logits: Array) -> Array:
    # Subtracting the largest logit changes nothing but keeps exp() from overflowing.
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probs: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_probs
