"""Which hosts this process looked for or connected to: what left the machine is observed, not inferred.

Python's own sockets are seen, on which the hub's library works. What a library in another language does by
itself is not. Imports nothing of this project.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Watch:
    def __init__(self, on_contact: Callable[[str], object]) -> None:
        self.hosts: dict[str, None] = {}
        self._on_contact = on_contact

    def note(self, host: str) -> None:
        if host not in self.hosts:
            self.hosts[host] = None
            self._on_contact(host)


_watches: list[_Watch] = []
_is_hooked: list[bool] = []
"""A hook of Python's stays to the end of the process."""


@contextmanager
def contacts_watched(on_contact: Callable[[str], object] = lambda host: None) -> Iterator[None]:
    """Within it, `contacted` knows; `on_contact` is called once with each new host, in any thread."""
    if not _is_hooked:
        sys.addaudithook(_on_event)
        _is_hooked.append(True)
    watch = _Watch(on_contact)
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def contacted() -> tuple[str, ...] | None:
    """Names of hosts, or addresses where no name was looked up, since `contacts_watched` was first entered;
    `None` outside of it."""
    return tuple(_watches[0].hosts) if _watches else None


def _on_event(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if isinstance(host, str):
        for watch in _watches:
            # A name is connected to by its address, which says no more.
            if event == "socket.getaddrinfo" or not watch.hosts:
                watch.note(host)
