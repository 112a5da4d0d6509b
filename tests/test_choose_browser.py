"""The page on which people choose, in headless Chromium."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import browser, needs_chromium
from choosers import Program, choices_in, lines_of, make_images, until

from diffusionrl.choosing.choices import Choices
from diffusionrl.choosing.page import PageServer
from diffusionrl.choosing.rounds import plan
from diffusionrl.config.rewards import HumanConfig
from diffusionrl.data.gallery import gallery
from diffusionrl.rewards import score
from diffusionrl.rewards.human import Human

assert browser  # a fixture
pytestmark = needs_chromium


class Window:
    """One window with the page, and what it said and asked for."""

    def __init__(self, context: Any, address: str) -> None:
        self.page, self.said, self.asked = context.new_page(), list[str](), list[str]()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url.removeprefix(address)))
        self.page.goto(address)
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("#stage.ready, #stage:empty", state="attached")
        self.page.wait_for_function("document.querySelector('#stage.ready') || !document.querySelector('.choice')")

    def press(self, key: str) -> None:
        self.after(lambda: self.page.keyboard.press(key))

    def tap(self, selector: str) -> None:
        self.after(lambda: self.page.tap(selector))

    def after(self, act: Any) -> None:
        """Once the next round is ready."""
        before = self.progress
        act()
        until(lambda: self.progress != before)
        self.ready()

    @property
    def progress(self) -> str:
        return self.page.inner_text("#progress")

    def images(self) -> list[str]:
        return self.page.eval_on_selector_all(".choice img", "all => all.map(each => each.getAttribute('src'))")


@contextmanager
def showing(images: Path, judged: Path, size: int = 2) -> Iterator[tuple[Choices, str]]:
    choices = choices_in(judged, *plan(gallery(images), size, None, 0))
    with PageServer(0) as page:
        page.show(choices)
        yield choices, page.address


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1200, "height": 800}, has_touch=True)
    yield opened
    opened.close()


def test_choose_undo_reload_and_go_on_later(context: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(Path("images"), ["a cat", "a dog"], each=4)
    pairs = Path("judged/metadata.jsonl")
    program = Program(capsys, "choose", "images")
    window = Window(context, program.address)
    assert window.progress == "0 of 4 judged" and window.page.is_disabled("#undo")
    first = window.images()
    window.press("ArrowLeft")
    assert [pair["chosen"] for pair in lines_of(pairs)] == ["images/00000_0.png"], "kept at once"
    window.press("2")
    window.press("s")
    assert window.progress == "3 of 4 judged" and len(lines_of(pairs)) == 2, "nothing is a pair where nothing is better"
    window.press("u")
    window.tap("#undo")
    window.page.reload()
    window.ready()
    assert window.progress == "1 of 4 judged" and len(lines_of(pairs)) == 1 and window.images() != first
    window.tap(".choice:nth-child(2)")
    window.page.click("#finish")
    window.page.wait_for_selector("text=You can close this window")
    assert program.code() == 0 and "2 choices in judged: train on them with" in program.said

    program = Program(capsys, "choose", "images")
    window = Window(context, program.address)
    assert window.progress == "2 of 4 judged"
    for _ in range(2):
        window.press("ArrowRight")
    assert window.page.inner_text("#note") == "That was all of them."
    window.press("Backspace")
    assert window.progress == "3 of 4 judged" and len(window.images()) == 2
    assert window.said == []
    window.page.click("#finish")
    assert program.code() == 0 and len(lines_of(pairs)) == 3
    window.page.wait_for_selector("text=You can close this window")


def test_a_second_window_judges_nothing_twice(context: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a cat"], each=8)
    with showing(images, tmp_path / "judged") as (choices, address):
        left, right = Window(context, address), Window(context, address)
        right.page.evaluate(
            "window.fetch = (ask => (path, more) => path === 'state' ? new Promise(() => {}) : ask(path, more))(fetch)"
        )
        left.press("1")
        right.press("2")  # of the same round, which it still shows
        assert right.page.inner_text("#note") == "This was judged in another window."
        assert choices.answers == [[0]] and right.images() == left.images()
        right.press("2")
        assert choices.answers == [[0], [1]]
        until(lambda: left.progress == "2 of 4 judged")
        left.page.dblclick(".choice:nth-child(1)")
        time.sleep(0.3)
        assert len(choices.answers) <= 3, "half of a double click is no choice among the next images"


def test_a_prompt_cannot_speak_and_nothing_leaves_the_machine(context: Any, tmp_path: Path) -> None:
    """Not even a script that got in could ask for anything elsewhere."""
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)> </title>\n" + "word_" * 2000
    images = make_images(tmp_path / "images", [nasty])
    with socket.create_server(("127.0.0.1", 0)) as server, showing(images, tmp_path / "judged") as (_, address):
        window = Window(context, address)
        assert window.page.text_content("#prompt") == nasty and window.page.title().startswith("<script>")
        assert window.page.evaluate("document.documentElement.scrollHeight <= innerHeight"), "the images have their place"
        window.press("1")
        assert window.said == [] and window.page.evaluate("document.scripts.length") == 1
        assert lines_of(tmp_path / "judged/metadata.jsonl")[0]["prompt"] == nasty
        asked = {each.split("/")[0] for each in window.asked}
        assert asked - {"data:,"} == {"", "page.css", "page.js", "state", "image", "choose"}

        server.settimeout(0.2)
        other = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert window.page.evaluate(f"fetch('{other}').then(() => 'reached', () => 'refused')") == "refused"
        load = f"const i = new Image(); i.onload = i.onerror = (event) => done(event.type); i.src = '{other}';"
        assert window.page.evaluate(f"new Promise((done) => {{ {load} }})") == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_two_thousand_images_are_shown_without_lag(context: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", [f"thing {i}" for i in range(100)], each=20, side=8)
    with showing(images, tmp_path / "judged") as (choices, address):
        assert choices.total == 1000
        window, took = Window(context, address), []
        for _ in range(4):
            began = time.perf_counter()
            window.press("1")
            took.append(time.perf_counter() - began)
        assert min(took) < 0.6, "of which 0.15 are waited"
        asked = [each for each in window.asked if each.startswith("image/")]
        assert len(set(asked)) <= 2 * 6, "of this round and the next alone"


def test_on_a_phone(browser: Any, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a cat with a rather long description of what it does"], each=9)
    phone = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme="dark")
    for size in (2, 9):
        with showing(images, tmp_path / f"judged{size}", size) as (choices, address):
            window = Window(phone, address)
            boxes = window.page.eval_on_selector_all(
                ".choice, footer button:not([hidden])",
                "all => all.map(each => each.getBoundingClientRect()).map(box => [box.left, box.right, box.width, box.height])",
            )
            assert window.page.evaluate("document.documentElement.scrollWidth") == 360
            assert all(left >= 0 and right <= 360 and min(width, height) >= 44 for left, right, width, height in boxes)
            assert boxes[0][2] > (240 if size == 2 else 100)
            window.tap(f".choice:nth-child({size})")
            assert choices.answers == [[size - 1]] and window.said == []
    phone.close()


class _Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def test_another_page_cannot_choose(context: Any, tmp_path: Path) -> None:
    """Even one that knows the address: by fetch, by a form, or around the page in a frame."""
    images = make_images(tmp_path / "images", ["a cat"])
    elsewhere = HTTPServer(("127.0.0.1", 0), _Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, args=(0.05,), daemon=True).start()
    with elsewhere, showing(images, tmp_path / "judged") as (choices, address):
        page = context.new_page()
        page.goto(f"http://localhost:{elsewhere.server_port}/")
        for options in (
            "{ method: 'POST', headers: { 'Content-Type': 'application/json' }, body }",
            "{ method: 'POST', mode: 'no-cors', body }",
            "{ method: 'POST', mode: 'no-cors', headers: { 'Content-Type': 'text/plain' }, body }",
        ):
            page.evaluate(
                f"""async () => {{
                    const body = JSON.stringify({{ round: 0, chosen: [0] }});
                    await fetch('{address}choose', {options}).catch(() => null);
                }}"""
            )
        assert page.evaluate(f"fetch('{address}state').then(() => 'read', () => 'refused')") == "refused"
        look = f"const i = new Image(); i.onload = i.onerror = (event) => done(event.type); i.src = '{address}image/0/0';"
        assert page.evaluate(f"new Promise((done) => {{ {look} }})") == "error"
        page.evaluate(f"document.body.innerHTML = `<iframe src='{address}'></iframe>`")
        page.wait_for_timeout(300)
        assert all(not frame.query_selector("#stage") for frame in page.frames)
        field = """<input name='{"round": 0, "chosen": [0]}'>"""
        post = f"<form method=post enctype=text/plain action='{address}choose'>{field}</form>"
        page.evaluate("(form) => { document.body.innerHTML = form; document.forms[0].submit(); }", post)
        page.wait_for_load_state()
        assert choices.answers == []
        window = Window(context, address)
        window.press("1")
        assert choices.answers == [[0]]
        elsewhere.shutdown()


def test_a_person_likes_several_and_pauses(context: Any) -> None:
    human = Human(HumanConfig(), 60.0)
    window = Window(context, human.page.address)
    assert "next images come by themselves" in window.page.inner_text("#note")
    images, found = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    call = threading.Thread(target=lambda: found.append(score(human, images, ["a cat"] * 5, [{}] * 5)))
    call.start()
    window.page.wait_for_selector("#stage.ready")
    window.press("p")
    assert window.progress == "paused" and human.board.paused
    window.press("p")
    for key in ("1", "3", "5", "3"):
        window.page.keyboard.press(key)
    assert window.page.inner_text("#done") == "Done (2)"
    window.page.keyboard.press("Enter")
    call.join()
    assert found[0].values.tolist() == [1, 0, 0, 0, 1] and window.said == []
    human.page.__exit__()
