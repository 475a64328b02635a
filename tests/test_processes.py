"""Processes: forked, spawned, on their way out, and kept short of threads and CPUs.

What happens to an optimizer in one forked child stands in test_threads.py; here are the ways in which
servers and clusters use processes. No test measures a time; where something waits, it is killed in the end.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, _core, show_config
from snapshots import assert_same_bits, map_tree, random_like

pytestmark = pytest.mark.slow

PATIENCE = 30  # seconds, until waiting counts as hanging
PARALLEL = 600_011  # elements: enough for threads that sleep to be woken
LARGE = 2_000_000  # elements: enough for another thread to come while they are updated

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
TASKS = Path("/proc/self/task")
needs_tasks = pytest.mark.skipif(not TASKS.exists(), reason="only Linux shows its threads")
MACHINE = _core.Threads(show_config()["threads"], 0)  # what it allows the back end of this run
needs_team = pytest.mark.skipif(MACHINE.back_end != "team", reason="OpenMP is the back end of this run")
needs_openmp = pytest.mark.skipif(not _core.openmp_version(), reason="built without OpenMP")


IMPORTED_BY = os.getpid()


class Child:
    """A forked process that runs a function; killed where it does not come back with a result."""

    def __init__(self, function: Callable[[], Any], patience: float = PATIENCE) -> None:
        self._deadline = time.monotonic() + patience
        self._from_child, to_parent = os.pipe()
        with warnings.catch_warnings():
            # Newer Pythons warn that the child of a process with threads may hang: what is tested here.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                with open(to_parent, "wb") as file:
                    pickle.dump(function(), file)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(to_parent)

    def result(self) -> Any:
        received = b""
        try:
            while True:
                wait = max(0, self._deadline - time.monotonic())
                assert select.select([self._from_child], [], [], wait)[0], "the child hangs"
                part = os.read(self._from_child, 1 << 20)
                if not part:
                    break
                received += part
        except BaseException:
            os.kill(self._pid, signal.SIGKILL)
            raise
        finally:
            os.close(self._from_child)
            status = os.waitpid(self._pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0
        return pickle.loads(received)


def start_helpers() -> None:
    """Step until a step had a new helper: where CPUs are scarce, steps keep to one thread for a while.

    In a forked child, OpenMP has none: there, make sure of it.
    """
    params, grads = np.ones(PARALLEL, np.float32), np.ones(PARALLEL, np.float32)
    before, end = len(os.listdir(TASKS)), time.monotonic() + PATIENCE / 3
    opt = Adam(params, num_threads=before + 1)  # one more than there can be
    if MACHINE.back_end == "openmp" and os.getpid() != IMPORTED_BY:
        opt.step(grads)
        assert len(os.listdir(TASKS)) == before
        return
    while len(os.listdir(TASKS)) == before:
        assert time.monotonic() < end, "no step had a helper"
        opt.step(grads)


class Model:
    """Arrays in training, one of them large enough for threads."""

    EMPTY = (np.empty(PARALLEL, np.float32), np.empty((3, 5)), np.empty(1000))

    def __init__(self, num_threads: int) -> None:
        self.params = map_tree(np.copy, self.grads(1))
        self.opt = Adam(self.params, num_threads=num_threads)

    @classmethod
    @functools.lru_cache(None)  # drawing takes longer than stepping, above all where many wait for a CPU
    def grads(cls, seed: int) -> Any:
        return random_like(cls.EMPTY, seed)

    def trained(self, *seeds: int) -> Any:
        for seed in seeds:
            self.opt.step(self.grads(seed))
        return [self.params, [list(entry.values()) for entry in self.opt.state.values()]]


def assert_same(found: Any, expected: Any) -> None:
    """Parameters, moments and step counts."""
    params, state = found
    assert_same_bits(params, expected[0])
    assert [entry[0] for entry in state] == [entry[0] for entry in expected[1]]
    assert_same_bits([entry[1:] for entry in state], [entry[1:] for entry in expected[1]])


# --- fork -------------------------------------------------------------------------------------------


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test in a child, whose team is new: that of all tests may have all helpers that it can have."""
    if MACHINE.back_end == "openmp":
        return test  # a child has no helpers

    @functools.wraps(test)
    def run() -> None:
        Child(test, 2 * PATIENCE).result()

    return run


