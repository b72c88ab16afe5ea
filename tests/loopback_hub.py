"""A Hugging Face Hub on 127.0.0.1 that serves folders, with enough of the HTTP API for the libraries that read it.

    python tests/loopback_hub.py ROOT [--port N] [--log requests.jsonl]

serves the repositories ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME, and prints `HF_ENDPOINT=http://…`. In a
test:

    with LoopbackHub(root) as hub:
        subprocess.run(command, env=hub.environment(home))
        hub.requests    # what was asked: a list of dicts with method, path, status, sent, rank, …

The main branch of a repository is what its folder holds; another branch or tag is the folder ROOT/…/NAME@REVISION. A
commit is a hash of the files, so a changed file makes a new commit. As on the Hub, the ETag of a file is the hash of
its content, small files come through a relative redirect (307), large ones ("LFS") through a redirect to another host
(302), and a repository that does not exist is 401 without a token and 404 with one. Xet, through which the Hub can also
serve large files, is missing.

A test makes the server fail with `hub.faults.append(Fault("GET .*safetensors", cut=1000))`; a program does it with a
POST of a list of such objects to /_control/faults.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import parse_qs, unquote, urlsplit

LFS = re.compile(r".*\.(safetensors|bin|parquet|tar|gz|avi|mp4|model|png|jpg)$")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<verb>revision|tree|paths-info|refs)(/(?P<rest>.*))?)?$"
)
FILE = re.compile(r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)$")
CONTENT = re.compile(r"/(cdn|api/resolve-cache)/(?P<kind>\w+)/(?P<repo>[^/]+/[^/]+)/(?P<commit>[^/]+)/(?P<name>.+)$")
ROOT = Path(__file__).resolve().parents[1]

# Python runs a module of this name before anything else. It makes each process say its rank in every request.
SITECUSTOMIZE = """
import os

os.environ["HF_HUB_USER_AGENT_ORIGIN"] = f"rank-{os.environ.get('RANK', 0)}"
"""


@dataclass
class Fault:
    """What happens to requests whose "METHOD path" fits the regular expression `match`."""

    match: str
    status: int | None = None  # answer with this status
    code: str | None = None  # its X-Error-Code: RepoNotFound, GatedRepo, EntryNotFound or RevisionNotFound
    message: str | None = None  # its X-Error-Message
    headers: dict = field(default_factory=dict)  # more headers of this answer, such as Retry-After
    body: str | None = None  # its content, in place of an error in JSON: a proxy's page, for example
    cut: int | None = None  # send only so many bytes of the content, then close the connection
    short: int | None = None  # answer with only so many bytes, as if the file ended there
    corrupt: bool = False  # change some bytes in the middle of the content
    reset: bool = False  # reset the connection in place of an answer
    delay: float = 0.0  # seconds before the answer
    without_token: bool = False  # only requests without a token
    times: int = 10**9  # only the first so many requests
    hits: int = 0  # how many requests it was


class Repository:
    """The files of a folder at one commit."""

    def __init__(self, folder: Path):
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in found}
        self.commit = hashlib.sha1(repr([(name, self.etag(name)) for name in self.files]).encode()).hexdigest()

    def etag(self, name: str) -> str:
        """SHA-256 of a large file, Git's hash of a small one."""
        path = self.files[name]
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in ETAGS:
            content = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            ETAGS[key] = hashlib.sha256(content).hexdigest() if LFS.match(name) else git
        return ETAGS[key]

    def entry(self, name: str) -> dict:
        """A file or folder as the API lists it."""
        if name not in self.files:
            return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        size, etag = self.files[name].stat().st_size, self.etag(name)
        entry = {"type": "file", "oid": etag[:40], "size": size, "path": name}
        return entry | ({"lfs": {"oid": etag, "size": size, "pointerSize": 134}} if LFS.match(name) else {})

    def tree(self, folder: str, recursive: bool) -> list[dict] | None:
        """The files and folders in a folder of the repository; None if there is no such folder."""
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        names = {name for name in self.files if name.startswith(prefix)}
        if prefix and not names:
            return None
        for name in list(names):
            parents = name[len(prefix) :].split("/")[:-1]
            names |= {prefix + "/".join(parents[: i + 1]) for i in range(len(parents))}
        return [self.entry(name) for name in sorted(names) if recursive or "/" not in name[len(prefix) :]]

    def info(self, kind: str, repo: str) -> dict:
        about = {"pipeline_tag": "image-text-to-text", "library_name": "transformers"} if kind == "models" else {}
        about |= {"_id": "0" * 24, "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": self.commit}
        about |= {"lastModified": "2024-09-26T22:42:57.000Z", "createdAt": "2024-08-16T23:48:22.000Z"}
        about |= {"private": False, "gated": False, "disabled": False, "downloads": 1, "likes": 1}
        return about | {"tags": ["license:mit"], "siblings": [{"rfilename": name} for name in self.files]}


