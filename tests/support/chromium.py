"""Headless Chromium, spoken to through a pipe by its DevTools protocol: what a page looks like, and what it
asks for. No library; the browser is Debian's package `chromium`."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROGRAM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
"""`None`: there is none here."""


class Browser:
    """One page of one browser."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._next = 0
        self._session = ""
        self._rest = b""
        self.requested: list[str] = []
        """Addresses that the page asked for, its own file left out."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Close the pipes."""
        with contextlib.suppress(OSError):
            self._writer.close()
        self._reader.close()

    def call(self, method: str, **params: Any) -> Any:
        """The result of a method of the protocol."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> Mapping[str, Any]:
        while b"\0" not in self._rest:
            more = self._reader.read1(1 << 20)  # type: ignore[attr-defined]
            assert more, "the browser has gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        event: Mapping[str, Any] = json.loads(message)
        if event.get("method") == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if url != self._url:
                self.requested.append(url)
        self._seen.append(str(event.get("method", "")))
        return event

    _url = ""
    _seen: list[str] = []  # noqa: RUF012

    def open(self, path: Path, *, width: int = 1440, height: int = 1000, dark: bool = False) -> None:
        """Show `path` in a window of `width` x `height`."""
        self._url = path.resolve().as_uri()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._seen.clear()
        self.call("Page.navigate", url=self._url)
        while "Page.loadEventFired" not in self._seen:
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, to: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        to.write_bytes(base64.b64decode(shown["data"]))

    def pdf(self) -> bytes:
        """As printed on its own page size."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(printed["data"])


def _pipe() -> tuple[int, int]:
    """Both ends above the numbers that the browser wants."""
    ends = os.pipe()
    above = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends)
    for end in ends:
        os.close(end)
    return above[0], above[1]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert PROGRAM is not None
    to_read, from_write = _pipe()
    from_read, to_write = _pipe()
    with tempfile.TemporaryDirectory() as profile:
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        arguments = [
            PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars=false",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["/bin/bash", "-c", command, *arguments], pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            found = Browser(from_read, from_write)
            try:
                yield found
            finally:
                found.close()
        finally:
            process.terminate()
            process.wait(10)
