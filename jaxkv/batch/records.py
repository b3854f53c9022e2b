"""The output of a batch job: whole records only, whatever happens to the process that writes them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxkv.batch.lines import Id, Place

SYNC_SECONDS = 1.0
"""Between two waits for the disk."""
FIRST_BYTES = b'{"id": '
"""What every record begins with."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What the output already says of a line."""

    id: Id | None
    failed: bool
    digest: str | None
    """Of the line; None in error records, and in those of versions that wrote none."""
    settings: dict[str, Any] | None
    """Of the job; None likewise."""


class OutputFile:
    """The output: one whole record after the other, written by one process only.

    Raises:
      OSError: it can't be opened or is no regular file.
      ValueError: another process writes it, or it holds something that is no record of a batch job.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Not through a link: a rename would replace the link.
            self.real = Path(os.path.realpath(path))
            self.fd = os.open(self.real, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise OSError(f"can't write {path}: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise OSError(f"can't write {path}: it must be a regular file, so that the job can be resumed from it")
            self._lock(self.fd)
            if not os.path.samestat(os.stat(self.real), os.fstat(self.fd)):
                # A rename by drop_failed came between opening and locking: the lock is on a file without a name.
                raise ValueError(f"another process has just rewritten {path}; try again")
            self.done = self._read()
        except BaseException:
            os.close(self.fd)
            raise
        self._synced = time.monotonic()
        self._dirty = self._new_name = True  # what an earlier process left unsynced counts too

    def cut_torn_line(self) -> int:
        """Cuts off the beginning of a record that a killed process left; returns its bytes."""
        torn = os.fstat(self.fd).st_size - self.size
        if torn:
            os.ftruncate(self.fd, self.size)
        return torn

    def drop_failed(self) -> None:
        """Takes the error records out, so that their lines are tried again; all at once, by a rename.

        Raises:
          OSError: it can't be rewritten; it is then as it was.
        """
        kept = {place: done for place, done in self.done.items() if not done.failed}
        if len(kept) == len(self.done):
            return
        beside = self.real.with_name(f".{self.real.name}.retry")
        try:
            fd = os.open(beside, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, os.fstat(self.fd).st_mode & 0o777)
            try:
                self._lock(fd)
                with self.real.open("rb") as old, open(fd, "wb", closefd=False) as new:
                    for raw in old:
                        if raw.endswith(b"\n") and json.loads(raw).get("error") is None:
                            new.write(raw)
                os.fsync(fd)
                size = os.fstat(fd).st_size
                os.replace(beside, self.real)
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    beside.unlink()
                raise
        except OSError as error:
            raise OSError(f"can't rewrite {self.path} without its error records: {error.strerror or error}") from None
        os.close(self.fd)
        self.fd, self.size, self.done = fd, size, kept
        self._dirty = self._new_name = True

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record.

        Raises:
          OSError: it can't be written; the file then ends with the record before it.
        """
        data = json.dumps(record).encode() + b"\n"
        rest = memoryview(data)
        try:
            while rest:  # a disk that is nearly full takes a part; the next write says so
                rest = rest[os.write(self.fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise self._failed(error) from None
        self.size += len(data)
        self._dirty = True
        self.tick()

    def tick(self) -> None:
        """Waits for the disk where that is due.

        Raises:
          OSError: what was written did not reach the disk.
        """
        if self._dirty and time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Waits until all that is written is on the disk, the file's name too.

        Raises:
          OSError: it can't get there.
        """
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise self._failed(error) from None
        if self._new_name:
            with contextlib.suppress(OSError):  # not every file system can do this for a directory
                directory = os.open(self.real.parent, os.O_RDONLY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        self._dirty, self._new_name, self._synced = False, False, time.monotonic()

    def close(self) -> None:
        try:
            if self._dirty:
                self.sync()
        finally:
            os.close(self.fd)

    def _failed(self, error: OSError) -> OSError:
        free = "free some space and " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        return OSError(
            f"can't write {self.path}: {error.strerror}; all records in it are whole: {free}start the same command "
            "again to go on"
        )

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.path}; wait for it, or give another --output") from None
        except OSError as error:
            raise OSError(f"can't lock {self.path}: {error.strerror}; give an --output on a local disk") from None

    def _read(self) -> dict[Place, Done]:
        done: dict[Place, Done] = {}
        self.size = 0
        with open(self.fd, "rb", closefd=False) as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    if not _is_torn(raw):
                        raise self._foreign(number, raw)
                    break
                place, record = _understood(raw)
                if record is None:
                    raise self._foreign(number, raw)
                if place in done:
                    raise ValueError(f"{self.path} holds two records of the input's {place}; remove one of them")
                done[place] = record
                self.size += len(raw)
        return done

    def _foreign(self, number: int, raw: bytes) -> ValueError:
        shown = ascii(raw[:40].decode("utf-8", "replace").rstrip("\n"))
        ends = "; its lines end in CR alone: convert them to LF" if b"\r{" in raw else ""
        return ValueError(
            f"{self.path} line {number} is no record of a batch job: {shown}{ends}; give a new --output, or that of "
            "this job"
        )


def place_of(record: dict[str, Any]) -> Place:
    """Of the line that a record is of."""
    return Place(sys.intern(record.get("file", "")), record["line"])  # of a million names there are few


def _is_torn(raw: bytes) -> bool:
    """Whether it is the beginning of one record; anything else is somebody's file, which must stay as it is.

    Zeros are what a file system may leave where the power failed.
    """
    if not raw.startswith(FIRST_BYTES):
        return FIRST_BYTES.startswith(raw) or not raw.strip(b"\0")
    try:
        text = raw.decode("ascii")
        end = json.JSONDecoder().raw_decode(text)[1]
    except UnicodeDecodeError:  # records are written in ASCII
        return False
    except (ValueError, RecursionError):  # it ends before its record does
        return True
    return not text[end:].strip("\0")  # a whole record may lack its line's end; more after it are other lines


def _understood(raw: bytes) -> tuple[Place, Done | None]:
    """Where the line of a record is and what is needed of it; None where it isn't one."""
    try:
        record = json.loads(raw)
        place, name = place_of(record), record["id"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Place("", 0), None
    digest, settings, failed = record.get("digest"), record.get("settings"), record.get("error") is not None
    answered = failed or "text" in record or "response" in record
    right = type(place.line) is int and isinstance(name, str | int | float | None) and answered
    if not right or not isinstance(settings, dict | None):
        return Place("", 0), None
    return place, Done(id=name, failed=failed, digest=digest, settings=settings)
