"""In one process with PyTorch and scikit-learn, whose threads and settings are their own.

A process for each order of import does everything once and prints what it found; the tests look at that.
No test measures a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, _core

pytestmark = pytest.mark.slow

PATIENCE = 120  # seconds, until waiting counts as hanging: two large libraries are imported

on_x86 = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64",
    reason="knows the rounding modes of Linux on x86-64",
)

# Ten steps, each large enough for threads, with gradients of which a third is subnormal or nearly.
TRAIN = """
def train(num_threads, between=lambda: None, before=lambda: None):
    rng = np.random.default_rng(0)
    params = rng.standard_normal(600_011).astype(np.float32)
    grads = rng.standard_normal(600_011).astype(np.float32)
    with np.errstate(all="ignore"):
        grads[::3] *= np.finfo(np.float32).smallest_normal
    opt = Adam(params, num_threads=num_threads)
    before()
    for _ in range(10):
        opt.step(grads)
        between()
    arrays = [params, *list(opt.state[0].values())[1:]]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
"""

NEIGHBOURS = """
import ctypes, hashlib, json, os, sys, threading
import numpy as np

def settings():
    '''What an import of ours must leave alone.'''
    found = {"environment": dict(os.environ)}
    if "torch" in sys.modules:
        found["torch"] = [torch.get_num_threads(), torch.get_num_interop_threads()]
        pools = [pool for pool in threadpool_info() if "fused_adam" not in pool["filepath"]]
        found["pools"] = {pool["filepath"]: pool["num_threads"] for pool in pools}
    return found

libm = ctypes.CDLL(None)
ours_first = sys.argv[1] == "before"
facts = {}
if ours_first:
    from fused_adam import Adam, _core, show_config
    # Our helpers are there before those of the others.
    Adam(np.ones(600_011), num_threads=2).step(np.ones(600_011))
import torch
from sklearn.cluster import KMeans
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_info, threadpool_limits
if not ours_first:
    before = settings()
    from fused_adam import Adam, _core, show_config
    facts["untouched"] = settings() == before

TRAIN

# In forked children, before any other step of ours: helpers start with the float mode of their caller.
def in_mode(change, mode):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            modes = []
            bits = train(2, before=lambda: (change(), modes.append(mode())))
            os.write(theirs, json.dumps([bits, *modes, mode()]).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    result = json.loads(os.read(ours, 10000) or "null")
    os.close(ours)
    os.waitpid(pid, 0)
    return result

def products():
    '''Whether a product of torch's is flushed, and one of NumPy's.'''
    small = np.full(1, np.finfo(np.float32).smallest_normal)
    with np.errstate(all="ignore"):
        return [float(torch.from_numpy(small) * 0.5) == 0, float((small * np.float32(0.5))[0]) == 0]

facts["modes"] = {}
if not ours_first and sys.platform == "linux" and os.uname().machine == "x86_64":
    facts["modes"]["flush"] = in_mode(lambda: torch.set_flush_denormal(True), products)
    for mode in (0x400, 0x800, 0xC00):
        facts["modes"][f"round {mode:#x}"] = in_mode(lambda: libm.fesetround(mode), libm.fegetround)

# Small whole numbers: sums in any order are exact.
rng = np.random.default_rng(1)
a, b = (torch.from_numpy(rng.integers(-8, 9, (300, 300)).astype(np.float32)) for _ in range(2))
product = (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)).astype(np.float32)
centres = rng.integers(-50, 50, (4, 8)) * 10.0
points = np.repeat(centres, 250, axis=0) + rng.standard_normal((1000, 8))
kinds = np.repeat(np.arange(4), 250)
wrong = []

def multiply():
    if not np.array_equal((a @ b).numpy(), product):
        wrong.append("torch matmul")
    if float(torch.ones(200_000).add_(1).sum()) != 400_000:
        wrong.append("torch sum")

def cluster():
    labels = KMeans(4, n_init=1, random_state=0, init=points[::250]).fit(points).labels_
    if not np.array_equal(labels, kinds):
        wrong.append("k-means")

def boost():
    model = HistGradientBoostingClassifier(max_iter=2, early_stopping=False).fit(points, kinds)
    if not np.array_equal(model.predict(points), kinds):
        wrong.append("boosting")

def all_of_theirs():
    multiply()
    cluster()

bits = {}
facts["bits"] = bits
boost()
cpus = torch.get_num_threads()
bits["alone"] = train(2)
bits["matrices between"] = train(2, multiply)
bits["clusters between"] = train(2, cluster)
bits["default"] = train(None, multiply)
for limit in (1, 2):
    with threadpool_limits(limit):
        facts[f"threads under {limit}"] = show_config()["num_threads"]
        bits[f"limit {limit}"] = train(None, all_of_theirs)
        bits[f"limit {limit}, told 2"] = train(2, multiply)
facts["torch threads"] = [cpus, torch.get_num_threads()]

