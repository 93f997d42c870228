"""Files that are there whole or not at all.

What is written stands beside its name, is flushed to the disk, and renamed onto it: at every moment the name
leads to the old file or to the new one (Pillai et al. 2014, "All file systems are not created equal"). It is
locked meanwhile; what a killed process left is not, and goes at the next write into that folder.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which removes no open file: a lock is not needed there
    fcntl = None

TEMPORARY = ".fnn-tmp"


@contextmanager
def replacing(where: str, path: Path) -> Iterator[IO[bytes]]:
    """Yields a file to write and read; where the block ends well, it takes the place of what is at `path`.

    where: begins the message of the OSError if it cannot be written; then what was there before still is
    """
    path = Path(os.path.realpath(path))  # through a link, onto what it leads to
    is_there = False
    try:
        mode = _mode(path)
        _remove_leftovers(path.parent)
        with _temporary(path.parent) as file:
            yield file
            file.flush()
            if mode is not None:
                os.chmod(file.name, mode)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(file.name, path)
            is_there = True
        _flush_folder(path.parent)
    except OSError as error:
        hint = "What was there before still is."
        if is_there:
            hint = "The new file is there, but may not outlive a power failure."
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{where}: could not write {path}: {reason}. {hint}") from error


def make_folder(where: str, folder: Path) -> None:
    """Makes the folder and those above it, each kept by the disk."""
    if folder.is_dir():
        return
    try:
        make_folder(where, folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)
    except FileExistsError as error:
        raise OSError(error.errno, f"{where}: {folder} is no folder but a file.") from None


@contextmanager
def _temporary(folder: Path) -> Iterator[IO[bytes]]:
    """A new file, marked as being written; removed in the end, unless it was renamed."""
    while True:
        file = open(os.path.join(folder, f".{secrets.token_hex(8)}{TEMPORARY}"), "x+b")
        try:
            _lock(file)
            if os.path.exists(file.name):
                yield file
                return
            # Taken for a leftover before it was locked: once more.
        finally:
            with suppress(OSError):
                os.unlink(file.name)
            with suppress(OSError):  # what is still to be written, to a disk that is full
                file.close()


def _mode(path: Path) -> int | None:
    """The permissions of the file that is there, which the new one gets. Raises OSError if none can be."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist, make it first")
    if not path.exists():
        return None
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "a folder or a device is there")
    return stat.S_IMODE(mode)


def _lock(file: IO[bytes]) -> None:
    """Marks a temporary file as being written, until it is closed or the process ends."""
    with suppress(OSError):  # a file system without locks: then no leftovers are removed either
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            with open(leftover, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while another writes it
                    leftover.unlink()
            if fcntl is None:
                leftover.unlink()


def _flush_folder(folder: Path) -> None:
    """Has the disk keep the folder's names, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
