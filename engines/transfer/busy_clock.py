"""How long at least one of several threads was at work."""

from __future__ import annotations

import threading

from engines.transfer.clock import now_s


class BusyClock:
    """Adds up the time in which at least one thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since_s = self._sum_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since_s = now_s()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._sum_s += now_s() - self._since_s

    def take_s(self) -> float:
        with self._lock:
            if self._inside:
                now = now_s()
                self._sum_s, self._since_s = self._sum_s + now - self._since_s, now
            total_s, self._sum_s = self._sum_s, 0.0
            return total_s
