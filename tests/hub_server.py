"""A small server of the Hub's protocol on the loopback address: what huggingface_hub asks of it, and no more."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_friend"


class Hub:
    """Repositories by name, each a directory; a context manager.

    ``private`` and ``gated`` name those that need ``TOKEN``; ``cut`` are files of which only half is sent.
    """

    def __init__(self, **repos: Path):
        self.repos: dict[str, Path] = {name.replace("__", "/"): path for name, path in repos.items()}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.status = 0
        self.sent: list[str] = []
        """Files sent, with their revisions."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def answer(self, to: BaseHTTPRequestHandler, *, body: bool) -> None:
        place = unquote(urlsplit(to.path).path).strip("/").split("/")
        if self.status:
            return refuse(to, self.status, "Unavailable")
        api = place[:2] == ["api", "models"]
        repo = "/".join(place[2:4] if api else place[:2])
        rest = place[4:] if api else place[2:]
        known = to.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.repos or (repo in self.private and not known):
            return refuse(to, 401, "RepoNotFound")
        if repo in self.gated and not known and not (api and rest[:1] != ["tree"]):
            return refuse(to, 403, "GatedRepo")
        if len(rest) > 1 and rest[1] not in ("main", "v1", self.commit(repo)):
            return refuse(to, 404, "RevisionNotFound")
        return self._api(to, repo, rest) if api else self._file(to, repo, "/".join(rest[2:]), body)

    def files(self, repo: str) -> dict[str, Path]:
        root = self.repos[repo]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def _api(self, to: BaseHTTPRequestHandler, repo: str, rest: list[str]) -> None:
        files = self.files(repo)
        if rest[:1] == ["tree"]:
            said: object = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                for name, path in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            said = {"_id": "0", "id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": siblings, "tags": []}
        send(to, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _file(self, to: BaseHTTPRequestHandler, repo: str, name: str, body: bool) -> None:
        path = self.files(repo).get(name)
        if path is None:
            return refuse(to, 404, "EntryNotFound")
        data = path.read_bytes()
        headers = {"X-Repo-Commit": self.commit(repo), "ETag": f'"{etag(path)}"', "Accept-Ranges": "bytes"}
        if not body:
            return send(to, b"", headers | {"Content-Length": str(len(data))})
        self.sent.append(name)
        if name in self.cut:
            send(to, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            to.close_connection = True
            return None
        begin = int(to.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        return send(to, data[begin:], headers, 206 if begin else 200)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def send(to: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], status: int = 200) -> None:
    to.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | headers).items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(data)


def refuse(to: BaseHTTPRequestHandler, status: int, code: str) -> None:
    said = json.dumps({"error": code}).encode()
    head = to.command == "HEAD"
    send(
        to,
        b"" if head else said,
        {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": str(len(said))},
        status,
    )
