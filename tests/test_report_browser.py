"""The pages in headless Chromium: they load clean, ask nobody for anything, and their parts work."""

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import browser, needs_chromium
from synthetic import make_run, noise

from diffusionrl.config import EvaluationConfig
from diffusionrl.report.compare_page import write_comparison
from diffusionrl.report.run_page import write_report

assert browser  # a fixture
pytestmark = needs_chromium


class Visit:
    """A page opened from a file, and what it said and asked for.

    Attributes:
        seconds: until its images were there, which says little on a busy machine.
        work: seconds of processor time that the page's process took until then.
    """

    def __init__(self, browser: Any, file: Path, width: int = 1600, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        meter = self.context.new_cdp_session(self.page)
        meter.send("Performance.enable")
        began = time.perf_counter()
        self.page.goto(file.as_uri())
        self.page.evaluate("Promise.all([...document.images].slice(0, 24).map((image) => image.decode()))")
        self.seconds = time.perf_counter() - began
        measured = {entry["name"]: entry["value"] for entry in meter.send("Performance.getMetrics")["metrics"]}
        self.work = measured["ProcessTime"]

    def value(self, code: str) -> Any:
        return self.page.evaluate(code)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *reason: object) -> None:
        self.context.close()


LONG = "a_very_long_word_without_any_place_to_break_" * 40


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    prompts = ["a cat", "a dog", "an owl", LONG, *(f"thing {i}" for i in range(26))]
    held_out = EvaluationConfig(held_out=("judge",))
    runs = [make_run(folder / f"seed_{seed}", prompts=prompts, seed=seed, evaluation=held_out) for seed in (0, 1)]
    runs.append(make_run(folder / LONG[:200], prompts=prompts, samples_per_prompt=2))
    (runs[0] / "alarms.jsonl").write_text(json.dumps({"step": 4, "kind": "guard", "message": LONG}) + "\n")
    report = write_report(runs[0])
    return {"report": report, "compare": write_comparison(runs, folder / "compare.html")}


def first_images(visit: Visit) -> list[str]:
    return visit.value("[...document.querySelectorAll('.tile[data-cell] img')].slice(0, 4).map((image) => image.src)")


