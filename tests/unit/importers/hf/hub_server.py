"""A loopback server that speaks as much of the Hub's API as transfers need, and misbehaves when told to."""

import base64
import hashlib
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model")  # what the Hub keeps in LFS, filed by SHA-256


class HubServer:
    """Serves one repository, ``org/mixtral``, and takes uploads to any.

    Attributes:
        faults: File name (or "api") -> what goes wrong, one entry per request: "500", "reset" and "short" (half the
            body, then the connection closes or the answer ends), "wrong" (other bytes of the same length). Under
            "upload", statuses that files sent are answered with.
        served: Method, file name and Range header of every request that was answered with a body.
        gated: Answer as a gated repository.
        uploaded: Repository -> file name -> content, of every commit made.
        private: Repository -> whether it was made private.
        writers: Authorization headers that may upload.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.served: list[tuple[str, str, str | None]] = []
        self.gated = False
        self.tokens: set[str | None] = set()
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.writers = {"Bearer hf_writer"}
        self._objects: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, name: str) -> int:
        """How often a file's body was sent, wholly or in part."""
        return sum(served == name for method, served, _ in self.served if method == "GET")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                path = urlsplit(self.path).path
                if self.headers.get("Authorization") not in hub.writers:
                    self._refuse(401)
                else:
                    lines = [json.loads(line) for line in sent.splitlines()]
                    answer = json.dumps(hub.take(path, lines)).encode()
                    self._send(answer, {"Content-Type": "application/json"}, True)

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if hub.faults["upload"]:
                    self._refuse(int(hub.faults["upload"].pop(0)))
                else:
                    hub.keep(self.path.rsplit("/", 1)[1], content)
                    self._send(b"", {}, True)

            def _answer(self, *, body: bool) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                path = unquote(urlsplit(self.path).path)
                fault = ""
                name = "api" if path.startswith("/api/") else path.rsplit("/", 1)[1]
                if body and hub.faults[name]:
                    fault = hub.faults[name].pop(0)
                if fault == "500":
                    self._refuse(500)
                elif hub.gated and name not in ("api", "config.json.public"):
                    self._refuse(403, "GatedRepo")
                elif path.startswith("/api/models/org/mixtral"):
                    if path.endswith("/revision/nowhere"):
                        self._refuse(404, "RevisionNotFound")
                    else:
                        self._send(json.dumps(hub.info()).encode(), {"Content-Type": "application/json"}, body)
                elif (
                    path.startswith(("/org/mixtral/resolve/main/", f"/org/mixtral/resolve/{COMMIT}/"))
                    and (hub.folder / name).is_file()
                ):
                    self._file(name, body, fault)
                else:
                    self._refuse(404, "RepoNotFound" if not path.startswith("/org/mixtral") else "EntryNotFound")

            def _refuse(self, status: int, code: str = "") -> None:
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
                self.send_response(status)
                for header, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(header, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def _file(self, name: str, body: bool, fault: str) -> None:
                content = (hub.folder / name).read_bytes()
                large = name.endswith(LARGE)
                tag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                span = self.headers.get("Range")
                if not body:
                    self._send(content, headers, False)
                    return
                hub.served.append(("GET", name, span))
                if fault == "wrong":
                    content = bytes(len(content) - 1) + b"!"
                start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
                if span:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                rest = content[start:]
                if fault == "short":
                    rest = rest[: len(rest) // 2]
                    self._send(rest, {k: v for k, v in headers.items() if k != "Content-Range"}, True)
                elif fault == "reset":
                    headers["Content-Length"] = str(len(rest))
                    self._send(rest[: len(rest) // 2], headers, True, 206 if span else 200)
                    self.close_connection = True
                else:
                    self._send(rest, headers, True, 206 if span else 200)

        return Handler

    def take(self, path: str, lines: list[Any]) -> dict[str, Any]:
        """What a POST of an upload is answered: make a repository, say how to send files, commit them."""
        sent = lines[0]
        if path == "/api/repos/create":
            repo = "/".join(filter(None, (sent.get("organization"), sent["name"])))
            self.private[repo] = sent.get("visibility", "private") == "private" and sent.get("private", True)
            return {"url": f"{self.url}/{repo}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            modes = [(file["path"], "lfs" if file["path"].endswith(LARGE) else "regular") for file in sent["files"]]
            return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
        if path.endswith("/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    {**entry, "actions": {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}}
                    for entry in sent["objects"]
                ],
            }
        repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in lines[1:]:
            value = line["value"]
            content = self._objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            self.uploaded.setdefault(repo, {})[value["path"]] = content
        return {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{repo}/commit/{COMMIT}"}

    def keep(self, oid: str, content: bytes) -> None:
        """A large file's bytes, filed under the SHA-256 they must have."""
        assert hashlib.sha256(content).hexdigest() == oid
        self._objects[oid] = content

    def info(self) -> dict[str, Any]:
        """What /api/models answers."""
        siblings = []
        for path in sorted(self.folder.iterdir()):
            content = path.read_bytes()
            entry: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": git_sha1(content)}
            if path.name.endswith(LARGE):
                entry["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 134,
                }
            siblings.append(entry)
        return {
            "id": "org/mixtral",
            "modelId": "org/mixtral",
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
