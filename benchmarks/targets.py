"""The targets, and which of them hold. Each is a line: what, the figure wanted, the figure measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.peers import LIMITS

US = "1 array of 1,000"
K10 = "1 array of 10,000"
MLP = "MLP, 6 arrays, 26,122"
MANY = "1,000 arrays of 64"
LORA = "LoRA, 96 arrays, 589,824"
K100 = "1 array of 100,000"
M1 = "1 array of 1,000,000"
GPT2 = "GPT-2 small, 148 arrays, 124 M"

# How many times faster than PyTorch's fused Adam, and with how many threads that is measured.
OVER_TORCH = {US: (25, 2), MLP: (6, 2), MANY: (80, 2), LORA: (4, 1), K100: (5, 2), M1: (2.2, 2), GPT2: (1, 2)}
# The shares of the speeds of limit.cpp.
OF_LIMIT = {K100: 0.70, M1: 0.70, GPT2: 0.95}
OF_DIVIDER = {K10: 0.90, K100: 0.90}
# Two equal programs differ by this much between runs: "not slower" means not slower by more.
NOISE = 0.03
WITHIN = f", within {NOISE:.0%}".replace("%", " %")


@dataclass
class Target:
    what: str
    wanted: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'MISSED'}  {self.what}: {self.measured} (wanted {self.wanted})"


def judge(results: dict[str, Any]) -> list[Target]:
    targets: list[Target] = []
    steps: dict[tuple[str, str, int, str], dict[str, float]] = {
        (row["workload"], row["dtype"], row["threads"], row["isa"]): {
            peer: timing["median"] for peer, timing in row["peers"].items()
        }
        for row in results["steps"]
    }
    for (workload, dtype, threads, isa), medians in steps.items():
        if "fused-adam" not in medians:
            continue
        at = f"{workload}, {dtype}, {threads} thread{'s' * (threads > 1)}, {isa}"
        ours = medians["fused-adam"]
        others = {p: t for p, t in medians.items() if p not in ("fused-adam", *LIMITS)}
        if others:
            peer, best = min(others.items(), key=lambda item: item[1])
            ratio = best / ours
            targets.append(
                Target(
                    f"not slower than any peer, {at}",
                    f">= 1{WITHIN}",
                    f"{ratio:.2f} x {peer}",
                    ratio >= 1 - NOISE,
                )
            )
        factor, factor_threads = OVER_TORCH.get(workload, (0, 0))
        if threads == factor_threads and "torch fused" in medians:
            ratio = medians["torch fused"] / ours
            slack, within = (NOISE, WITHIN) if factor == 1 else (0, "")
            targets.append(
                Target(
                    f"against torch fused, {at}",
                    f">= {factor} x{within}",
                    f"{ratio:.1f} x",
                    ratio >= factor - slack,
                )
            )
        if workload in OF_LIMIT and "limit" in medians and dtype == "float32":
            share, wanted = medians["limit"] / ours, OF_LIMIT[workload]
            targets.append(Target(f"of the limit, {at}", f">= {wanted}", f"{share:.2f}", share >= wanted))
        if workload in OF_DIVIDER and "divider" in medians:
            share, wanted = medians["divider"] / ours, OF_DIVIDER[workload]
            targets.append(Target(f"of the divider, {at}", f">= {wanted}", f"{share:.2f}", share >= wanted))

    calls = {name: timing["median"] for name, timing in results["calls"].items()}
    small = calls["1 array of 100"]
    targets.append(Target("one array of 100", "<= 1.5 us", f"{small * 1e6:.2f} us", small <= 1.5e-6))
    for container in ("list", "dict", "nested"):
        each = (calls[container] - small) / 1000
        targets.append(
            Target(f"an extra array, {container}", "<= 50 ns", f"{each * 1e9:.0f} ns", each <= 50e-9)
        )
    gradients = results["gradients"]
    ratio = gradients["made anew"]["median"] / gradients["reused"]["median"]
    targets.append(
        Target(
            "gradients made anew, against reused ones", f"<= 1{WITHIN}", f"{ratio:.2f}", ratio <= 1 + NOISE
        )
    )

    memory = results["memory"]
    traced = memory["traced_peak"]
    targets.append(
        Target(
            "allocated by 1,000 steps at any time", "< 1,024 bytes, of one call", f"{traced}", traced < 1024
        )
    )
    resident = memory["resident_peak"] // 1024
    targets.append(
        Target("peak of resident memory grown by 1,000 steps", "<= 64 KiB", f"{resident} KiB", resident <= 64)
    )
    per_param = memory["moments"] / memory["params"]
    targets.append(Target("state per float32 parameter", "8 bytes", f"{per_param:g} bytes", per_param == 8))

    fused = [row for row in results["busy"] if row["peer"] == "fused-adam"]
    idle = {(row["workload"], row["threads"]): row["idle"]["median"] for row in fused}
    for row in fused:
        workload, threads = row["workload"], row["threads"]
        base = threads if workload == US else 1
        if threads == 1 or (workload, base) not in idle:
            continue
        ratio = row["busy"]["p99"] / idle[workload, base]
        targets.append(
            Target(
                f"p99 with a core busy, {workload}, {threads} threads",
                f"<= 3 idle medians of {base} thread{'s' * (base > 1)}",
                f"{ratio:.1f}",
                ratio <= 3,
            )
        )
    for row in results["idle"]:
        if row["peer"] != "fused-adam":
            continue
        for threads in (int(key[4:]) for key in row if key.startswith("cpu_") and key != "cpu_1"):
            burnt = row[f"cpu_{threads}"] - row["cpu_1"]
            targets.append(
                Target(
                    f"CPU burnt by {threads} waiting threads, steps 5 ms apart, {row['workload']}",
                    "<= 0.25 ms a step",
                    f"{burnt * 1e3:.2f} ms",
                    burnt <= 0.25e-3,
                )
            )
    return targets
