"""A small server that speaks as much of the Hugging Face Hub's HTTP as pushing and pulling a model needs."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_is_good_here"


@dataclass
class Repository:
    private: bool = False
    settings: dict = field(default_factory=dict)  # what it was created with
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit: path to content
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags to commits

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, files: dict[str, bytes]) -> str:
        """Make a new commit on main with these files, for tampering as much as for a push."""
        content = repr((len(self.commits), sorted(files.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs["main"] = commit
        return commit


class HubServer(ThreadingHTTPServer):
    """Holds repositories; `failures` and `truncations` spoil that many of the coming answers."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.reset()
        super().__init__(address, _Handler)

    def reset(self) -> None:
        """Forget everything. A client keeps its connections open, so a new server would not get its requests."""
        self.repositories: dict[str, Repository] = {}
        self.failures: list[int] = []  # status codes for the next requests; 0 lets one pass
        self.truncations = 0  # of the next downloads
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(("POST", self.path))
        if self.made_to_fail():
            pass
        elif self.path == "/api/validate-yaml":
            self.validate(json.loads(body))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/(?:models|spaces)/([^/]+/[^/]+)/(preupload|commit|tag)/(.+)", self.path):
            repository = self.server.repositories[match[1]]
            getattr(self, match[2])(match[1], repository, unquote(match[3]), body)
        else:
            self.answer(404, {"error": f"no route {self.path}"})

    def made_to_fail(self) -> bool:
        status = self.server.failures.pop(0) if self.server.failures else 0
        if status:
            self.answer(status, {"error": "made to fail"})
        return status != 0

    def validate(self, body: dict) -> None:
        errors = [] if re.search("^license: .", body["content"].split("---")[1], re.M) else [{"message": "no license"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: dict) -> None:
        name = f"{body.get('organization') or 'me'}/{body['name']}" if "/" not in body["name"] else body["name"]
        url = f"http://{self.headers['Host']}/{name}"
        if name in self.server.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = body.get("private") or body.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=bool(private), settings=body)
        self.server.repositories[name].commit({".gitattributes": b""})
        self.answer(200, {"url": url, "name": name, "id": name})

    def preupload(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        _, files = repository.files(revision)
        files = dict(files)
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                del files[operation["value"]["path"]]
        commit = repository.commit(files)
        url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def tag(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        tag = json.loads(body)["tag"]
        if tag in repository.refs:
            self.answer(409, {"error": "Tag reference exists already"})
            return
        repository.refs[tag] = repository.files(revision)[0]
        self.answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if self.made_to_fail():
            pass
        elif self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            if self.find(match[1], "main"):
                self.list_refs(self.server.repositories[match[1]].refs)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            if found := self.find(match[1], match[3] or "main"):
                self.list_files(match[1], *found, tree=match[2] == "tree")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.find(match[1], match[2]):
                self.send_file(*found, match[3])
        else:
            self.answer(404, {"error": f"no route {path}"})

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            # As on the Hub, a stranger is not told whether a private repository exists.
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        found = repository.files(revision)
        if found is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def list_files(self, name: str, commit: str, files: dict[str, bytes], *, tree: bool) -> None:
        if tree:
            entries = [
                {"type": "file", "oid": _blob(data), "size": len(data), "path": path} for path, data in files.items()
            ]
            self.answer(200, entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            private = self.server.repositories[name].private
            self.answer(200, {"id": name, "sha": commit, "siblings": siblings, "private": private, "tags": []})

    def list_refs(self, refs: dict[str, str]) -> None:
        entries = {"branches": [], "tags": [], "converts": []}
        for name, commit in refs.items():
            kind = "branches" if name == "main" else "tags"
            ref = f"refs/{'heads' if name == 'main' else 'tags'}/{name}"
            entries[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        self.answer(200, entries)

    def send_file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data, start = files[path], 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_blob(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.truncations and len(data) > 10_000:
            self.server.truncations -= 1
            self.wfile.write(data[start : start + 5_000])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def answer(self, status: int, content: dict | list, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        if status >= 400 and isinstance(content, dict):
            self.send_header("X-Error-Message", content.get("error", "invalid"))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """Name a file as git does."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
