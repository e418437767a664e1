"""A proxy in front of a real S3 server that answers wrongly, breaks connections or is slow, as it is told."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.serving import Quiet, Stand


@dataclass
class Fault:
    """What goes wrong.

    `kind` is status, reset-request, reset-response, cut (the body ends early), slow, as-200 (a range is not called one),
    whole (ranges are ignored), or none.
    """

    kind: str
    method: str = "GET"
    match: str = ""
    times: int = 1
    status: int = 503
    after: int = 0
    seconds: float = 0.0


class Proxy(Stand):
    """Serves at `url` until `close`; `seen` holds (method, path, Range, status) of every request, in order of arrival."""

    def __init__(self, target: str, folder: Path) -> None:
        self.target = target.removeprefix("http://")
        self.folder = folder
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, str, int]] = []
        self.before: Callable[[str, str], object] | None = None
        self.lock = threading.Lock()
        super().__init__(self._handler())

    def requests(self, method: str, match: str = "", status: int | None = None) -> list[tuple[str, str, str, int]]:
        return [s for s in self.seen if s[0] == method and match in s[1] and status in (None, s[3])]

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.match in path:
                    fault.times -= 1
                    return fault
        return None

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def note(self, status: int) -> None:
                with proxy.lock:
                    proxy.seen.append((self.command, self.path, self.headers.get("Range", ""), status))

            def forward(self) -> None:
                fault = proxy.take(self.command, self.path) or Fault("none")
                if proxy.before:
                    proxy.before(self.command, self.path)
                length = int(self.headers.get("Content-Length") or 0)
                if fault.kind == "reset-request":
                    self.rfile.read(min(fault.after, length))
                    self.note(0)
                    self.reset()
                    return
                body = self.rfile.read(length)
                if fault.kind == "status":
                    self.note(fault.status)
                    self.send_response(fault.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault.kind == "slow":
                    time.sleep(fault.seconds)
                self.answer(fault, body)

            def answer(self, fault: Fault, body: bytes) -> None:
                there = http.client.HTTPConnection(proxy.target)
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        there.putheader(name, value)
                there.endheaders(body)
                answer = there.getresponse()
                data = answer.read()
                there.close()
                status = 200 if fault.kind in ("as-200", "whole") else answer.status
                dropped = {"connection", "transfer-encoding", "date", "server"}
                if fault.kind == "whole":
                    data = (proxy.folder / self.path.lstrip("/").split("?")[0]).read_bytes()
                if self.command != "HEAD":
                    dropped |= {"content-length"}
                if fault.kind == "whole":
                    dropped |= {"content-range"}
                self.note(status)
                self.send_response(status)
                for name, value in answer.getheaders():
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                try:
                    if fault.kind == "reset-response":
                        self.wfile.write(data[: fault.after])
                        self.wfile.flush()
                        time.sleep(0.05)
                        self.reset()
                    elif fault.kind == "cut":
                        self.wfile.write(data[: fault.after])
                        self.close_connection = True
                    elif self.command != "HEAD":
                        self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        return Handler
