"""SIGTERM and SIGINT between steps: clusters pre-empt, people press Ctrl-C, and a run wants to save first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def put_off() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the number of the signal that has come, 0 before any.

    At the end the former handlers stand again and get the signal. Whoever cannot wait for the end of a step presses
    Ctrl-C three times. Only the main thread gets signals; elsewhere nothing is put off.
    """
    caught: list[int] = []
    owner = os.getpid()

    def note(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked worker, which gets Ctrl-C with its parent and ends with it
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        caught.append(number)
        if caught.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    with handled(note):
        yield lambda: caught[0] if caught else 0
    if caught:
        signal.raise_signal(caught[0])


@contextmanager
def ending() -> Iterator[None]:
    """A program in it that gets one of the signals ends with 143 or 130, as shells count."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    with handled(end):
        yield


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
