"""Results as text: tables in Markdown."""

from __future__ import annotations

from typing import Any


def seconds_text(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            value = seconds * factor
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    raise AssertionError


def machine_text(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['cpu']}, {machine['cores']} CPUs, {machine['isa']}, load {machine['load']:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_tables(results: dict[str, Any]) -> str:
    """For each ISA, dtype and number of threads a table: workloads by peers, medians."""
    parts = []
    kinds = dict.fromkeys((row["isa"], row["dtype"], row["threads"]) for row in results["steps"])
    for isa, dtype, threads in kinds:
        rows = [r for r in results["steps"] if (r["isa"], r["dtype"], r["threads"]) == (isa, dtype, threads)]
        peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
        body = []
        for row in rows:
            cells = [row["peers"].get(peer) for peer in peers]
            body.append([row["workload"], *(seconds_text(c["median"]) if c else "-" for c in cells)])
        title = f"**{dtype}, {threads} thread{'s' * (threads > 1)}, {isa}**, median of a step"
        parts.append(title + "\n\n" + table(["workload", *peers], body))
    return "\n\n".join(parts)


def busy_table(results: dict[str, Any]) -> str:
    columns = [("idle", "median"), ("idle", "p99")]
    columns += [("busy", k) for k in ("median", "p99", "p99.9", "max")]
    columns = [(s, k) for s, k in columns if any(k in row[s] for row in results["busy"])]
    body = []
    for row in results["busy"]:
        figures = [seconds_text(row[s][k]) if k in row[s] else "-" for s, k in columns]
        body.append([row["workload"], row["peer"], str(row["threads"]), *figures])
    header = ["workload", "peer", "threads", *(f"{s} {k}" for s, k in columns)]
    return "**With one core held by another process**\n\n" + table(header, body)


def idle_table(results: dict[str, Any]) -> str:
    keys = list(dict.fromkeys(key for row in results["idle"] for key in row if key.startswith("cpu_")))
    body = [[row["workload"], row["peer"], *(seconds_text(row[k]) for k in keys)] for row in results["idle"]]
    header = ["workload", "peer", *(f"{k[4:]} thread{'s' * (k != 'cpu_1')}" for k in keys)]
    return "**CPU time of a step, steps 5 ms apart**\n\n" + table(header, body)


def back_end_table(results: dict[str, Any]) -> str:
    rows = results["back_ends"]
    names = [name for name in ("team", "openmp") if name in rows[0]]
    figures = ("median", "mean", "p99", "cpu")
    body = [
        [row["workload"], row["state"], *(seconds_text(row[n][f]) for n in names for f in figures)]
        for row in rows
    ]
    header = ["workload", "steps", *(f"{n} {f}".replace("cpu", "CPU") for n in names for f in figures)]
    return "**Team and OpenMP**, single steps, and CPU time of all threads for each\n\n" + table(header, body)


def isa_table(results: dict[str, Any]) -> str:
    names = list(next(iter(results["isas"].values())))
    body = [[w, *(seconds_text(by_isa[n]) for n in names)] for w, by_isa in results["isas"].items()]
    return "**Instruction sets, 1 thread, float32**\n\n" + table(["workload", *names], body)


def scaling_table(results: dict[str, Any]) -> str:
    counts = list(next(iter(results["scaling"].values())))
    body = []
    for workload, by_count in results["scaling"].items():
        one = by_count[counts[0]]
        body.append([workload, *(f"{seconds_text(by_count[n])}, {one / by_count[n]:.2f} x" for n in counts)])
    return "**Threads, float32**\n\n" + table(["workload", *map(str, counts)], body)


def call_table(results: dict[str, Any]) -> str:
    body = [[name, seconds_text(timing["median"])] for name, timing in results["calls"].items()]
    title = "**Cost of a call**: one array of 100; 1,000 arrays of 1 element in each container"
    return title + "\n\n" + table(["arrays", "median"], body)


def gradient_table(results: dict[str, Any]) -> str:
    body = [[name, seconds_text(timing["median"])] for name, timing in results["gradients"].items()]
    return "**Gradients**, a step of 1,000 arrays of 1 element\n\n" + table(["gradients", "median"], body)


def all_tables(results: dict[str, Any]) -> str:
    tables = (step_tables, call_table, gradient_table, scaling_table, busy_table, idle_table)
    tables += (back_end_table, isa_table)
    return "\n\n".join([machine_text(results), *(make(results) for make in tables)])
