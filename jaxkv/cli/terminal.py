"""What surrounds a command: a Ctrl-C that is heard, and streams that may be closed, full or short of letters."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO, TypeVar

T = TypeVar("T")
STOPPED = 130
"""Exit status after Ctrl-C."""


class Interrupts:
    """Ctrl-C, heard where it does no harm: between two events.

    An exception at any moment may be swallowed by a callback, become another one in an import, or tear down what is
    being compiled. The second Ctrl-C ends the process at once, also while a compiler leaves Python no say; a batch
    job's output stands that.

    A context manager. Where SIGINT is ignored, or has another handler, it is left alone.
    """

    def __init__(self) -> None:
        self.heard = self._takes = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        self._takes = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._takes:
            self._heard_by, self._told_by = socket.socketpair()
            self._told_by.setblocking(False)
            self._woken_before = signal.set_wakeup_fd(self._told_by.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_end_at_the_second, args=[self._heard_by], daemon=True).start()
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._takes:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(self._woken_before)
            self._told_by.close()

    def check(self) -> None:
        """Raises KeyboardInterrupt where Ctrl-C was heard."""
        if self.heard:
            raise KeyboardInterrupt

    def heed(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a ``check`` before each."""
        self.check()
        for item in items:
            self.check()
            yield item

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_at_the_second(told: socket.socket) -> None:
    """Is told the number of each signal as it comes, where the main thread may be in a compiler for minutes."""
    heard = 0
    with told:
        while number := told.recv(1):
            heard += number[0] == signal.SIGINT
            if heard == 2:
                os._exit(STOPPED)


class Words(io.TextIOBase):
    """Standard error: from the first word that can't get out on, all go to the null device, and the work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.encoding


@contextmanager
def safe_streams() -> Iterator[None]:
    """Fills the places of closed standard streams, keeps trouble with standard error from ending the work, and has
    standard output replace what its encoding lacks."""
    fill_closed()
    before = sys.stderr
    sys.stderr = Words(os.fdopen(2, "w", closefd=False) if before is None else before)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in (sys.stdout, before):
            if stream is None:
                continue
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)  # whoever wrote has been told; the interpreter's own last flush would tell it again
        sys.stderr = before


def can_say(text: str) -> bool:
    """Whether standard output has all letters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def fill_closed() -> None:
    """Opens the null device where a standard stream is closed: else the next file, such as an output, gets its number,
    and with it what libraries write to standard error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


def silence(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()
