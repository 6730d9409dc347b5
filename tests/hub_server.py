"""A Hugging Face Hub of one process: repositories in memory, as much of the protocol as sending and fetching need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_COMMIT = "c" * 40


class Hub:
    """`with Hub() as hub:` serves `hub.repositories` (id -> {path: bytes}) at `hub.address`."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(hub) -> type:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def say(self, tree: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
                self.answer(json.dumps(tree).encode(), code, {"Content-Type": "application/json", **(headers or {})})

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_POST(self) -> None:
                path, body = self.path.split("?")[0], self.body()
                hub.requests.append(f"POST {path}")
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                    name = name if "/" in name else f"you/{name}"
                    hub.repositories.setdefault(name, {})
                    self.say({"url": f"{hub.address}/{name}", "name": name, "id": "1", "private": asked.get("private")})
                    return
                if path == "/api/validate-yaml":
                    self.say({"errors": [], "warnings": []})
                    return
                name = "/".join(path.split("/")[3:5])
                if "/preupload/" in path:
                    files = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for f in json.loads(body)["files"]
                    ]
                    self.say({"files": files})
                elif "/commit/" in path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            value = line["value"]
                            hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                    self.say({"success": True, "commitOid": _COMMIT, "commitUrl": f"{hub.address}/{name}/commit/1"})
                else:
                    self.say({}, 404)

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                if path == "/api/whoami-v2":
                    self.say({"type": "user", "name": "you", "orgs": [], "auth": {}})
                    return
                parts = path.strip("/").split("/")
                name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
                files = hub.repositories.get(name)
                if files is None:
                    self.say({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                elif parts[0] == "api" and "tree" in parts:
                    self.say([{"type": "file", "path": p, "size": len(b), "oid": _sha(b)} for p, b in files.items()])
                elif parts[0] == "api":
                    self.say(
                        {
                            "id": name,
                            "sha": _COMMIT,
                            "siblings": [{"rfilename": p, "size": len(b)} for p, b in files.items()],
                        }
                    )
                elif "/".join(parts[4:]) in files:
                    body = files["/".join(parts[4:])]
                    self.answer(body, headers={"ETag": f'"{_sha(body)}"', "X-Repo-Commit": _COMMIT})
                else:
                    self.say({}, 404, {"X-Error-Code": "EntryNotFound"})

            do_HEAD = do_GET

        return Handler


def _sha(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
