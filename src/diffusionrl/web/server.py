"""What every HTTP server of ours has: so many connections, each for so long; bodies of JSON, read within a limit and a time;
and on loopback an answer to those alone who ask for a loopback address."""

import ipaddress
import json
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffusionrl.errors import UserError

_MAX_DIGITS = 12  # of a length
_LOOK = 0.1  # seconds between two looks at who is late


class Refused(Exception):
    """A request that is not done as it asks: HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BoundedServer(ThreadingHTTPServer):
    """``serve_forever`` and ``shutdown`` as in the standard library.

    Args:
        port: 0 takes any free one.
        timeout: seconds for a request; a client has as many to begin one.
        connections: at once.
        setting: which chooses the port.

    Raises:
        UserError: the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, handler: type["Handler"], timeout: float, connections: int, setting: str = "--port"
    ) -> None:
        self.host, self.seconds = host, timeout
        self._connections = threading.BoundedSemaphore(connections)
        self._deadlines: dict[socket.socket, float] = {}
        try:
            super().__init__((host, port), handler)
        except OSError as error:
            remedy = f"choose another {setting}, or 0 for any free one"
            raise UserError(f"cannot listen on {host}:{port}: {error}: {remedy}") from error
        threading.Thread(target=self._hang_up_on_the_late, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Or hang up at once, where too many are connected: idle ones must not use up what the process may open."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def give_until(self, connection: socket.socket, deadline: float | None) -> None:
        """Hang up on a connection then, whatever it is doing; None: not any more."""
        if deadline is None:
            self._deadlines.pop(connection, None)
        else:
            self._deadlines[connection] = deadline

    def _hang_up_on_the_late(self) -> None:
        while True:
            time.sleep(_LOOK)
            now = time.monotonic()
            for connection in [each for each, deadline in list(self._deadlines.items()) if deadline < now]:
                self._deadlines.pop(connection, None)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Of the requests of one connection."""

    server: BoundedServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffusionrl", ""
    wbufsize = -1  # head and body of a reply in one packet: two wait for each other 40 ms
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.seconds)  # so that a silent client frees its thread

    def handle_one_request(self) -> None:
        """Or hang up: a client has the time-out to begin, and once more for the request and its answer, however it drips."""
        self.server.give_until(self.connection, time.monotonic() + 2 * self.server.seconds)
        try:
            super().handle_one_request()
        finally:
            self.server.give_until(self.connection, None)

    def do_GET(self) -> None:
        self._answer(self.get)

    def do_POST(self) -> None:
        self._answer(self.post)

    def _answer(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Refused as refused:
            self.send_json(refused.status, {"error": str(refused)})

    def get(self) -> None:
        """Answer a GET. Raises Refused."""
        raise NotImplementedError

    def post(self) -> None:
        """Answer a POST. Raises Refused."""
        raise NotImplementedError

    def more_headers(self) -> dict[str, str]:
        """Of every answer."""
        return {}

    def check_host(self) -> None:
        """Raises Refused for a web page whose name was bound to this address."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if is_loopback(self.server.host) and not is_loopback(host):
            raise Refused(421, "this server answers for loopback addresses alone")

    def length(self, limit: int) -> int:
        """Of the body. Raises Refused where it is no JSON, or longer than ``limit`` bytes."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "Content-Length is needed")
        if len(length) > _MAX_DIGITS or int(length) > limit:
            raise Refused(413, f"the body is longer than {limit} bytes")
        return int(length)

    def read(self, length: int, deadline: float) -> bytes:
        """The body. Raises Refused where it does not come in time."""
        body = bytearray()
        while len(body) < length:
            if time.monotonic() > deadline:
                raise Refused(408, "the body did not come in time")
            try:
                part = self.rfile.read1(length - len(body))
            except TimeoutError as error:
                raise Refused(408, "the body did not come in time") from error
            if not part:
                raise Refused(400, "the body ended early")
            body += part
        return bytes(body)

    def send_json(self, status: int, answer: dict[str, Any]) -> None:
        self.send(status, json.dumps(answer).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str) -> None:
        """The answer; after one that is not 200, the connection ends."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **self.more_headers()}.items():
            self.send_header(name, value)
        if status != 200:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if status != 200:
            self._drain()

    def _drain(self) -> None:
        """End the connection, but let a client that still sends come to reading why, for a second."""
        self.close_connection = True
        end = time.monotonic() + 1
        self.connection.settimeout(0.1)
        with suppress(OSError):
            while time.monotonic() < end and self.rfile.read1(65536):
                pass

    def log_message(self, *arguments: Any) -> None:
        pass


def is_loopback(host: str) -> bool:
    """Whether a name or address is one of this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
