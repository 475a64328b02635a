"""What goes wrong with files: killed writers, full disks, flipped bits, files made to harm.

A writer that dies leaves the old file or the new one, whole. A reader refuses all but what was written.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fused_adam import Adam, AdamW, CheckpointError, _file, _file_header, _replace
from fused_adam._file_header import FORMAT
from snapshots import assert_same_state, random_like, train

posix = pytest.mark.skipif(sys.platform == "win32", reason="processes, devices and limits of POSIX")
Path = pathlib.Path


def like_small() -> Any:
    return random_like({"w": np.empty((2, 3), np.float32), "b": np.empty(4)}, 1)


def small(steps: int = 3) -> Adam:
    opt = Adam(like_small(), amsgrad=True)
    train(opt, like_small(), range(steps))
    return opt


# --- Writers that fail --------------------------------------------------------------------------------

# Forks a child that saves version after version and says so after each, kills it, and looks.
KILLER = """
    import os, random, signal, sys, time
    import numpy as np
    from fused_adam import Adam

    path, kills = sys.argv[1], int(sys.argv[2])
    random.seed(1)
    params = [np.zeros(100_000), np.zeros((300, 200), order="F"), np.zeros((), np.float32)]
    opt = Adam(params, num_threads=1)

    def make(version):
        state = opt._core.all_state()
        del state["step"]
        for array in state["exp_avg"] + state["exp_avg_sq"]:
            array[...] = version
        opt._core.set_state([version] * len(params), state, [], version)

    def version_in_file():
        twin = Adam.load(path, params)
        values = {float(value) for entry in twin.state.values() for array in entry.values()
                  for value in np.unique(array)}
        assert len(values) == 1, f"torn: {values}"
        return int(values.pop())

    make(1)
    opt.save(path)
    known = 1
    torn = 0
    for kill in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            for version in range(known + 1, known + 10_000):
                make(version)
                opt.save(path)
                os.write(write, version.to_bytes(8, "little"))
            os._exit(1)
        os.close(write)
        started = os.read(read, 8)  # one is saved for sure, and the next on its way
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        said = started
        while more := os.read(read, 65536):
            said = more
        os.close(read)
        told = int.from_bytes(said[-8:], "little")
        torn += len(os.listdir(os.path.dirname(path))) > 1
        known = version_in_file()
        assert known in (told, told + 1), f"{known} in the file, {told} was saved"
    make(known)
    opt.save(path)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)], "leftovers"
    print(torn)
"""


@pytest.mark.slow
@posix
def test_killed_at_any_moment(tmp_path: Path) -> None:
    kills = 60
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path / "a"), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > kills // 4, "most kills should meet a file half written"


@contextmanager
def leaves_the_old_file(folder: Path, error: int) -> Iterator[Path]:
    """The body fails with this errno; before and after it the file is the same, and the only one."""
    path = folder / "a"
    small().save(path)
    old = path.read_bytes()
    with pytest.raises(OSError) as caught:
        yield path
    assert caught.value.errno == error
    assert caught.value.filename == str(path), "the message names the file"
    assert "Nothing was saved; what was there before is as it was" in str(caught.value)
    assert path.read_bytes() == old
    assert os.listdir(folder) == ["a"]


@posix
@pytest.mark.parametrize("limit", [0, 1, 1000, 5000, 1_000_000, 16_000_000])
def test_file_size_limit(tmp_path: Path, limit: int) -> None:
    import resource

    opt = Adam([np.zeros(1_000_000)])  # 16 MB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with leaves_the_old_file(tmp_path, errno.EFBIG) as path:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
        try:
            opt.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
def test_disk_full(tmp_path: Path) -> None:
    size = ["-o", "size=256k"]
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", tmp_path], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount")
    if made.returncode != 0:
        pytest.skip("mount needs root")
    try:
        for count in (11_000, 16_384, 100_000):
            with leaves_the_old_file(tmp_path, errno.ENOSPC) as path:
                Adam([np.zeros(count), np.zeros(count, np.float32)]).save(path)
        small().save(tmp_path / "a")  # there is room again
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("early", [False, True])
def test_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """The system tells of an error once: where an early flush hears of it, a later one succeeds."""
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with leaves_the_old_file(tmp_path, errno.EIO) as path:
        monkeypatch.setattr(os, "fsync", fsync)
        if early:
            monkeypatch.setattr(_replace, "_FLUSHED_EARLY", 100)
        small().save(path)
    assert not early or len(calls) >= 1


def test_disk_that_fails_in_any_early_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the last one, after which nothing is written and the last fsync succeeds."""
    early: list[int] = []
    fails_at = 0

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            early.append(descriptor)
            if len(early) == fails_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    for fails_at in (1, 2, 3):  # noqa: B007 (fsync reads it)  after header, arrays, header
        early.clear()
        with leaves_the_old_file(tmp_path, errno.EIO) as path, monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(_replace, "_FLUSHED_EARLY", 100)
            small().save(path)


