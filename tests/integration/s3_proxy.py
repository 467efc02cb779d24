"""An HTTP proxy in front of the S3 server that counts requests, slows reads down, and fails in the ways that stores and networks do.

Requests are forwarded as they were signed, so that the server behind checks signatures, rights and conditions as ever.
"""

import http.client
import random
import socket
import socketserver
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Faults:
    """Shares of requests that fail. Drawn by a generator of its own seed."""

    slow_down: float = 0.0  # 503 SlowDown, not forwarded
    reset: float = 0.0  # the connection is reset, half of the times after the request was carried out
    truncated: float = 0.0  # of the answers with a body: it ends early
    stalled: float = 0.0  # the answer waits for `stall_s`
    stall_s: float = 30.0
    error_after_put: float = 0.0  # of the writes: stored, and answered with 500
    denied: str | None = None  # every request: 403 with this code
    seed: int = 0


class S3Proxy:
    """`delay_s` is waited before each GET of an image. `faults` may be replaced at any time."""

    def __init__(
        self, endpoint: str, *, delay_s: float = 0.0, faults: Faults | None = None, strip: tuple[str, ...] = (),
        unknown: tuple[str, ...] = (),
    ):  # fmt: skip
        """`strip` names request headers that the proxy loses (a server that checks signatures will refuse them then), `unknown` those
        that it answers with 501."""
        host, port = endpoint.removeprefix("http://").split(":")
        self.target, self.delay_s, self.faults, self.strip = (host, int(port)), delay_s, faults or Faults(), strip
        self.unknown = unknown
        self.requests: Counter[tuple[str, str]] = Counter()  # (method, path) of all that came, failed ones too
        self.failures: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._random = random.Random(self.faults.seed)
        self._port = 0
        self.open()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def gets(self, prefix: str) -> Counter[str]:
        """How often each path under `prefix` was asked for."""
        with self.lock:
            return Counter(
                {path: n for (method, path), n in self.requests.items() if method == "GET" and path.startswith(prefix)}
            )

    def open(self) -> None:
        """Listen, again on the same port after `close`."""
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Refuse connections and cut those that are open: the endpoint is gone."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()

    def drawn(self, share: float, name: str) -> bool:
        with self.lock:
            hit = self._random.random() < share
            self.failures[name] += hit
        return hit


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *arguments: Any):
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self._open):
            _reset(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a peer that is gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: S3Proxy

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(*self.proxy.target, timeout=120)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _do(self) -> None:
        proxy, faults = self.proxy, self.proxy.faults
        path = self.path.partition("?")[0]
        with proxy.lock:
            proxy.requests[self.command, path] += 1
        body = self._body()
        if proxy.delay_s and self.command == "GET" and path.endswith(".jpg"):
            time.sleep(proxy.delay_s)
        if any(name in self.headers for name in proxy.unknown):
            return self._answer(501, _error("NotImplemented"))
        if faults.denied:
            return self._answer(403, _error(faults.denied))
        if proxy.drawn(faults.slow_down, "slow_down"):
            return self._answer(503, _error("SlowDown"))
        if proxy.drawn(faults.reset / 2, "reset"):
            return self._reset()
        status, headers, payload = self._forward(body)
        if proxy.drawn(faults.reset / 2, "reset"):
            return self._reset()
        if proxy.drawn(faults.stalled, "stalled"):
            time.sleep(faults.stall_s)
        if self.command == "PUT" and status == 200 and proxy.drawn(faults.error_after_put, "error_after_put"):
            return self._answer(500, _error("InternalError"))
        cut = len(payload) > 1 and proxy.drawn(faults.truncated, "truncated")
        return self._answer(status, payload, headers, cut=cut)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _do  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self._upstream
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"transfer-encoding", "content-length", "connection", "expect", *self.proxy.strip}:
                upstream.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        answer = upstream.getresponse()
        payload = answer.read()
        self._length = answer.getheader("Content-Length")
        return (
            answer.status,
            [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP],
            payload,
        )

    def _answer(
        self, status: int, payload: bytes, headers: list[tuple[str, str]] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers or [("Content-Type", "application/xml")]:
            self.send_header(name, value)
        length = self._length if self.command == "HEAD" and headers else str(len(payload))
        if length is not None and status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload[: len(payload) // 2] if cut else payload)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        _reset(self.connection)


def _reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
