"""A Hub on this machine: an HTTP server that speaks the part of its API which `huggingface_hub` and `datasets` use.

    hub = HubServer(token="hf_...")                 # in a thread of this process; `hub.url`, `hub.close()`
    python tests/hub_server.py --token hf_... --port 0          # of its own; prints the URL

Repositories live in memory: branches of commits, each with all of its files, and a store of large files by their
sha256. What makes a client's life hard is asked for by `hub.faults`: a status instead of an answer, a connection that
is dropped while a body is sent, or after the request was granted. `hub.requests` lists what was asked.

Clients are the real ones, in processes with HF_ENDPOINT set to the URL, HF_HUB_DISABLE_XET=1 and HF_HUB_OFFLINE=0
before they are imported. Not here: Xet, pull requests, permissions of more than one user.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "me"
# As on the Hub: tracked by LFS whatever their size.
LARGE = (".parquet", ".png", ".arrow", ".safetensors", ".bin", ".pt", ".pth")
CARD = re.compile(r"^\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "odc-by", "openrail", "other", "unknown")


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        """As git names it; a large file's is that of its pointer, which is made up here."""
        held = self.sha256.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def oid(self) -> str:
        """By which a client sees that it has the same."""
        return self.sha256 if self.large else self.blob


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commits(self, revision: str) -> list[Commit] | None:
        """Up to the revision, the newest last."""
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for number, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: number + 1]
        return None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        found = self.commits(revision)
        assert found is not None, revision
        return {path: file.content for path, file in found[-1].files.items()}

    def commit(self, revision: str, message: str, files: dict[str, File]) -> Commit:
        before = self.branches.setdefault(revision, [])
        held = sorted((path, file.oid) for path, file in files.items())
        named = f"{self.kind} {self.name} {revision} {len(before)} {message} {held}"
        before.append(Commit(hashlib.sha1(named.encode()).hexdigest(), message, files))
        return before[-1]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" the pattern is found in.

    `what` is a status; or "drop", the connection is closed when half of the body has come; or "drop answer", the
    request is granted, and the connection closed instead of an answer; or a function that is called before the request
    is granted. `echo`: the answer of a status repeats the request's Authorization.
    """

    pattern: str
    what: int | str | Callable[[], None]
    times: int = 1
    echo: bool = False


class HubServer:
    def __init__(self, token: str = "hf_local", port: int = 0):
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        with self.lock:
            for held in (self.repos, self.large, self.faults, self.requests):
                held.clear()

    def dataset(self, name: str) -> Repo:
        return self.repos["dataset", name]

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that was there before."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", "initial commit", {path: File(content, is_large(path)) for path, content in files.items()})
        return repo

    def struck(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        parts = urlsplit(self.path)
        request = f"{self.command} {parts.path}"
        self.query = parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.struck(request)
        size = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.what == "drop":
            self.rfile.read(size // 2)
            return self.drop()
        self.body = self.read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        if fault is not None and isinstance(fault.what, int):
            told = f"asked with {self.headers.get('Authorization')}" if fault.echo else "a fault that was asked for"
            return self.send(fault.what, {"error": told}, {"X-Error-Message": told})
        if fault is not None and callable(fault.what):
            fault.what()
        try:
            with self.hub.lock:
                content, headers = self.grant(self.command, parts.path)
            status = int(headers.pop("status", 200))
        except Refused as refused:
            named = {"X-Error-Code": refused.code} if refused.code else {}
            content, status, headers = refused.body, refused.status, {**named, "X-Error-Message": str(refused)}
        if fault is not None and fault.what == "drop answer":
            return self.drop()
        self.send(status, content, headers)

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks

    def signed_in(self) -> bool:
        """Raises: Refused, by a token that is not the user's."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given is not None

    def must_sign_in(self) -> None:
        if not self.signed_in():
            raise Refused(401, "Invalid username or password.")

    def may_write(self, name: str) -> None:
        self.must_sign_in()
        if not name.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to write to {name}")

    def find(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        signed_in = self.signed_in()
        if repo is None or (repo.private and not signed_in):
            raise Refused(404 if signed_in else 401, "Repository not found", "RepoNotFound")
        return repo

    def find_commits(self, repo: Repo, revision: str) -> list[Commit]:
        commits = repo.commits(revision)
        if commits is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits

    # What is asked: method, path -> content, headers

    def grant(self, method: str, path: str) -> tuple[Any, dict[str, str]]:
        for pattern, asked in ROUTES:
            if (method, path) == pattern:
                return asked(self), {}
        kinds = r"(?P<kind>model|dataset|space)s"
        names = r"(?P<name>[^/]+/[^/]+|[^/]+)"
        if found := re.fullmatch(rf"/api/{kinds}/{names}", path):
            return self.info(self.find(**found.groupdict()), "main"), {}
        if found := re.fullmatch(rf"/api/{kinds}/{names}/(?P<what>[a-z-]+)(/(?P<rest>.*))?", path):
            return self.of_repo(
                method, self.find(found["kind"], found["name"]), found["what"], found["rest"] or ""
            ), {}
        if found := re.fullmatch(rf"/(?P<dataset>datasets/)?{names}\.git/info/lfs/objects/batch", path):
            self.may_write(found["name"])
            return self.batch(), {}
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self.store(found[1]), {}
        if found := re.fullmatch(rf"/(?P<dataset>datasets/)?{names}/resolve/(?P<rest>.*)", path):
            return self.resolve(self.find("dataset" if found["dataset"] else "model", found["name"]), found["rest"])
        raise Refused(404, f"there is no {method} {path} here")

    def of_repo(self, method: str, repo: Repo, what: str, quoted: str) -> Any:
        rest = unquote(quoted)
        match method, what:
            case "GET", "revision":
                return self.info(repo, rest)
            case "GET", "refs":
                heads = {name: commits[-1].oid for name, commits in repo.branches.items()}
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in heads.items()]
                return {"branches": branches, "tags": [], "converts": []}
            case "GET", "tree":
                revision, _, folder = quoted.partition("/")
                return self.tree(repo, unquote(revision), unquote(folder))
            case "POST", "paths-info":
                asked = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
                paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
                return [entry for entry in self.tree(repo, rest, "", recursive=True) if entry["path"] in paths]
        self.may_write(repo.name)
        match method, what:
            case "POST", "branch":
                if rest in repo.branches:
                    raise Refused(409, f"Reference already exists: {rest}")
                start = json.loads(self.body or b"{}").get("startingPoint", "main")
                repo.branches[rest] = list(self.find_commits(repo, start))
                return {}
            case "POST", "preupload":
                files = self.find_commits(repo, rest)[-1].files
                return {"files": [self.upload_mode(files, asked["path"]) for asked in json.loads(self.body)["files"]]}
            case "POST", "commit":
                return self.commit(repo, rest)
        raise Refused(404, f"there is no {method} {what} here")

    def who(self) -> Any:
        self.must_sign_in()
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def validate(self) -> Any:
        asked = json.loads(self.body)
        errors = []
        try:
            data = card_of(asked["content"])
            licenses = data.get("license", [])
            for name in licenses if isinstance(licenses, list) else [licenses]:
                if name not in LICENSES:
                    errors.append({"message": f'"license" must be one of {", ".join(LICENSES)}'})
            for config in data.get("configs", []):
                if not {"config_name", "data_files"} <= set(config):
                    errors.append({"message": '"configs" need a config_name and data_files'})
        except (yaml.YAMLError, AttributeError) as error:
            errors.append({"message": f"not YAML: {error}"})
        if errors:
            raise Refused(400, "Invalid metadata in README.md", errors=errors, warnings=[])
        return {"errors": [], "warnings": []}

    def create(self) -> Any:
        self.must_sign_in()
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        self.may_write(name)
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repos:
            raise Refused(409, f"You already created this {kind} repo: {name}", url=url)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.add(kind, name, {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}, private)
        return {"url": url, "name": name, "id": name}

    def info(self, repo: Repo, revision: str) -> Any:
        commit = self.find_commits(repo, revision)[-1]
        card = {}
        if "README.md" in commit.files:
            card = card_of(commit.files["README.md"].content.decode())
        return {
            "id": repo.name,
            "author": USER,
            "sha": commit.oid,
            "private": repo.private,
            "disabled": False,
            "gated": False,
            "tags": list(card.get("tags", [])),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool = False) -> list[dict[str, Any]]:
        files = self.find_commits(repo, revision)[-1].files
        recursive = recursive or self.query.get("recursive", ["false"])[0].lower() == "true"
        start = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(start):
                continue
            parents = path.split("/")[:-1]
            for depth in range(len(parents)):
                parent = "/".join(parents[: depth + 1])
                if parent.startswith(start):
                    entries.setdefault(parent, {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0})
            large = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries[path] = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
            entries[path] |= {"lfs": large} if file.large else {}
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return [entry for path, entry in entries.items() if recursive or "/" not in path[len(start) :]]

    def upload_mode(self, files: dict[str, File], path: str) -> dict[str, Any]:
        held = {"oid": files[path].oid} if path in files else {}
        return {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False, **held}

    def commit(self, repo: Repo, revision: str) -> Any:
        commits = self.find_commits(repo, revision)
        if revision not in repo.branches:
            raise Refused(400, f"{revision} is no branch")
        files, message = dict(commits[-1].files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit") not in (None, commits[-1].oid):
                        raise Refused(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise Refused(400, f"the LFS object {value['oid']} of {value['path']} was not uploaded")
                    files[value["path"]] = File(self.hub.large[value["oid"]], large=True)
                case "deletedFile":
                    if value["path"] not in files:
                        raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                    del files[value["path"]]
                case "deletedFolder":
                    files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
                case other:
                    raise Refused(400, f"there is no {other} here")
        made = repo.commit(revision, message, files)
        url = f"{self.hub.url}/{'' if repo.kind == 'model' else f'{repo.kind}s/'}{repo.name}/commit/{made.oid}"
        return {"success": True, "commitOid": made.oid, "commitUrl": url}

    def batch(self) -> Any:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(known if asked["oid"] in self.hub.large else {**known, "actions": upload})
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, f"what came is not {oid}")
        self.hub.large[oid] = self.body
        return {}

    def resolve(self, repo: Repo, rest: str) -> tuple[bytes, dict[str, str]]:
        revision, path = map(unquote, rest.split("/", 1))
        commit = self.find_commits(repo, revision)[-1]
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, f"{path} is not in {revision}", "EntryNotFound")
        file = commit.files[path]
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        content = file.content
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers |= {"status": "206", "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first : last + 1]
        return content, headers


ROUTES: list[tuple[tuple[str, str], Callable[[Handler], Any]]] = [
    (("GET", "/api/whoami-v2"), Handler.who),
    (("POST", "/api/validate-yaml"), Handler.validate),
    (("POST", "/api/repos/create"), Handler.create),
]


def card_of(readme: str) -> dict[str, Any]:
    found = CARD.search(readme)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on this machine, in memory, until it is interrupted.")
    parser.add_argument("--token", default="hf_local", help="Of its one user, 'me'.")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free.")
    settings = parser.parse_args()
    hub = HubServer(settings.token, settings.port)
    print(hub.url, flush=True)
    try:
        hub.thread.join()
    except KeyboardInterrupt:
        hub.close()


if __name__ == "__main__":
    main()