def test_large_files_are_flushed_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is left to wait for at the end: 80 MB in some steps of 32 MiB each, and the rest."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_mode))
    Adam(np.zeros(5_000_000)).save(tmp_path / "a")
    assert len([mode for mode in calls if stat.S_ISREG(mode)]) == 3


@posix
def test_temporary_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the file of another process that saves: neither written nor removed."""
    import fcntl

    taken = tmp_path / f".a.{'00' * 8}.tmp"
    taken.write_bytes(b"of another")
    monkeypatch.setattr(os, "urandom", bytes)
    with open(taken, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="Nothing was saved"):
            small().save(tmp_path / "a")
    assert os.listdir(tmp_path) == [taken.name] and taken.read_bytes() == b"of another"


@posix
@pytest.mark.parametrize("has_the_lock", [True, False])
def test_temporary_file_that_another_takes_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_the_lock: bool
) -> None:
    """Between its creation and its lock another process may remove it, or be about to: a new one is made."""
    lock = _replace._lock
    locked: list[str] = []

    def lose_the_first(file: Any) -> bool | None:
        locked.append(os.fsdecode(file.name))
        if len(locked) > 1:
            return lock(file)
        if has_the_lock:
            return False
        os.unlink(file.name)
        return lock(file)

    monkeypatch.setattr(_replace, "_lock", lose_the_first)
    small().save(tmp_path / "a")
    assert len(set(locked)) == len(locked) == 2
    assert os.listdir(tmp_path) == ["a"]
    assert_same_state(Adam.load(tmp_path / "a", like_small()), small())


@posix
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is saved all the same; leftovers stay, as nobody knows whose they are."""
    import fcntl

    calls = []

    def flock(*_: Any) -> None:
        calls.append(0)
        assert len(calls) < 10, "it tries again and again"
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    leftover = tmp_path / f".a.{1:016x}.tmp"
    leftover.touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    small().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [leftover.name, "a"]


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written all the same."""

    def listdir(_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        small().save(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


# Raises at any moment of a save, again while it ends, and looks whether the file is whole.
INTERRUPTED = """
    import signal, sys
    import numpy as np
    from fused_adam import Adam

    def interrupt(*args):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    params = [np.ones((2048, 2048), np.float32, order="F"), np.ones(2**22, np.float32)]
    opt = Adam(params)
    opt.save(sys.argv[1])
    interrupted = 0
    for k in range(300):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + k % 60 * 0.001, 0.0003 * (k % 3))
                opt.save(sys.argv[1])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    Adam.load(sys.argv[1], params)
    print(interrupted)
