"""Signals that ask a run to stop: noted here, acted on at a step boundary by all ranks together."""

import signal
import sys
import threading
from types import FrameType


class Signals:
    """Notes SIGTERM, SIGUSR1 and SIGINT; a second SIGINT interrupts at once. `name` is the last one noted, or empty."""

    def __init__(self, say: bool):
        self.name, self.say = "", say
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if number == signal.SIGINT and self.say:
            print("\nstopping after this step (once more: at once)", file=sys.stderr, flush=True)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