def text_of(visit: Visit, selector: str) -> str:
    return visit.value(f"document.querySelector('{selector}').textContent.trim()")


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_it_loads_clean_and_fits_the_screen(browser: Any, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    with Visit(browser, pages[name], width, dark) as visit:
        assert visit.said == []
        assert visit.asked[0] == pages[name].as_uri()
        assert all(url.startswith("data:image/") for url in visit.asked[1:])
        visit.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        visit.value("document.getElementById('unfold')?.click()")
        assert visit.value("document.documentElement.scrollWidth") == width
        outside = """[...document.querySelectorAll('body *')]
            .filter((each) => !each.closest('.scroll, pre, dialog'))
            .filter((each) => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map((each) => each.outerHTML.slice(0, 80))"""
        assert visit.value(outside) == []
        paper, ink = (
            sum(map(float, re.findall(r"[\d.]+", visit.value(f"getComputedStyle({of}).{what}"))[:3])) / (3 * 255)
            for of, what in (("document.documentElement", "backgroundColor"), ("document.querySelector('h1')", "color"))
        )
        assert paper < 0.2 < 0.7 < ink if dark else ink < 0.3 < 0.9 < paper


def test_it_cannot_reach_the_network(browser: Any, pages: dict[str, Path]) -> None:
    """Not even a script that got in could."""
    with socket.create_server(("127.0.0.1", 0)) as server, Visit(browser, pages["report"]) as visit:
        server.settimeout(0.5)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert visit.value(f"fetch('{address}').then(() => 'reached', () => 'refused')") == "refused"
        load = f"const i = new Image(); i.onload = i.onerror = (event) => done(event.type); i.src = '{address}';"
        assert visit.value(f"new Promise((done) => {{ {load} }})") == "error"
        add = "const s = document.createElement('script'); s.textContent = 'window.got = 1'; document.body.append(s);"
        visit.value(f"(() => {{ {add} }})()")
        assert visit.value("window.got") is None
        with pytest.raises(TimeoutError):
            server.accept()
        assert all("Content Security Policy" in line for line in visit.said)


@pytest.mark.parametrize("name", ["report", "compare"])
def test_the_slider_changes_images_and_scores(browser: Any, pages: dict[str, Path], name: str) -> None:
    with Visit(browser, pages[name]) as visit:
        after, score, label = first_images(visit), text_of(visit, ".tile .score b"), text_of(visit, "#label")
        visit.page.focus("#stop")
        visit.page.keyboard.press("ArrowLeft")
        between = first_images(visit)
        visit.page.keyboard.press("Home")
        before = first_images(visit)
        assert all(len({a, b, c}) == 3 for a, b, c in zip(before, between, after, strict=True))
        assert text_of(visit, "#label") == "before training" and text_of(visit, ".tile .score b") == "0.00"
        assert visit.value("[...document.images].every((image) => image.naturalWidth > 0 || !image.src)")
        visit.page.keyboard.press("End")
        assert (first_images(visit), text_of(visit, ".tile .score b"), text_of(visit, "#label")) == (after, score, label)
        assert visit.said == []


def test_the_mark_in_the_curves_follows_the_slider(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["report"]) as visit:
        place = "document.querySelector('.chart .mark').x1.baseVal.value"
        last = visit.value(place)
        visit.page.focus("#stop")
        visit.page.keyboard.press("Home")
        assert visit.value(place) < last


def test_play_runs_through_the_evaluations(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["report"]) as visit:
        last = text_of(visit, "#label")
        visit.page.click("#play")
        assert text_of(visit, "#label") == "before training"
        for _ in range(100):
            visit.page.wait_for_timeout(100)
            if text_of(visit, "#label") == last:
                break
        assert text_of(visit, "#label") == last
        assert text_of(visit, "#play") == "▶"


def test_a_tile_opens_to_all_its_stages(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["report"], 380) as visit:
        visit.page.click(".tile[data-cell='1'] button")
        assert visit.value("document.getElementById('closer').open")
        assert visit.value("document.querySelectorAll('.film img').length") == 3
        assert text_of(visit, "dialog .prompt") == "a dog"
        assert visit.value("document.documentElement.scrollWidth") == 380
        visit.page.keyboard.press("Escape")
        assert not visit.value("document.getElementById('closer').open")
        assert visit.said == []


def test_the_curves_can_be_read(browser: Any, pages: dict[str, Path]) -> None:
    with Visit(browser, pages["report"]) as visit:
        visit.page.hover(".chart svg", position={"x": 60, "y": 60})
        assert re.match(r"\d+ queries: (training|fixed seeds)", text_of(visit, ".chart .reading"))


def test_a_prompt_cannot_speak(browser: Any, tmp_path: Path) -> None:
    nasty = [
        "<script>alert(1)</script>",
        "</script><script>alert(2)</script>",
        "<img src=x onerror=alert(3)>",
        "x" * 10_000_000,
    ]
    with Visit(browser, write_report(make_run(tmp_path / "run", prompts=nasty))) as visit:
        assert visit.said == []
        assert visit.value("document.scripts.length") == 2
        assert text_of(visit, ".tile .prompt") == nasty[0]
        visit.page.click(".tile[data-cell='1'] button")
        assert text_of(visit, "dialog .prompt") == nasty[1]
        assert visit.said == [] and all(url.startswith(("file:", "data:")) for url in visit.asked)


def test_two_thousand_steps_and_five_hundred_images_are_small_and_quick(browser: Any, tmp_path: Path) -> None:
    """Of noise, which no format can compress."""
    run_dir = make_run(
        tmp_path / "run",
        steps=2000,
        every=100,
        prompts=[f"thing {i}" for i in range(25)],
        reward=lambda i, step: None if i == 7 else float(i),
        draw=lambda index, step: noise(index, step, 96),
    )
    shutil.rmtree(run_dir / "samples" / "step_000100")  # 20 evaluations of 25
    report = write_report(run_dir)
    size = report.stat().st_size / 1e6
    assert report.read_text().count("data:image/webp") >= 500
    with Visit(browser, report) as visit:
        print(f"\n2,000 steps and 500 images: {size:.1f} MB; open after {visit.seconds:.2f} s, {visit.work:.2f} s of them work")
        assert size < 20
        assert visit.work < 2