"""


@posix
def test_interrupted_at_any_moment(tmp_path: Path) -> None:
    """What another thread still hashes must not be freed: it crashed in each of 5 such programs.

    The allocator gives every block back to the system, so that whoever reads it afterwards crashes.
    """
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path / "a")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


@posix
def test_file_names_in_an_ascii_locale(tmp_path: Path) -> None:
    """Where open() takes the bytes of a name as they are, so does save, also of one that is shortened."""
    script = """
        import sys
        import numpy as np
        from fused_adam import Adam
        assert sys.getfilesystemencoding() == "ascii"
        for path in sys.argv[1:]:
            Adam(np.ones(2)).save(path)
            Adam.load(path, np.ones(2))
            open(path, "rb").close()
    """
    names = ["größe", "é" * 127]
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", textwrap.dedent(script), *(tmp_path / name for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    if "assert sys.getfilesystemencoding" in done.stderr:
        pytest.skip("file names are UTF-8 in any locale here")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_no_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source), None, str(target))

    with leaves_the_old_file(tmp_path, errno.EACCES) as path:
        monkeypatch.setattr(os, "replace", replace)
        small().save(path)


def test_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: the file is there, and saved as well as it can be."""
    fsync = os.fsync

    def fail_on_folders(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path)):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    small().save(tmp_path / "a")
    assert_same_state(Adam.load(tmp_path / "a", like_small()), small())


def test_writes_that_stop_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(_replace.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    small().save(tmp_path / "a")
    monkeypatch.setattr(_replace, "FileIO", Short)
    small().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_by_the_exit_of_the_interpreter(tmp_path: Path) -> None:
    """When threads are no longer started, and more is saved than is flushed at once."""
    script = """
        import atexit, sys, threading
        import numpy as np
        from fused_adam import Adam
        params = np.zeros(5_000_000)
        opt = Adam(params)
        atexit.register(lambda: opt.save(sys.argv[1]))
    """
    path = str(tmp_path / "a")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=True, timeout=60)
    Adam.load(path, np.zeros(5_000_000))


