"""A stand-in for the Hugging Face Hub on the loopback address, in the Hub's own layout.

Repositories are dicts in memory. Faults are put in ``faults[path]``, one for each request to come:
a status such as 429, or "break" for a connection that ends half-way.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import time
import urllib.parse

LARGE = 1000  # bytes from which a file is stored as LFS, behind a redirect


class Hub:
    """Attributes:
    repos: (kind, name) -> {"files": {path: bytes}, "card": dict, "gated": bool}.
    faults: path of a URL -> list of what goes wrong, in order.
    log: (method, path, Range) of each request.
    pause: seconds between pieces of 64 KiB.
    """

    def __init__(self):
        self.repos, self.faults, self.log, self.pause = {}, {}, [], 0.0

    def add(self, kind, name, files, card=None, gated=False):
        self.repos[kind, name] = {"files": files, "card": card or {}, "gated": gated}

    def commit(self, kind, name):
        files = self.repos[kind, name]["files"]
        facts = [f"{path} {hashlib.sha256(files[path]).hexdigest()}" for path in sorted(files)]
        return hashlib.sha1("\n".join(facts).encode()).hexdigest()

    def fetched(self):
        """Paths of the files whose content was asked for."""
        files = ("/cdn/", "/resolve/")
        return [
            path
            for method, path, _ in self.log
            if method == "GET" and any(part in path for part in files)
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        fault = self.hub.faults[path].pop(0) if self.hub.faults.get(path) else None
        if isinstance(fault, int):
            return self._send(fault, b"", {"Retry-After": "1"} if fault == 429 else {})
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            return self._content(self._blob(parts[1]), fault)
        kind = "dataset" if "datasets" in parts[:2] else "model"
        if parts[0] == "api":
            return self._listing(kind, "/".join(parts[2:4]), "/".join(parts[5:]))
        parts = parts[1:] if kind == "dataset" else parts
        return self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), fault)

    def _refused(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        allowed = self.headers.get("Authorization") == "Bearer secret"
        if repo is None:
            self._send(404 if allowed else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo["gated"] and not allowed:
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        return repo is None or (repo["gated"] and not allowed)

    def _listing(self, kind, name, revision):
        if self._refused(kind, name):
            return None
        commit = self.hub.commit(kind, name)
        if revision not in ("", "main", commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        repo, siblings = self.hub.repos[kind, name], []
        for path, body in repo["files"].items():
            entry = {"rfilename": path, "size": len(body), "blobId": _git_hash(body)}
            if len(body) >= LARGE:
                sha = hashlib.sha256(body).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(body), "pointerSize": 130}
            siblings.append(entry)
        answer = {"id": name, "sha": commit, "siblings": siblings, "cardData": repo["card"]}
        answer |= {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, kind, name, revision, path, fault):
        if self._refused(kind, name):
            return None
        commit = self.hub.commit(kind, name)
        if revision not in ("main", commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        body = self.hub.repos[kind, name]["files"].get(path)
        if body is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        facts = {"X-Repo-Commit": commit}
        if len(body) < LARGE:
            return self._content(body, fault, facts | {"ETag": f'"{_git_hash(body)}"'})
        sha = hashlib.sha256(body).hexdigest()
        facts |= {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{sha}"'}
        port = self.server.server_address[1]  # by another name, as the Hub's storage is elsewhere
        return self._send(302, b"", facts | {"Location": f"http://localhost:{port}/cdn/{sha}"})

    def _blob(self, sha):
        bodies = [b for repo in self.hub.repos.values() for b in repo["files"].values()]
        return next(body for body in bodies if hashlib.sha256(body).hexdigest() == sha)

    def _content(self, body, fault, headers=None):
        size, status, headers = len(body), 200, dict(headers or {})
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{size - 1}/{size}"
            body = body[start:]
        return self._send(status, body, headers, half=fault == "break")

    def _send(self, status, body, headers, half=False):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # the client was killed
            end = len(body) // 2 if half else len(body)
            for start in range(0, end, 2**16):
                self.wfile.write(body[start : min(start + 2**16, end)])
                time.sleep(self.hub.pause)
        if half:
            self.close_connection = True


def _git_hash(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextlib.contextmanager
def serving():
    """A hub, and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
