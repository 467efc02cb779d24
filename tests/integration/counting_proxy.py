"""A TCP proxy in front of the S3 server that counts requests by method and path, and can slow reads down."""

import contextlib
import re
import socket
import threading
import time
from collections import Counter

_REQUEST = re.compile(rb"(?:^|\r\n\r\n|\n)(GET|PUT|HEAD|POST|DELETE) (/[^ ?]*)[^ ]* HTTP/1\.1\r\n")


class CountingProxy:
    """Forwards bytes unchanged (so that signatures hold) from its own port to `target`. `delay_s` is waited before each image GET."""

    def __init__(self, target: tuple[str, int], *, delay_s: float = 0.0):
        self._target, self.delay_s = target, delay_s
        self.requests: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def gets(self, prefix: str) -> Counter[str]:
        """How often each path under `prefix` was read."""
        with self._lock:
            return Counter(
                {path: n for (method, path), n in self.requests.items() if method == "GET" and path.startswith(prefix)}
            )

    def close(self) -> None:
        """Take no new connection; those that are open end with their peers."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server, count=True)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, *, count: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if count:
                    self._count(_REQUEST.findall(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, found: list[tuple[bytes, bytes]]) -> None:
        with self._lock:
            self.requests.update((method.decode(), path.decode()) for method, path in found)
        if self.delay_s and any(method == b"GET" and b".jpg" in path for method, path in found):
            time.sleep(self.delay_s)
