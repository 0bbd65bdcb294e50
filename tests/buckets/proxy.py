"""A proxy between a run and its bucket that fails some requests, by a plan."""

import http.client
import http.server
import json
import random
import threading
import time

KINDS = ("503", "429", "drop", "lost", "half", "slow")


def seeded(seed, rate, kinds=KINDS):
    """A plan that fails a part of all requests, the same ones for the same order of requests."""
    draw = random.Random(seed)
    return lambda method, path: draw.choice(kinds) if draw.random() < rate else ""


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a port of this machine.

    Attributes:
      plan: (method, path) -> '' to pass it on; a status to answer instead; 'drop' to hang up before
        the server sees it, 'lost' after it has done it; 'half' to cut the answer; 'slow' to delay.
      away: whether to hang up on every request, as where there is no server.
      faults: how many requests were failed or delayed; those to a server that is away do not count.
    """

    daemon_threads = True

    def __init__(self, port, plan=lambda method, path: ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.plan, self.faults, self.lock = port, plan, 0, threading.Lock()
        self.away = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        body = self.read_body()
        if self.server.away:
            self.close_connection = True
            return None
        with self.server.lock:
            fault = self.server.plan(self.command, self.path)
            self.server.faults += bool(fault)
        if fault == "slow":
            time.sleep(0.3)
        if fault.isdecimal():
            text = json.dumps({"error": {"code": int(fault), "message": f"fault {fault}"}}).encode()
            return self.answer(int(fault), [("Content-Type", "application/json")], text)
        answer = None if fault == "drop" else self.ask(body)
        if answer is None or fault == "lost":
            self.close_connection = True
            return None
        return self.answer(*answer, cut=fault == "half")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = forward  # noqa: N815

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def ask(self, body):
        """(status, headers, body) of the server; None where it is away."""
        headers = {n: v for n, v in self.headers.items() if n.lower() != "transfer-encoding"}
        if body or "Content-Length" in self.headers:
            headers["Content-Length"] = str(len(body))
        server = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            server.request(self.command, self.path, body, headers)
            found = server.getresponse()
            return found.status, found.getheaders(), found.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            server.close()

    def answer(self, status, headers, body, cut=False):
        self.send_response_only(status)
        left_out = ("transfer-encoding", "connection", "content-length")
        for name, value in headers:
            if name.lower() not in left_out:
                self.send_header(name, value)
        length = dict((n.lower(), v) for n, v in headers).get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *arguments):
        """Nothing is printed."""