ETAGS: dict[tuple, str] = {}  # by path, size and time of change


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    hub: "LoopbackHub"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, self.query, self.fault, self.record = unquote(url.path), parse_qs(url.query), None, None
        if path.startswith("/_control/"):
            return self.control(path)
        agent = self.headers.get("User-Agent") or ""
        said = re.search(r"origin/rank-(\d+)", agent)
        token = self.headers.get("Authorization")
        self.record = {
            "time": round(time.time(), 3),
            "method": self.command,
            "path": path,
            "range": self.headers.get("Range"),
            "token": bool(token),
            "agent": agent,
            "rank": int(said[1]) if said else None,
            "status": 0,
            "sent": 0,
        }
        self.fault = self.hub.fault_for(f"{self.command} {path}", bool(token))
        try:
            self.answer_request(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def do_CONNECT(self):
        """As a proxy that refuses every connection."""
        self.send_error(407, "Proxy Authentication Required")

    def answer_request(self, path: str):
        if fault := self.fault:
            time.sleep(fault.delay)
            if fault.reset:
                self.hub.note(self.record)
                self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            if fault.status and fault.body is not None:
                return self.answer(fault.status, fault.body.encode(), {"Content-Type": "text/html"} | fault.headers)
            if fault.status:
                return self.fail(fault.status, fault.code, fault.message, fault.headers)
        if found := CONTENT.match(path):
            return self.send_file(self.hub.repository(found["kind"], found["repo"], found["commit"]), found["name"])
        if found := API.match(path):
            return self.api(found["kind"], found["repo"], found["verb"], found["rest"] or "")
        if found := FILE.match(path):
            return self.resolve(found["kind"] or "models", found["repo"], found["revision"], found["name"])
        self.fail(404, None, "There is nothing at this path")

    def known(self, kind: str, repo: str, revision: str) -> Repository | None:
        """The repository at a revision. Answers with an error if there is none."""
        if not (self.hub.root / kind / repo).is_dir():
            # Without a token, the Hub does not tell a repository that is missing from a private one.
            has_token = self.headers.get("Authorization")
            message = "Repository not found" if has_token else "Invalid username or password."
            return self.fail(404 if has_token else 401, "RepoNotFound", message)
        repository = self.hub.repository(kind, repo, revision)
        return repository or self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def api(self, kind: str, repo: str, verb: str | None, rest: str):
        revision, _, folder = rest.partition("/")
        repository = self.known(kind, repo, revision or "main")
        if repository is None:
            return
        if verb == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commit}
            return self.send_json({"branches": [main], "tags": [], "converts": []})
        if verb == "tree":
            entries = repository.tree(folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if entries is None:
                return self.fail(404, "EntryNotFound", f"{folder} does not exist on {revision}")
            return self.send_json(entries)
        if verb == "paths-info":
            try:
                wanted = json.loads(self.body)["paths"]
            except ValueError:
                wanted = parse_qs(self.body.decode()).get("paths", [])
            wanted = [path.strip("/") for path in wanted if path.strip("/")]
            return self.send_json(
                [repository.entry(path) for path in wanted if repository.tree(path, False) is not None]
            )
        self.send_json(repository.info(kind, repo))

    def resolve(self, kind: str, repo: str, revision: str, name: str):
        """Where the content of a file is."""
        repository = self.known(kind, repo, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            return self.fail(404, "EntryNotFound", "Entry not found", headers)
        etag = f'"{repository.etag(name)}"'
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(repository.files[name].stat().st_size)}
        place = f"{kind}/{repo}/{repository.commit}/{name}"
        if LFS.match(name):
            return self.answer(
                302, b"Found", headers | {"ETag": etag, "Location": f"{self.hub.cdn}/cdn/{place}?Expires=1"}
            )
        self.answer(307, b"Temporary Redirect", headers | {"Location": f"/api/resolve-cache/{place}"})

    def send_file(self, repository: Repository | None, name: str):
        if repository is None or name not in repository.files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = repository.files[name].read_bytes()
        if self.fault and self.fault.short is not None:
            content = content[: self.fault.short]
        headers = {"ETag": f'"{repository.etag(name)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        size, status, first, last = len(content), 200, 0, len(content) - 1
        if wanted := re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range") or ""):
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            last = min(int(wanted[2]), last) if wanted[1] and wanted[2] else last
            if first >= size:
                return self.answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
        body = content[first : last + 1]
        if self.fault and self.fault.corrupt:
            middle = len(body) // 2
            body = body[:middle] + bytes(255 - b for b in body[middle : middle + 64]) + body[middle + 64 :]
        self.answer(status, body, headers)

    def fail(self, status: int, code: str | None, message: str | None, headers: dict | None = None):
        headers = (headers or {}) | {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, json.dumps({"error": message or "error"}).encode(), headers)

    def send_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json; charset=utf-8"})

    def answer(self, status: int, body: bytes, headers: dict):
        content = b"" if self.command == "HEAD" else body
        is_cut = self.fault and self.fault.cut is not None and status in (200, 206) and self.fault.cut < len(content)
        if is_cut:
            content = content[: self.fault.cut]
        if self.record:  # noted before it is sent, because the client may look at once
            self.hub.note(self.record | {"status": status, "sent": len(content)})
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-Id", "Root=1-0")
        self.end_headers()
        self.wfile.write(content)
        if is_cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def control(self, path: str):
        if path.endswith("/faults"):
            self.hub.faults[:] = [Fault(**fault) for fault in json.loads(self.body)]
        elif path.endswith("/clear"):
            self.hub.requests.clear()
        self.send_json(self.hub.requests)


class LoopbackHub:
    """The server, on threads of this process.

    port: 0 takes a free one; log: a file to which each request is also written as a line of JSON.
    """

    def __init__(self, root: str | Path, port: int = 0, log: str | Path | None = None):
        self.root, self.log = Path(root), log and Path(log)
        self.requests: list[dict] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        # Large files come from another host, to which huggingface_hub must not send the token.
        self.servers = [ThreadingHTTPServer(("127.0.0.1", p), handler) for p in (port, 0)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        """Ends the server: connections are refused from now on."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = []

    def repository(self, kind: str, repo: str, revision: str = "main") -> Repository | None:
        folder = self.root / kind / repo
        named = {path.name.partition("@")[2]: path for path in folder.parent.glob(f"{folder.name}@*")}
        if revision in ("main", "HEAD") or revision in named:
            return Repository(named.get(revision, folder))
        found = (Repository(path) for path in (folder, *named.values()))
        return next((repository for repository in found if repository.commit == revision), None)

    def commit(self, repo: str, kind: str = "models", revision: str = "main") -> str:
        return self.repository(kind, repo, revision).commit

    def fault_for(self, request: str, has_token: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if (
                    fault.hits < fault.times
                    and re.search(fault.match, request)
                    and not (fault.without_token and has_token)
                ):
                    fault.hits += 1
                    return fault
        return None

    def note(self, record: dict):
        with self.lock:
            self.requests.append(record)
            if self.log:
                with open(self.log, "a") as file:
                    file.write(json.dumps(record) + "\n")

    def environment(self, home: Path, **more) -> dict[str, str]:
        """The environment of a process that reads this Hub, and keeps its cache in the folder `home`."""
        home.mkdir(parents=True, exist_ok=True)
        start = home / "start"
        start.mkdir(exist_ok=True)
        (start / "sitecustomize.py").write_text(SITECUSTOMIZE)
        left_out = re.compile(
            r"(HF_|HUGGING|TRANSFORMERS_|ACCELERATE_|MASTER_).*|.*_PROXY|.*RANK|WORLD_SIZE", re.IGNORECASE
        )
        kept = {name: value for name, value in os.environ.items() if not left_out.fullmatch(name)}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        own |= {"PYTHONPATH": f"{start}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        return kept | own | {name: str(value) for name, value in more.items()}

    def by_rank(self) -> dict[int | None, int]:
        """How many requests each rank made."""
        return dict(sorted(Counter(record["rank"] for record in self.requests).items(), key=str))

    def fetched(self) -> Counter:
        """How often the content of each file was sent."""
        contents = [
            CONTENT.match(r["path"]) for r in self.requests if r["method"] == "GET" and r["status"] in (200, 206)
        ]
        return Counter(f"{found['repo']}/{found['name']}" for found in contents if found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    with LoopbackHub(args.root, args.port, args.log) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
