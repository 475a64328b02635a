"""Results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "fused-adam": "#0072b2",
    "torch fused": "#d55e00",
    "DeepSpeed": "#e69f00",
    "Numba loop": "#009e73",
    "optax, jit": "#cc79a7",
    "thinc": "#999933",
    "scikit-learn": "#999999",
    "textbook NumPy": "#555555",
}


def save(results: dict[str, Any], folder: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    paths = []
    kinds = {(row["dtype"], row["threads"]) for row in _best_isa(results)}
    for dtype, threads in sorted(kinds):
        path = folder / f"speed-{dtype}-{threads}.png"
        _speed(results, dtype, threads, path)
        paths.append(path)
    for name, draw in (("busy", _busy), ("isas", _isas), ("threads", _threads)):
        path = folder / f"{name}.png"
        draw(results, path)
        paths.append(path)
    return paths


def _best_isa(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["steps"] if row["isa"] == results["machine"]["isa"]]


def _speed(results: dict[str, Any], dtype: str, threads: int, path: Path) -> None:
    """How many times the time of fused-adam each peer takes, by workload."""
    import matplotlib.pyplot as plt

    rows = [r for r in _best_isa(results) if (r["dtype"], r["threads"]) == (dtype, threads)]
    peers = [p for p in COLOURS if p != "fused-adam" and any(p in row["peers"] for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.85 * len(rows)), layout="constrained")
    height = 0.8 / max(len(peers), 1)
    for i, row in enumerate(rows):
        ours = row["peers"]["fused-adam"]["median"]
        for j, peer in enumerate(peers):
            if peer not in row["peers"]:
                continue
            ratio = row["peers"][peer]["median"] / ours
            y = i - 0.4 + (j + 0.5) * height
            axes.barh(y, ratio, height * 0.9, color=COLOURS[peer], label=peer if i == 0 else None)
            axes.text(ratio * 1.04, y, f"{ratio:.3g}", va="center", fontsize=7)
    axes.axvline(1, color=COLOURS["fused-adam"], linewidth=2)
    axes.set_xscale("log")
    axes.set_xlim(left=0.7)
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), [row["workload"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, fused-adam = 1 (the blue line)")
    axes.set_title(
        f"How many times as long others take ({dtype}, {threads} thread{'s' * (threads > 1)})", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _busy(results: dict[str, Any], path: Path) -> None:
    """p99 of a step, idle and with one core held by another process."""
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(row["workload"] for row in results["busy"]))
    threads = max(row["threads"] for row in results["busy"])
    figure, all_axes = plt.subplots(
        1, len(workloads), figsize=(9, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, workload in zip(all_axes[0], workloads, strict=True):
        rows = [r for r in results["busy"] if r["workload"] == workload and r["threads"] == threads]
        for i, row in enumerate(rows):
            colour = COLOURS[row["peer"]]
            axes.bar(i - 0.2, row["idle"]["median"] * 1e6, 0.38, color=colour, alpha=0.45)
            axes.bar(i + 0.2, row["busy"]["p99"] * 1e6, 0.38, color=colour)
        axes.set_xticks(range(len(rows)), [row["peer"] for row in rows], fontsize=8)
        axes.set_yscale("log")
        axes.set_title(workload, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel("us (pale: idle median, full: p99 when busy)")
    title = f"A step with {threads} thread{'s' * (threads > 1)} while another process holds one of "
    title += f"{results['machine']['cpus']} cores"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _isas(results: dict[str, Any], path: Path) -> None:
    """How many times as fast as the scalar code each ISA is, on one thread."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    names = [name for name in next(iter(results["isas"].values())) if name != "scalar"]
    width = 0.8 / max(len(names), 1)
    for j, name in enumerate(names):
        for i, medians in enumerate(results["isas"].values()):
            ratio = medians["scalar"] / medians[name]
            x = i - 0.4 + (j + 0.5) * width
            colour = list(COLOURS.values())[j]
            axes.bar(x, ratio, width * 0.9, color=colour, label=name if i == 0 else None)
            axes.text(x, ratio, f"{ratio:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(results["isas"])), list(results["isas"]))
    axes.set_ylabel("times as fast as scalar")
    axes.set_title("The same bits by each instruction set (float32, 1 thread)", loc="left")
    _finish(figure, axes, path)


def _threads(results: dict[str, Any], path: Path) -> None:
    """Speed by number of threads, one thread = 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, medians), colour in zip(results["scaling"].items(), COLOURS.values(), strict=False):
        # From a results.json the counts come as text.
        counts = [int(count) for count in medians]
        speeds = [next(iter(medians.values())) / seconds for seconds in medians.values()]
        axes.plot(counts, speeds, marker="o", color=colour, label=name)
    axes.plot(counts, counts, color="#bbbbbb", linestyle="--", zorder=0, label="as many as threads")
    axes.set_xticks(counts)
    axes.set_xlabel("threads")
    axes.set_ylabel("times as fast as 1 thread")
    axes.set_title("Threads (float32)", loc="left")
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
