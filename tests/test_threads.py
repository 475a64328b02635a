"""Threads, forked processes, and limits on the number of threads.

No test measures a time. Those that need two threads to meet try again until they did, up to a bound.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, _core, adam_step, show_config
from snapshots import assert_same_bits, assert_same_state, random_like, train

PATIENCE = 30  # seconds, until waiting counts as hanging
LARGE = 2_000_000  # elements: enough for another thread to come while they are updated
PARALLEL = 600_011  # elements: enough for threads that sleep to be woken

# What the machine allows the back end of this run.
MACHINE = _core.Threads(show_config()["threads"], 0)
needs_team = pytest.mark.skipif(MACHINE.back_end != "team", reason="OpenMP is the back end of this run")
needs_openmp = pytest.mark.skipif(not _core.openmp_version(), reason="built without OpenMP")

# --- Two threads, one optimizer ---------------------------------------------------------------------


def meet(*calls: Callable[[], Any]) -> list[int]:
    """Each call in a thread of its own, again and again until one finds another inside.

    How often each of them was taken: all other times it must have got a RuntimeError. No thread waits for
    another between its calls, so that where CPUs are scarce it is in the midst of one when it is interrupted.
    """
    end = time.monotonic() + PATIENCE
    done = threading.Event()

    def repeat(call: Callable[[], Any]) -> int:
        taken = 0
        try:
            while not done.is_set():
                assert time.monotonic() < end, "the threads never met"
                try:
                    call()
                    taken += 1
                except RuntimeError as error:
                    assert "this optimizer is in use: by another thread" in str(error)
                    break
        finally:
            done.set()
        return taken

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(repeat, call) for call in calls]]


def test_second_thread_in_a_step_is_refused() -> None:
    """And the steps that are taken are whole: as many of them in one thread give the same bits."""
    params, grads = np.ones(LARGE, np.float32), random_like(np.empty(LARGE, np.float32), 1)
    opt = Adam(params)
    first, second = meet(lambda: opt.step(grads), lambda: opt.step(grads))
    expected = np.ones(LARGE, np.float32)
    twin = Adam(expected)
    for _ in range(first + second):
        twin.step(grads)
    assert_same_bits(params, expected)
    assert_same_state(opt, twin)


def add_bad_group(opt: Adam) -> None:
    with pytest.raises(ValueError, match="is the same array"):
        opt.add_param_group({"params": opt.param_groups[0]["params"]})


CALLS: dict[str, Callable[[Adam], Any]] = {
    "zero_grad": Adam.zero_grad,
    "state_dict": Adam.state_dict,
    "load_state_dict": lambda opt: opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]}),
    "add_param_group": add_bad_group,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls_are_refused_during_a_step(call: Callable[[Adam], Any]) -> None:
    opt = Adam([{"params": np.ones(LARGE, np.float32)}])
    opt.grads  # noqa: B018  (made now)
    meet(opt.step, lambda: call(opt))
    opt.step()


def test_state_may_be_read_while_a_group_is_added() -> None:
    opt = Adam(np.ones(3))
    done = threading.Event()

    def look() -> int:
        looks = 0
        while not done.is_set():
            looks += sum(entry["step"] == 0 and entry["exp_avg"].size > 0 for entry in opt.state.values())
        return looks

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        try:
            opt.add_param_group({"params": [np.ones(2) for _ in range(20_000)]})
        finally:
            done.set()
    assert looks.result(PATIENCE) > 0


def test_optimizers_of_many_threads() -> None:
    """Each thread with an optimizer of its own, all with the same gradients."""
    empty = [np.empty(PARALLEL, np.float32), np.empty((3, 5)), np.empty(1000)]
    expected = random_like(empty, 1)
    twin = Adam(expected, num_threads=1)
    train(twin, expected, range(5))
    all_grads = [random_like(empty, seed) for seed in range(5)]

    def work() -> Adam:
        opt = Adam(random_like(empty, 1))
        for grads in all_grads:
            opt.step(grads)
        return opt

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work) for _ in range(16)]:
            opt = future.result(PATIENCE)
            assert_same_bits(list(opt.param_groups[0]["params"]), expected)
            assert_same_state(opt, twin)


def test_optimizer_handed_from_thread_to_thread() -> None:
    params, expected = np.ones(PARALLEL), np.ones(PARALLEL)
    opt, twin = Adam(params), Adam(expected)
    for seed in range(4):
        grads = random_like(params, seed)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(opt.step, grads).result(PATIENCE)
        twin.step(grads)
    assert_same_bits(params, expected)


@contextmanager
def counting() -> Iterator[list[int]]:
    """A thread counts whenever it gets the GIL, which nobody gives it but by releasing it."""
    count = [0]
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            count[0] += 1
            time.sleep(1e-5)  # the GIL goes back to who waits for it

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield count
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join(PATIENCE)


@pytest.mark.parametrize("function", ["Adam.step", "adam_step"])
def test_others_run_during_a_step(function: str) -> None:
    arrays = [np.ones(LARGE, np.float32) for _ in range(4)]
    opt = Adam(arrays[0])

    def step() -> None:
        if function == "adam_step":
            adam_step(*arrays, step=1)
        else:
            opt.step(arrays[1])

    with counting() as count:
        for _ in range(300):
            before = count[0]
            step()
            if count[0] > before:
                return
    raise AssertionError("the GIL is held")


# --- fork -------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
TASKS = Path("/proc/self/task")
needs_tasks = pytest.mark.skipif(not TASKS.exists(), reason="only Linux shows its threads")


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(function()), daemon=True)
    with warnings.catch_warnings():
        # Of newer Pythons, that the child of a process with threads may hang: that it does not is the point.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    try:
        assert ours.poll(PATIENCE), "the child hangs"
        result = ours.recv()
        process.join(PATIENCE)
        assert process.exitcode == 0
        return result
    finally:
        process.kill()


@needs_fork
@pytest.mark.parametrize("steps_before", [0, 2], ids=["before-any-step", "after-parallel-steps"])
def test_forked_child_goes_on(steps_before: int) -> None:
    """It has none of its parent's threads, and must not wait for them."""
    params = random_like(np.empty(PARALLEL, np.float32), 1)
    opt = Adam(params, num_threads=2)
    train(opt, params, range(steps_before))

    def child() -> Any:
        train(opt, params, range(10, 13))
        return params, opt.state[0]

    found, state = in_child(child)
    train(opt, params, range(10, 13))  # the parent is as it was: in parallel, with the same bits
    assert_same_bits(found, params)
    assert state.pop("step") == opt.state[0]["step"] == steps_before + 3
    assert_same_bits(list(state.values()), list(opt.state[0].values())[1:])


