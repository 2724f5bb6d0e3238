"""A Hugging Face Hub of our own on loopback, for tests: the unmodified huggingface_hub client talks to it over HTTP.

It is written from what the client (huggingface_hub 2.4) sends and reads, keeps everything on disk, and needs nothing
but the standard library (and PyYAML, which huggingface_hub itself needs, to judge a card's front matter). Large files
go by LFS, basic and multipart; xet is not spoken: clients run with `HF_HUB_DISABLE_XET=1`, their documented switch.

    with HubServer(tmp_path / "hub") as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("alice/model")
        hub.fail(method="PUT", route="/_storage/", cut_after=1000)     # cuts the next upload after 1,000 bytes
        result = hub.python("from huggingface_hub import snapshot_download; ...")   # a clean process, a fresh cache
        print(hub.coverage())                                          # the Hub calls made so far

The calls that a run of tests made, as the table of docs/hub_calls.md:

    UNIT_HUB_CALLS=calls.txt python -m pytest tests/test_push*.py tests/test_hub_server.py
    python tests/hub_server.py --list calls.txt > docs/hub_calls.md

By itself, for a client in another process: `python tests/hub_server.py FOLDER [--port N]` (Ctrl-C prints the calls).

The accounts that exist, all of them with public tokens of their own: see `TOKENS`.

A branch moves in one rename, after everything that the commit names lies on disk: a server killed at any point shows
the last whole commit when it is started again. What the real Hub does and this one does not: xet, git over HTTP,
`.gitignore` (`shouldIgnore` is always false), malware scans, building and running Spaces, rate limits, webhooks.
"""

import argparse
import base64
import codecs
import contextlib
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKENS = {
    "hf_aliceWritesWithThisTokenInTests01": ("alice", "write"),
    "hf_aliceReadsWithThisTokenInTests002": ("alice", "read"),
    "hf_bobWritesWithThisTokenInTests0003": ("bob", "write"),
}
ALICE, ALICE_READ_ONLY, BOB = TOKENS
"""Alice may write, with her first token, in `alice/…` and `lab/…`; Bob only in `bob/…`."""
ORGANISATIONS = {"lab": ("alice",)}

LARGE = (  # file names that go by LFS from the first commit on, whatever their size
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot "
    "*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst"
)
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE.split())
SPACE_CARD = "---\ntitle: {name}\nsdk: {sdk}\napp_file: app.py\npinned: false\n---\n"
BLOCK = 1 << 18  # bytes held at once of an upload or a download: a 2 GB shard must not pass through memory whole
NO_CONTENT_LIMIT = 64 << 20  # a body of JSON is refused above this
REGULAR_LIMIT = 10 << 20  # bytes; larger files go by LFS, as on the Hub
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
SHA = re.compile(r"[0-9a-f]{40}")
OID = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """An answer other than success: status, the Hub's `X-Error-Code` where it has one, and its words."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body
        self.headers: dict[str, str] = {}


class CutError(Exception):
    """The connection is to be dropped now, without an answer."""


@dataclass
class Request:
    """One request as the server saw it.

    `route` is the template it matched ("" if none), `headers` the pairs as they came, `received` and `sent` the bytes
    of the bodies, `status` the answer's (0: the connection was cut before any).
    """

    method: str
    route: str
    path: str
    headers: list[tuple[str, str]]
    status: int = 0
    received: int = 0
    sent: int = 0

    def header(self, name: str) -> str | None:
        """The first header of that name, whatever its case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass
class Fault:
    """What `HubServer.fail` set up; `hits` counts how often it has struck."""

    method: str | None
    route: str
    skip: int
    times: int
    status: int | None
    cut_after: int | None
    drop_answer: bool
    kill: bool
    hits: int = 0


def git_hash(data: bytes) -> str:
    """The git blob id of a file's bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(oid: str, size: int) -> bytes:
    """The text that git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside and renames, so that no reader, and no later run, ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def is_text(sample: bytes) -> bool:
    """Whether the first bytes of a file look like UTF-8 text; a character cut in two at the end is no objection."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


def front_matter(card: str) -> dict:
    """The YAML block at the head of a card, {} where there is none; ValueError where it is not a mapping."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if not found:
        return {}
    import yaml

    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("the metadata must be a mapping")
    return json.loads(json.dumps(data, default=str))


def check_path(path: object) -> str:
    """A file's path inside a repository, or an error that says what is wrong with it."""
    if not isinstance(path, str) or not path or "\\" in path or "\0" in path:
        raise HubError(400, f"Invalid path: {path!r}")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


class Repository:
    """One repository on disk: settings, refs, commits, blobs by git id, large files by SHA-256."""

    def __init__(self, folder: Path, kind: str, name: str):
        self.folder, self.kind, self.name = folder, kind, name

    @property
    def settings(self) -> dict:
        return json.loads((self.folder / "settings.json").read_text())

    def write_settings(self, **changes) -> None:
        settings = self.settings if (self.folder / "settings.json").exists() else {}
        write_whole(self.folder / "settings.json", json.dumps(settings | changes).encode())

    @property
    def refs(self) -> dict[str, str]:
        """Full name (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to commit."""
        return json.loads((self.folder / "refs.json").read_text())

    def write_refs(self, refs: dict[str, str]) -> None:
        write_whole(self.folder / "refs.json", json.dumps(refs).encode())

    def commit(self, sha: str) -> dict:
        return json.loads((self.folder / "commits" / f"{sha}.json").read_text())

    def add_commit(self, parent: str | None, files: dict, title: str, message: str, author: str) -> str:
        """Writes a commit that nothing points to yet, and gives its id."""
        body = {"parent": parent, "title": title, "message": message, "author": author, "date": now(), "files": files}
        data = json.dumps(body | {"salt": secrets.token_hex(8)}).encode()
        sha = hashlib.sha1(data).hexdigest()
        write_whole(self.folder / "commits" / f"{sha}.json", data)
        return sha

    def history(self, sha: str) -> list[tuple[str, dict]]:
        """The commits from `sha` back to the first."""
        found: list[tuple[str, dict]] = []
        at: str | None = sha
        while at:
            found.append((at, self.commit(at)))
            at = found[-1][1]["parent"]
        return found

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag, `refs/…` name or (shortened) id; RevisionNotFound otherwise."""
        refs = self.refs
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return refs[name]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [path.stem for path in (self.folder / "commits").glob(f"{revision}*.json")]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def large(self, oid: str) -> Path:
        return self.folder / "lfs" / oid

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def add_blob(self, data: bytes) -> dict:
        """Stores a small file; gives its entry for a commit's table."""
        oid = git_hash(data)
        write_whole(self.blob(oid), data)
        return {"oid": oid, "size": len(data)}

    def add_pointer(self, oid: str, size: int) -> dict:
        """The entry of a large file that has been uploaded."""
        text = pointer(oid, size)
        write_whole(self.blob(git_hash(text)), text)
        return {"oid": git_hash(text), "size": size, "lfs": {"oid": oid, "size": size, "pointerSize": len(text)}}

    def content(self, entry: dict) -> Path:
        return self.large(entry["lfs"]["oid"]) if "lfs" in entry else self.blob(entry["oid"])

    def large_patterns(self, files: dict) -> list[str]:
        entry = files.get(".gitattributes")
        if entry is None:
            return []
        lines = self.content(entry).read_text(errors="replace").splitlines()
        return [line.split()[0] for line in lines if "filter=lfs" in line]


