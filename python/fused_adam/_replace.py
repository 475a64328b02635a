"""A file that takes the place of another when it is whole and on the disk, or never."""

from __future__ import annotations

import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if sys.platform != "win32":
    import fcntl
if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
_HASHED_ASIDE = 1 << 18  # bytes from which on a second thread saves time
_FLUSHED_EARLY = 1 << 25  # bytes that are handed to the disk while the next ones are hashed


class Writer:
    """Writes, and has the disk take what is written meanwhile: little is left to wait for at the end."""

    def __init__(self, file: FileIO, path: str | os.PathLike[str]) -> None:
        self._file, self._path = file, path
        self._pool: ThreadPoolExecutor | None = None
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error: object, *args: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if error is None:
            self._wait()

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        self._unflushed += len(rest)
        with _explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        if self._unflushed >= _FLUSHED_EARLY:
            self._unflushed = 0
            self._wait()
            self._flush = self._aside(os.fsync, self._file.fileno())

    def write_hashed(self, data: memoryview, checksum: int) -> int:
        """Write, and hash meanwhile: both take about as long, and neither needs the GIL."""
        hashed = self._aside(zlib.crc32, data, checksum) if data.nbytes >= _HASHED_ASIDE else None
        try:
            self.write(data)
        finally:
            if hashed is not None:
                wait([hashed])  # also where the write fails: the memory is free to be reused then
        return zlib.crc32(data, checksum) if hashed is None else hashed.result()

    def _aside(self, function: Callable[..., T], *args: object) -> Future[T] | None:
        """On another thread; None at the exit of the interpreter, where none is started any more."""
        with suppress(RuntimeError):
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor  # at the exit not even this can be imported

                self._pool = ThreadPoolExecutor(2)  # one to flush, one to hash
            return self._pool.submit(function, *args)
        return None

    def _wait(self) -> None:
        """An error is told only once by the operating system: the last fsync may not know of it."""
        if self._flush is not None:
            flush, self._flush = self._flush, None
            with _explained(self._path):
                flush.result()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A file that takes the place of `path` once it is whole and on the disk, or never."""
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
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
    return os.fsdecode(os.fsencode(target.name)[:200].decode(errors="ignore"))


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


def _flush_to_disk(file: FileIO) -> None:
    os.fsync(file.fileno())
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
