"""Folders that appear whole or not at all, and locks that end with their process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A new hidden sibling of `out` to write into; it is removed if the block fails or leaves it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, out: Path) -> bool:
    """Flushes every file of `draft` to disk and renames the folder to `out`.

    Returns False, changing nothing, if `out` is there already and is not empty.
    """
    for file in sorted(draft.iterdir()):
        sync(file)
    sync(draft)
    try:
        draft.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync(out.parent)
    return True


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Holds the lock file `path`; waits, saying so once, while another process is `doing` the same.

    The kernel frees the lock when its process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is %s; waiting for it", doing)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_drafts(out: Path) -> None:
    """Removes what killed processes left half-made for `out`; call it only while holding the lock."""
    for left in out.parent.glob(f".{out.name}.*.part"):
        log.warning("removing %s, left by an interrupted conversion", left)
        shutil.rmtree(left, ignore_errors=True)