@needs_fork
@needs_tasks
@needs_team
def test_forked_child_has_threads_of_its_own() -> None:
    params = np.ones(PARALLEL, np.float32)
    Adam(params, num_threads=2).step(params.copy())

    def child() -> list[int]:
        opt, grads = Adam(params, num_threads=2), params.copy()
        counts = [len(list(TASKS.iterdir()))]
        end = time.monotonic() + PATIENCE / 2  # on a busy machine, steps keep to one thread for a while
        while counts[-1] == 1 and time.monotonic() < end:
            opt.step(grads)
            counts.append(len(list(TASKS.iterdir())))
        return [counts[0], counts[-1]]

    assert in_child(child) == [1, 2]


@pytest.mark.slow
@needs_fork
def test_fork_while_another_thread_steps() -> None:
    """The child must not find a lock that nobody will ever open."""
    params, others = np.ones(PARALLEL, np.float32), np.ones(PARALLEL, np.float32)
    grads = params.copy()
    opt, busy = Adam(params, num_threads=2), Adam(others, num_threads=2)
    done = threading.Event()

    def step_on() -> None:
        while not done.is_set():
            busy.step(grads)

    def three_steps() -> bytes:
        for _ in range(3):
            opt.step(grads)
        return params.tobytes()

    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(step_on)
        try:
            found = [in_child(three_steps) for _ in range(10)]
        finally:
            done.set()
        stepping.result(PATIENCE)
    assert found == [three_steps()] * 10


