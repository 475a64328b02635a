"""Optimizers saved in a file: what is loaded goes on with the same bits, other tools can read it."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import stat
import sys
import threading
import tracemalloc
import zlib
from collections import namedtuple
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW, CheckpointError
from fused_adam._file_header import FORMAT
from snapshots import Snapshot, assert_same_bits, assert_same_state, map_tree, random_like, refused, train

posix = pytest.mark.skipif(sys.platform == "win32", reason="file modes, links and locks of POSIX")
Layer = namedtuple("Layer", ["weight", "bias"])
EMPTY = {
    "layers": [Layer(np.empty((3, 4), np.float32), np.empty((2, 3), order="F")), {"scale": np.empty(())}],
    "none": np.empty((0, 2), np.float32),
    # In Fortran order, with an axis that is longer than what is written at a time, and one shorter.
    "wide": np.empty((2, 300_001), np.float32, order="F"),
    "tall": np.empty((100_003, 2), order="F"),
    'größe 🙂 " \\ \n': np.empty(33, np.float32),
}


def split(params: dict[str, Any]) -> list[Any]:
    rest = {key: value for key, value in params.items() if key != "layers"}
    return [{"params": params["layers"], "lr": 0.02, "tag": ["head", {"depth": 3}]}, {"params": rest}]


# Class, options, form of params; how grads have the form of params: lists of groups as lists of trees.
KINDS: dict[str, tuple[type[Adam], dict[str, Any], Callable[[Any], Any]]] = {
    "adam": (Adam, {}, lambda params: params),
    "l2": (Adam, {"weight_decay": 0.1, "maximize": True}, lambda params: params),
    "amsgrad": (Adam, {"amsgrad": True, "betas": (0.5, 0.6)}, lambda params: params),
    "adamw": (AdamW, {"lr": 0.1, "eps": 1e-3}, lambda params: params),
    "groups": (AdamW, {"amsgrad": True}, split),
    "array": (Adam, {}, lambda params: params["wide"]),
    "scalar": (Adam, {}, lambda params: params["layers"][1]["scale"]),
    "empty": (Adam, {}, lambda params: params["none"]),
    "list": (Adam, {"lr": 1}, lambda params: list(params.values())[1:]),
    "tuple": (Adam, {"lr": np.float32(0.1), "betas": (np.float32(0.5), 0.9)}, lambda p: tuple(p["layers"])),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def new(kind: str) -> tuple[Any, Adam]:
    cls, options, form = KINDS[kind]
    params = random_like(EMPTY, seed=1)
    return params, cls(form(params), **options)


def grads_for(opt: Adam, seed: int) -> Any:
    """Every other one of them None for odd seeds."""
    grads = random_like(opt.grads, seed)
    return map_tree(lambda grad: None if grad.size % 2 else grad, grads) if seed % 2 else grads


def arrays_of(opt: Adam) -> list[np.ndarray]:
    return [array for group in opt.param_groups for array in group["params"]]


def load_twin(path: Any, kind: str, opt: Adam) -> Adam:
    """From the file, on arrays of its own with the values of opt's."""
    cls, _, form = KINDS[kind]
    params = map_tree(lambda array: array.copy(order="K"), random_like(EMPTY, seed=1))
    given = form(params)
    twin = cls.load(path, given)
    for a, b in zip(arrays_of(twin), arrays_of(opt), strict=True):
        a[...] = b
    return twin


def assert_goes_on(twin: Adam, opt: Adam) -> None:
    assert_same_state(twin, opt)
    for one, other in zip(twin.param_groups, opt.param_groups, strict=True):
        assert {**one, "params": None} == {**other, "params": None}
    for seed in (11, 12, 13):
        for one in (twin, opt):
            one.step(grads_for(one, seed))
    assert_same_bits(arrays_of(twin), arrays_of(opt))
    assert_same_state(twin, opt)


def small(steps: int = 3, **options: Any) -> Adam:
    params = random_like({"w": np.empty((2, 3), np.float32), "b": np.empty(4)}, 1)
    opt = Adam(params, **options)
    train(opt, params, range(steps))
    return opt


def like_small() -> Any:
    return random_like({"w": np.empty((2, 3), np.float32), "b": np.empty(4)}, 1)


