"""Runs the peers side by side: one process each, rounds interleaved, medians of rounds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.workloads import Workload


class Worker:
    """A peer in a process of its own."""

    def __init__(self, peer: str, threads: int, environment: dict[str, str] | None = None) -> None:
        limits = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(max(threads, 1))}
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **limits, **(environment or {})},
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"unable": "its process died; run python -m benchmarks.worker to see why"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def setup(self, workload: Workload, dtype: str, seconds: float) -> dict[str, Any]:
        return self.ask(do="setup", shapes=workload.shapes, dtype=dtype, seconds=seconds)

    def close(self) -> None:
        self._process.communicate()  # the end of its stdin; no error if it is dead


@dataclass
class Timing:
    """Seconds of a step: median, and quartiles of the rounds."""

    median: float
    low: float
    high: float
    rounds: list[float]


def timing(rounds: Sequence[float]) -> Timing:
    quarters = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else [rounds[0]] * 3
    return Timing(statistics.median(rounds), quarters[0], quarters[2], list(rounds))


@dataclass
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float  # of steps in a round, at least


# From here on the arrays of all peers together do not fit into memory: a worker lives for a round only.
LARGE = 10_000_000


def side_by_side(
    peers: Iterable[str], workload: Workload, dtype: str, threads: int, isa: str, effort: Effort
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by peer, and why the others were left out."""
    workers: dict[str, tuple[Worker, int]] = {}
    rounds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}

    def start(peer: str) -> tuple[Worker, int] | None:
        worker = Worker(peer, threads, {"FUSED_ADAM_ISA": isa})
        answer = worker.setup(workload, dtype, effort.seconds)
        if "unable" in answer:
            left_out[peer] = answer["unable"]
            worker.close()
            return None
        return worker, max(1, round(effort.seconds / answer["seconds"]))

    try:
        for _ in range(effort.rounds):
            for peer in peers:
                if peer in left_out:
                    continue
                if peer not in workers:
                    started = start(peer)
                    if started is None:
                        continue
                    workers[peer] = started
                worker, steps = workers[peer]
                time.sleep(0.012)  # the last peer's threads spin on for up to 10 ms
                answer = worker.ask(do="time", steps=steps)
                if "unable" in answer:
                    left_out[peer] = answer["unable"]
                else:
                    rounds.setdefault(peer, []).append(answer["seconds"])
                if workload.size >= LARGE or peer in left_out:
                    workers.pop(peer)[0].close()
    finally:
        for worker, _ in workers.values():
            worker.close()
    return {peer: timing(values) for peer, values in rounds.items() if peer not in left_out}, left_out


def known_peers(names: Sequence[str] | None) -> list[str]:
    """In the order of PEERS; fused-adam always."""
    return [peer for peer in PEERS if names is None or peer in names or peer == "fused-adam"]
