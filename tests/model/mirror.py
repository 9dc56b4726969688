"""A Hugging Face hub for the tests: the two paths that a download asks for, over files of a folder."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes: larger files are known by SHA-256, smaller ones by git's SHA-1


class Mirror:
    """cut: after so many bytes a large answer breaks off, once. spoiled: files of wrong content.

    ranges, sent: the ranges and the files that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.cut = 0
        self.spoiled: set[str] = set()
        self.ranges: list[str] = []
        self.sent: list[str] = []

    def listing(self, repository: str) -> dict[str, Any]:
        root = self.folder / repository
        siblings = []
        for path in sorted(each for each in root.rglob("*") if each.is_file()):
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            row: dict[str, Any] = {"rfilename": str(path.relative_to(root)), "size": len(data), "blobId": blob}
            if len(data) > LARGE:
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(row)
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}


@contextlib.contextmanager
def mirror(folder: Path) -> Iterator[Mirror]:
    made = Mirror(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if found := re.match(r"/api/models/([^/]+/[^/?]+)/revision/", self.path):
                if not (folder / found[1]).is_dir():
                    return self.reply(404, b"{}")
                return self.reply(200, json.dumps(made.listing(found[1])).encode())
            found = re.match(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/([^?]+)", self.path)
            if not found:
                return self.reply(404, b"")
            data = (folder / found[1] / found[2]).read_bytes()
            made.sent.append(found[2])
            if found[2] in made.spoiled:
                data = bytes(len(data))
            wanted = self.headers.get("range", "")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if wanted:
                made.ranges.append(wanted)
            return self.reply(206 if wanted else 200, data[start:], large=len(data) > LARGE)

        def reply(self, status: int, data: bytes, *, large: bool = False) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.send_header("content-type", "application/json")
            self.end_headers()
            if large and 0 < made.cut < len(data):
                data, made.cut = data[: made.cut], 0
                self.close_connection = True
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
