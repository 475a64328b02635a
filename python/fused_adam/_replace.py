"""A file that takes the place of another when it is whole and on the disk, or never."""

from __future__ import annotations

import os
import re
import stat
import sys
import zlib
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

_HASHED_ASIDE = 1 << 22  # bytes from which on a thread saves more than it costs
_WRITTEN = 1 << 20  # bytes between two calls of who wants to know
_FLUSHED_EARLY = 1 << 25  # bytes that are handed to the disk while the next ones are hashed


class _Aside(Generic[T]):
    """A call in a thread of its own, for functions that leave the GIL alone.

    The thread ends by itself and holds what it was given, so that an interruption may come at any moment,
    and again: it leaves nothing to end, to join or to free. A ThreadPoolExecutor has locks that may stay
    locked then: 2 of 7 programs with 300 interrupted saves each could not exit.
    """

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        start_new_thread(_answer_to, (self._answer, function, args))

    def result(self) -> T:
        value, error = self._answer.get()
        if error is not None:
            raise error
        return cast(T, value)


def _answer_to(answer: SimpleQueue[Any], function: Callable[..., object], args: tuple[object, ...]) -> None:
    try:
        answer.put((function(*args), None))
    except BaseException as error:
        answer.put((None, error))


class Writer:
    """Writes, and has the disk take what is written meanwhile: little is left to wait for at the end."""

    def __init__(self, file: FileIO, path: str | os.PathLike[str]) -> None:
        self._file, self._path = file, path
        self._flush: _Aside[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error: object, *args: object) -> None:
        if error is None:
            self._wait()

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        self._unflushed += len(rest)
        with _explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        if self._unflushed >= _FLUSHED_EARLY:
            self._unflushed = 0
            self._wait()
            with suppress(RuntimeError):  # at the exit of the interpreter there are no new threads
                self._flush = _Aside(_flush, self._file)

    def write_hashed(self, data: memoryview, checksum: int, written: Callable[[int], object]) -> int:
        """Write, and hash meanwhile: both take about as long, and neither needs the GIL.

        An interruption may leave the hashing behind, which needs the memory until it is done: data must
        own it, as views of arrays do.
        """
        hashed: _Aside[int] | None = None
        if len(data) >= _HASHED_ASIDE:
            with suppress(RuntimeError):  # as above
                hashed = _Aside(zlib.crc32, data, checksum)
        for begin in range(0, len(data), _WRITTEN):
            part = data[begin : begin + _WRITTEN]
            self.write(part)
            written(len(part))
        return zlib.crc32(data, checksum) if hashed is None else hashed.result()

    def _wait(self) -> None:
        """An error is told only once by the operating system: the last fsync may not know of it."""
        if self._flush is not None:
            flush, self._flush = self._flush, None
            with _explained(self._path):
                flush.result()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A file that takes the place of `path` once it is whole and on the disk, or never."""
    target = Path(os.path.realpath(os.fsdecode(path)))  # what a link points to is replaced, not the link
    old_mode = None
    with suppress(FileNotFoundError):
        old_mode = target.stat().st_mode
    if old_mode is not None and stat.S_ISDIR(old_mode):
        raise IsADirectoryError(f"{os.fspath(path)} is a directory; a checkpoint is a file.")
    if old_mode is not None and not stat.S_ISREG(old_mode):
        raise OSError(f"{os.fspath(path)} is a device or a pipe, which a file would take the place of.")
    with suppress(OSError):  # of a folder that may be written but not read
        _remove_leftovers(target)
    with _explained(path):
        file = _new_temporary(target)
    temporary = Path(os.fsdecode(file.name))
    try:
        with file:
            if sys.platform != "win32" and old_mode is not None:
                with _explained(path):
                    os.fchmod(file.fileno(), stat.S_IMODE(old_mode))
            yield file
            with _explained(path):
                _flush_to_disk(file)
                if sys.platform != "win32":
                    os.replace(temporary, target)  # while it is locked: nobody takes it for a leftover
        if sys.platform == "win32":
            with _explained(path):
                os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sys.platform != "win32":
        _flush_folder(target.parent)


def _new_temporary(target: Path) -> FileIO:
    """A new file beside the target, locked, with the mode of any new file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    while True:
        temporary = target.with_name(f".{_stem(target)}.{os.urandom(8).hex()}.tmp")
        file = FileIO(temporary, "wb", opener=lambda name, _: os.open(name, flags, 0o666))
        # Another process that saves may have taken it for a leftover, before it was locked.
        if _lock(file) is not False and (sys.platform == "win32" or os.fstat(file.fileno()).st_nlink):
            return file
        file.close()
        with suppress(OSError):
            temporary.unlink()


def _stem(target: Path) -> str:
    """The name of the target, shortened where the longer one of a temporary file would be too long."""
    name = target.name
    while len(os.fsencode(name)) > 200:
        name = name[:-1]
    return name


def _remove_leftovers(target: Path) -> None:
    """Of processes that were killed while they saved: nobody holds the lock of their files."""
    pattern = re.compile(re.escape(f".{_stem(target)}.") + r"[0-9a-f]{16}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        path = target.with_name(name)
        if sys.platform == "win32":  # where an open file cannot be removed
            with suppress(OSError):
                path.unlink()
            continue
        # For writing, since some network file systems lock no other files.
        with suppress(OSError), FileIO(path, "r+", opener=open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and _lock(file):
                path.unlink()


def _lock(file: FileIO) -> bool | None:
    """Take the lock of a file: False where another has it, None where the file system has no locks."""
    if sys.platform == "win32":
        return True  # an open file cannot be removed there
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody at the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _flush(file: FileIO) -> None:
    os.fsync(file.fileno())  # an error where an interruption has closed it, and no other file is flushed


def _flush_to_disk(file: FileIO) -> None:
    _flush(file)
    if sys.platform == "darwin":  # where fsync stops at the cache of the disk
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)


def _flush_folder(folder: Path) -> None:
    """Best effort: the new file is whole and in its place, but after a power failure it may be the old one.

    Some file systems cannot flush a directory, and some directories may be written but not read.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors name the file that the user asked for, not the temporary one, or none."""
    try:
        yield
    except OSError as error:
        problem = f"{error.strerror}. Nothing was saved; what was there before is as it was"
        raise OSError(error.errno, problem, os.fspath(path)) from error