# --- Round trips --------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_round_trip(tmp_path: pathlib.Path, kind: str, steps: int) -> None:
    _, opt = new(kind)
    for seed in range(steps):
        opt.step(grads_for(opt, seed))
    path = tmp_path / "adam.safetensors"
    before = Snapshot(opt)
    assert opt.save(path) is None
    before.assert_unchanged()
    twin = load_twin(path, kind, opt)
    assert type(twin) is type(opt)
    assert_goes_on(twin, opt)
    assert os.listdir(tmp_path) == [path.name]


def test_saved_again_it_is_the_same_file(tmp_path: pathlib.Path) -> None:
    opt = small(amsgrad=True)
    opt.save(tmp_path / "a")
    Adam.load(tmp_path / "a", like_small()).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**53 - 2, 2**53 + 1, 2**62])
def test_huge_step_counts(tmp_path: pathlib.Path, step: int) -> None:
    opt = small()
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = step
    opt.load_state_dict(saved)
    opt.save(tmp_path / "a")
    twin = Adam.load(tmp_path / "a", like_small())
    assert [entry["step"] for entry in twin.state.values()] == [step, step]
    for a, b in zip(arrays_of(twin), arrays_of(opt), strict=True):
        a[...] = b
    assert_goes_on(twin, opt)


def test_options_of_any_kind_of_number(tmp_path: pathlib.Path) -> None:
    opt = small()
    group = opt.param_groups[0]
    group.update(lr=np.array(0.25), eps=Decimal("0.5"), betas=[np.float32(0.5), np.longdouble(0.25)])
    group.update(weight_decay=np.longdouble(0.125))
    group.update(history=[np.float32(1.5), {"n": np.int64(2), "flag": np.True_}], best=None, tag="ü\ud800")
    opt.save(tmp_path / "a")
    found = Adam.load(tmp_path / "a", like_small()).param_groups[0]
    assert (found["lr"], found["eps"], found["betas"], found["weight_decay"]) == (
        0.25,
        0.5,
        (0.5, 0.25),
        0.125,
    )
    assert found["history"] == [1.5, {"n": 2, "flag": True}]
    assert found["best"] is None and found["tag"] == "ü\ud800"
    for lr in (1, 1.0):  # each stays what it is
        group["lr"] = lr
        opt.save(tmp_path / "a")
        assert type(Adam.load(tmp_path / "a", like_small()).param_groups[0]["lr"]) is type(lr)


DEEP: Any = []
DEEP.append(DEEP)