# --- Limits -----------------------------------------------------------------------------------------


@needs_openmp
def test_threadpoolctl_limits() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = MACHINE.most
    with threadpoolctl.threadpool_limits(1):
        assert MACHINE.most == 1
        assert show_config()["num_threads"] == 1
    assert MACHINE.most == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has it")
def test_affinity_limits() -> None:
    cpus = os.sched_getaffinity(0)
    assert 1 <= _core.usable_cpus() <= len(cpus)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        assert _core.usable_cpus() == 1
        assert MACHINE.most == 1
    finally:
        os.sched_setaffinity(0, cpus)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("OMP_NUM_THREADS", "FUSED_ADAM_NUM_THREADS")
    rest = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**rest, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


PRINT = "from fused_adam import show_config as s; print(s()['num_threads'], *s()['environment'].items())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"OMP_NUM_THREADS": "1"}, 1, marks=needs_openmp),
        ({"FUSED_ADAM_NUM_THREADS": "1"}, 1),
        ({"FUSED_ADAM_NUM_THREADS": "3"}, 3),
        ({"FUSED_ADAM_NUM_THREADS": "3", "OMP_NUM_THREADS": "1"}, 3),
        ({"FUSED_ADAM_NUM_THREADS": ""}, MACHINE.most),
    ],
    ids=str,
)
def test_environment_limits(environment: dict[str, str], expected: int) -> None:
    done = run_python(PRINT, **environment)
    assert done.returncode == 0, done.stderr
    number, *shown = done.stdout.split(maxsplit=1)
    assert int(number) == expected
    for name, value in environment.items():
        assert repr((name, value)) in shown[0]


COUNT = """
import os
import numpy as np
from fused_adam import Adam, adam_step

def new_threads(function):
    before = len(os.listdir("/proc/self/task"))
    function()
    return len(os.listdir("/proc/self/task")) - before

size, num_threads = {size}, {num_threads}
arrays = [np.ones(size, np.float32) for _ in range(4)]
opt = Adam(arrays[0], num_threads=num_threads)
one = new_threads(lambda: opt.step(arrays[1]))
print(one, one + new_threads(lambda: adam_step(*arrays, step=1, num_threads=num_threads)))
"""


@needs_tasks
@pytest.mark.parametrize(
    ("size", "num_threads", "environment", "expected"),
    [
        (PARALLEL, 1, {}, 1),
        (PARALLEL, 2, {}, 2),
        (PARALLEL, 3, {"OMP_NUM_THREADS": "1"}, 3),
        pytest.param(PARALLEL, None, {"OMP_NUM_THREADS": "1"}, 1, marks=needs_openmp),
        (PARALLEL, None, {"FUSED_ADAM_NUM_THREADS": "1"}, 1),
        (PARALLEL, None, {"FUSED_ADAM_NUM_THREADS": "2"}, 2),
        (PARALLEL, 1, {"FUSED_ADAM_NUM_THREADS": "2"}, 1),
        (1000, 2, {}, 1),  # not worth it
    ],
    ids=str,
)
def test_step_uses_as_many_threads_as_it_may(
    size: int, num_threads: int | None, environment: dict[str, str], expected: int
) -> None:
    done = run_python(COUNT.format(size=size, num_threads=num_threads), **environment)
    assert done.returncode == 0, done.stderr
    # Either back end keeps those that it started.
    assert [1 + int(number) for number in done.stdout.split()] == [expected, expected]


WAKEUPS = """
import os, threading, time
import numpy as np
from fused_adam import Adam

def switches():
    "How often each helper has gone to sleep."
    counts = {{}}
    for task in os.listdir("/proc/self/task"):
        if task not in others:
            with open(f"/proc/self/task/{{task}}/status") as status:
                counts[task] = next(int(line.split()[1]) for line in status if line.startswith("voluntary"))
    return counts

first = threading.Thread(target=int)  # a sanitizer starts a thread of its own with the first one
first.start()
first.join()
others = os.listdir("/proc/self/task")
params, grads = np.ones({size}, np.float32), np.ones({size}, np.float32)
for _ in range(100):  # on a busy machine, steps keep to one thread for a while
    Adam(params, num_threads=9).step(grads)
    if len(switches()) == 8:
        break
    time.sleep(0.1)
time.sleep(0.1)
before = switches()
opt = Adam(params, num_threads=2)
for _ in range(50):
    opt.step(grads)
    time.sleep(0.001)
after = switches()
print(len(before), sum(after[task] != before[task] for task in before))
"""


