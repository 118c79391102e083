"""One process at a time: a lock file that says who it is, locked as long as that process lives, however it ends.

Called by runs.py for the folder of a run, and by datasets/shards.py for one in which shards are made; calls files.py.
The file: data/README.md.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .files import naming_errors, parse_json

_REFUSED = "cannot write in this folder"
# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class Lock:
    """A lock file that this process has open. `is_new`: it was not there before; `is_locked`: False where the file
    system has no locks; `stays`: whether the file is still there when the lock is given back."""

    def __init__(self, path: Path):
        self.path, self.is_locked, self.stays = path, False, False
        self.is_new = not path.exists()
        with naming_errors(path.parent, _REFUSED) if self.is_new else naming_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(self._descriptor)

    def read(self, count: int) -> bytes:
        """The first bytes of the file."""
        return os.pread(self._descriptor, count, 0)

    def write_holder(self, program: str) -> None:
        """Says in the file who has it: `program` in this process."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"program": program, "pid": os.getpid(), "host": platform.node(), "since": since}
        with naming_errors(self.path.parent, _REFUSED):
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0))

    def is_current(self) -> bool:
        """Whether the file is still at its path. If not, it was deleted or moved, and another process may have the lock
        of the one that is there now."""
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(os.fstat(self._descriptor), there)

    def take(self, doing: str, option: str) -> None:
        """Locks the file; ValueError, as `locked` says, if another process has it."""
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise ValueError(f"{self.path}: not a regular file, so it cannot be locked; move it away")
        with naming_errors(self.path, "cannot lock this file"):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_locked = True
            except BlockingIOError:
                who = self._describe_holder(doing)
                raise ValueError(
                    f"{self.path.parent}: {who}; wait for it, stop it, or choose another {option}"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise

    def _describe_holder(self, doing: str) -> str:
        # A process that got the lock just now has yet to write who it is.
        time.sleep(0.1)
        try:
            holder = parse_json(self.read(4096), self.path.name)
            since = datetime.fromisoformat(holder["since"]).astimezone()
            return f"pid {holder['pid']} on host {holder['host']} has been {doing} there since {since:%Y-%m-%d %H:%M}"
        except (ValueError, TypeError, KeyError, OverflowError):
            return f"another process is {doing} there"

    def close(self) -> None:
        """Gives the lock back."""
        # In a process that was forked from the one with the lock it is closed already.
        if self._descriptor in _descriptors:
            _descriptors.remove(self._descriptor)
            os.close(self._descriptor)


@contextlib.contextmanager
def locked(path: Path, doing: str, option: str) -> Iterator[Lock]:
    """Holds the lock file at `path`, which is made if need be, and deleted after the block unless it `stays`.

    OSError if it cannot be made or locked. ValueError naming its holder if another process has it, which is `doing`
    something in the folder; `option` is how one chooses another folder.
    """
    while True:
        lock = Lock(path)
        try:
            lock.take(doing, option)
            is_current = lock.is_current()
        except BaseException:
            lock.close()
            raise
        if is_current:
            break
        # The process that held the lock has deleted or moved its file since, so this lock is of no use.
        lock.close()
    try:
        yield lock
    finally:
        if not lock.stays and lock.is_current():
            path.unlink()
        lock.close()


# The lock files that this process has open. A process forked from it shares their locks: it closes them, so as not to
# hold a folder when this process is gone.
_descriptors: set[int] = set()


def _close_all() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_all)
