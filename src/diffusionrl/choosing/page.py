"""The page on which a person chooses, and what it asks of this machine.

    GET  TOKEN/              the page; page.css and page.js beside it
    GET  TOKEN/state         what is shown now (``Board.state``)
    GET  TOKEN/image/R/P     the image of round R at place P
    POST TOKEN/ACTION        {"round": R or null, "chosen": [P, ...] or null}, as ``Board.act`` takes it: the state after it,
                             with 409 where another round is shown

It listens on loopback. The token is new each time, and in the address: who does not have that sees nothing and chooses nothing.
A POST must come from the page itself (its Origin), and the host that is asked for must be a loopback address, so that no other
page in the browser can choose. The page loads nothing from anywhere else, and may not (its content security policy).
"""

import hmac
import json
import secrets
import threading
import time
from pathlib import Path

from diffusionrl.choosing.board import Board, Stale
from diffusionrl.web.server import BoundedServer, Handler, Refused

_FILES = {"": ("page.html", "text/html"), "page.css": ("page.css", "text/css"), "page.js": ("page.js", "text/javascript")}
_MAX_BYTES = 10_000  # of a body
_SECONDS, _CONNECTIONS = 60.0, 64
_HERE = 5.0  # seconds since a page asked last: it does so every second, less often in the background
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(BoundedServer):
    """Has a port from when it is made, and an answer from when it is to ``show`` something.

    Raises:
        UserError: the port cannot be had.
    """

    board: Board

    def __init__(self, port: int, setting: str = "--port") -> None:
        self.token, self.asked = secrets.token_urlsafe(16), -_HERE
        self.files = {name: (Path(__file__).with_name(file).read_bytes(), kind) for name, (file, kind) in _FILES.items()}
        super().__init__("127.0.0.1", port, _Handler, _SECONDS, _CONNECTIONS, setting)

    def show(self, board: Board) -> None:
        """From now on, beside whatever else the process does."""
        self.board = board
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        """For the browser."""
        return f"{self.url}/{self.token}/"

    @property
    def is_open(self) -> bool:
        """Whether somebody has the page before them."""
        return time.monotonic() - self.asked < _HERE

    def __exit__(self, *reason: object) -> None:
        if hasattr(self, "board"):
            self.shutdown()
        self.server_close()


class _Handler(Handler):
    server: PageServer

    def get(self) -> None:
        place = self._place()
        kind, *numbers = place.split("/")
        if place in self.server.files:
            self.send(200, *self.server.files[place])
        elif place == "state":
            self.server.asked = time.monotonic()
            self.send_json(200, self.server.board.state())
        elif kind == "image" and len(numbers) == 2 and all(each.isascii() and each.isdecimal() for each in numbers):
            try:
                image = self.server.board.image(*map(int, numbers))
            except (LookupError, ValueError, OSError) as error:
                raise Refused(404, "there is no such image") from error
            self.send(200, *image)
        else:
            raise Refused(404, "there is nothing here")

    def post(self) -> None:
        action, status = self._place(), 200
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise Refused(403, "only the page itself may choose")
        number, chosen = _read(self.read(self.length(_MAX_BYTES), time.monotonic() + _SECONDS))
        try:
            self.server.board.act(action, number, chosen)
        except Stale:
            status = 409
        except OSError as error:
            raise Refused(500, f"not kept: {error}") from error
        self.send_json(status, self.server.board.state())

    def _place(self) -> str:
        """What is asked for. Raises Refused for whoever does not have the address."""
        self.check_host()
        token, slash, place = self.path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the whole address that diffusionrl has printed, with the slash at its end")
        return place

    def more_headers(self) -> dict[str, str]:
        kept = "private, max-age=86400" if "/image/" in self.path else "no-store"  # the next images are asked for before
        return _HEADERS | {"Cache-Control": kept}


def _read(body: bytes) -> tuple[int | None, list[int] | None]:
    """Raises Refused where it is not what the page sends."""
    try:
        message = json.loads(body)
        number, chosen = message["round"], message["chosen"]
        numbers = [*([] if number is None else [number]), *([] if chosen is None else chosen)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Refused(400, 'the body must be {"round": ..., "chosen": ...}') from error
    if not all(type(each) is int for each in numbers):
        raise Refused(400, "round must be a number, and chosen a list of numbers")
    return number, chosen
