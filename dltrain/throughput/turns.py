"""Training loops that take turns in one process: each in a thread of its own, of which one runs at a time."""

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

Context = AbstractContextManager[Any]


class _Ended(SystemExit):
    """There is no further turn."""


class Player:
    """A loop that calls `boundary()` before each step, where it may be held.

    `drive(player)` is the loop, without end; by the first step it has set `module`, which it calls once a micro-batch,
    and `optimizer`. `settings()` is entered for each turn: what the loop wants of switches that a process has once.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, drive: Callable[["Player"], None], settings: Callable[[], Context] = contextlib.nullcontext
    ) -> None:
        self._settings, self._within, self._stack = settings, contextlib.nullcontext(), contextlib.ExitStack()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._ended = 0, False
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()  # a setting of each thread
        self._thread = threading.Thread(target=self._run, args=(drive,), daemon=True)

    def play(self, steps: int, within: Context | None = None) -> None:
        """Let it take so many steps, inside of `within`, which is entered in its thread. The first turn also builds."""
        self._left, self._within = steps, within or contextlib.nullcontext()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        self._raise()

    def boundary(self) -> None:
        """What the loop calls between steps."""
        if self._left == 0:
            self._stack.close()
            self._done.release()
            self._go.acquire()
            if self._ended:
                raise _Ended
            self._enter()
        self._left -= 1

    def end(self) -> None:
        """Have it leave its loop, if it is in one."""
        self._ended = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()
            self._raise()

    def _enter(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._settings())
        self._stack.enter_context(self._within)

    def _run(self, drive: Callable[["Player"], None]) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._enter()
            drive(self)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
            self._stack.close()
        finally:
            self._done.release()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