# At the same time.
done = threading.Event()
rounds = [0]
def work_on():
    while not done.is_set():
        all_of_theirs()
        rounds[0] += 1
worker = threading.Thread(target=work_on, daemon=True)
worker.start()
bits["meanwhile"] = train(2)
with threadpool_limits(1):
    bits["meanwhile, limit 1"] = train(2)
while not rounds[0]:
    bits["meanwhile, later"] = train(2)
done.set()
worker.join()
boost()

def threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0

# Everything has started its threads by now.
params = np.ones(600_011, np.float32)
opt = Adam(params, num_threads=2)
all_of_theirs()
opt.step(params.copy())
first, most = threads(), 0
grads = params.copy()
for i in range(200):
    opt.step(grads)
    if i % 20 == 0:
        all_of_theirs()
    most = max(most, threads())
facts["threads"] = [first, most]
facts["wrong"] = wrong
print(json.dumps(facts))
"""


def run_python(code: str, *arguments: str) -> Any:
    """What a program prints, as JSON. It is killed where it hangs."""
    ours = ("OMP_NUM_THREADS", "FUSED_ADAM_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={name: value for name, value in os.environ.items() if name not in ours},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["before", "after"])
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of a process that imports ours before or after the others."""
    missing = [name for name in ("torch", "sklearn", "threadpoolctl") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    code = NEIGHBOURS.replace("\nTRAIN\n", TRAIN)
    return {"ours": request.param, **run_python(code, request.param)}


@pytest.fixture(scope="module")
def right_bits() -> str:
    """On one thread, in a process that may have no neighbours."""
    space: dict[str, Any] = {"np": np, "hashlib": hashlib, "Adam": Adam}
    exec(TRAIN, space)
    bits = space["train"](1)
    assert isinstance(bits, str)
    return bits


def test_same_bits_beside_others(facts: dict[str, Any], right_bits: str) -> None:
    """Between their parallel regions, during them, and under limits for them and us."""
    assert len(facts["bits"]) >= 9
    assert {how: bits for how, bits in facts["bits"].items() if bits != right_bits} == {}


def test_others_compute_what_is_right(facts: dict[str, Any]) -> None:
    assert facts["wrong"] == []


def test_limits_of_others_are_ours(facts: dict[str, Any]) -> None:
    if _core.openmp_version():
        assert facts["threads under 1"] == 1
    assert 1 <= facts["threads under 2"] <= 2


def test_settings_of_others_are_theirs(facts: dict[str, Any]) -> None:
    """No variable, no number of threads: not by our import, not by our steps."""
    before, after = facts["torch threads"]
    assert before == after
    assert facts.get("untouched", True)


def test_number_of_threads_stays(facts: dict[str, Any]) -> None:
    first, most = facts["threads"]
    assert most <= first


@on_x86
def test_helpers_that_start_in_another_float_mode(facts: dict[str, Any], right_bits: str) -> None:
    """A thread inherits flush-to-zero and rounding: those of the caller at the first step."""
    assert len(facts["modes"]) == (4 if facts["ours"] == "after" else 0)
    for name, result in facts["modes"].items():
        assert result is not None, name
        bits, before, after = result
        assert bits == right_bits, name
        assert before == after, name
        assert before == ([True, True] if name == "flush" else int(name.split()[1], 16)), name


IMPORT = """
import ctypes, json, sys, threading
import numpy as np

libm = ctypes.CDLL(None)
small = np.full(1000, np.finfo(np.float32).smallest_normal)

def mode():
    '''Rounding, and whether subnormals live.'''
    return [libm.fegetround(), bool((small * np.float32(0.5)).all()), sys.float_info.min / 2 > 0]

looks = []
go_on = [threading.Event() for _ in range(3)]
seen = [threading.Event() for _ in range(3)]
def look():
    for i in range(3):
        go_on[i].wait(20)
        looks.append(mode())
        seen[i].set()

def everywhere(i):
    go_on[i].set()
    seen[i].wait(20)
    looks.append(mode())
    new = threading.Thread(target=lambda: looks.append(mode()))
    new.start()
    new.join()

libm.fesetround(int(sys.argv[1]))
threading.Thread(target=look).start()
everywhere(0)
import fused_adam
everywhere(1)
params = np.ones(600_011, np.float32)
fused_adam.Adam(params, num_threads=2).step(params.copy())
everywhere(2)
print(json.dumps([looks[i : i + 3] for i in (0, 3, 6)]))
"""


@on_x86
@pytest.mark.parametrize("mode", [0, 0x400, 0x800, 0xC00], ids=["nearest", "down", "up", "to zero"])
def test_import_leaves_the_float_mode_alone(mode: int) -> None:
    """In the importing thread, in one that was there, in one that comes later; and so does a first step.

    Libraries linked with -ffast-math switch subnormals off when they are loaded.
    """
    at_first, imported, stepped = run_python(IMPORT, str(mode))
    assert at_first == [[mode, True, True]] * 3
    assert imported == at_first
    assert stepped == at_first
