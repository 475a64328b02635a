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
        # XLA and BLAS take what the process may use: one thread means one CPU.
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(threads)]
        self.peer, self.threads = peer, threads
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
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.peer} died; run python -m benchmarks.worker to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def setup(self, workload: Workload, dtype: str, seconds: float) -> dict[str, Any]:
        return self.ask(do="setup", shapes=workload.shapes, dtype=dtype, seconds=seconds)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


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
    peers: Iterable[str], workload: Workload, dtype: str, threads: int, effort: Effort
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by peer, and why the others were left out."""
    workers: dict[str, tuple[Worker, int]] = {}
    rounds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}

    def start(peer: str) -> tuple[Worker, int] | None:
        worker = Worker(peer, threads)
        answer = worker.setup(workload, dtype, effort.seconds)
        reason = answer.get("missing") or answer.get("unable")
        if reason:
            left_out[peer] = reason
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
                rounds.setdefault(peer, []).append(worker.ask(do="time", steps=steps)["seconds"])
                if workload.size >= LARGE:
                    workers.pop(peer)[0].close()
    finally:
        for worker, _ in workers.values():
            worker.close()
    return {peer: timing(values) for peer, values in rounds.items()}, left_out


def known_peers(names: Sequence[str] | None) -> list[str]:
    return [peer for peer in PEERS if names is None or peer in names]
