"""The thread that brings blocks from disk, one after the other, as memory for them becomes free."""

from __future__ import annotations

import threading
from collections.abc import Callable

ReadJob = Callable[[], None]


class ReaderThread:
    """Does one job after the other until it is closed.

    `changed` guards what decides on the next job and what jobs leave: whoever changes either holds it and
    notifies.
    """

    def __init__(self, name: str, next_job: Callable[[], ReadJob | None]) -> None:
        """`next_job` takes a job out of what there is to do, or gives `None`; it is called with `changed`
        held. A job is done without it and raises nothing."""
        self.changed = threading.Condition()
        self.is_closed = False
        self._next_job = next_job
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Once all is there that `next_job` looks at."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no further job. Does not wait."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def close(self) -> None:
        """Begin no further job, wait for the one under way. May be called twice."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._wait_for_job()) is not None:
            job()

    def _wait_for_job(self) -> ReadJob | None:
        with self.changed:
            while not self.is_closed:
                job = self._next_job()
                if job is not None:
                    return job
                self.changed.wait()
        return None
