"""python -m benchmarks.run: measure everything, print tables and targets, write JSON and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import own, plots, report, targets
from benchmarks.measure import LARGE, Effort, known_peers, side_by_side
from benchmarks.peers import ON_AVX2, PEERS
from benchmarks.workloads import WORKLOADS
from fused_adam import show_config

# Quick runs leave out the peers that nobody would take for fast, and those that compile for a minute.
QUICK_PEERS = ("fused-adam", "torch fused", "Numba loop", "textbook NumPy", "limit", "divider")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer peers and rounds: under 3 minutes")
    parser.add_argument(
        "--peers", nargs="+", choices=list(PEERS), metavar="PEER", help="fused-adam and these only"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    peers = known_peers(arguments.peers or (QUICK_PEERS if quick else None))

    results: dict[str, Any] = {"machine": machine(), "steps": [], "left_out": {}}
    cpus = show_config()["cpus"]
    counts = sorted({1, min(2, cpus)} if quick else {1, min(2, cpus), cpus})
    dtypes = ("float32",) if quick else ("float32", "float64")
    best = show_config()["isa"]
    # Where the CPU has more than AVX2, a full run measures those who can be kept to it once more.
    kinds = [(best, dtype, count) for dtype in dtypes for count in reversed(counts)]
    if best == "avx512" and not quick:
        kinds += [("avx2", dtype, count) for _, dtype, count in kinds]
    for isa, dtype, threads in kinds:
        measured = [peer for peer in peers if isa == best or peer in ON_AVX2]
        for workload in WORKLOADS:
            large = workload.size >= LARGE
            if large and (isa != best or (quick and threads < counts[-1])):
                continue
            effort = Effort(
                (3 if quick else 5) if large else 5 if quick else 9, 0.02 if quick and not large else 0.05
            )
            timings, left_out = side_by_side(measured, workload, dtype, threads, isa, effort)
            results["left_out"].update(left_out)
            results["steps"].append(
                {
                    "workload": workload.name,
                    "dtype": dtype,
                    "threads": threads,
                    "isa": isa,
                    "peers": {peer: asdict(timing) for peer, timing in timings.items()},
                }
            )
            medians = ", ".join(f"{p} {report.seconds_text(t.median)}" for p, t in timings.items())
            print(f"{workload.name}, {dtype}, {threads}, {isa}: {medians}", file=sys.stderr, flush=True)

    effort = Effort(5 if quick else 15, 0.02)
    results["calls"] = {name: asdict(timing) for name, timing in own.call_overhead(effort).items()}
    results["gradients"] = {name: asdict(timing) for name, timing in own.gradients_made_anew(effort).items()}
    results["memory"] = own.allocated_by_steps()
    rivals = ("fused-adam",) if quick else ("fused-adam", "torch fused", "Numba loop")
    present = [peer for peer in rivals if peer in peers and peer not in results["left_out"]]
    results["busy"] = own.busy_machine(present, counts, 0.3 if quick else 1)
    results["idle"] = own.idle_cost(present, counts)
    results["back_ends"] = own.back_ends(min(2, cpus) if quick else cpus, 5 if quick else 15)
    results["isas"] = own.isas(effort)
    results["scaling"] = own.scaling(effort)

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(report.all_tables(results))
    for peer, reason in results["left_out"].items():
        print(f"\nleft out: {peer}: {reason}")
    try:
        print("\nplots:", ", ".join(map(str, plots.save(results, arguments.output))))
    except ImportError as error:
        print(f"\nno plots: {error}")
    print(f"\nTargets on {report.machine_text(results)}")
    for target in targets.judge(results):
        print(target)


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "model name" in about:  # virtual machines may have no more of a name than "AMD EPYC"
            cpu = f"{about['model name']} (family {about['cpu family']}, model {about['model']})"
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], **show_config()}


if __name__ == "__main__":
    main()
