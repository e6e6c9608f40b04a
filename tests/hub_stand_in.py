"""The endpoints of the Hugging Face Hub that a bundle needs, with repositories in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub.utils import disable_progress_bars

disable_progress_bars()
WRITER, READER = "hf_writer", "hf_reader"
"""A token that may write as ``me``, and one that may not."""


class StandIn:
    """Repositories by name, each with files by revision and name.

    Attributes:
        repos: ``{repo: {revision: {file: bytes}}}``.
        private: Repositories that only the writer sees.
        asked: Files that were downloaded.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []

    def sha(self, repo: str, revision: str) -> str:
        names = sorted(self.repos[repo][revision].items())
        return hashlib.sha1(json.dumps([(name, data.hex()) for name, data in names]).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repos[repo]
        return branches.get(revision) or next(
            (branches[one] for one in branches if self.sha(repo, one) == revision), None
        )

    def answer(self, method: str, path: list[str], body: bytes, token: str | None) -> tuple[int, Any, dict[str, str]]:
        """Return status, content (bytes or what becomes JSON) and headers."""
        if path == ["api", "validate-yaml"]:
            return 200, {"warnings": [], "errors": []}, {}
        if method == "POST" and token != WRITER:
            return (401 if token is None else 403), {"error": "no"}, {}
        if path == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if repo not in self.repos or (repo in self.private and token != WRITER):
            return 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"}
        what, revision = (path[4], path[5]) if path[0] == "api" else (path[2], path[3])
        if what == "branch":
            self.repos[repo].setdefault(revision, dict(self.repos[repo]["main"]))
            return 200, {}, {}
        files = self.files(repo, revision)
        if files is None:
            return 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"}
        if what == "resolve":
            name, sha = path[4], hashlib.sha1(files[path[4]]).hexdigest()
            self.asked += [name] if method == "GET" else []
            commit = next(self.sha(repo, one) for one in self.repos[repo] if self.repos[repo][one] is files)
            return 200, files[name], {"ETag": f'"{sha}"', "X-Repo-Commit": commit}
        return self._repository(what, repo, revision, files, body)

    def _create(self, given: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        repo = f"{given['organization']}/{given['name']}"
        if given["organization"] != "me":
            return 403, {"error": "no"}, {}
        new = repo not in self.repos
        self.repos.setdefault(repo, {"main": {".gitattributes": b""}})
        if given.get("private") or given.get("visibility") == "private":
            self.private.add(repo)
        return (200 if new else 409), {"url": f"{huggingface_hub.constants.ENDPOINT}/{repo}"}, {}

    def _repository(
        self, what: str, repo: str, revision: str, files: dict[str, bytes], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        if what == "revision":
            return 200, {"id": repo, "sha": self.sha(repo, revision), "siblings": []}, {}
        if what == "tree":
            listed = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return 200, listed, {}
        if what == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            return 200, {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}, {}
        assert what == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{huggingface_hub.constants.ENDPOINT}/{repo}/commit/1"
        return 200, {"commitUrl": url, "commitOid": self.sha(repo, revision), "success": True}, {}


@contextmanager
def serving(hub: StandIn):
    """Answer requests on this machine, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            path = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
            status, content, headers = hub.answer(self.command, path, body, token)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def point_to(address: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this address, write to this cache, and know no token."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "tokens"))
    patch.delenv("HF_TOKEN", raising=False)