@needs_fork
@needs_tasks
@alone
def test_prefork_server() -> None:
    """As gunicorn does: the parent loads and warms up, forks its workers, goes on, and forks another."""
    model, twin = Model(num_threads=2), Model(num_threads=1)
    model.trained(1, 2)
    twin.trained(1, 2)
    before = Model(num_threads=2)  # untouched until there are workers
    start_helpers()

    def work() -> Any:
        start_helpers()  # of its own
        return model.trained(3, 4, 5), before.trained(6)

    workers = [Child(work) for _ in range(4)]
    expected = twin.trained(3, 4, 5), Model(num_threads=1).trained(6)
    for worker in workers:
        for found, right in zip(worker.result(), expected, strict=True):
            assert_same(found, right)
    assert_same(model.trained(3, 4, 5), expected[0])
    late = Child(lambda: model.trained(7))
    right = twin.trained(7)
    assert_same(late.result(), right)
    assert_same(model.trained(7), right)


@needs_fork
@needs_tasks
@alone
def test_grandchild() -> None:
    """Each generation has helpers of its own when it forks the next one, and goes on afterwards."""
    model = Model(num_threads=2)

    def generation(level: int) -> list[Any]:
        start_helpers()
        model.trained(level)
        below = Child(lambda: generation(level + 1), PATIENCE / (level + 2)).result() if level < 3 else []
        return [model.trained(10), *below]

    # What a generation has trained before it forks, the next one inherits; what it trains later, not.
    found = generation(1)
    for level, result in enumerate(found, 1):
        twin = Model(num_threads=1)
        twin.trained(*range(1, level + 1))
        assert_same(result, twin.trained(10))
    assert len(found) == 3


@needs_fork
def test_fork_during_a_step_of_the_same_optimizer() -> None:
    """The child finds it half updated and in use for ever: it is told so, at once, and starts anew."""
    params, grads = np.ones(LARGE, np.float32), np.ones(LARGE, np.float32)
    opt = Adam(params, num_threads=2)
    # Its helpers are started now: the runtime of a sanitizer has locks of its own, which a fork in the middle
    # of pthread_create leaves locked in the child (once in 12 runs).
    opt.step(grads)
    done = threading.Event()
    expected = Model(num_threads=1).trained(1, 2)

    def step_on() -> int:
        steps = 1
        while not done.is_set():
            opt.step(grads)
            steps += 1
        return steps

    def child() -> tuple[list[str], Any]:
        outcomes = []
        calls: list[Callable[[], Any]] = [lambda: opt.step(grads), opt.state_dict, lambda: opt.step(grads)]
        for call in calls:
            try:
                call()
                outcomes.append("done")
            except RuntimeError as error:
                outcomes.append(str(error))
        Adam(params, num_threads=2).step(grads)  # a new one may take over the arrays
        return outcomes, Model(num_threads=2).trained(1, 2)

    refused = 0
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(step_on)
        try:
            for _ in range(200):
                outcomes, found = Child(child).result()
                assert_same(found, expected)
                assert len(set(outcomes)) == 1, "once refused, always refused"
                if outcomes[0] != "done":
                    assert "by a thread that was inside a step when this process was forked" in outcomes[0]
                    refused += 1
                if refused == 3:
                    break
        finally:
            done.set()
        steps = stepping.result(PATIENCE)
    assert refused == 3, "no fork met a step"
    twin_params = np.ones(LARGE, np.float32)
    twin = Adam(twin_params, num_threads=1)
    for _ in range(steps):
        twin.step(grads)
    assert_same_bits(params, twin_params)  # the parent's optimizer did not notice


