"""What concerns fused-adam alone: cost of a call and of an array, memory, a busy machine, idling, ISAs."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from benchmarks.measure import Effort, Timing, Worker, timing
from benchmarks.workloads import WORKLOADS, Workload
from fused_adam import Adam, show_config

Array = Any


def _interleaved(steps: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, Timing]:
    counts = {}
    for name, step in steps.items():
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            step()
            count += 1
        counts[name] = count
    results: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                step()
            results[name].append((time.perf_counter() - begin) / counts[name])
    return {name: timing(values) for name, values in results.items()}


def _thousand() -> list[Array]:
    return [np.ones(1, np.float32) for _ in range(1000)]


def call_overhead(effort: Effort) -> dict[str, Timing]:
    """A step of one array of 100; of 1,000 arrays of 1 element in each container."""

    def named(values: Sequence[Array]) -> dict[str, Array]:
        return {f"layer{i}": value for i, value in enumerate(values)}

    def nested(values: Sequence[Array]) -> dict[str, list[Array]]:
        return {f"block{i}": list(values[i : i + 10]) for i in range(0, 1000, 10)}

    steps: dict[str, Callable[[], object]] = {}
    hundred = np.ones(100, np.float32)
    one = Adam(np.ones(100, np.float32))
    steps["1 array of 100"] = lambda: one.step(hundred)
    for name, container in (("list", list), ("dict", named), ("nested", nested)):
        opt, grads = Adam(container(_thousand())), container(_thousand())
        steps[name] = lambda opt=opt, grads=grads: opt.step(grads)  # type: ignore[misc]
    return _interleaved(steps, effort.rounds, effort.seconds)


def gradients_made_anew(effort: Effort) -> dict[str, Timing]:
    """A step of 1,000 arrays of 1 element, with the gradients of the step before or with new ones.

    New ones are made before every step, as backward passes make them, whether it takes them or not.
    """
    opt, kept = Adam(_thousand()), _thousand()
    rounds: dict[str, list[float]] = {"reused": [], "made anew": []}
    made = _thousand()
    for _ in range(effort.rounds):
        for name, medians in rounds.items():
            samples = []
            for _ in range(100):
                made = _thousand()
                grads = kept if name == "reused" else made
                begin = time.perf_counter()
                opt.step(grads)
                samples.append(time.perf_counter() - begin)
            medians.append(statistics.median(samples))
    return {name: timing(medians) for name, medians in rounds.items()}


def allocated_by_steps() -> dict[str, int]:
    """Bytes that 1,000 steps add to the peaks, traced by Python and resident; bytes of the moments."""
    params = [np.ones(1000, np.float32) for _ in range(100)]
    grads = [np.ones(1000, np.float32) for _ in range(100)]
    tracemalloc.start()
    opt = Adam(params)
    for _ in range(10):
        opt.step(grads)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        opt.step(grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "traced_peak": peak - before,
        "resident_peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident),
        "moments": sum(entry[k].nbytes for entry in opt.state.values() for k in ("exp_avg", "exp_avg_sq")),
        "params": sum(param.size for param in params),
    }


def _workload(name: str) -> Workload:
    return next(w for w in WORKLOADS if w.name == name)


@contextmanager
def _busy_core() -> Iterator[None]:
    """One core held by another process."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def busy_machine(peers: Sequence[str], counts: Sequence[int], scale: float) -> list[dict[str, Any]]:
    """Single steps, idle and with one core held by another process, by number of threads."""
    rows = []
    for name, count in (("1 array of 1,000", 20_000), ("1 array of 1,000,000", 10_000)):
        for peer in peers:
            for threads in counts:
                row: dict[str, Any] = {"workload": name, "peer": peer, "threads": threads}
                for state in ("idle", "busy"):
                    worker = Worker(peer, threads)
                    worker.setup(_workload(name), "float32", 0.2)
                    with _busy_core() if state == "busy" else nullcontext():
                        time.sleep(0.3)
                        answer = worker.ask(do="sample", steps=max(1000, int(count * scale)), pause=0)
                    worker.close()
                    if "samples" not in answer:
                        break
                    row[state] = _summary(answer["samples"])
                else:
                    rows.append(row)
    return rows


