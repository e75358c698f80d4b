"""Files that are replaced whole or not at all, and what tells whether they have been damaged since."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and leaves no trace when it raises.

    The bytes go to a temporary file in the same folder, which is synced and renamed; then the folder is synced.
    Whenever the process or the machine stops, `path` is the old file or the new one, whole. A temporary file that a
    killed process left behind is deleted by the next one to write the same path. The new file has the permissions of
    the old one, and is refused where `path` is a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "Neither a file nor the name of a new one", os.fspath(path))
    _delete_abandoned(target)
    file = _temporary(target)
    try:
        with file:
            # What nobody else might read stays so. Some file systems have no permissions to set.
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise
    _sync_folder(target.parent)


def checksum(text: str, parts: Iterable[tuple[str, Any]]) -> str:
    """The CRC-32, in hexadecimal, of a text and of named buffers one after another."""
    crc = zlib.crc32(text.encode())
    for name, data in parts:
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _temporary(target: Path) -> BinaryIO:
    """A new file beside the target, locked until it is closed: the sign that its process lives."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        # Unlike tempfile's, this file gets the permissions of any new file.
        file = open(path, "xb")  # noqa: SIM115
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # taken for abandoned before it was locked


def _delete_abandoned(target: Path) -> None:
    for name in os.listdir(target.parent):
        if not (name.startswith(f".{target.name}.") and name.endswith(".tmp")):
            continue
        # Gone already, or someone else's: not ours to complain about.
        with contextlib.suppress(OSError), open(target.with_name(name), "rb") as file:
            if _lock(file, wait=False):
                os.unlink(file.name)


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Lock the file against other openers; False where another has locked it or the file system has no locks."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
