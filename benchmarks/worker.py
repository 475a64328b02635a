"""One peer in a process of its own: reads orders from stdin, a JSON object a line, and answers on stdout."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np

from benchmarks.peers import PEERS

_MATRIX = np.ones((256, 256), np.float32)


def main() -> None:
    peer, threads = PEERS[sys.argv[1]], int(sys.argv[2])
    if threads == 1 and sys.platform == "linux":  # XLA takes all CPUs that the process may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # Libraries print what they like; answers go to the real stdout only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if order["do"] == "setup":
                step = None  # frees the last workload first
                step = peer(order["shapes"], order["dtype"], threads)
                answer["seconds"] = _warm_up(step, order["seconds"])
            elif order["do"] == "time":
                assert step is not None
                begin = time.perf_counter()
                for _ in range(order["steps"]):
                    step()
                answer["seconds"] = (time.perf_counter() - begin) / order["steps"]
            elif order["do"] == "sample":
                assert step is not None
                before = _product if order.get("product") else lambda: None
                answer["samples"], answer["cpu_seconds"] = _sample(
                    step, order["steps"], order["pause"], before
                )
        except (ImportError, NotImplementedError) as error:
            answer["unable"] = str(error)
        except Exception as error:
            answer["unable"] = repr(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _warm_up(step: Any, seconds: float) -> float:
    """Seconds of a step, once compilers have compiled and pages are in place."""
    for _ in range(3):
        step()
    steps, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or steps == 0:
        step()
        steps += 1
    return elapsed / steps if steps > 1 else time.perf_counter() - begin


def _product() -> None:
    """A matrix product of NumPy, which leaves threads of its BLAS behind, spinning."""
    _MATRIX @ _MATRIX


def _sample(step: Any, steps: int, pause: float, before: Any) -> tuple[list[float], float]:
    """Seconds of every single step, and the CPU time of all threads meanwhile, per step."""
    samples = []
    start = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        before()
        begin = time.perf_counter()
        step()
        samples.append(time.perf_counter() - begin)
        if pause:
            time.sleep(pause)
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    return samples, cpu / steps


if __name__ == "__main__":
    main()