def _summary(samples: Sequence[float]) -> dict[str, float]:
    summary = {
        "median": statistics.median(samples),
        "mean": statistics.fmean(samples),
        "p99": statistics.quantiles(samples, n=100)[98],
        "max": max(samples),
    }
    if len(samples) >= 10_000:  # ten of them are beyond it
        summary["p99.9"] = statistics.quantiles(samples, n=1000)[998]
    return summary


def idle_cost(peers: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """CPU time of all threads per step, for steps 5 ms apart, by number of threads."""
    rows = []
    for name in ("1 array of 1,000", "1 array of 100,000", "1 array of 1,000,000"):
        for peer in peers:
            row: dict[str, Any] = {"workload": name, "peer": peer}
            for threads in counts:
                worker = Worker(peer, threads)
                worker.setup(_workload(name), "float32", 0.1)
                answer = worker.ask(do="sample", steps=200, pause=0.005)
                worker.close()
                if "cpu_seconds" not in answer:
                    break
                row[f"cpu_{threads}"] = answer["cpu_seconds"]
            else:
                rows.append(row)
    return rows


# What a step meets, and the order to a worker that makes it so.
_STATES: dict[str, dict[str, Any]] = {
    "idle": {"steps": 200, "pause": 0},
    "after a matrix product": {"steps": 20, "pause": 0, "product": True},
    "5 ms apart": {"steps": 20, "pause": 0.005},
    "a core busy": {"steps": 200, "pause": 0},
}


def back_ends(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Single steps and CPU time of the team and of OpenMP, side by side, by workload and state."""
    rows = []
    for name in ("1 array of 100,000", "1 array of 1,000,000"):
        workers = {}
        for back_end in ("team", "openmp"):
            worker = Worker("fused-adam", threads, {"FUSED_ADAM_THREADS": back_end})
            if "unable" not in worker.setup(_workload(name), "float32", 0.1):  # built without OpenMP
                workers[back_end] = worker
        for state, order in _STATES.items():
            samples: dict[str, list[float]] = {back_end: [] for back_end in workers}
            cpu: dict[str, list[float]] = {back_end: [] for back_end in workers}
            with _busy_core() if state == "a core busy" else nullcontext():
                for _ in range(rounds):
                    for back_end, worker in workers.items():
                        time.sleep(0.012)  # the other one's threads spin on for a while
                        answer = worker.ask(do="sample", **order)
                        samples[back_end] += answer["samples"]
                        cpu[back_end].append(answer["cpu_seconds"])
            row: dict[str, Any] = {"workload": name, "state": state, "threads": threads}
            for back_end in workers:
                row[back_end] = {**_summary(samples[back_end]), "cpu": statistics.median(cpu[back_end])}
            rows.append(row)
        for worker in workers.values():
            worker.close()
    return rows


def _median_step(name: str, worker: Worker, effort: Effort) -> float:
    """Median seconds of a step, of a worker that is closed afterwards."""
    seconds = worker.setup(_workload(name), "float32", effort.seconds)["seconds"]
    steps = max(1, round(effort.seconds / seconds))
    rounds = [worker.ask(do="time", steps=steps)["seconds"] for _ in range(effort.rounds)]
    worker.close()
    return statistics.median(rounds)


def scaling(effort: Effort) -> dict[str, dict[int, float]]:
    """Median seconds of a step by number of threads, up to the CPUs that there are."""
    cpus = show_config()["cpus"]
    counts = sorted({min(2**i, cpus) for i in range(10)})
    results: dict[str, dict[int, float]] = {}
    for name in ("1 array of 100,000", "1 array of 1,000,000", "GPT-2 small, 148 arrays, 124 M"):
        results[name] = {}
        for threads in counts:
            results[name][threads] = _median_step(name, Worker("fused-adam", threads), effort)
    return results


def isas(effort: Effort) -> dict[str, dict[str, float]]:
    """Median seconds of a step on one thread, by workload and ISA."""
    results: dict[str, dict[str, float]] = {}
    for name in ("1 array of 1,000", "1 array of 100,000", "1 array of 1,000,000"):
        results[name] = {}
        for isa in show_config()["isas_supported"]:
            worker = Worker("fused-adam", 1, {"FUSED_ADAM_ISA": isa})
            results[name][isa] = _median_step(name, worker, effort)
    return results
