"""A hub of one data set on this machine, for tests: files over HTTP, as the hub has them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

REVISION = "a" * 40


@contextmanager
def hub_with(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves the data set `name`, `organisation/name`; gives the address of the hub (`HF_ENDPOINT`)."""
    about, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def _send(self, body: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _send_json(self, value: object) -> None:
            self._send(json.dumps(value).encode(), Content_Type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                paths = json.loads(body)["paths"]
            except ValueError:
                paths = parse_qs(body.decode())["paths"]
            self._send_json([_file(path, files[path]) for path in paths if path in files])

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = path.removeprefix(resolve).partition("/")[2]
            if path.startswith(resolve) and file in files:
                tag = hashlib.sha1(files[file]).hexdigest()
                self._send(files[file], ETag=f'"{tag}"', X_Repo_Commit=REVISION)
            elif path.startswith(f"{about}/tree/"):
                folder = path.removeprefix(f"{about}/tree/").partition("/")[2]
                self._send_json(list(_listed(files, f"{folder}/" if folder else "")))
            elif path.startswith(about):
                known = {"id": name, "sha": REVISION, "private": False, "disabled": False, "gated": False}
                siblings = [{"rfilename": each} for each in files]
                self._send_json(known | {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings})
            else:
                what = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
                self._send(b"{}", 404, X_Error_Code=what)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _file(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _listed(files: Mapping[str, bytes], folder: str) -> Iterator[dict[str, object]]:
    """What is in `folder` itself, which ends in a slash or is empty."""
    folders: set[str] = set()
    for path, content in files.items():
        first, slash, _ = path.removeprefix(folder).partition("/")
        if path.startswith(folder) and not slash:
            yield _file(path, content)
        elif path.startswith(folder) and first not in folders:
            folders.add(first)
            yield {"type": "directory", "path": folder + first, "oid": "b" * 40, "size": 0}
