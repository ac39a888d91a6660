"""Stop politely: a first Ctrl-C or SIGTERM asks, a second Ctrl-C insists.

The request is only a flag. The loop reads it after every step, and evaluation and sampling poll it too, so a
preempted job saves within a fraction of its grace period.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["stop_requests"]


@contextlib.contextmanager
def stop_requests(announce: Callable[[str], None] = lambda _: None) -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM while the body runs.

    Args:
        announce: Told once, in words, when a stop is requested.

    Yields:
        A function that says whether a stop was requested. Outside the main thread signals cannot be
        caught, and it always says no.
    """
    requested = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not requested:
            again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
            announce(f"{signal.Signals(number).name}: saving and stopping{again}")
        requested = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