ROUTES: list[tuple[str, str, re.Pattern, str]] = []


def route(method: str, template: str) -> Callable:
    """Marks a handler's method as the answer to a route. `{kind}`: models, datasets or spaces; `{repo}`: user/name;
    `{rev}`: a revision, percent-encoded; `{path}`: the rest."""
    parts = {
        "kind": r"(?P<kind>models|datasets|spaces)",
        "prefix": r"(?P<prefix>datasets/|spaces/|)",
        "repo": r"(?P<repo>[^/]+/[^/]+)",
        "rev": r"(?P<rev>[^/]+)",
        "path": r"(?P<path>.+)",
    }
    pattern = re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], rf"(?P<{found[1]}>[^/]+)"), template)

    def mark(function):
        ROUTES.append((method, template, re.compile(pattern), function.__name__))
        return function

    return mark


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server_version = "TestHub"
    disable_nagle_algorithm = True
    hub: "HubServer"

    # --- the way of a request ---

    def handle_one_request(self) -> None:
        # a peer that goes away in the middle is what some tests are about, not an error of the server
        with contextlib.suppress(OSError):
            super().handle_one_request()
            return
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        self.seen = Request(self.command, "", self.path, list(self.headers.items()))
        self.body_read = False
        self.fault: Fault | None = None
        with self.hub.lock:
            self.hub.requests.append(self.seen)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            try:
                for wanted, template, pattern, name in ROUTES:
                    found = pattern.fullmatch(url.path)
                    if wanted == method and found:
                        self.seen.route = template
                        self.strike(self.hub.next_fault(self.command, template))
                        values = {key: unquote(value) for key, value in found.groupdict().items()}
                        getattr(self, name)(**values)
                        break
                else:
                    self.no_route(unquote(url.path))
            except HubError as error:
                self.send_error_body(error)
            self.drain()
        except CutError:
            self.cut()
        except OSError:
            self.close_connection = True  # the client is gone
        except Exception:
            with self.hub.lock:
                self.hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            self.cut()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def strike(self, fault: Fault | None) -> None:
        """Carries out what a fault does at once; the rest happens where bytes pass."""
        self.fault = fault
        if fault is None:
            return
        if fault.status is not None:
            raise HubError(fault.status, f"{HTTPStatus(fault.status).phrase} (asked for by the test)")
        if fault.cut_after == 0:
            raise CutError

    def left(self, done: int, size: int) -> int:
        """How many of the next `size` bytes may pass after `done`; cuts when there are none left."""
        if self.fault is None or self.fault.cut_after is None:
            return size
        if done >= self.fault.cut_after:
            raise CutError
        return min(size, self.fault.cut_after - done)

    def cut(self) -> None:
        self.close_connection = True
        if self.fault is not None and self.fault.kill:
            self.hub.kill()  # before the client hears of it: whoever sees the cut finds no server
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> Iterator[bytes]:
        """The request's body, block by block, with a length or chunked."""
        self.body_read = True
        cutting = self.seen.route != ""  # what is only drained is not cut

        def count(data: bytes) -> bytes:
            self.seen.received += len(data)
            return data

        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                while size:
                    allowed = self.left(self.seen.received, size) if cutting else size
                    data = self.rfile.read(min(allowed, BLOCK))
                    if not data:
                        raise CutError
                    size -= len(data)
                    yield count(data)
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b"\n", b""):
                pass
            return
        size = int(self.headers.get("Content-Length") or 0)
        while size:
            allowed = self.left(self.seen.received, size) if cutting else size
            data = self.rfile.read(min(allowed, BLOCK))
            if not data:
                raise CutError
            size -= len(data)
            yield count(data)

    def drain(self) -> None:
        """Reads what is left of the body, or the next request would start in the middle of it."""
        if not self.body_read and not self.close_connection:
            self.fault = None
            for _ in self.body():
                pass

    def whole_body(self) -> bytes:
        data = bytearray()
        for block in self.body():
            data += block
            if len(data) > NO_CONTENT_LIMIT:
                self.close_connection = True
                raise HubError(413, "Payload Too Large")
        return bytes(data)

    def json_body(self) -> dict:
        try:
            body = json.loads(self.whole_body() or b"{}")
        except ValueError:
            raise HubError(400, "Invalid JSON") from None
        if not isinstance(body, dict):
            raise HubError(400, "Invalid JSON: an object is expected")
        return body

    def send(self, status: int, data: bytes = b"", headers: dict | None = None, kind="application/json") -> None:
        """One whole answer. The body of the request has been read by then, or is drained after it."""
        if self.fault is not None and self.fault.drop_answer:
            raise CutError
        self.send_head(status, len(data), headers or {}, kind)
        if self.command != "HEAD":
            self.send_bytes(data)

    def send_head(self, status: int, size: int, headers: dict, kind: str) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()

    def send_bytes(self, data: bytes) -> None:
        cutting = not self.seen.received  # a request with a body is cut in its body
        while data:
            allowed = self.left(self.seen.sent, len(data)) if cutting else len(data)
            self.wfile.write(data[:allowed])
            self.seen.sent += allowed
            data = data[allowed:]

    def send_json(self, body, status: int = 200, headers: dict | None = None) -> None:
        self.send(status, json.dumps(body).encode(), headers)

    def send_error_body(self, error: HubError) -> None:
        if not self.body_read:
            self.drain()
        headers = {"X-Error-Message": error.message.splitlines()[0], **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.fault = None
        self.send_json({"error": error.message} | error.body, error.status, headers)

    def send_file(self, path: Path, headers: dict) -> None:
        """A file's bytes, or the range asked for (RFC 9110: one range; others are ignored)."""
        size = path.stat().st_size
        start, end, status = 0, size, 200
        headers = {"Accept-Ranges": "bytes", **headers}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip())
        if found and (found[1] or found[2]):
            if found[1]:
                start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
            else:
                start = max(size - int(found[2]), 0)
            if start >= end:
                error = HubError(416, "Range Not Satisfiable")
                error.headers = {"Content-Range": f"bytes */{size}"}
                raise error
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
        self.send_head(status, end - start, headers, "application/octet-stream")
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            file.seek(start)
            while start < end:
                data = file.read(min(BLOCK, end - start))
                start += len(data)
                self.send_bytes(data)

    def no_route(self, path: str) -> None:
        """Nothing of ours: a repository that is missing if the path names one, else a call that is not covered."""
        found = re.match(r"/(?:api/(models|datasets|spaces)/)?([^/]+(?:/[^/]+)?)", path)
        if found and (found[1] or "/resolve/" in path):
            kind, name = found[1] or "models", found[2]
            if "/" in name and self.hub.folder(kind, name).is_dir():
                self.hub.uncovered.append(f"{self.command} {path}")
                raise HubError(501, f"The test Hub does not cover {self.command} {path}; see tests/hub_server.py")
            self.user()
            self.missing()
        self.hub.uncovered.append(f"{self.command} {path}")
        raise HubError(404, f"The test Hub does not cover {self.command} {path}; see tests/hub_server.py")

    # --- who may do what ---

    def user(self, required: bool = False) -> tuple[str | None, str]:
        """Name and role (`read`, `write`, `` without a token) behind the request's token."""
        given = self.headers.get("Authorization", "")
        if not given:
            if required:
                raise HubError(401, "Invalid username or password.")
            return None, ""
        name, role = self.hub.tokens.get(given.removeprefix("Bearer "), (None, ""))
        if name is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return name, role

    def missing(self) -> None:
        """The Hub tells strangers nothing: a missing repository and a private one look alike."""
        name, _ = self.user()
        if name is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def owns(self, name: str | None, space: str) -> bool:
        return name is not None and (name == space or name in ORGANISATIONS.get(space, ()))

    def repository(self, kind: str, name: str) -> Repository:
        """A repository that the caller may see."""
        person, _ = self.user()
        repository = self.hub.repository(kind, name)
        if repository is None:
            self.missing()
        if repository.settings["private"] and not self.owns(person, name.split("/")[0]):
            self.missing()
        return repository

    def readable(self, kind: str, name: str) -> Repository:
        """A repository whose files the caller may read: a gated one shows itself, but not its files."""
        repository = self.repository(kind, name)
        person, _ = self.user()
        if repository.settings["gated"] and not self.owns(person, name.split("/")[0]):
            if person is None:
                raise HubError(
                    401,
                    f"Access to {kind[:-1]} {name} is restricted. You must have access to it and be authenticated to "
                    "access it. Please log in.",
                    "GatedRepo",
                )
            raise HubError(
                403,
                f"Access to {kind[:-1]} {name} is restricted and you are not in the authorized list. Visit "
                f"{self.hub.endpoint}/{name} to ask for access.",
                "GatedRepo",
            )
        return repository

    def writable(self, kind: str, name: str, proposing: bool = False) -> Repository:
        """A repository that the caller may write to, or (`proposing`) open a pull request on."""
        repository = self.repository(kind, name)
        person, role = self.user()
        if person is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write":
            raise HubError(403, f"Forbidden: you must use a write token to upload to a repository ({name}).")
        if not proposing and not self.owns(person, name.split("/")[0]):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    # --- accounts, creating and deleting ---

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        name, role = self.user(required=True)
        orgs = [
            {"type": "org", "name": org, "fullname": org} for org, people in ORGANISATIONS.items() if name in people
        ]
        self.send_json(
            {
                "type": "user",
                "id": hashlib.sha1(name.encode()).hexdigest()[:24],
                "name": name,
                "fullname": name.title(),
                "isPro": False,
                "orgs": orgs,
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
        )

    @route("GET", "/api/agent-harnesses")
    def harnesses(self) -> None:
        """The client asks once in each cache, before its first call; nothing is known here."""
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def named(self, body: dict) -> tuple[str, str]:
        """Kind and full name out of the body of a create or delete; the caller must own the namespace."""
        person, role = self.user(required=True)
        kind = str(body.get("type") or "model") + "s"
        space, name = body.get("organization") or person, body.get("name")
        if kind not in ("models", "datasets", "spaces"):
            raise HubError(400, f"Invalid repo type: {kind[:-1]}")
        if not all(isinstance(part, str) and NAME.fullmatch(part) for part in (space, name)) or ".." in name:
            raise HubError(400, f"Invalid repo name: {name!r}")
        if role != "write" or not self.owns(person, space):
            raise HubError(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{space}"')
        return kind, f"{space}/{name}"

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        body = self.json_body()
        kind, name = self.named(body)
        if kind == "spaces" and body.get("sdk") not in ("gradio", "docker", "static", "streamlit"):
            raise HubError(400, '"sdk" must be one of gradio, docker, static, streamlit')
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        with self.hub.lock:
            if self.hub.repository(kind, name) is not None:
                raise HubError(409, f"You already created this {kind[:-1]} repo: {name}", url=url)
            self.hub.create(kind, name, body, self.user()[0])
        self.send_json({"url": url, "name": name, "id": name, "private": body.get("visibility") == "private"})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        kind, name = self.named(self.json_body())
        with self.hub.lock:
            if self.hub.repository(kind, name) is None:
                self.missing()
            shutil.rmtree(self.hub.folder(kind, name))
        self.send_json({})

    @route("PUT", "/api/{kind}/{repo}/settings")
    def change_settings(self, kind: str, repo: str) -> None:
        body = self.json_body()
        with self.hub.lock:
            repository = self.writable(kind, repo)
            changes = {"gated": body["gated"]} if "gated" in body else {}
            if "visibility" in body or "private" in body:
                changes["private"] = bool(body.get("private", body.get("visibility") == "private"))
            repository.write_settings(**changes)
        self.send_json(changes)

    @route("GET", "/api/{kind}/{repo}/auth-check")
    def check_access(self, kind: str, repo: str) -> None:
        self.readable(kind, repo)
        self.send_json({})

    @route("GET", "/api/{kind}/{repo}/auth-check/write")
    def check_write_access(self, kind: str, repo: str) -> None:
        self.writable(kind, repo)
        self.send_json({})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        body = self.json_body()
        problems, warnings = [], []
        try:
            data = front_matter(str(body.get("content", "")))
        except ValueError as error:
            problems, data = [str(error)], {}
        if not data and not problems:
            warnings.append("empty or missing yaml metadata in repo card")
        if body.get("repoType") == "space" and data and data.get("sdk") not in ("gradio", "docker", "static"):
            problems.append('"sdk" must be one of [gradio, docker, static]')
        answer = {
            "errors": [{"message": text} for text in problems],
            "warnings": [{"message": text} for text in warnings],
        }
        self.send_json(answer, 400 if problems else 200)

    # --- reading ---

    @route("GET", "/api/{kind}/{repo}")
    def info(self, kind: str, repo: str, rev: str = "main") -> None:
        repository = self.repository(kind, repo)
        sha = repository.resolve(rev)
        commit, settings = repository.commit(sha), repository.settings
        siblings = []
        for path, entry in sorted(commit["files"].items()):
            siblings.append({"rfilename": path})
            if self.flag("blobs"):
                siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    large = entry["lfs"]
                    siblings[-1]["lfs"] = {"sha256": large["oid"], "size": large["size"]}
                    siblings[-1]["lfs"]["pointerSize"] = large["pointerSize"]
        body = {
            "_id": hashlib.sha1(f"{kind}/{repo}".encode()).hexdigest()[:24],
            "id": repo,
            "author": repo.split("/")[0],
            "sha": sha,
            "lastModified": commit["date"],
            "createdAt": settings["created"],
            "private": settings["private"],
            "gated": settings["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        with contextlib.suppress(ValueError, KeyError):
            card = front_matter(repository.content(commit["files"]["README.md"]).read_text(errors="replace"))
            body |= {"cardData": card, "tags": list(card.get("tags") or [])}
            if kind == "models":
                body |= {key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card}
        if kind == "models":
            body["modelId"] = repo
        if kind == "spaces":
            body |= {"sdk": settings["sdk"], "runtime": self.runtime(settings)}
        if wanted := self.query.get("expand") or self.query.get("expand[]"):
            body = {key: value for key, value in body.items() if key in ("_id", "id", *wanted)}
        self.send_json(body)

    @route("GET", "/api/{kind}/{repo}/revision/{rev}")
    def info_of_revision(self, kind: str, repo: str, rev: str) -> None:
        self.info(kind, repo, rev)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def entry(self, path: str, entry: dict) -> dict:
        return {"type": "file", "path": path, **entry}

    def page(self, items: list) -> None:
        """One page of a listing; `Link` names the next."""
        size = self.hub.page_size
        if limit := self.query.get("limit", [""])[0]:
            size = min(size, int(limit))
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(items):
            kept = "".join(f"{key}={quote(one)}&" for key in self.query if key != "cursor" for one in self.query[key])
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?{kept}cursor={start + size}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send_json(items[start : start + size], headers=headers)

    @route("GET", "/api/{kind}/{repo}/tree/{rev}")
    def tree(self, kind: str, repo: str, rev: str, path: str = "") -> None:
        repository = self.readable(kind, repo)
        sha = repository.resolve(rev)
        commit = repository.commit(sha)
        inside = path.strip("/") + "/" if path.strip("/") else ""
        found: dict[str, dict] = {}
        for name, entry in sorted(commit["files"].items()):
            if not name.startswith(inside):
                continue
            steps = name[len(inside) :].split("/")
            for depth in range(1, len(steps)):
                folder = inside + "/".join(steps[:depth])
                if depth == 1 or self.flag("recursive"):
                    oid = hashlib.sha1(f"{sha}/{folder}".encode()).hexdigest()
                    found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if len(steps) == 1 or self.flag("recursive"):
                found[name] = self.entry(name, entry)
        if inside and not found:
            raise HubError(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
        if self.flag("expand"):
            for one in found.values():
                one["lastCommit"] = {"id": sha, "title": commit["title"], "date": commit["date"]}
        self.page([found[name] for name in sorted(found)])

    @route("GET", "/api/{kind}/{repo}/tree/{rev}/{path}")
    def tree_of_folder(self, kind: str, repo: str, rev: str, path: str) -> None:
        self.tree(kind, repo, rev, path)

    @route("POST", "/api/{kind}/{repo}/paths-info/{rev}")
    def paths_info(self, kind: str, repo: str, rev: str) -> None:
        data = self.whole_body()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(data).get("paths", [])
        else:
            paths = parse_qs(data.decode()).get("paths", [])
        repository = self.readable(kind, repo)
        sha = repository.resolve(rev)
        files = repository.commit(sha)["files"]
        found = []
        for path in paths:
            if path in files:
                found.append(self.entry(path, files[path]))
            elif any(name.startswith(path.rstrip("/") + "/") for name in files):
                oid = hashlib.sha1(f"{sha}/{path.rstrip('/')}".encode()).hexdigest()
                found.append({"type": "directory", "path": path.rstrip("/"), "oid": oid, "size": 0})
        self.send_json(found)

    @route("GET", "/api/{kind}/{repo}/refs")
    def list_refs(self, kind: str, repo: str) -> None:
        found: dict[str, list] = {"branches": [], "converts": [], "tags": []}
        places = {"refs/heads/": "branches", "refs/tags/": "tags"}
        if self.flag("include_prs"):
            found["pullRequests"] = []
            places["refs/pr/"] = "pullRequests"
        for ref, sha in self.repository(kind, repo).refs.items():
            for start, place in places.items():
                if ref.startswith(start):
                    name = ref if place == "pullRequests" else ref[len(start) :]
                    found[place].append({"name": name, "ref": ref, "targetCommit": sha})
        self.send_json(found)

    @route("GET", "/api/{kind}/{repo}/commits/{rev}")
    def list_commits(self, kind: str, repo: str, rev: str) -> None:
        repository = self.repository(kind, repo)
        self.page(
            [
                {
                    "id": sha,
                    "title": commit["title"],
                    "message": commit["message"],
                    "authors": [{"user": commit["author"]}],
                    "date": commit["date"],
                }
                for sha, commit in repository.history(repository.resolve(rev))
            ]
        )

    @route("GET", "/{prefix}{repo}/resolve/{rev}/{path}")
    def resolve(self, prefix: str, repo: str, rev: str, path: str) -> None:
        """A file of a revision: small ones at once, large ones by a redirect to storage that needs no token."""
        kind = prefix.rstrip("/") or "models"
        repository = self.readable(kind, repo)
        sha = repository.resolve(rev)
        entry = repository.commit(sha)["files"].get(path)
        if entry is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers = {"X-Repo-Commit": sha}
            raise error
        if "lfs" not in entry:
            self.send_file(repository.content(entry), {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'})
            return
        oid = entry["lfs"]["oid"]
        self.send(
            302,
            headers={
                "X-Repo-Commit": sha,
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(entry["size"]),
                "ETag": f'"{entry["oid"]}"',
                "Location": self.hub.signed(f"/_storage/objects/{kind}/{repo}/{oid}"),
            },
        )

    @route("GET", "/_storage/objects/{kind}/{repo}/{oid}")
    def download(self, kind: str, repo: str, oid: str) -> None:
        path = self.stored(kind, repo, oid).large(oid)
        if not path.is_file():
            raise HubError(404, "NoSuchKey")
        self.send_file(path, {"ETag": f'"{oid}"'})

    # --- uploading ---

    @route("POST", "/api/{kind}/{repo}/preupload/{rev}")
    def preupload(self, kind: str, repo: str, rev: str) -> None:
        body = self.json_body()
        repository = self.writable(kind, repo, proposing=self.flag("create_pr") or rev.startswith("refs/pr/"))
        files = repository.commit(repository.resolve(rev))["files"]
        patterns = repository.large_patterns(files)
        answers = []
        for wanted in body.get("files", []):
            path = check_path(wanted.get("path"))
            sample = base64.b64decode(wanted.get("sample") or "")
            large = wanted["size"] > REGULAR_LIMIT or not is_text(sample)
            large |= any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in files:
                answers[-1]["oid"] = files[path].get("lfs", files[path])["oid"]
        self.send_json({"files": answers})

    @route("POST", "/{prefix}{repo}.git/info/lfs/objects/batch")
    def batch(self, prefix: str, repo: str) -> None:
        """Where to put each large file; nothing for those that lie here already."""
        kind = prefix.rstrip("/") or "models"
        body = self.json_body()
        ref = (body.get("ref") or {}).get("name")
        repository = self.writable(kind, repo, proposing=ref is None or ref.startswith("refs/pr/"))
        transfers = body.get("transfers") or ["basic"]
        answers = []
        for wanted in body.get("objects", []):
            oid, size = wanted.get("oid"), wanted.get("size")
            if not isinstance(oid, str) or not OID.fullmatch(oid) or not isinstance(size, int) or size < 0:
                raise HubError(422, f"Invalid object: {wanted}")
            answers.append({"oid": oid, "size": size, "authenticated": True})
            if repository.large(oid).is_file():
                continue
            place = f"{kind}/{repo}/{oid}"
            upload: dict = {"href": self.hub.signed(f"/_storage/objects/{place}")}
            if "multipart" in transfers and size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                upload = {
                    "href": self.hub.signed(f"/_storage/complete/{place}"),
                    "header": {"chunk_size": str(self.hub.part_size)}
                    | {str(n): self.hub.signed(f"/_storage/parts/{place}/{n}") for n in range(1, count + 1)},
                }
            verify = f"{self.hub.endpoint}/{prefix}{repo}.git/info/lfs/objects/verify"
            answers[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        self.send(
            200, json.dumps({"transfer": "basic", "objects": answers}).encode(), kind="application/vnd.git-lfs+json"
        )

    def stored(self, kind: str, repo: str, oid: str) -> Repository:
        """The repository behind a signed address of storage."""
        repository = self.hub.repository(kind, repo)
        given = self.query.get("signature", [""])[0]
        if not hmac.compare_digest(given, self.hub.signature(unquote(urlsplit(self.path).path))):
            raise HubError(403, "SignatureDoesNotMatch")
        if repository is None or not OID.fullmatch(oid):
            raise HubError(404, "NoSuchKey")
        return repository

    def receive(self, target: Path, oid: str | None = None) -> str:
        """Streams the body to `target`, which appears only when it is whole (and hashes to `oid`); gives the MD5."""
        target.parent.mkdir(parents=True, exist_ok=True)
        md5, sha = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        handle, beside = tempfile.mkstemp(dir=target.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                for block in self.body():
                    md5.update(block)
                    sha.update(block)
                    file.write(block)
            if oid is not None and sha.hexdigest() != oid:
                raise HubError(400, "The provided sha256 does not match the content")
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise
        return md5.hexdigest()

    @route("PUT", "/_storage/objects/{kind}/{repo}/{oid}")
    def upload(self, kind: str, repo: str, oid: str) -> None:
        repository = self.stored(kind, repo, oid)
        etag = self.receive(repository.large(oid), oid)
        self.send(200, headers={"ETag": f'"{etag}"'})

    @route("PUT", "/_storage/parts/{kind}/{repo}/{oid}/{number}")
    def upload_part(self, kind: str, repo: str, oid: str, number: str) -> None:
        repository = self.stored(kind, repo, oid)
        etag = self.receive(repository.folder / "parts" / oid / str(int(number)))
        self.send(200, headers={"ETag": f'"{etag}"'})

    @route("POST", "/_storage/complete/{kind}/{repo}/{oid}")
    def complete(self, kind: str, repo: str, oid: str) -> None:
        """Joins the parts of an upload, in their order and only if each is the one that the client means."""
        body = self.json_body()
        repository = self.stored(kind, repo, oid)
        folder, sha = repository.folder / "parts" / oid, hashlib.sha256()
        repository.large(oid).parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=repository.large(oid).parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                for number, part in enumerate(body.get("parts", []), 1):
                    md5, source = hashlib.md5(usedforsecurity=False), folder / str(number)
                    if part.get("partNumber") != number or not source.is_file():
                        raise HubError(400, "InvalidPart")
                    with open(source, "rb") as data:
                        while block := data.read(BLOCK):
                            md5.update(block)
                            sha.update(block)
                            file.write(block)
                    if part.get("etag", "").strip('"') != md5.hexdigest():
                        raise HubError(400, "InvalidPart")
            if sha.hexdigest() != oid:
                raise HubError(400, "The provided sha256 does not match the content")
            os.replace(beside, repository.large(oid))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        self.send_json({})

    @route("POST", "/{prefix}{repo}.git/info/lfs/objects/verify")
    def verify(self, prefix: str, repo: str) -> None:
        body = self.json_body()
        repository = self.writable(prefix.rstrip("/") or "models", repo, proposing=True)
        path = repository.large(str(body.get("oid")) if OID.fullmatch(str(body.get("oid"))) else "-")
        if not path.is_file() or path.stat().st_size != body.get("size"):
            raise HubError(404, "Object not found")
        self.send_json({})

    @route("POST", "/api/{kind}/{repo}/commit/{rev}")
    def make_commit(self, kind: str, repo: str, rev: str) -> None:
        proposing = self.flag("create_pr")
        lines = [json.loads(line) for line in self.whole_body().splitlines() if line.strip()]
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if header is None or not header.get("summary"):
            raise HubError(400, "A commit needs a header with a summary")
        with self.hub.lock:
            repository = self.writable(kind, repo, proposing=proposing or rev.startswith("refs/pr/"))
            refs = repository.refs
            ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
            if ref not in refs:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            head = refs[ref]
            if parent := header.get("parentCommit"):
                wanted = repository.resolve(parent)
                if wanted != head and not proposing:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                head = wanted
            files = self.apply(repository, dict(repository.commit(head)["files"]), lines)
            person = self.user()[0]
            sha = repository.add_commit(head, files, header["summary"], header.get("description", ""), person)
            answer = {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}/commit/{sha}",
                "hookOutput": "",
            }
            if proposing:
                number = self.open_request(repository, header["summary"], header.get("description", ""), rev, head)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = self.discussion_url(kind, repo, number)
                refs = repository.refs
            repository.write_refs(refs | {ref: sha})
        self.send_json(answer)

    def apply(self, repository: Repository, files: dict, lines: list[dict]) -> dict:
        """The table of files after a commit's operations."""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                continue
            path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
            if key == "file":
                text = value["content"]
                data = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
                files[path] = repository.add_blob(data)
            elif key == "lfsFile":
                oid = value.get("oid", "")
                if value.get("algo") != "sha256" or not OID.fullmatch(oid) or not repository.large(oid).is_file():
                    raise HubError(
                        400,
                        "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                        f"Offending file: - {path}",
                    )
                size = repository.large(oid).stat().st_size
                if value.get("size", size) != size:
                    raise HubError(400, f"The size of {path} is not the size of what was uploaded")
                files[path] = repository.add_pointer(oid, size)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(path + "/")]
                if not gone or any(name not in files for name in gone):
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(400, f"Unknown operation: {key}")
        return files

    # --- branches, tags, pull requests ---

    def change_refs(self, kind: str, repo: str, change: Callable[[Repository, dict], None]) -> None:
        with self.hub.lock:
            repository = self.writable(kind, repo)
            refs = repository.refs
            change(repository, refs)
            repository.write_refs(refs)
        self.send_json({})

    @route("POST", "/api/{kind}/{repo}/branch/{rev}")
    def create_branch(self, kind: str, repo: str, rev: str) -> None:
        start = self.json_body().get("startingPoint") or "main"

        def change(repository, refs):
            if f"refs/heads/{rev}" in refs:
                raise HubError(409, f"Reference already exists: {rev}")
            refs[f"refs/heads/{rev}"] = repository.resolve(start)

        self.change_refs(kind, repo, change)

    @route("DELETE", "/api/{kind}/{repo}/branch/{rev}")
    def delete_branch(self, kind: str, repo: str, rev: str) -> None:
        def change(_, refs):
            if rev == "main":
                raise HubError(403, "Cannot delete the default branch")
            if refs.pop(f"refs/heads/{rev}", None) is None:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

        self.change_refs(kind, repo, change)

    @route("POST", "/api/{kind}/{repo}/tag/{rev}")
    def create_tag(self, kind: str, repo: str, rev: str) -> None:
        tag = self.json_body().get("tag")

        def change(repository, refs):
            if not tag:
                raise HubError(400, '"tag" is required')
            if f"refs/tags/{tag}" in refs:
                raise HubError(409, f"Tag reference exists already: {tag}")
            refs[f"refs/tags/{tag}"] = repository.resolve(rev)

        self.change_refs(kind, repo, change)

    @route("DELETE", "/api/{kind}/{repo}/tag/{rev}")
    def delete_tag(self, kind: str, repo: str, rev: str) -> None:
        def change(_, refs):
            if refs.pop(f"refs/tags/{rev}", None) is None:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

        self.change_refs(kind, repo, change)

    def discussion_url(self, kind: str, repo: str, number: int) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}/discussions/{number}"

    def open_request(self, repository: Repository, title: str, text: str, base: str, start: str) -> int:
        """Notes a pull request that starts at a commit; gives its number."""
        requests = repository.settings["requests"]
        number = len(requests) + 1
        person = self.user()[0]
        made = {"title": title, "text": text, "author": person, "created": now(), "status": "open"}
        repository.write_settings(requests=requests + [made | {"base": base, "start": start, "merge": None}])
        return number

    def discussion(self, kind: str, repo: str, number: str) -> tuple[Repository, dict]:
        repository = self.repository(kind, repo)
        requests = repository.settings["requests"]
        if not number.isdigit() or not 1 <= int(number) <= len(requests):
            raise HubError(404, "Discussion not found")
        return repository, requests[int(number) - 1]

    def describe(self, kind: str, repo: str, number: int, request: dict) -> dict:
        return {
            "num": number,
            "title": request["title"],
            "author": {"name": request["author"]},
            "createdAt": request["created"],
            "status": request["status"],
            "isPullRequest": True,
            "repo": {"name": repo, "type": kind[:-1]},
        }

    @route("GET", "/api/{kind}/{repo}/discussions")
    def list_discussions(self, kind: str, repo: str) -> None:
        requests = self.repository(kind, repo).settings["requests"]
        found = [self.describe(kind, repo, number, one) for number, one in enumerate(requests, 1)]
        if self.query.get("type", ["all"])[0] == "discussion":
            found = []
        if (status := self.query.get("status", ["all"])[0]) != "all":
            found = [one for one in found if (one["status"] in ("open", "draft")) == (status == "open")]
        if author := self.query.get("author", [""])[0]:
            found = [one for one in found if one["author"]["name"] == author]
        self.send_json({"count": len(found), "start": 0, "discussions": found})

    @route("POST", "/api/{kind}/{repo}/discussions")
    def create_discussion(self, kind: str, repo: str) -> None:
        body = self.json_body()
        if not body.get("pullRequest"):
            raise HubError(501, "The test Hub covers pull requests, not discussions")
        with self.hub.lock:
            repository = self.writable(kind, repo, proposing=True)
            start = repository.resolve("main")
            number = self.open_request(repository, body["title"], body.get("description", ""), "main", start)
            requests = repository.settings["requests"]
            requests[-1]["status"] = "draft"
            repository.write_settings(requests=requests)
            repository.write_refs(repository.refs | {f"refs/pr/{number}": start})
        self.send_json({"num": number, "pullRequest": True})

    @route("GET", "/api/{kind}/{repo}/discussions/{number}")
    def show_discussion(self, kind: str, repo: str, number: str) -> None:
        repository, request = self.discussion(kind, repo, number)
        events = []
        for sha, commit in reversed(repository.history(repository.refs[f"refs/pr/{number}"])):
            event = {"id": sha, "type": "commit", "createdAt": commit["date"], "author": {"name": commit["author"]}}
            events.append(event | {"data": {"subject": commit["title"], "oid": sha}})
            if sha == request["start"]:
                events = []
        changes = {"base": f"refs/heads/{request['base']}", "mergeCommitId": request["merge"]}
        self.send_json(
            self.describe(kind, repo, int(number), request)
            | {"events": events, "changes": changes, "filesWithConflicts": [], "diff": ""}
        )

    @route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
    def merge(self, kind: str, repo: str, number: str) -> None:
        """Puts a request's changes on its branch; refused where the branch changed the same files."""
        self.whole_body()
        with self.hub.lock:
            repository = self.writable(kind, repo)
            _, request = self.discussion(kind, repo, number)
            if request["status"] not in ("open", "draft"):
                raise HubError(400, "This pull request is closed")
            refs, ref = repository.refs, f"refs/heads/{request['base']}"
            old, theirs, ours = (
                repository.commit(sha)["files"] for sha in (request["start"], refs[f"refs/pr/{number}"], refs[ref])
            )
            merged = dict(ours)
            for path in {*old, *theirs}:
                if old.get(path) == theirs.get(path):
                    continue
                if ours.get(path) not in (old.get(path), theirs.get(path)):
                    raise HubError(409, f"This pull request conflicts with {request['base']}: {path}")
                merged.pop(path, None)
                if path in theirs:
                    merged[path] = theirs[path]
            title = f"{request['title']} (#{number})"
            sha = repository.add_commit(refs[ref], merged, title, "", self.user()[0])
            repository.write_refs(refs | {ref: sha})
            requests = repository.settings["requests"]
            requests[int(number) - 1] |= {"status": "merged", "merge": sha}
            repository.write_settings(requests=requests)
        self.send_json({})

    # --- Spaces ---

    def runtime(self, settings: dict) -> dict:
        hardware = {"current": settings["hardware"], "requested": settings["hardware"]}
        return {"stage": "BUILDING", "hardware": hardware, "gcTimeout": 172800}

    @route("GET", "/api/spaces/{repo}/runtime")
    def show_runtime(self, repo: str) -> None:
        self.send_json(self.runtime(self.repository("spaces", repo).settings))

    @route("POST", "/api/spaces/{repo}/restart")
    def restart(self, repo: str) -> None:
        self.send_json(self.runtime(self.writable("spaces", repo).settings))

    @route("POST", "/api/spaces/{repo}/hardware")
    def request_hardware(self, repo: str) -> None:
        wanted = self.json_body().get("flavor", "cpu-basic")
        with self.hub.lock:
            repository = self.writable("spaces", repo)
            repository.write_settings(hardware=wanted)
        self.send_json(self.runtime(repository.settings))

    def keep(self, repo: str, what: str) -> None:
        """Adds or removes one variable or secret of a Space."""
        body = self.json_body()
        with self.hub.lock:
            repository = self.writable("spaces", repo)
            kept = dict(repository.settings[what])
            if self.command == "DELETE":
                kept.pop(body.get("key"), None)
            else:
                kept[body["key"]] = {
                    "value": body["value"],
                    "description": body.get("description"),
                    "updatedAt": now(),
                }
            repository.write_settings(**{what: kept})
        self.show(repo, what)

    def show(self, repo: str, what: str) -> None:
        kept = self.writable("spaces", repo).settings[what]
        hidden = ("value",) if what == "secrets" else ()  # a secret cannot be read back
        self.send_json(
            {
                key: {name: one for name, one in value.items() if name not in hidden} | {"key": key}
                for key, value in kept.items()
            }
        )

    @route("GET", "/api/spaces/{repo}/variables")
    def show_variables(self, repo: str) -> None:
        self.show(repo, "variables")

    @route("POST", "/api/spaces/{repo}/variables")
    def add_variable(self, repo: str) -> None:
        self.keep(repo, "variables")

    @route("DELETE", "/api/spaces/{repo}/variables")
    def delete_variable(self, repo: str) -> None:
        self.keep(repo, "variables")

    @route("GET", "/api/spaces/{repo}/secrets")
    def show_secrets(self, repo: str) -> None:
        self.show(repo, "secrets")

    @route("POST", "/api/spaces/{repo}/secrets")
    def add_secret(self, repo: str) -> None:
        self.keep(repo, "secrets")

    @route("DELETE", "/api/spaces/{repo}/secrets")
    def delete_secret(self, repo: str) -> None:
        self.keep(repo, "secrets")


class Listener(ThreadingHTTPServer):
    """The listening socket, which remembers its connections so that all of them can be cut."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address, handler):
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


PATIENCE = """
import time as _time
_sleep = _time.sleep
_time.sleep = lambda seconds: _sleep(min(seconds, 0.02))
"""


@dataclass
class HubServer:
    """The server: start, stop, kill and start again on the same folder and port; a context manager.

    Args:
        root: the folder of all repositories; it outlives the server.
        port: 0 takes a free one, which is kept when the server is started again.
        part_size: bytes; larger LFS files are uploaded in parts of this size.
        page_size: entries in a page of a listing.
        tokens: token to (user, `read` or `write`).

    What it notes: `requests`, every request in the order in which they came; `uncovered`, the calls that it does not
    know; `errors`, its own failures (there must be none).
    """

    root: Path
    port: int = 0
    part_size: int = 5 << 20
    page_size: int = 1000
    tokens: dict[str, tuple[str, str]] = field(default_factory=lambda: dict(TOKENS), repr=False)
    requests: list[Request] = field(default_factory=list, repr=False)
    uncovered: list[str] = field(default_factory=list, repr=False)
    errors: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.root = Path(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.listener: Listener | None = None
        secret = self.root / "secret"
        if not secret.exists():
            write_whole(secret, secrets.token_bytes(32))
        self.secret = secret.read_bytes()

    # --- running ---

    def start(self) -> "HubServer":
        """Listens; the same port as before where the server has run already."""
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.listener = Listener(("127.0.0.1", self.port), handler)
        self.port = self.listener.server_port
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Closes the socket and cuts every open connection. What was not whole on disk stays invisible."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()
            listener.cut_connections()

    def kill(self) -> None:
        """`stop`, as it happens in the middle of a request: callable from a handler's own thread."""
        thread = threading.Thread(target=self.stop, daemon=True)
        thread.start()
        thread.join(timeout=5)

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files lie: another host name, as on the real Hub, so that a token must not be sent there."""
        return f"http://localhost:{self.port}"

    token, read_token, other_token, wrong_token = ALICE, ALICE_READ_ONLY, BOB, "hf_nobodyHasThisTokenInTests00000004"

    def signature(self, path: str) -> str:
        return hmac.new(self.secret, path.encode(), "sha256").hexdigest()

    def signed(self, path: str) -> str:
        """A storage address that works without a token."""
        return f"{self.storage}{path}?signature={self.signature(path)}"

    # --- repositories ---

    def folder(self, kind: str, name: str) -> Path:
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(part) for part in parts):
            return self.root / "no such repository"
        return self.root / kind / parts[0] / parts[1]

    def repository(self, kind: str, name: str) -> Repository | None:
        """A repository by kind (`models`, `datasets`, `spaces`) and name, None where there is none."""
        folder = self.folder(kind, name)
        return Repository(folder, kind, name) if (folder / "refs.json").is_file() else None

    def create(self, kind: str, name: str, body: dict, author: str) -> Repository:
        """A new repository with the first commit that the Hub makes by itself."""
        repository = Repository(self.folder(kind, name), kind, name)
        pairs = {what: {one["key"]: one for one in body.get(what) or []} for what in ("variables", "secrets")}
        repository.write_settings(
            private=body.get("visibility") == "private" or bool(body.get("private")),
            gated=False,
            created=now(),
            sdk=body.get("sdk"),
            hardware=body.get("hardware") or "cpu-basic",
            requests=[],
            **pairs,
        )
        files = {".gitattributes": repository.add_blob(ATTRIBUTES.encode())}
        if kind == "spaces":
            card = SPACE_CARD.format(name=name.split("/")[1], sdk=body["sdk"])
            files["README.md"] = repository.add_blob(card.encode())
        sha = repository.add_commit(None, files, "initial commit", "", author)
        repository.write_refs({"refs/heads/main": sha})
        return repository

    def head(self, name: str, ref: str = "main", kind: str = "models") -> str:
        """The commit that a revision points to, read from disk (works on a server that is down)."""
        return Repository(self.folder(kind, name), kind, name).resolve(ref)

    def files(self, name: str, ref: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Every file of a revision with its content, read from disk."""
        repository = Repository(self.folder(kind, name), kind, name)
        found = repository.commit(repository.resolve(ref))["files"]
        return {path: repository.content(entry).read_bytes() for path, entry in found.items()}

    # --- faults ---

    def fail(
        self,
        *,
        method: str | None = None,
        route: str = "",
        skip: int = 0,
        times: int = 1,
        status: int | None = None,
        cut_after: int | None = None,
        drop_answer: bool = False,
        kill: bool = False,
    ) -> Fault:
        """Sets up what goes wrong with coming requests.

        Args:
            method, route: which requests: the method, and words that the route's template contains.
            skip: so many of them pass unharmed first.
            times: so many of them are struck after that (-1: all).
            status: the answer, 500 or 503 say, in place of the work.
            cut_after: the connection is cut after so many bytes of the request's body, or of the answer's where the
                request has none; 0 cuts before anything is read. A body that ends before passes unharmed.
            drop_answer: the work is done, and the connection is cut in place of the answer.
            kill: with a cut, the server goes down as well, until `start` is called.
        """
        if (status is not None) + (cut_after is not None) + drop_answer != 1:
            raise ValueError("pass one of status, cut_after and drop_answer")
        fault = Fault(method, route, skip, times, status, cut_after, drop_answer, kill)
        with self.lock:
            self.faults.append(fault)
        return fault

    def next_fault(self, method: str, template: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method not in (None, method) or fault.route not in template or fault.times == fault.hits:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                return fault
        return None

    # --- looking back ---

    def calls(self, since: int = 0) -> Counter:
        """How often each (method, route template) was called, from the `since`-th request on."""
        with self.lock:
            return Counter((one.method, one.route) for one in self.requests[since:] if one.route)

    def coverage(self) -> str:
        """The calls made so far, as a Markdown table."""
        rows = [
            f"| `{method}` | `{template}` | {count} |" for (method, template), count in sorted(self.calls().items())
        ]
        return "\n".join(["| Method | Route | Calls |", "| --- | --- | ---: |", *rows])

    def leaks(self) -> list[str]:
        """Where a token has turned up that should not be there.

        Looked through: addresses, headers other than `Authorization`, `Authorization` sent to storage, and whatever
        lies in the repositories (files, commit messages; not the Spaces' secrets, which are kept where they belong).
        """
        known = [*self.tokens, self.wrong_token]
        with self.lock:
            seen = list(self.requests)
        found = []
        for one in seen:
            text = [one.path]
            for key, value in one.headers:
                if key.lower() != "authorization" or "/_storage/" in one.path:
                    text.append(f"{key}: {value}")
            found += [f"{one.method} {line}" for line in text if any(token in line for token in known)]
        for path in self.root.glob("*/*/*/*/*"):
            if path.is_file() and path.parent.name in ("blobs", "commits", "lfs"):
                with open(path, "rb") as file:
                    kept = b""
                    while block := file.read(BLOCK):
                        if any(token.encode() in kept + block for token in known):
                            found.append(str(path))
                            break
                        kept = block[-64:]
        return found

    # --- clients ---

    def environment(self, home: Path, token: str | None = ALICE, patient: bool = False) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub, with `home` as its cache.

        huggingface_hub waits 1 to 8 seconds between attempts; unless `patient`, the process's `time.sleep` is cut to
        20 ms (by a `sitecustomize` of its own), or each test of a dead server would take half a minute.
        """
        home = Path(home)
        home.mkdir(parents=True, exist_ok=True)
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_")) and key != "TRANSFORMERS_OFFLINE"
        }
        for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            kept.pop(proxy, None)
        paths = [kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else []
        if not patient:
            (home / "patience").mkdir(exist_ok=True)
            (home / "patience" / "sitecustomize.py").write_text(PATIENCE)
            paths.insert(0, str(home / "patience"))
        kept |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if token is not None:
            kept["HF_TOKEN"] = token
        return kept

    def run(
        self,
        command: list[str],
        *,
        home: Path | None = None,
        token: str | None = ALICE,
        patient: bool = False,
        **options,
    ) -> subprocess.CompletedProcess:
        """Runs a command as a client of this server; `home` (the cache) is fresh and thrown away unless given.

        Output is captured as text. `options` go to `subprocess.run` (`cwd`, `timeout`, `check`…); `env` adds to the
        environment.
        """
        with tempfile.TemporaryDirectory(prefix="hub-client-") as fresh:
            environment = self.environment(home or Path(fresh), token, patient) | options.pop("env", {})
            options = {"timeout": 120, "capture_output": True, "text": True} | options
            return subprocess.run([str(part) for part in command], env=environment, **options)

    def python(self, code: str, *arguments, **options) -> subprocess.CompletedProcess:
        """Runs Python source in a clean process as a client of this server (`arguments` become `sys.argv[1:]`)."""
        return self.run([sys.executable, "-c", code, *arguments], **options)


def call_list(lines: list[str]) -> str:
    """A page of Markdown: the calls in what `UNIT_HUB_CALLS` gathered, one "METHOD ROUTE" a line, and in how many
    tests each was made; and the calls that the server knows and none of the tests makes."""
    made = Counter(line for line in lines if line)
    known = {f"{method} {template}" for method, template, *_ in ROUTES}
    rows = [
        f"| `{call}` | {made[call] or '-'} |"
        for call in sorted(known | set(made), key=lambda call: call.split()[::-1])
    ]
    return "\n".join(
        [
            "# Calls of the Hub that the tests make",
            "",
            "By the unmodified huggingface_hub client, to the server of `tests/hub_server.py` on loopback; made by",
            "the two commands in that file's docstring. Number: tests in which a call is made.",
            "",
            "| Call | Tests |",
            "| --- | ---: |",
            *rows,
        ]
    )


def main() -> None:
    """Serves until interrupted, then prints the calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="print the calls that UNIT_HUB_CALLS gathered, and end"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--part-size", type=int, default=64 << 20, help="bytes in a part of a multipart upload")
    given = parser.parse_args()
    if given.list is not None:
        print(call_list(given.list.read_text(encoding="utf-8").split("\n")))
        return
    if given.folder is None:
        parser.error("name a folder")
    with HubServer(given.folder, given.port, part_size=given.part_size) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}\nHF_HUB_DISABLE_XET=1\nHF_TOKEN={hub.token}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(hub.coverage(), flush=True)


if __name__ == "__main__":
    main()