@needs_fork
def test_sixteen_threads_and_one_that_forks() -> None:
    """Whatever the others were doing when the child was made, it trains as they do."""
    expected = Model(num_threads=1).trained(1, 2)
    initial, grads = Model(num_threads=1).params, Model.grads(2)
    models = [Model(num_threads=2) for _ in range(16)]
    all_step = threading.Barrier(len(models) + 1, timeout=PATIENCE)
    done = threading.Event()

    def step_on(model: Model) -> int:
        model.opt.step(grads)
        all_step.wait()
        steps = 1
        while not done.is_set():
            model.opt.step(grads)
            steps += 1
        return steps

    with ThreadPoolExecutor(16) as pool:
        stepping = [pool.submit(step_on, model) for model in models]
        try:
            all_step.wait()
            children = [Child(lambda: Model(num_threads=2).trained(1, 2)) for _ in range(6)]
        finally:
            done.set()
        steps = [future.result(PATIENCE) for future in stepping]
    for child in children:
        assert_same(child.result(), expected)
    twin, taken = Adam(initial, num_threads=1), 0
    for count, model in sorted(zip(steps, models, strict=True), key=lambda pair: pair[0]):
        for _ in range(count - taken):
            twin.step(grads)
        taken = count
        assert_same_bits(model.params, initial)


# --- Programs of their own --------------------------------------------------------------------------

PRELUDE = """
import hashlib, os, sys, threading, time
import numpy as np
from fused_adam import Adam, _core, show_config

def threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0

def make(num_threads=None):
    return Adam(np.random.default_rng(0).standard_normal(600_011).astype(np.float32), num_threads=num_threads)

def make_grads(seed, steps):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(600_011).astype(np.float32) for _ in range(steps)]

def digest(opt):
    state = opt.state[0]
    arrays = [*opt.param_groups[0]["params"], state["exp_avg"], state["exp_avg_sq"]]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

def go_on(opt, steps=3):
    for grads in make_grads(opt.state[0]["step"], steps):
        opt.step(grads)
    return digest(opt)
"""


