"""Signals that ask a run to stop: noted here, acted on at a step boundary by all ranks together."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_early: list[str] = []  # those that came before there was a run
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Stop(BaseException):
    """A signal came while the data was waited for."""


def listen() -> None:
    """Note the signals from now on, for the run that is about to start: importing torch alone takes seconds."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            signal.signal(number, lambda number, frame: _early.append(signal.Signals(number).name))


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when its parent dies: the launcher's own end would leave it running (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Signals:
    """Notes SIGTERM, SIGUSR1, SIGUSR2 and SIGINT; a second SIGINT interrupts at once. `name` is the last, or empty."""

    def __init__(self, say: bool):
        self.name, self.say, self._waiting = _early[-1] if _early else "", say, False
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (*ASKING, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While something is waited for that may never come, a signal raises Stop at once, as does one noted before."""
        self._waiting = True
        try:
            if self.name:
                raise Stop
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if number == signal.SIGINT and self.say:
            print("\nstopping after this step (once more: at once)", file=sys.stderr, flush=True)
        if self._waiting:
            raise Stop

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
