"""A W&B server on loopback for the tests: real `wandb` clients log to it, and everything that they send can be looked at.

    with FakeWandb() as server:
        subprocess.run(command, env={**os.environ, **server.environment})
        (run,) = server.runs.values()
        run.group, run.job_type, run.tags, run.config, run.history, run.summary, run.state

- `environment`: variables that point a process at it, online, with a key, and away from the user's own W&B settings.
- `runs`: by run id; see `FakeRun`. `artifacts`: by name, of each commit its type and {path: bytes}.
- `calls`: every GraphQL operation as (name, variables); `answers[NAME] = lambda variables: data` adds one or replaces it.
- `unknown`: operations without an answer; they get an error.
- `down()` closes the port in the middle of everything, `up()` opens it again.

It keeps what the real one keeps by the rules that matter here: history lines lie at the offsets at which they were sent, and a
resumed run is told how many there are.
"""

import contextlib
import gzip
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"
Answer = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class FakeRun:
    """What a run has sent. exit_code None: not finished."""

    id: str
    entity: str
    project: str
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    raw_config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)  # of the history, by offset
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {key: value["value"] for key, value in self.raw_config.items() if key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]


class FakeWandb:
    """The server; it listens from `with` on, or from `up()`."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.artifacts: dict[str, list[dict[str, Any]]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.unknown: list[str] = []
        self.answers: dict[str, Answer] = {name: getattr(self, f"_{name}") for name in OPERATIONS}
        self._pending: dict[str, dict[str, Any]] = {}  # artifacts before their commit
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._home = tempfile.TemporaryDirectory()
        self.port = 0

    def __enter__(self) -> "FakeWandb":
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()
        self._home.cleanup()

    def up(self) -> None:
        if self._server is not None:
            return
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        home = self._home.name
        folders = {f"WANDB_{name}_DIR": f"{home}/{name.lower()}" for name in ("CONFIG", "CACHE", "DATA")}
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "NETRC": f"{home}/netrc", **folders}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else query
        with self._lock:
            self.calls.append((name, variables))
            if name not in self.answers:
                self.unknown.append(name)
                return {"errors": [{"message": f"unknown operation {name}"}]}
            return {"data": self.answers[name](variables)}

    def file_stream(self, run_id: str, body: dict[str, Any]) -> None:
        with self._lock:
            run = self.runs[run_id]
            for name, chunk in body.get("files", {}).items():
                if name == "wandb-history.jsonl":
                    run.lines.update(enumerate(chunk["content"], chunk["offset"]))
                elif name == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][-1])
            if body.get("complete"):
                run.exit_code = body["exitcode"]

    def put(self, path: str, body: bytes) -> None:
        kind, owner, name = path.strip("/").split("/", 2)
        with self._lock:
            if kind == "run-file":
                self.runs[owner].files[name] = body
            elif name != "manifest":
                self._pending[owner]["files"][name] = body

    def run_of(self, variables: dict[str, Any], key: str = "name") -> FakeRun:
        entity, project = variables.get("entity") or ENTITY, variables.get("project") or "uncategorized"
        return self.runs.setdefault(variables[key], FakeRun(variables[key], entity, project))

    # the operations, in the order in which a client meets them

    def _Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": None}
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}
        bucket = {
            "id": run.id,
            "name": run.id,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.name,
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps([run.lines[max(run.lines)]] if run.lines else []),
            "eventsTail": "[]",
            "config": json.dumps(run.raw_config),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),  # without it a client takes the run for one that never began
        }
        return {"model": {**project, "bucket": bucket}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        inserted = variables["name"] not in self.runs
        run = self.run_of(variables)
        for key, name in (("displayName", "name"), ("groupName", "group"), ("jobType", "job_type"), ("tags", "tags")):
            if variables.get(key) is not None:
                setattr(run, name, variables[key])
        for key, name in (("config", "raw_config"), ("summaryMetrics", "summary")):
            if variables.get(key):
                setattr(run, name, json.loads(variables[key]))
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}
        bucket = {"id": run.id, "name": run.id, "displayName": run.name or run.id, "description": "", "config": json.dumps(run.raw_config)}
        bucket |= {"sweepName": variables.get("sweep"), "project": project, "historyLineCount": len(run.lines)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _RunStoppedStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/run-file/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        ident = f"artifact{len(self._pending)}"
        self._pending[ident] = {"name": given["artifactCollectionName"], "type": given["artifactTypeName"], "run": given["runName"]}
        self._pending[ident]["files"] = {}
        return {"createArtifact": {"artifact": {"id": ident, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        ident = variables["artifactID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{ident}/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": ident, "file": file}}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            ident, name = file["artifactID"], file["name"]
            node = {"storagePath": name, "uploadUrl": f"{self.url}/artifact/{ident}/{name}", "uploadHeaders": []}
            edges.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": ident}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        ident = variables["artifactManifestID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{ident}/manifest", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": ident, "file": file}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self._pending[variables["artifactID"]]
        self.artifacts.setdefault(artifact["name"], []).append(artifact)
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}


OPERATIONS = [name[1:] for name in vars(FakeWandb) if re.match(r"_[A-Z]", name)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self.open: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up as they please; what matters is asserted on what has arrived."""

    def server_close(self) -> None:
        super().server_close()
        for connection in self.open:  # a dead server drops whoever is talking to it
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body, reply = self._body(), {}
            if self.path == "/graphql":
                asked = json.loads(body)
                reply = fake.graphql(asked["query"], asked.get("variables") or {})
            elif self.path.endswith("/file_stream"):  # /files/ENTITY/PROJECT/RUN/file_stream
                fake.file_stream(self.path.split("/")[4], json.loads(body))
            self._reply(reply)  # of the rest, the client's own telemetry, nothing is kept

        def do_PUT(self) -> None:
            fake.put(self.path, self._body())
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