@pytest.mark.parametrize(
    "value",
    [
        *(
            {3, 4},
            1j,
            object(),
            float("nan"),
            float("inf"),
            b"x",
            "\ud83d\ude00",
            np.ones(3),
            {1: 2},
            [[{"a": {2: 3}}]],
            DEEP,
        ),
        *(10**5000, np.datetime64("2020-01-01"), (1, [np.float32("nan")])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_that_json_cannot_hold(tmp_path: pathlib.Path, value: Any) -> None:
    opt = small()
    opt.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    opt.param_groups[0]["mine"] = value
    with refused(TypeError, r"^param_groups\[0\]\['mine'\].* is .*cannot be saved: .*Nothing was saved", opt):
        opt.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old and os.listdir(tmp_path) == ["a"]


def test_options_that_are_too_long(tmp_path: pathlib.Path) -> None:
    opt = small()
    opt.param_groups[0]["history"] = "x" * (5 << 20)
    with refused(ValueError, "^names and options take .* bytes in the file", opt):
        opt.save(tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_amsgrad_is_that_of_the_file(tmp_path: pathlib.Path) -> None:
    """Whatever the groups say that load is given: often those of the first construction."""
    for saved, given in ((False, True), (True, False)):
        opt = small(amsgrad=saved)
        opt.save(tmp_path / "a")
        twin = Adam.load(tmp_path / "a", [{"params": like_small(), "amsgrad": given, "lr": 0.7, "mine": 1}])
        assert twin.param_groups[0]["amsgrad"] is saved
        assert twin.lr == opt.lr and twin.param_groups[0]["mine"] == 1
        grads = random_like(like_small(), 5)
        opt.step(grads)
        twin.step([grads])
        for name in ("w", "b"):
            assert_same_bits(twin.state[name]["exp_avg_sq"], opt.state[name]["exp_avg_sq"])


@pytest.mark.parametrize("steps", [0, 2])
def test_amsgrad_switched_on_or_off(tmp_path: pathlib.Path, steps: int) -> None:
    for before in (False, True):
        opt = small(steps, amsgrad=before)
        opt.param_groups[0]["amsgrad"] = not before
        opt.save(tmp_path / "a")
        twin = Adam.load(tmp_path / "a", like_small())
        for a, b in zip(arrays_of(twin), arrays_of(opt), strict=True):
            a[...] = b
        assert_goes_on(twin, opt)


def test_another_memory_order(tmp_path: pathlib.Path) -> None:
    a = random_like(np.empty((5, 7)), 1)
    opt = Adam(a)
    opt.step(random_like(a, 2))
    opt.save(tmp_path / "a")
    twin = Adam.load(tmp_path / "a", np.asfortranarray(a))
    assert_same_bits(twin.state[0]["exp_avg"], opt.state[0]["exp_avg"])


def test_adamw_stays_decoupled(tmp_path: pathlib.Path) -> None:
    small(weight_decay=0.5).save(tmp_path / "a")
    (group,) = AdamW.load(tmp_path / "a", like_small()).param_groups
    assert group["decoupled_weight_decay"] is True and group["weight_decay"] == 0.5


# Of fused-adam 0.1.0, format 1: two groups, the first with amsgrad and names, after two steps. Every version
# reads it; a file that a new format writes is another text, beside this one.
GOLDEN = """
eNrVVT+P0zAcPVhYWI5PUAWxmcp23DS9pceCxBdgaaPgJD+3kZI25M/Ro8qMxMAXQMzcyAQjA1+AkRkkxMIKjPyc9HpNL7pSiQG8
/OTn5+fnZ8dZ3Dio2tJw3RhyGchcuq5xtDSmIANIXT/1TW4cGR6YpmBCGcQ4h5ZjI8shGRtHnbFhMkW5GfCxQToalzl0WRcWiStP
JjXFpj1mC8ZaKW72uGaxgdVjvBc0WbFcuH/C5M0lKfRsYIq1UtZCfd/uMzlQmyzaFAqY54mB57VS1kLU6vetoC+brDbvF8wSE1VF
BoGL4ceumqexzDFd1sRPIM3C+QwHKMZBcXBWxJCGfoaQZtzVExKZIneSzotE4yM8IhQE6U/1srMiirQxXyZ5kUovAo0qGWWg4SBU
ClKY5eGlocqIRvK0qIAo1T3a5T3d8/DmZBoY0S4CtNvvORqHJKtprOY9gXAyzd0AfHlaD1SwjLNJKhv6mFkYh0+3DIKPG4swkm2h
NaUKYGWFdFjlIpfVIY6Y7ozHBaXK1yek43DWk9yZjKGeiUbrE8TjdkrS+e9SXK/4F2LkTungzQpAySLKs/q7/yeNl0ZJqhdJP19B
fpoAmn1gCXSfTaXujUwHd6KfuLlSGejd4DXhwqkmNt6jTY37DY3LElwQk7do4Ne+j4zJiaCbMs2HYx8pQYmwL6T47l3xFhGbWKJF
5EovLTqWIPbGvmirGfyjbIiQFhmbkoHVIrNtZ7fSwCKM8U2pK5LeLYdahHGMu+zs3a7Xv9+D83ptVQ+r9mP4cvFQ3Hr0c13r0W+r
+nFVP6/qm+Fi8Wv44sun989fnQ3Lm2+P4bs4/vrs8PjO2evhu9sf7m33fwPOl3Cg
"""


def golden_optimizer() -> tuple[Any, Adam]:
    params = [{"w": np.full((2, 2), 2.0, np.float32), "b": np.array(3.0)}, [np.array([1.0, -1.0])]]
    groups = [{"params": params[0], "amsgrad": True, "tag": [1, "ü", None]}, {"params": params[1]}]
    return params, Adam(groups, lr=0.25, betas=(0.5, 0.75), eps=0.125, weight_decay=0.5)


def golden_step(opt: Adam, k: int) -> None:
    w = np.array([[1, -2], [0.5, 4]], np.float32) * np.float32(k)
    opt.step([{"w": w, "b": np.array(0.25 * k)}, [None if k == 2 else np.array([1.0, k])]])


def test_golden_file_of_format_1(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(zlib.decompress(base64.b64decode(GOLDEN)))
    params, opt = golden_optimizer()
    twin_params = map_tree(np.copy, params)
    for k in (1, 2):
        golden_step(opt, k)
    twin = Adam.load(path, [{"params": tree} for tree in twin_params])
    for a, b in zip(arrays_of(twin), arrays_of(opt), strict=True):
        a[...] = b
    assert [entry["step"] for entry in twin.state.values()] == [2, 2, 1]
    assert twin.param_groups[0]["tag"] == [1, "ü", None]
    assert_same_state(twin, opt)
    for one in (twin, opt):
        golden_step(one, 3)
    assert_same_bits(arrays_of(twin), arrays_of(opt))


# --- What other tools see -----------------------------------------------------------------------------


@kinds
def test_safetensors_reads_it(tmp_path: pathlib.Path, kind: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    _, opt = new(kind)
    for seed in range(2):
        opt.step(grads_for(opt, seed))
    opt.save(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        metadata = file.metadata()
    assert found.pop("step").tolist() == [entry["step"] for entry in opt.state.values()]
    expected = {
        f"state.{i}.{key}": value
        for i, entry in opt.state.items()
        for key, value in entry.items()
        if key != "step"
    }
    assert found.keys() == expected.keys()
    for key in found:
        assert_same_bits(found[key], expected[key])
    assert metadata["fused_adam_format"] == str(FORMAT)
    groups = json.loads(metadata["param_groups"])
    assert [group["lr"] for group in groups] == [group["lr"] for group in opt.param_groups]
    if kind == "groups":
        assert groups[0]["param_names"] == ["0.0", "0.1", "1.scale"]
        assert groups[1]["param_names"] == [key for key in EMPTY if key != "layers"]


def test_arrays_are_aligned_in_the_file(tmp_path: pathlib.Path) -> None:
    _, opt = new("adam")
    opt.save(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 64 == 0
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F32": 4, "F64": 8, "I64": 8}[entry["dtype"]] == 0


# --- The file system ----------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_mode_of_a_new_file(tmp_path: pathlib.Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        small().save(tmp_path / "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_mode_of_the_old_file_stays(tmp_path: pathlib.Path, mode: int) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(mode)
    small().save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    Adam.load(tmp_path / "a", like_small())


@posix
@pytest.mark.parametrize("exists", [False, True])
def test_symbolic_link_stays(tmp_path: pathlib.Path, exists: bool) -> None:
    (tmp_path / "there").mkdir()
    if exists:
        (tmp_path / "there" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("there/real")
    small().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "there" / "real").is_symlink()
    Adam.load(tmp_path / "there" / "real", like_small())
    assert os.listdir(tmp_path / "there") == ["real"]


def test_paths_of_any_kind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    opt = small()
    names = ["a", pathlib.Path("b"), "sub/c", str(tmp_path / "d"), "gewichte-🙂.safetensors", "[x]*?.st"]
    for path in [*names, "x" * 255, "é" * 127]:  # as long as a name can be
        for _ in range(2):
            opt.save(path)
        assert_same_state(Adam.load(path, like_small()), opt)
    assert len(os.listdir(tmp_path)) == 8


@pytest.mark.parametrize("path", [3, None], ids=repr)
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError):
        small().save(path)
    with pytest.raises(TypeError):
        Adam.load(path, like_small())


def test_path_of_bytes(tmp_path: pathlib.Path) -> None:
    """As `open` takes it."""
    opt, path = small(), tmp_path / "a"
    opt.save(os.fsencode(path))  # type: ignore[arg-type]
    assert_same_state(Adam.load(os.fsencode(path), like_small()), opt)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: "):
        Adam.load(os.fsencode(path), np.ones(1))  # type: ignore[arg-type]


def test_errors_name_the_file_of_the_user(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "missing" / "a"
    for call in (lambda: small().save(missing), lambda: Adam.load(missing, like_small())):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.filename == str(missing) and ".tmp" not in str(caught.value)
    for call in (lambda: small().save(tmp_path), lambda: Adam.load(tmp_path, like_small())):
        with pytest.raises((IsADirectoryError, PermissionError), match=re.escape(str(tmp_path))):
            call()
    assert not os.listdir(tmp_path)


@posix
@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="Nothing was saved"):
        small().save(tmp_path / "a")


def test_overwrites_whatever_file_was_there(tmp_path: pathlib.Path) -> None:
    opt = small()
    for content in (b"", b"text", b"\xff" * 100_000):
        (tmp_path / "a").write_bytes(content)
        opt.save(tmp_path / "a")
        assert_same_state(Adam.load(tmp_path / "a", like_small()), opt)
    assert os.listdir(tmp_path) == ["a"]


@posix
def test_leftovers_of_the_dead_are_removed(tmp_path: pathlib.Path) -> None:
    import fcntl

    dead = [tmp_path / f".a.{k:016x}.tmp" for k in range(3)]
    live = tmp_path / f".a.{9:016x}.tmp"
    others = [f".b.{1:016x}.tmp", f".a.{1:015x}.tmp", ".a.0123456789abcdeX.tmp", f"a.{1:016x}.tmp", ".a.tmp"]
    for path in (*dead, live, *(tmp_path / name for name in others)):
        path.write_bytes(b"x")
    os.mkfifo(tmp_path / f".a.{5:016x}.tmp")  # whoever opens it would wait
    with open(live, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        small().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", live.name, f".a.{5:016x}.tmp", *others])


@posix
def test_many_writers_of_one_file(tmp_path: pathlib.Path) -> None:
    """None takes the file of another for a leftover, and each leaves a whole one."""
    errors: list[BaseException] = []

    def work() -> None:
        opt = small()
        try:
            for _ in range(40):
                opt.save(tmp_path / "a")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["a"]
    Adam.load(tmp_path / "a", like_small())


@posix
@pytest.mark.skipif(sys.platform == "win32", reason="the order of calls is that of POSIX")
def test_flushed_before_and_after_it_is_renamed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no test can see happen, a power failure, can still be prepared for in the right order."""
    calls: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append(("fsync", status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else None))
        fsync(descriptor)

    def log_replace(source: Any, target: Any) -> None:
        calls.append(("replace", os.stat(source).st_ino, os.fspath(target)))
        assert pathlib.Path(source).parent == pathlib.Path(target).parent
        # It is whole when it takes its place.
        Adam.load(source, like_small())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    path = tmp_path.resolve() / "a"
    small().save(path)
    status = path.stat()
    assert calls == [
        ("fsync", status.st_ino, status.st_size),
        ("replace", status.st_ino, str(path)),
        ("fsync", tmp_path.stat().st_ino, None),
    ]


# --- Progress, memory, threads ------------------------------------------------------------------------


def large() -> tuple[Any, Adam]:
    """48 MB of moments; some in an order that is not that of the file."""
    params = [np.zeros(4_000_000, np.float32), np.zeros((1000, 1000), order="F")]
    return params, Adam(params)


def test_progress(tmp_path: pathlib.Path) -> None:
    params, opt = large()
    total = 48_000_000 + 2 * 8
    calls: list[tuple[int, int]] = []
    opt.save(tmp_path / "a", progress=lambda *args: calls.append(args))
    saved, calls = calls, []
    Adam.load(tmp_path / "a", params, progress=lambda *args: calls.append(args))
    for seen in (saved, calls):
        assert {call[1] for call in seen} == {total}
        done = [call[0] for call in seen]
        assert done[-1] == total and done == sorted(set(done))
        assert 30 <= len(done) <= 60  # for every MiB or so
        assert all(type(count) is int for count in done)
    small(0).save(tmp_path / "b", progress=lambda *args: calls.append(args))
    assert calls[-1] == (2 * (24 + 32) + 16,) * 2


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "mine"), CheckpointError("mine")], ids=repr)
def test_cancelled_by_progress(tmp_path: pathlib.Path, error: Any) -> None:
    params, opt = large()
    opt.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    opt.step([np.ones_like(param) for param in params])
    before = Snapshot(opt)
    raised: list[BaseException] = []
    for last in (1, 40_000_000, 48_000_016):

        def cancel(done: int, total: int, last: int = last) -> None:
            if done >= last:
                raise error

        for call in (
            lambda cancel=cancel: opt.save(tmp_path / "a", progress=cancel),
            lambda cancel=cancel: Adam.load(tmp_path / "a", params, progress=cancel),
        ):
            with pytest.raises(type(error) if isinstance(error, BaseException) else error) as caught:
                call()
            raised.append(caught.value)
    assert all(one is error or type(one) is error for one in raised)
    before.assert_unchanged()
    assert (tmp_path / "a").read_bytes() == old and os.listdir(tmp_path) == ["a"]
    opt.save(tmp_path / "a")  # it is free again


@pytest.mark.slow
def test_memory(tmp_path: pathlib.Path) -> None:
    params, opt = large()
    tracemalloc.start()
    try:
        opt.save(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
        tracemalloc.reset_peak()
        Adam.load(tmp_path / "a", params)
        assert tracemalloc.get_traced_memory()[1] < 48_000_000 + (3 << 20)
    finally:
        tracemalloc.stop()


def test_not_while_another_thread_has_it(tmp_path: pathlib.Path) -> None:
    """A long save in one thread, a step and a save in another."""
    opt = small()
    refusals: list[BaseException] = []

    def other() -> None:
        for call in (lambda: opt.step(like_small()), lambda: opt.save(tmp_path / "b")):
            try:
                call()
            except RuntimeError as error:
                refusals.append(error)

    def progress(done: int, total: int) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    before = Snapshot(opt)
    opt.save(tmp_path / "a", progress=progress)
    assert len(refusals) == 2 and all("in use" in str(error) for error in refusals)
    assert os.listdir(tmp_path) == ["a"]
    before.assert_unchanged()


def test_save_inside_a_step_is_refused(tmp_path: pathlib.Path) -> None:
    opt = small()

    class Rate(float):
        def __float__(self) -> float:
            return float.__add__(self, 0.0)

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            if seen:
                seen.pop()
                with pytest.raises(RuntimeError, match="in use"):
                    opt.save(tmp_path / "a")
                done.append(True)
            return str.__eq__(self, other)

    seen, done = [1], []  # type: ignore[var-annotated]
    opt.step({Key("w"): np.ones((2, 3), np.float32), Key("b"): np.ones(4)})
    assert done and not os.listdir(tmp_path)


# --- Files of other models ----------------------------------------------------------------------------


def others() -> dict[str, tuple[Any, Any, str]]:
    """What was saved, what it is loaded for, what the message says."""
    f4, f8 = np.float32, np.float64
    w, b = np.zeros((2, 3), f4), np.zeros(4, f8)
    return {
        "shape": (
            {"net": {"w": w}},
            {"net": {"w": w.T.copy()}},
            "parameter 'net.w' is float32 of shape (3, 2), but float32 of shape (2, 3) in the file",
        ),
        "shape-1": ([b], [b[:3].copy()], "parameter 0 is float64 of shape (3,), but float64 of shape (4,)"),
        "dtype": ([w], [w.astype(f8)], "parameter 0 is float64 of shape (2, 3), but float32 of shape (2, 3)"),
        "fewer": ([w, b], [w.copy()], "it has 2 parameters, but params has 1 there: it is of another model"),
        "fewer-in-group": (
            [{"params": [w, b]}, {"params": [w.copy()]}],
            [{"params": [w, b]}, {"params": [w.copy(), b.copy()]}],
            "it has 1 parameters in param_groups[1], but params has 2 there",
        ),
        "groups": (
            [{"params": [w]}, {"params": [b]}],
            [w, b],
            "it has 2 parameter groups, but params has 1.",
        ),
        "names": (
            {"w": w, "b": b, "c": b.copy()},
            {"w": w, "d": b, "c": b.copy()},
            "its parameters have other names: 'b' in the file but not in params; 'd' in params but not in",
        ),
        "many-names": (
            {f"w{i}": w.copy() for i in range(9)},
            {f"v{i}": w.copy() for i in range(9)},
            "'w0', 'w1', 'w2' and 6 more in the file but not in params; 'v0', 'v1', 'v2' and 6 more in par",
        ),
        "three-names": (
            {f"w{i}": w.copy() for i in range(3)},
            {f"v{i}": w.copy() for i in range(3)},
            "'w0', 'w1', 'w2' in the file but not in params; 'v0', 'v1', 'v2' in params but",
        ),
        "order": (
            {"w": w, "b": b},
            {"b": b, "w": w},
            "its parameters have another order: number 0 is 'w' in the file, 'b' in params",
        ),
        "group-of-shape": (
            [{"params": {"w": w}}, {"params": {"b": b}}],
            [{"params": {"w": w}}, {"params": {"b": b[:2].copy()}}],
            "parameter 'b' of param_groups[1] is float64 of shape (2,), but float64 of shape (4,) in the",
        ),
    }


@pytest.mark.parametrize("case", others())
def test_another_model(tmp_path: pathlib.Path, case: str) -> None:
    saved, given, message = others()[case]
    path = tmp_path / "a"
    Adam(saved).save(path)
    with pytest.raises(CheckpointError, match="^" + re.escape(f"{path}: ") + ".*" + re.escape(message)):
        Adam.load(path, given)


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        ({"a.b": 1, "a": {"b": 2}}, {"a": {"b": 2}, "a.b": 1}),
        ({1: 1, "1": 2}, {"1": 2, 1: 1}),
    ],
)
def test_ambiguous_names(tmp_path: pathlib.Path, saved: Any, given: Any) -> None:
    make = partial(map_tree, lambda value: np.full(2, float(value)))
    opt = Adam(make(saved))
    opt.step(make(saved))
    opt.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="its parameters have another order: number 0 is "):
        Adam.load(tmp_path / "a", make(given))
    assert_same_state(Adam.load(tmp_path / "a", make(saved)), opt)


def test_keys_of_any_text(tmp_path: pathlib.Path) -> None:
    params = {"\ud800": np.ones(2), "\ud83d\ude00": np.ones(3), "😀": np.ones(4)}
    opt = Adam(params)
    train(opt, params, [1])
    opt.save(tmp_path / "a")
    assert_same_state(Adam.load(tmp_path / "a", params), opt)
    with pytest.raises(CheckpointError, match=r"parameter .*\\ud800.* is float64 of shape \(1,\)"):
        Adam.load(tmp_path / "a", {**params, "\ud800": np.ones(1)})


def test_names_matter_only_where_both_have_them(tmp_path: pathlib.Path) -> None:
    named, unnamed = random_like([{"a": np.empty(2), "b": np.empty(2)}, [np.empty(2), np.empty(2)]], 1)
    for one, other in ((named, unnamed), (unnamed, named)):
        Adam(one).save(tmp_path / "a")
        Adam.load(tmp_path / "a", other)


def test_groups_added_later_have_the_defaults_of_the_saved(tmp_path: pathlib.Path) -> None:
    opt = small(lr=0.5, betas=(0.5, 0.75))
    opt.save(tmp_path / "a")
    twin = Adam.load(tmp_path / "a", like_small())
    assert twin.defaults == opt.defaults
    twin.add_param_group({"params": np.ones(2)})
    assert twin.param_groups[1]["lr"] == 0.5 and twin.param_groups[1]["betas"] == (0.5, 0.75)


def test_groups_added_to_a_subclass_are_as_it_fixes_them(tmp_path: pathlib.Path) -> None:
    opt = small(weight_decay=0.5)
    opt.save(tmp_path / "a")
    twin = AdamW.load(tmp_path / "a", like_small())
    twin.add_param_group({"params": [np.ones(3)]})
    for options in (twin.defaults, *twin.param_groups):
        assert options["decoupled_weight_decay"] is True and options["weight_decay"] == 0.5


def test_options_that_no_optimizer_has_are_refused(tmp_path: pathlib.Path) -> None:
    """Here, where they can be mended, and not when the file is read."""
    opt = small()
    for where, options in (("defaults", opt.defaults), ("param_groups[0]", opt.param_groups[0])):
        options["lr"] = -1
        with pytest.raises(ValueError, match="^" + re.escape(f"{where}['lr'] must be finite and >= 0")):
            opt.save(tmp_path / "a")
        options["lr"] = 1
    assert not list(tmp_path.iterdir())
