"""Folders of images to choose among, and programs that wait for a person while a test plays one."""

import http.client
import io
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionrl.choosing.board import Round
from diffusionrl.choosing.choices import Choices
from diffusionrl.cli import main

WAIT = 30.0  # seconds, on a busy machine
_COLOURS = 10


def make_images(folder: Path, prompts: list[str], each: int = 4, side: int = 16) -> Path:
    """Of each prompt so many images, of one of a few colours each, with captions."""
    folder.mkdir()
    encoded = []
    for colour in range(min(_COLOURS, len(prompts) * each)):
        encoded.append(io.BytesIO())
        Image.new("RGB", (side, side), (colour * 25, 255 - colour * 20, colour * 10)).save(encoded[-1], "PNG")
    with (folder / "metadata.jsonl").open("w") as lines:
        for index in range(len(prompts) * each):
            (folder / f"{index:04d}.png").write_bytes(encoded[index % _COLOURS].getvalue())
            lines.write(json.dumps({"file_name": f"{index:04d}.png", "text": prompts[index // each]}) + "\n")
    return folder


def choices_in(folder: Path, *rounds: Round) -> Choices:
    """Among these, in a folder that may be there."""
    folder.mkdir(exist_ok=True)
    choices = Choices(folder)
    choices.rounds, choices.total = list(rounds), len(rounds)
    return choices


def until(what: Callable[[], Any]) -> Any:
    """What it says once it says something."""
    end = time.monotonic() + WAIT
    while not (found := what()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
    return found


class Program:
    """A command that shows a page, in a thread.

    Attributes:
        address: of the page.
        said: what it has printed.
    """

    def __init__(self, capsys: Any, *arguments: str) -> None:
        self._capsys, self.said, self._codes = capsys, "", list[int]()
        self._thread = threading.Thread(target=lambda: self._codes.append(main(arguments)))
        self._thread.start()
        self.address = until(self._address)

    def _address(self) -> str:
        printed = self._capsys.readouterr()
        self.said += printed.out + printed.err
        assert self._thread.is_alive(), self.said
        found = re.search(r"http://127\S+/", self.said)
        return found[0] if found else ""

    def code(self) -> int:
        """With which it ends."""
        self._thread.join(WAIT)
        self.said += self._capsys.readouterr().out
        return self._codes[0]


def ask(address: str, place: str = "state", body: Any = None, **headers: str) -> tuple[int, Any]:
    """Of a page, as its script does: status and answer; a POST where there is a body."""
    parts = urllib.parse.urlsplit(address)
    sent = {"Content-Type": "application/json", "Origin": f"http://{parts.netloc}"} | headers
    connection = http.client.HTTPConnection(parts.netloc, timeout=WAIT)
    path, text = parts.path + place, None if body is None else json.dumps(body)
    connection.request("GET" if text is None else "POST", path, text, {name: value for name, value in sent.items() if value})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content


def choose(address: str, chosen: list[int] | None) -> Any:
    """Judge the round that is shown; returns the state after it."""
    number = until(lambda: ask(address)[1]["shown"])[0][0]
    status, state = ask(address, "choose", {"round": number, "chosen": chosen})
    assert status == 200, state
    return state


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
