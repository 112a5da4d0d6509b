"""One live line on a terminal, plain lines elsewhere, and a terminal that is left as it was."""

import io
import os
import pty
import select
import signal
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from faults import start, tiny_run

from diffusionrl.cli import START_AGAIN
from diffusionrl.runs.progress import Progress

EVALUATION = {"eval/reward": 2.5, "eval/reward_se": 0.25}


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "queries": 8 * number, "reward/mean": float(number), "reward/std": 0.5} | more


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows of it: a carriage return goes back to the line's beginning, and what follows overwrites."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def run(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, clock: list[float], first: int = 0) -> str:
    """Evaluation, two steps of 4 s, a third one with an evaluation, a fourth."""
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress(100, 8)
    clock[0] += 1000  # models load
    progress.begin(first)
    if first == 0:
        progress.show({"step": 0, "queries": 0} | EVALUATION)
    for number in range(first + 1, first + 5):
        clock[0] += 4
        progress.show(step(number, **(EVALUATION if number == first + 3 else {})))
    progress.close()
    return stream.getvalue()


def test_a_terminal_shows_one_live_line(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    written = run(Terminal(), monkeypatch, clock)
    shown = screen(written)
    assert [line.split("/")[0].split()[-1] for line in shown if line] == ["0", "3", "4"], "1 and 2 were overwritten"
    assert shown[-1] == "", "the cursor stands on a line of its own"
    assert "queries 32 (2/s)  0:06:24 left" in shown[2]
    assert "evaluation 2.500 ± 0.250" in shown[1]
    assert "\x1b" not in written


def test_a_narrow_terminal_does_not_wrap(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    written = run(Terminal(), monkeypatch, clock)
    live = [part for line in written.split("\n") for part in line.split("\r") if part and "evaluation" not in part]
    assert live and all(len(part) <= 29 for part in live)


def test_elsewhere_every_step_has_a_plain_line(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    written = run(io.StringIO(), monkeypatch, clock)
    assert "\r" not in written and len(written.splitlines()) == 5
    assert written.splitlines()[1] == "step   1/100  reward 1.000 ± 0.500  queries 8 (2/s)  0:06:36 left"


def test_a_run_that_goes_on_counts_from_where_it_does(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    assert "(2/s)  0:03:16 left" in run(io.StringIO(), monkeypatch, clock, first=50).splitlines()[0]


def test_a_lost_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Lost())
    progress = Progress(2, 1)
    progress.show(step(1))
    progress.close()


def test_an_interrupted_run_leaves_the_terminal_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    """The whole command on a pseudo-terminal, stopped by Ctrl-C in its fifth step."""
    controller, terminal = pty.openpty()
    before, written = termios.tcgetattr(terminal), b""
    process = start(tiny_run(tiny_folder, tmp_path / "run", "--evaluation.every", "0"), Path(os.ttyname(terminal)))
    try:
        while process.is_alive() or select.select([controller], [], [], 0.1)[0]:
            if select.select([controller], [], [], 0.1)[0]:
                written += os.read(controller, 1000)
            if b"step 4/" in written and process.is_alive():
                os.kill(process.pid, signal.SIGINT)  # type: ignore[arg-type]
                process.join(30)
        assert process.exitcode == START_AGAIN, written
        assert termios.tcgetattr(terminal) == before
    finally:
        process.kill()
        os.close(terminal)
        os.close(controller)
    said = written.decode().replace("\r\n", "\n")
    assert "\x1b" not in said
    live, last = said.rstrip("\n").rsplit("\n", 1)
    assert last.startswith("saved and stopped by SIGINT"), "on a line of its own"
    assert live.split("\n")[-1].count("\r") == 4 and live.rstrip(" ").endswith(" left"), "one line, whole at 80 columns"
