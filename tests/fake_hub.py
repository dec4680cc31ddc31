"""A model hub on this machine: it serves folders as repositories, over the part of the hub's HTTP API that is used."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_JSON = {"Content-Type": "application/json"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by their ids. `broken` are names of files that it does not hand out, of which `slow` it
    hands out half; `asked` is what was asked for:
    the method and the path."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories, self.broken, self.slow = repositories, set[str](), set[str]()
        self.ending = threading.Event()
        self.asked: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has gone
            super().handle()

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        """What a repository holds under some paths, and the two steps of a commit of files that are no LFS files."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        body = self._body().decode()
        found = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/(paths-info|preupload|commit)/[^/]+", path)
        if found is None or (folder := self.server.repositories.get(found[1])) is None:
            self._refuse("RepoNotFound")
            return
        answer: object
        if found[2] == "paths-info":
            there = [folder / name for name in parse_qs(body).get("paths", ()) if (folder / name).exists()]
            answer = [_entry(folder, one) for one in there]
        elif found[2] == "preupload":
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **kinds} for file in json.loads(body)["files"]]}
        else:
            for change in map(json.loads, body.splitlines()):
                if change["key"] == "file":
                    target = folder / change["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(change["value"]["content"]))
            url = f"{self.server.endpoint}/datasets/{found[1]}/commit/{COMMIT}"
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
        self._send(200, json.dumps(answer).encode(), _JSON)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = bytearray()
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(found)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            self._list(found[1], found[2] or "")
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found[2] in ("main", COMMIT):
                self._send_file(found[1], found[3], with_body=with_body)
            else:
                self._refuse("RevisionNotFound")
        else:
            self._refuse("EntryNotFound")

    def _list(self, repository: str, rest: str) -> None:
        folder = self.server.repositories.get(repository)
        if folder is None:
            self._refuse("RepoNotFound")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [(str(path.relative_to(folder)), path) for path in files]
        if rest.startswith("/tree"):
            below = folder / rest.partition("/tree/")[2].partition("/")[2]
            whole = "recursive=true" in urlsplit(self.path).query.lower()
            found: object = [_entry(folder, path) for path in sorted(below.rglob("*") if whole else below.glob("*"))]
        else:
            found = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in names]}
        self._send(200, json.dumps(found).encode(), _JSON)

    def _send_file(self, repository: str, name: str, *, with_body: bool) -> None:
        folder = self.server.repositories.get(repository)
        if folder is None:
            self._refuse("RepoNotFound")
        elif not (folder / name).is_file() or (with_body and name in self.server.broken):
            self._refuse("EntryNotFound")
        else:
            headers = {"ETag": f'"{_digest(folder / name)}"', "X-Repo-Commit": COMMIT}
            self._send(200, (folder / name).read_bytes(), headers, with_body=with_body, slow=name in self.server.slow)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, with_body: bool = True, slow: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data[: len(data) // 2] if slow else data)
        if with_body and slow:
            self.wfile.flush()
            self.server.ending.wait(60)

    def _refuse(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)[:40]}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """The hub, which listens until the block ends."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ending.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