@needs_tasks
@needs_team
def test_helpers_that_are_not_needed_sleep_on() -> None:
    """A step of 2 threads wakes one helper, however many some earlier step had."""
    done = run_python(WAKEUPS.format(size=PARALLEL), OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    helpers, woken = map(int, done.stdout.split())
    assert helpers == 8
    assert woken <= 1


def assert_refused(variable: str, value: str, reason: str) -> None:
    done = run_python("import fused_adam", **{variable: value})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: environment variable {variable}")
    assert reason in last


SHOW_THREADS = "from fused_adam import show_config as s; print(s()['threads'], s()['environment'])"


@pytest.mark.parametrize("value", ["", "team", pytest.param("openmp", marks=needs_openmp)])
def test_environment_chooses_the_back_end(value: str) -> None:
    done = run_python(SHOW_THREADS, FUSED_ADAM_THREADS=value)
    assert done.returncode == 0, done.stderr
    back_end, shown = done.stdout.split(maxsplit=1)
    assert back_end == (value or "team")
    assert f"'FUSED_ADAM_THREADS': {value!r}" in shown


@pytest.mark.parametrize("value", ["OpenMP", "omp", "team ", "none", "1"])
def test_unknown_back_end_refused(value: str) -> None:
    assert_refused("FUSED_ADAM_THREADS", value, f"must be 'team' or 'openmp', got {value!r}")


@pytest.mark.skipif(_core.openmp_version() > 0, reason="built with OpenMP")
def test_openmp_refused_without_it() -> None:
    assert_refused("FUSED_ADAM_THREADS", "openmp", "this build has no OpenMP")


SIGNAL = """
import os, signal
import numpy as np
from fused_adam import Adam
Adam(np.ones({size}, np.float32), num_threads=2).step(np.ones({size}, np.float32))
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}})
os.kill(os.getpid(), signal.SIGUSR1)
print(signal.sigtimedwait({{signal.SIGUSR1}}, 10).si_signo == signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are of Unix")
@needs_team
def test_helpers_do_not_take_the_signals_of_the_program() -> None:
    """A signal that the program blocks and waits for would kill it if a helper had it open."""
    # NumPy's BLAS has threads too, with all signals open.
    done = run_python(SIGNAL.format(size=PARALLEL), OPENBLAS_NUM_THREADS="1")
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


BLOCKED = """
import os, signal, time
import numpy as np
from fused_adam import Adam
others = os.listdir("/proc/self/task")
params = np.ones({size}, np.float32)
while not (helpers := set(os.listdir("/proc/self/task")).difference(others)):
    Adam(params, num_threads=2).step(params.copy())
faults = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
helper = helpers.pop()
deadline = time.monotonic() + 10.0
blocked = faults
# The C library blocks every signal in a thread until it has started it; read in that moment, all are blocked.
while all(number in blocked for number in faults) and time.monotonic() < deadline:
    with open(f"/proc/self/task/{{helper}}/status") as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
    blocked = [number for number in range(1, 65) if mask >> (number - 1) & 1]
print(*(int(number in blocked) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)))
print(*(int(number in blocked) for number in faults))
"""


@needs_tasks
@pytest.mark.skipif(show_config()["threads"] != "team", reason="OpenMP is the back end of this run")
def test_a_fault_in_a_helper_is_told() -> None:
    """Blocked, the signal of a fault ends the process before faulthandler can say anything."""
    # NumPy has threads then, and so the one of a sanitizer, which starts with the first, is no new one.
    done = run_python(BLOCKED.format(size=PARALLEL), OPENBLAS_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 1 1", "0 0 0 0"]