@posix
@pytest.mark.parametrize("kind", ["fifo", "full", "socket"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """Neither waited for by load, nor replaced by save."""
    path = tmp_path / "a"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "full":  # a device like /dev/full, without a risk for that
        try:
            os.mknod(path, 0o020666, os.makedev(1, 7))
        except OSError:
            pytest.skip("devices need root")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            try:
                one.bind(str(path))
            except OSError:
                pytest.skip("the path is too long for a socket")
    before = os.lstat(path)
    with pytest.raises(OSError, match="device or a pipe"):
        small().save(path)
    error, problem = (OSError, "") if kind == "socket" else (CheckpointError, ": it is no regular file")
    with pytest.raises(error, match=re.escape(f"{path}") + ".*" + problem):
        Adam.load(path, like_small())
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ["a"]


# --- Files that are damaged ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save(tmp_path / "a")
    return tmp_path / "a"


def check_refused(path: Path, message: str = "", params: Any = None) -> None:
    params = like_small() if params is None else params
    with pytest.raises(CheckpointError, match="^" + re.escape(f"{path}: ") + f".*{message}") as caught:
        Adam.load(path, params)
    assert type(caught.value) is CheckpointError
    assert len(str(caught.value)) < 1000 + len(str(path)), "for a person"


def header_size(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_cut_off_anywhere(saved: Path) -> None:
    size = saved.stat().st_size
    header = header_size(saved)
    lengths = {*range(header + 1), *range(0, size, 64), *range(size - 9, size)}
    for length in sorted(lengths, reverse=True):
        os.truncate(saved, length)
        check_refused(saved, "cut off" if length >= 8 else "empty|no checkpoint")


@posix
@pytest.mark.parametrize("order", ["C", "F"])
def test_cut_off_while_it_is_read(tmp_path: Path, order: Any) -> None:
    path = tmp_path / "a"
    params = np.ones((2, 1_000_000), np.float32, order=order)
    Adam(params).save(path)

    def cut_off(done: int, total: int) -> None:
        os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(CheckpointError, match="it was cut off while it was read"):
        Adam.load(path, params, progress=cut_off)


def test_header_cut_off_while_it_is_read(saved: Path) -> None:
    class Shorter(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 8))

    with (
        Shorter(saved) as file,
        pytest.raises(_file_header.Refusal, match="it was cut off while it was read"),
    ):
        _file_header.read_header(file, _file_header.header_room(2))


def test_disk_that_cannot_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not say which file it was; we do."""

    class Broken(io.FileIO):
        def readinto(self, _: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_file, "open", lambda path, *_, **__: Broken(path), raising=False)
    with pytest.raises(OSError, match=re.escape(str(saved))) as caught:
        Adam.load(saved, like_small())
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit(saved: Path, bit: int) -> None:
    whole = saved.read_bytes()
    params = like_small()
    with open(saved, "r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
            with pytest.raises(CheckpointError):
                Adam.load(saved, params)
            file.seek(place)
            file.write(bytes([byte]))
    assert_same_state(Adam.load(saved, params), small())  # mended


def test_which_array_is_damaged(saved: Path) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    check_refused(
        saved, "it is damaged: max_exp_avg_sq of parameter 'w' has another checksum. Use another copy"
    )
    start = header_size(saved)
    saved.write_bytes(whole[:start] + b"\x01" + whole[start + 1 :])
    check_refused(saved, "it is damaged: the array of step counts has another checksum")


@pytest.mark.parametrize("tail", [b"\0", b"x", b"\0" * 4096, None], ids=repr)
def test_appended(saved: Path, tail: bytes | None) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole + (whole if tail is None else tail))
    check_refused(saved, "has something appended")


def test_blocks_that_changed_places(saved: Path) -> None:
    """What a checksum of sums would not see: arrays of the same bytes elsewhere."""
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-72] + whole[-48:-24] + whole[-72:-48] + whole[-24:])
    check_refused(saved, "has another checksum")
    saved.write_bytes(whole[: header_size(saved)] + bytes(len(whole) - header_size(saved)))
    check_refused(saved, "has another checksum")


# --- Files that are made to harm ----------------------------------------------------------------------


def forge(path: Path, text: bytes, data: bytes = b"") -> None:
    """A file with this header, whose checksum is made right."""
    text += b" " * (-(8 + len(text)) % 64)
    blank = len(text).to_bytes(8, "little") + re.sub(
        rb'("header_crc32":")[0-9a-f]{8}', rb"\g<1>00000000", text, count=1
    )
    checksum = b'"header_crc32":"%08x' % zlib.crc32(blank)
    path.write_bytes(blank.replace(b'"header_crc32":"00000000', checksum, 1) + data)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    start = header_size(path)
    return json.loads(whole[8:start]), whole[start:]


def dumps(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def edit(header: Any, *path: Any, value: Any) -> None:
    """Set a value, also inside what is JSON within JSON; ... removes it."""
    key, rest = path[0], path[1:]
    if not rest:
        if value is ...:
            del header[key]
        else:
            header[key] = value
        return
    if isinstance(header[key], str):
        inner = json.loads(header[key])
        edit(inner, *rest, value=value)
        header[key] = json.dumps(inner)
    else:
        edit(header[key], *rest, value=value)


META = "__metadata__"
W, B = "state.0.exp_avg", "state.1.exp_avg"
TERA = 2**40
NOT_OURS = "it is no checkpoint of fused-adam, or its header is damaged"
TABLE = "its table is wrong at"
GROUP = (META, "param_groups", 0)
W_PARAM = (META, "params", 0)
NEEDED = ("fused_adam_format", "fused_adam_version", "crc32", "requires", "params", "streams")
OTHER_ARRAYS = "arrays that are not Adam's|its table is wrong"
ODD: list[Any] = [None, True, 1, -1, 1.5, "", "x", [], [1], [None], {}, {"a": 1}, ["a", {}], TERA, 10**400]

# Where, what, how the message goes on.
HOSTILE: list[tuple[tuple[Any, ...], Any, str]] = [
    ((*W_PARAM, 1), [TERA, TERA], "parameter 'w' is float32 of shape (2, 3), but float32 of shape"),
    ((*W_PARAM, 1), [3, 2], "parameter 'w' is float32 of shape (2, 3), but float32 of shape (3, 2)"),
    ((*W_PARAM, 1), [-2, -3], "parameter 'w' is float32 of shape (2, 3), but"),
    ((*W_PARAM, 0), "float64", "but float64 of shape (2, 3) in the file"),
    ((W, "shape"), [TERA, TERA], TABLE),
    ((W, "shape"), [3, 2], TABLE),
    ((W, "shape"), [2.0, 3.0], TABLE),
    ((W, "dtype"), "F64", TABLE),
    ((W, "dtype"), "BF16", TABLE),
    ((W, "dtype"), "x" * 10**4, TABLE),
    ((W, "shape"), list(range(10**4)), TABLE),
    ((*W_PARAM, 0), "x" * 10**4, f"but {'x' * 40} of shape (2, 3) in the file"),
    ((*W_PARAM, 1), list(range(10**4)), "of another model"),
    (W_PARAM, ..., NOT_OURS),
    (
        (META, "requires"),
        '["ema", "from the future"]',
        "it needs ['from the future'], which fused-adam",
    ),
    ((META, "streams", "exp_avg", "elements_per_entry"), 64, "its exp_avg is stored in another way"),
    ((META, "streams", "more"), {"elements_per_entry": 1}, NOT_OURS),
    *(((META, "streams", "exp_avg", "params"), bad, NOT_OURS) for bad in ([0, 0], [0, 2], [-1, 0], [0.0])),
    *(((META, "streams", "exp_avg", "params"), bad, NOT_OURS) for bad in ([1, 0], [0, 1])),
    *(
        ((META, "streams", "exp_avg", "params"), bad, "arrays that are not Adam's|its table is wrong")
        for bad in ([0], [])
    ),
    ((META, "streams", "exp_avg"), ..., "arrays that are not Adam's|its table is wrong"),
    ((META, "streams", "ema"), {"elements_per_entry": 1}, TABLE),
    *(((META, "streams", "exp_avg"), odd, "") for odd in ODD[:-1]),
    *(
        ((META, "streams", "exp_avg", "elements_per_entry"), odd, "")
        for odd in ODD[:-1]
        if type(odd) is not int
    ),
    *(((META, "streams", "exp_avg", "params"), odd, "") for odd in ODD[:-1]),
    ((W, "data_offsets"), [0, 24], f"{TABLE} exp_avg of parameter 'w'"),
    ((W, "data_offsets"), [-24, 0], TABLE),
    ((W, "data_offsets"), [TERA, TERA + 24], TABLE),
    ((W, "data_offsets"), [136, 112], TABLE),
    ((W, "data_offsets"), [112.0, 136.0], TABLE),
    ((B, "data_offsets"), [17, 49], f"{TABLE} exp_avg of parameter 'b'"),
    ((W, "more"), 1, TABLE),
    ((W, "dtype"), ..., TABLE),
    ((W, "data_offsets"), ..., TABLE),
    ((W,), ..., TABLE),
    (("state.0.exp_avg_sq",), ..., f"{TABLE} exp_avg_sq of parameter 'w'"),
    (("step",), ..., f"{TABLE} the array of step counts"),
    (("step", "dtype"), "F64", f"{TABLE} the array of step counts"),
    (("step", "shape"), [3], f"{TABLE} the array of step counts"),
    (("state.0.grad",), {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "arrays that are not Adam's"),
    (
        ("state.2.exp_avg",),
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "arrays that are not Adam's",
    ),
    (("state.0.max_exp_avg_sq",), ..., OTHER_ARRAYS),
    *(
        ((META, "crc32", name), "00000000", "arrays that are not Adam's")
        for name in ("more", "state.0.grad", "state.0.other", "state.2.exp_avg")
    ),
    ((META, "crc32", W), ..., TABLE),
    ((META, "crc32", W), "00000000", "exp_avg of parameter 'w' has another checksum"),
    ((META, "crc32", W), "f" * 10**4, "exp_avg of parameter 'w' has another checksum"),
    (
        (META, "fused_adam_format"),
        str(FORMAT + 1),
        f"it has format {FORMAT + 1}, of fused-adam .*Upgrade fused-adam",
    ),
    ((META, "fused_adam_format"), "999999999", "it has format 999999999, .*Upgrade fused-adam"),
    *(
        ((META, "fused_adam_format"), bad, NOT_OURS)
        for bad in ("", "0", "-1", "1.0", "x", "1_0", " 1", "٣", 1)
    ),
    ((META,), ..., NOT_OURS),
    *(((META, key), ..., NOT_OURS) for key in NEEDED),
    ((META, "header_crc32"), ..., NOT_OURS),
    ((META, "param_groups"), ..., NOT_OURS),
    ((META, "param_groups"), "[" * 10**4, NOT_OURS),
    ((META, "param_groups"), '[{"lr": NaN}]', NOT_OURS),
    ((META, "param_groups"), '[{"lr": 1, "lr": 2}]', NOT_OURS),
    ((META, "param_groups"), "[]", "it has 0 parameter groups, but params has 1"),
    ((*GROUP, "params"), [1, 0], NOT_OURS),
    ((*GROUP, "params"), [0.0, 1.0], NOT_OURS),
    ((*GROUP, "params"), [0], "it has 1 parameters, but params has 2"),
    ((*GROUP, "params"), ..., NOT_OURS),
    ((*GROUP, "param_names"), ["w", "w"], "it has two parameters named 'w', as an earlier version"),
    ((*GROUP, "param_names"), ["w", "c"], "'b' in params but not in the file|other names"),
    ((*GROUP, "param_names"), [["w"], {}], "other names"),
    ((*GROUP, "param_names"), ["w" * 10**4, "c" * 10**4], "other names"),
    ((*GROUP, "lr"), -1, r"options that no optimizer has: param_groups\[0\]\['lr'\] must be finite and >= 0"),
    ((*GROUP, "tag"), float("nan"), NOT_OURS),
    (
        (META, "defaults", "lr"),
        -1,
        r"options that no optimizer has: defaults\['lr'\] must be finite",
    ),
    ((*GROUP, "betas"), [0.9, 1.0], r"options that no optimizer has: param_groups\[0\]\['betas'\]\[1\]"),
    ((*GROUP, "amsgrad"), 1, r"options that no optimizer has: param_groups\[0\]\['amsgrad'\]"),
    *((path, odd, "") for path in ((META,), (W,), (W, "shape"), (W, "dtype")) for odd in ODD),
    *(((W, "data_offsets"), odd, "") for odd in ODD),
    *(((META, "crc32", W), odd, "") for odd in ODD[:-1]),
    *(((META, key), odd, "") for key in ("header_crc32", "param_groups", *NEEDED[2:]) for odd in ODD),
    *((path, odd, "") for path in (W_PARAM, (*W_PARAM, 0), (*W_PARAM, 1)) for odd in ODD[:-1]),
    *(((META, key), json.dumps(odd), "") for key in ("params", "streams") for odd in ODD[:-1]),
    *(((META, "requires"), json.dumps(odd), "") for odd in ODD[:-1] if odd != []),
    *(((*GROUP[:2],), json.dumps(odd), "") for odd in ODD[:-1]),
    *(((META, "param_groups"), json.dumps([odd]), "") for odd in ODD[:-1]),
    *(((META, "crc32"), json.dumps(odd), "") for odd in ODD[:-1]),
    *(((*GROUP, "params"), odd, "") for odd in ODD[:-1]),
    *(((*GROUP, "param_names"), odd, "") for odd in ODD[1:-1]),
    *(((*GROUP, "betas"), odd, "") for odd in ODD[:-1]),
]


NO_ROOM_FOR_FORTRAN = """
import resource, signal, sys
import numpy as np
from fused_adam import Adam

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
opt = Adam({"w": np.ones((1024, 4096), np.float32, order="F")})
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
for _ in range(50):
    try:
        opt.save(sys.argv[1])
    except OSError:
        continue
    raise SystemExit("there was room")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits are of Unix")
def test_no_room_while_a_buffer_is_hashed(tmp_path: Path) -> None:
    """What another thread still reads must not be freed: it crashed in each of 5 such programs."""
    program = [sys.executable, "-c", NO_ROOM_FOR_FORTRAN, str(tmp_path / "a")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_hostile_headers(saved: Path) -> None:
    text, data = saved.read_bytes()[8 : header_size(saved)], parts(saved)[1]
    forge(saved, text, data)
    Adam.load(saved, like_small())  # so the forger is good at it
    tracemalloc.start()
    try:
        for path, value, message in HOSTILE:
            header = json.loads(text)
            if value == 10**400:
                edit(header, *path, value="@")
                forged = dumps(header).replace(b'"@"', b"1" * 5000)
            else:
                edit(header, *path, value=value)
                forged = dumps(header)
            forge(saved, forged, data)
            message = message if ".*" in message or "\\" in message or "|" in message else re.escape(message)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                check_refused(saved, message)
            except BaseException:
                print(f"{path} = {value!r:.100}")  # shown with the failure
                raise
            assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    finally:
        tracemalloc.stop()


def test_steps_that_are_none(saved: Path) -> None:
    for step in (-1, 2**62 + 1, 2**63 - 1, -(2**63), int(np.float64("nan").view(np.int64))):
        header, data = parts(saved)
        raw = np.array([3, step]).tobytes()
        edit(header, META, "crc32", "step", value=f"{zlib.crc32(raw):08x}")
        forge(saved, dumps(header), raw + data[16:])
        check_refused(saved, f"the step count of parameter 'b' is {step}")


def test_hostile_headers_of_format_1(saved: Path) -> None:
    """It said nothing of the parameters: what they were is what their moments are."""
    header, data = parts(saved)
    edit(header, META, "fused_adam_format", value="1")
    forge(saved, dumps(header), data)
    Adam.load(saved, like_small())
    for key, odd in itertools.product((W, B), ODD[:-1]):
        forge(saved, dumps({**header, key: odd}), data)
        check_refused(saved)


def test_header_that_another_reader_would_not_take(saved: Path) -> None:
    whole = saved.read_bytes()
    text, data = whole[8 : header_size(saved)].rstrip(b" "), whole[header_size(saved) :]
    assert text.count(b'},"step"') == 1
    for forged in (
        text.replace(b'{"__metadata__"', b'{"__metaxata__"'),
        text.replace(b'{"__metadata__"', b'["__metadata__"'),
        text.replace(b'},"step"', b'};"step"'),
        text[:-1] + b"]",
        text[:-1] + b",",
    ):
        forge(saved, forged, data)
        check_refused(saved, NOT_OURS)


def test_options_that_a_file_lacks(saved: Path) -> None:
    """As one of an earlier version: they are the default of Adam, in groups and in groups to come."""
    header, data = parts(saved)
    for where in (GROUP, (META, "defaults")):
        edit(header, *where, "weight_decay", value=...)
    forge(saved, dumps(header), data)
    opt = AdamW.load(saved, like_small())
    opt.add_param_group({"params": [np.ones(2)]})
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.0]


def test_names_that_do_not_tell_apart(saved: Path) -> None:
    """Files of earlier versions may have them; which of two is meant must not be guessed."""
    for given in (like_small(), {"w": {"b": np.ones((2, 3), np.float32)}, "w.b": np.ones(4)}):
        header, data = parts(saved)
        edit(header, *GROUP, "param_names", value=["w.b", "w.b"])
        forge(saved, dumps(header), data)
        check_refused(saved, "it has two parameters named 'w.b', as an earlier version", given)
    assert_same_state(Adam.load(saved, list(like_small().values())), small())  # as the message says


def test_duplicate_keys(saved: Path) -> None:
    """Two readers could take one each."""
    header, data = parts(saved)
    text = dumps(header)
    for key in (META, W, "shape", "step"):
        mark = b'"%s":' % key.encode()
        begin = text.index(mark)
        value = dumps(header.get(key, [2, 3]))
        forge(saved, text[:begin] + mark + value + b"," + text[begin:], data)
        check_refused(saved, NOT_OURS)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"__metadata__":{}}',
        b"[" * 10**6,
        b'{"a":' * 10**6,
        b'{"__metadata__":{"header_crc32":"00000000"' + b',"x":[' * 10**5,
        b'{"__metadata__":{"header_crc32":"00000000"}}',
        b'"header_crc32":"00000000"',
        b'{"__metadata__":{"header_crc32":"00000000"},"\xff\xfe":1}',
        '{"__metadata__":{"header_crc32":"00000000"}}'.encode("utf-16"),
        b'{"__metadata__":{"header_crc32":"00000000"},"x":' + b"1" * 10**6 + b"}",
        b'{"__metadata__":{"header_crc32":"00000000"},"x":NaN}',
        b'{"__metadata__":{"header_crc32":"00000000"},"x":[' + b"[]," * 10**5 + b"[]]}",
        b'{"__metadata__":{"header_crc32":"00000000"},"x":['
        + b"{}," * 20_000
        + b"[]]}",  # as long as it may be
    ],
    ids=lambda text: text[:12].decode("latin-1") + f"-{len(text)}",
)
def test_headers_that_are_no_headers(tmp_path: Path, text: bytes) -> None:
    forge(tmp_path / "a", text, bytes(100))
    tracemalloc.start()
    try:
        check_refused(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 100, 99_999_992, 10**8 + 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    """Also where the file is as long as it says, which costs nothing: it is a hole."""
    path = tmp_path / "a"
    for size in (8, 1000, 200_000_000):
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, size)
        tracemalloc.start()
        try:
            check_refused(path)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