def run_script(
    path: Path, code: str, *arguments: str, stdin: str = "", command: Sequence[str] = (), **environment: str
) -> str:
    """What a program prints. It, and whatever it started, is killed where it hangs."""
    path.write_text(code)
    ours = ("OMP_NUM_THREADS", "FUSED_ADAM_NUM_THREADS")
    rest = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.Popen(
        [*command, sys.executable, "-W", "ignore::DeprecationWarning", str(path), *arguments],
        env={**rest, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(stdin, timeout=PATIENCE)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                getattr(os, "killpg", os.kill)(process.pid, 9)
            process.wait()
    assert (process.returncode, errors) == (0, ""), output
    return output


MULTIPROCESSING = (
    PRELUDE
    + """
import multiprocessing

def anew(_):
    return go_on(make(2), 6)

if __name__ == "__main__":
    opt, twin = make(2), make(1)
    assert go_on(opt) == go_on(twin)  # in parallel, before any process is made
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        sent = pool.apply_async(go_on, (opt,))  # the optimizer is pickled
        found = pool.map_async(anew, range(2), 1)
        sent, found = sent.get(20), found.get(20)
    assert sent == go_on(opt) == go_on(twin)
    assert found == [go_on(make(1), 6)] * 2
    print("same bits")
"""
)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    if method != "spawn" and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    assert run_script(tmp_path / "program.py", MULTIPROCESSING, method) == "same bits\n"


# Ten processes that end in the same way, and the one that forked them. They are forked before the first
# step, so that each is as if it had been started by itself. (With OpenMP, only the last one has helpers.)
ENDS = (
    PRELUDE
    + """
import atexit, signal

def step_on():
    opt, grads = make_opt(), np.ones(size, np.float32)
    while True:
        opt.step(grads)
        started.set()

def make_opt():
    return Adam(np.ones(size, np.float32), num_threads=2)

def busy_thread(daemon):
    threading.Thread(target=step_on, daemon=daemon).start()
    assert started.wait(20)

how, size = sys.argv[1], int(sys.argv[2])
started = threading.Event()
children = []
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        children = None
        break
    children.append(pid)
else:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(codes, flush=True)

if how == "daemon":
    busy_thread(daemon=True)
elif how == "daemon, in code of the caller":
    class Rate:
        def __float__(self):
            started.set()
            while True:
                time.sleep(0.001)

    def step_for_ever():
        opt = make_opt()
        opt.param_groups[0]["lr"] = Rate()
        opt.step(np.ones(size, np.float32))

    threading.Thread(target=step_for_ever, daemon=True).start()
    assert started.wait(20)
elif how == "daemon, sys.exit in the middle":
    busy_thread(daemon=True)
    time.sleep(0.003)
    sys.exit(0)
elif how == "daemon, os._exit":
    busy_thread(daemon=True)
    os._exit(0)
elif how == "asleep":
    opt = make_opt()
    opt.step(np.ones(size, np.float32))
    time.sleep(0.02)
    sys.exit(0)
elif how == "awake":
    opt = make_opt()
    opt.step(np.ones(size, np.float32))
    sys.exit(0)
elif how == "os._exit":
    make_opt().step(np.ones(size, np.float32))
    os._exit(0)
elif how == "atexit":
    atexit.register(lambda opt: opt.step(np.ones(size, np.float32)), make_opt())
elif how == "unfinished thread":
    threading.Thread(target=lambda: [make_opt().step(np.ones(size, np.float32)) for _ in range(5)]).start()
else:
    raise AssertionError(how)
"""
)


@needs_fork
@pytest.mark.parametrize(
    ("how", "size"),
    [
        ("daemon", 1000),
        ("daemon", LARGE),
        ("daemon, sys.exit in the middle", LARGE),
        ("daemon, os._exit", LARGE),
        ("asleep", LARGE),
        ("awake", LARGE),
        ("os._exit", LARGE),
        ("atexit", LARGE),
        ("unfinished thread", LARGE),
    ],
)
def test_process_ends_in_peace(how: str, size: int, tmp_path: Path) -> None:
    """Helpers sleep, look out for work, or are in the middle of it: no crash, no message, exit code 0."""
    # Without threads of BLAS: only ours could be in the way.
    output = run_script(tmp_path / "program.py", ENDS, how, str(size), OPENBLAS_NUM_THREADS="1")
    assert output == f"{[0] * 10}\n"


@needs_fork
def test_thread_that_is_unwound_inside_a_step(tmp_path: Path) -> None:
    """Python before 3.14 ends it where it asks for the GIL: in code of the caller, through frames of ours."""
    how = "daemon, in code of the caller"
    output = run_script(tmp_path / "program.py", ENDS, how, "1000", OPENBLAS_NUM_THREADS="1")
    assert output == f"{[0] * 10}\n"


# --- No thread to be had ----------------------------------------------------------------------------

NO_THREADS = (
    PRELUDE
    + """
import resource

def thread_is_refused():
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        return True
    return False

what, stacks = sys.argv[1], float(sys.argv[2])
grads = make_grads(0, 3)
expected = go_on(make(1))
opt = make(4)
before = threads()
if what == "RLIMIT_AS":
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = 2 << 20 if stack == resource.RLIM_INFINITY else stack
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    low = size + int(stacks * stack)
else:
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)  # root has no such limit
    low = 1  # this process is one already
limit = getattr(resource, what)
soft, hard = resource.getrlimit(limit)
resource.setrlimit(limit, (low, hard))
for entry in grads:
    opt.step(entry)
found = threads() - before, thread_is_refused()
resource.setrlimit(limit, (soft, hard))
print(*found, digest(opt) == expected)
end = time.monotonic() + 20
while threads() < before + 3 and time.monotonic() < end:
    opt.step(grads[0])
print(threads() - before)
"""
)


@needs_tasks
@needs_team
@pytest.mark.parametrize(
    ("limit", "stacks", "helpers"), [("RLIMIT_AS", 0.5, 0), ("RLIMIT_AS", 1.5, 1), ("RLIMIT_NPROC", 0, 0)]
)
def test_no_thread_to_be_had(limit: str, stacks: float, helpers: int, tmp_path: Path) -> None:
    """As with the pids limit of a container: the step goes on with those it has, and asks again later.

    OpenMP ends the process here.
    """
    output = run_script(tmp_path / "program.py", NO_THREADS, limit, str(stacks), OPENBLAS_NUM_THREADS="1")
    under_limit, afterwards = output.splitlines()
    assert under_limit == f"{helpers} True True"
    assert afterwards == "3"


# --- Fewer CPUs -------------------------------------------------------------------------------------

ONE_CPU = (
    PRELUDE
    + """
cpus = os.sched_getaffinity(0)
expected = go_on(make(1), 50)
before = threads()
os.sched_setaffinity(0, {min(cpus)})
assert go_on(make(), 50) == expected
print(threads() - before)
assert go_on(make(3), 50) == expected  # three threads that take turns on one CPU
print(threads() - before)
os.sched_setaffinity(0, cpus)
print(_core.usable_cpus() == len(cpus))
"""
)


@needs_tasks
def test_pinned_to_one_cpu(tmp_path: Path) -> None:
    """Alone by default; with more threads if told so, and they do not wait for each other for ever."""
    output = run_script(tmp_path / "program.py", ONE_CPU, OPENBLAS_NUM_THREADS="1")
    assert output.split() == ["0", "2", "True"]


CPUS = (
    PRELUDE
    + """
opt, before = make(), threads()
opt.step(make_grads(0, 1)[0])
print(show_config()["num_threads"], threads() - before)
"""
)


@needs_openmp
@needs_tasks
@pytest.mark.parametrize(
    ("variables", "limit"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "64"}, None),  # no more than there are CPUs
        ({"OMP_NUM_THREADS": "1,8"}, 1),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "true"}, 1),
        ({"OMP_NUM_THREADS": "1", "OMP_DYNAMIC": "true", "OMP_WAIT_POLICY": "active"}, 1),
    ],
    ids=str,
)
def test_variables_of_openmp(variables: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    expected = min(limit or 4096, _core.usable_cpus())
    output = run_script(tmp_path / "program.py", CPUS, OPENBLAS_NUM_THREADS="1", **variables)
    assert [int(number) for number in output.split()] == [expected, expected - 1]


PLACED = (
    PRELUDE
    + """
opt, twin, before = make(), make(1), threads()
assert go_on(opt) == go_on(twin)
print(show_config()["num_threads"], threads() - before)
"""
)


@needs_openmp
@needs_tasks
@pytest.mark.parametrize("variables", [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "threads"}], ids=str)
def test_threads_in_places_of_openmp(variables: dict[str, str], tmp_path: Path) -> None:
    """The first thread is bound to the first place then: its affinity no longer says what may be used."""
    output = run_script(
        tmp_path / "program.py", PLACED, FUSED_ADAM_THREADS="openmp", OPENBLAS_NUM_THREADS="1", **variables
    )
    cpus = _core.usable_cpus()
    assert output == f"{cpus} {cpus - 1}\n"


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset")
@needs_tasks
def test_taskset(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CPUS)
    command = [
        "taskset",
        "-c",
        str(min(os.sched_getaffinity(0))),
        sys.executable,
        str(tmp_path / "program.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "1 0\n"), done.stderr


# Quotas of the cgroup: what /proc/self/cgroup says, the files under /sys/fs/cgroup, and how many CPUs that
# makes (None: no limit).
V1 = "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
QUOTAS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "v2, max": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
    "v2, 0.5": ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 1),
    "v2, 0.001": ("0::/a\n", {"a/cpu.max": "1000 1000000\n"}, 1),
    "v2, 1": ("0::/a\n", {"a/cpu.max": "100000 100000\n"}, 1),
    "v2, 1.00001": ("0::/a\n", {"a/cpu.max": "100001 100000\n"}, 2),
    "v2, 1.5": ("0::/a\n", {"a/cpu.max": "150000 100000\n"}, 2),
    "v2, more than an int": ("0::/a\n", {"a/cpu.max": "9000000000000000000 1000\n"}, None),
    "v2, no line end": ("0::/a", {"a/cpu.max": "50000 100000"}, 1),
    "v2, container: files of the group at the root": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "v2, smaller parent": ("0::/a/b/c\n", {"a/b/c/cpu.max": "max 1000\n", "a/b/cpu.max": "900 1000\n"}, 1),
    "v2, smaller grandparent": (
        "0::/a/b/c\n",
        {"a/b/c/cpu.max": "1500 1000\n", "a/b/cpu.max": "max 1000\n", "a/cpu.max": "700 1000\n"},
        1,
    ),
    "v2, smaller child": ("0::/a/b\n", {"a/b/cpu.max": "900 1000\n", "a/cpu.max": "1500 1000\n"}, 1),
    "v2, smaller sister": ("0::/a/b\n", {"a/b/cpu.max": "max 1000\n", "a/c/cpu.max": "1 1000\n"}, None),
    "v2, colon and blank in the name": ("0::/a:b c\n", {"a:b c/cpu.max": "500 1000\n"}, 1),
    "v2, after lines of v1": ("3:pids:/x\n1:name=systemd:/y\n0::/a\n", {"a/cpu.max": "500 1000\n"}, 1),
    "v2, group outside of the namespace": ("0::/../../x\n", {"a/cpu.max": "500 1000\n"}, None),
    "v1, no quota": (
        V1,
        {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1, 0.5": (
        V1,
        {"cpu/docker/abc/cpu.cfs_quota_us": "50000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "v1, 1.5": (
        V1,
        {"cpu/docker/abc/cpu.cfs_quota_us": "150000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "v1, container: files of the group at the root": (
        V1,
        {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "v1, smaller parent": (
        V1,
        {
            "cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
            "cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            "cpu/docker/cpu.cfs_quota_us": "50000\n",
            "cpu/docker/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "v1, another controller's files": (
        "4:cpuacct:/a\n5:cpuset:/b\n",
        {"cpu/a/cpu.cfs_quota_us": "1\n", "cpu/a/cpu.cfs_period_us": "1000\n"},
        None,
    ),
    "v1, no period": (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "50000\n"}, None),
    "no files": ("0::/a/b\n" + V1, {}, None),
    "no groups": ("", {}, None),
    "garbage for groups": (
        "\n:\n::\n0::\n0::a\nrubbish\n0::/" + "x" * 9000 + "\n\0\n0::/a//\n",
        {"a/cpu.max": "max 1\n"},
        None,
    ),
    **{
        f"garbage: {text!r}": ("0::/a\n", {"a/cpu.max": text}, None)
        for text in [
            "",
            "\n",
            "max",
            "1",
            "half 1000",
            "-500 1000",
            "500 0",
            "500 -1",
            "0 1000",
            "\0 \0",
            "nan 1",
        ]
    },
    "garbage, and a quota above": ("0::/a\n", {"a/cpu.max": "max", "cpu.max": "500 1000"}, 1),
}

# In a mount namespace of its own, where nobody else sees what lies over /sys and /proc.
READ_QUOTAS = """
import ctypes, json, os, shutil, sys
from pathlib import Path

import numpy as np

libc = ctypes.CDLL(None, use_errno=True)

def bind(source, target):
    if libc.mount(bytes(source), target.encode(), None, 4096, None):
        raise OSError(ctypes.get_errno(), "mount", target)

here = Path(sys.argv[1])
tree, group = here / "tree", here / "group"
tree.mkdir()
group.touch()
bind(tree, "/sys/fs/cgroup")
results = []
for groups, files in json.load(sys.stdin):
    for old in tree.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    group.write_text(groups)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        bind(group, "/proc/self/cgroup")
        from fused_adam import Adam, _core  # reads the quota

        array = np.ones(600_011, np.float32)
        Adam(array).step(array.copy())
        os.write(theirs, json.dumps([_core.usable_cpus(), len(os.listdir("/proc/self/task"))]).encode())
        os._exit(0)
    os.close(theirs)
    assert os.waitpid(pid, 0)[1] == 0
    results.append(json.loads(os.read(ours, 1000)))
    os.close(ours)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def quotas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """For each of QUOTAS: the CPUs that may be used, and the threads of a step."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this system")
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-r", "-m"]
    nothing = tmp_path_factory.mktemp("nothing")
    probe = [*unshare, "sh", "-c", 'mount --bind "$1" /sys/fs/cgroup', "sh", str(nothing)]
    refusal = subprocess.run(probe, capture_output=True, text=True, timeout=PATIENCE)
    if refusal.returncode:
        pytest.skip(f"no mount namespace of our own: {refusal.stderr.strip()}")
    here = tmp_path_factory.mktemp("cgroup")
    cases = [[groups, files] for groups, files, _ in QUOTAS.values()]
    output = run_script(
        here / "program.py",
        READ_QUOTAS,
        str(here),
        stdin=json.dumps(cases),
        command=unshare,
        OPENBLAS_NUM_THREADS="1",
    )
    return dict(zip(QUOTAS, json.loads(output), strict=True))


@pytest.mark.parametrize("case", QUOTAS)
def test_quota_of_the_cgroup(case: str, quotas: dict[str, list[int]]) -> None:
    limit = QUOTAS[case][2]
    cpus = len(os.sched_getaffinity(0))
    expected = cpus if limit is None else min(cpus, limit)
    assert quotas[case][0] == expected
    assert quotas[case][1] == min(expected, MACHINE.most)
