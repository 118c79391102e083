"""Reading and writing whole files safely.

Every file but the growing main.log and the lock of a run's folder is written through `atomic_write`: under its final
name there is either the whole new content or what was there before, whatever fails in between. Called by checkpoint.py,
the tokenizer, the datasets and the programs; imports only the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# The first number of every binary file of this family, and what such a file is: to say what was given for another.
KINDS_BY_MAGIC = {
    20240326: "a model",
    20240327: "a debug state",
    20240328: "a tokenizer",
    20240520: "a token file",
    20240522: "an evaluation file",
    20240527: "a training state",
    20240801: "a token file",
    20240803: "a Llama model",
}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to; it becomes `path` when the block ends, and vanishes if the block fails.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the final name in one rename
    that is flushed too. An OSError while writing (a full disk, a read-only folder) is raised again with the final
    path in it, and leaves what was at `path` untouched.
    """
    # A rename would put a regular file in the place of a device or a pipe.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: cannot be written: it is there and not a regular file")
    # A link is written through, as open() would.
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Unlike tempfile's files, which only their owner can read, this one gets the permissions the umask gives.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A write error carries no name, one of open or rename that of the temporary file: name the file that was asked
        # for. An error with another name comes from the caller's block and stays as it is.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, f"cannot write this file: {os.strerror(error.errno)}", str(path)) from None
        raise


def _sync_folder(folder: Path) -> None:
    """Flushes a rename in `folder` to the disk, where folders can be flushed at all."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file for reading; ValueError for a folder, a pipe or a device, which could block or never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: not a regular file")
    return open(path, "rb")


def file_size(file: BinaryIO) -> int:
    """The size in bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_exact(file: BinaryIO, n: int, what: str) -> bytes:
    """Exactly `n` bytes; ValueError naming the file and `what` was being read if it ends before."""
    data = file.read(n)
    if len(data) != n:
        raise ValueError(f"{file.name}: ends inside {what}: {n} bytes needed, {len(data)} found; the file is truncated")
    return data


def read_into(file: BinaryIO, buffer, what: str) -> None:
    """Fills a writable contiguous buffer (a NumPy array) from the file; ValueError if the file ends before."""
    memory = memoryview(buffer).cast("B")
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            raise ValueError(
                f"{file.name}: ends inside {what}: {len(memory)} bytes needed, {done} found; the file is truncated"
            )
        done += count


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