def write_npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, w=np.ones(3))


def write_safetensors(path: Path) -> None:
    pytest.importorskip("safetensors.numpy").save_file({"w": np.ones(3)}, path, metadata={"format": "np"})


def write_safetensors_again(path: Path) -> None:
    """Ours, read and written by another tool: its checksum of the header is no longer that of the header."""
    numpy = pytest.importorskip("safetensors.numpy")
    small().save(path)
    header, _ = parts(path)
    numpy.save_file(numpy.load_file(path), path, metadata=header[META])


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "short": (lambda path: path.write_bytes(b"1234567"), NOT_OURS),
    "text": (lambda path: path.write_text("hello " * 100), NOT_OURS),
    "npz": (write_npz, NOT_OURS),
    "safetensors": (write_safetensors, NOT_OURS),
    "safetensors-again": (write_safetensors_again, "its header is damaged"),
    "json": (lambda path: path.write_text('{"header_crc32":"00000000"}'), NOT_OURS),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files(tmp_path: Path, kind: str) -> None:
    write, message = FILES[kind]
    write(tmp_path / "a")
    check_refused(tmp_path / "a", message)


def test_refusal_changes_nothing_of_the_caller(saved: Path) -> None:
    """Params are never written; the options of the groups that load is given are the caller's, too."""
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    params = like_small()
    groups = [{"params": params, "lr": 0.5, "mine": [1]}]
    before = {key: array.tobytes() for key, array in params.items()}
    check_refused(saved, params=groups)
    assert {key: array.tobytes() for key, array in params.items()} == before
    assert groups == [{"params": params, "lr": 0.5, "mine": [1]}]
