"""The report of a run and the comparison of several: what they say, that nothing in a run can break them, nor they a run."""

import itertools
import json
import os
import re
import runpy
import shutil
import signal
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import ENVIRONMENT, make_run, noise

from diffusionrl import UserError, train
from diffusionrl.cli import START_AGAIN, main, parse_train
from diffusionrl.config import DDPOConfig, EvaluationConfig, PolicyConfig, RWRConfig, SamplingConfig
from diffusionrl.evaluation.intervals import Estimate, mean_interval
from diffusionrl.policies import load_policy
from diffusionrl.report import compare_page, curves, run_page, thumbnails
from diffusionrl.report.curves import Line, draw
from diffusionrl.report.page import MAX_IMAGES, plus_minus, thinned
from diffusionrl.report.record import Evaluated, read_run
from diffusionrl.report.run_page import write_report
from diffusionrl.runs import checkpoint
from diffusionrl.runs import folder as tracking
from diffusionrl.runs.card import make_card


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text by lines."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._within = "", ""
        self.feed(file.read_text())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within not in ("style", "script"):
            self.text += " " + data

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def data_of(file: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def code_of(file: Path) -> str:
    found = re.search(r"Take it home</h2>\s*<pre><code>(.*?)</code>", file.read_text(), re.DOTALL)
    assert found is not None
    return unescape(found[1])


# A run writes its report


def tiny_train(model: Path, run_dir: Path, *more: str) -> list[str]:
    options = f"""train --model {model} --run-dir {run_dir} --prompts ddpo-animals --steps 2 --prompts-per-step 4
        --sampling.num-steps 3 --algorithm.updates-per-step 2 --evaluation.every 1 --evaluation.num-samples 3"""
    return [*options.split(), *more]


WATCHING = """
from pathlib import Path

seen = []

def watching(images, prompts, metadata):
    report = Path("run/report.html")
    seen.append(report.read_text() if report.is_file() else None)
    return [float(image.mean()) for image in images]
"""


def test_a_run_rewrites_its_report_at_every_evaluation_and_at_its_end(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "watching_reward.py").write_text(WATCHING)
    assert main(tiny_train(tiny_folder, Path("run"), "--reward", "watching_reward:watching")) == 0
    import watching_reward

    trial, first, step_1, evaluation_1, step_2, evaluation_2 = watching_reward.seen
    assert trial is None and first is None
    assert "at 1 of 1 evaluation," in step_1 and step_1 == evaluation_1
    assert "at 2 of 2 evaluations," in step_2 and step_2 == evaluation_2
    assert "<b>running</b> <span>1 of 2 steps are done</span>" in step_2
    last = Page(tmp_path / "run" / "report.html").text
    assert "at 3 of 3 evaluations," in last and "finished all 2 steps are done" in last
    assert "report: run/report.html" in " ".join(capsys.readouterr().out.split())
    assert not list(Path("run").glob("*.partial"))

    # What it says of the result is true: five lines of plain diffusers draw with what was learned.
    code = code_of(tmp_path / "run" / "report.html")
    assert f"load_lora_weights({str(tmp_path / 'run/export')!r})" in code and len(code.splitlines()) == 5
    (tmp_path / "load.py").write_text(code)
    image = runpy.run_path(str(tmp_path / "load.py"))["image"]
    assert image.size == (32, 32)


def test_the_report_is_rewritten_between_evaluations_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute after it was last written, at the next step; the clock is ours, and a call of the reward takes 12 s."""
    now = [0.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pages: list[str] = []

    def slow(images: Any, prompts: Any, metadata: Any) -> Any:
        report = tmp_path / "run" / "report.html"
        pages.append(Page(report).text if report.is_file() else "")
        now[0] += 12.0
        return images.mean((1, 2, 3))

    config = parse_train(tiny_train(tiny_folder, tmp_path / "run", "--steps", "6", "--evaluation.every", "0")[1:])
    train(config, reward=slow)
    said = [re.search(r"(\d) of 6 steps are done", page) for page in pages]
    assert [int(found[1]) for found in said if found] == [0, 0, 0, 3, 3, 3, 3], "the last call is step 6's evaluation"


def test_the_hours_of_a_slow_reward_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    """Sampling four images takes a few hundredths of a second, and the reward a quarter of a second."""

    def sleeping(images: Any, prompts: Any, metadata: Any) -> Any:
        time.sleep(0.25)
        return images.mean((1, 2, 3))

    train(parse_train(tiny_train(tiny_folder, tmp_path / "run")[1:]), reward=sleeping)
    assert read_run(tmp_path / "run").metrics[-1]["hours"] * 3600 >= 2 * 0.25


def test_best_worst_and_failed_are_those_of_the_last_training_steps(tiny_folder: Path, tmp_path: Path) -> None:
    """Of 16 samples a step, whose score says which call and which image it was; the first image of a call fails."""
    pages: list[Page] = []
    calls: list[int] = []

    def counted(images: Any, prompts: Any, metadata: Any) -> list[float | None]:
        calls.append(len(images))
        if (tmp_path / "run" / "report.html").is_file():
            pages.append(Page(write_report(tmp_path / "run")))
        scores = [100.0 * len(calls) + i for i in range(len(images))]
        return [None, *scores[1:]] if len(images) == 16 else scores  # type: ignore[list-item]

    options = ["--steps", "4", "--evaluation.every", "0", "--prompts-per-step", "16", "--samples-per-prompt", "1"]
    options += ["--algorithm.updates-per-step", "1"]
    train(parse_train(tiny_train(tiny_folder, tmp_path / "run", *options)[1:]), reward=counted)
    first = calls.index(16) + 1  # the first step's call
    recent = sorted((tmp_path / "run" / "samples" / "recent").iterdir())
    assert [folder.name for folder in recent] == ["step_000002", "step_000003", "step_000004"]
    lines = [json.loads(line) for line in (recent[-1] / "samples.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, *range(1, 7), *range(10, 16)]
    assert lines[0]["reward"] is None and "it returned nan for" in lines[0]["error"] and "error" not in lines[1]
    assert lines[-1]["reward"] == 100.0 * (first + 3) + 15 and lines[-1]["prompt"].startswith("a")
    assert {file.stem for file in recent[-1].glob("*.png")} == {f"{line['index']:05d}" for line in lines}

    assert "Highest reward at the evaluation of step 0" in pages[0].text, "before the first step is done"
    said = Page(tmp_path / "run" / "report.html").text
    best, worst, failed = re.split(r"(?:Highest|Lowest) reward in training, steps 2 to 4|Without a valid score", said)[1:]
    assert f"{100 * (first + 3) + 15}" in best and "step 4" in best and "step 2" not in best
    assert f"{100 * (first + 1) + 1}" in worst and "step 2" in worst and "step 4" not in worst
    assert [failed.count(f"invalid step {step}") for step in (1, 2, 3, 4)] == [0, 1, 1, 1] and "it returned nan for" in failed


def test_the_report_says_what_stopped_a_run_and_goes_on_with_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stopping_reward.py").write_text(
        "import os, signal\ncalls = []\n"
        "def stopping(images, prompts, metadata):\n    calls.append(1)\n"
        "    if len(calls) == 5:\n        os.kill(os.getpid(), signal.SIGTERM)\n"  # in step 2
        "    return [float(image.mean()) for image in images]\n"
    )
    command = tiny_train(tiny_folder, Path("run"), "--reward", "stopping_reward:stopping")
    assert main(command) == START_AGAIN
    assert "interrupted by SIGTERM; 1 of 2 steps are done" in Page(tmp_path / "run" / "report.html").text
    assert main(command) == 0
    assert "finished all 2 steps are done" in Page(tmp_path / "run" / "report.html").text
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    failing = "def failing(images, prompts, metadata):\n    return [None if len(images) == 16 else 1.0] * len(images)\n"
    (tmp_path / "failing_reward.py").write_text(failing)
    options = ["--reward", "failing_reward:failing", "--rewards.invalid-window", "1"]
    assert main(tiny_train(tiny_folder, Path("failed"), *options)) == 1
    assert "stopped 16 of 16 samples of the last 1 steps have no valid score" in Page(tmp_path / "failed" / "report.html").text


def test_a_report_that_cannot_be_written_does_a_run_no_harm(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr(run_page, "render", broken)
    assert main(tiny_train(tiny_folder, tmp_path / "run")) == 0
    assert "warning: report.html was not written: RuntimeError: no page today" in capsys.readouterr().err
    assert (tmp_path / "run" / "finished.json").is_file() and not (tmp_path / "run" / "report.html").exists()


def test_a_report_leaves_a_full_disk_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 100_000)
    with pytest.raises(OSError, match=r"only 0 MB are free"):
        write_report(run_dir)
    monkeypatch.undo()
    (run_dir / "report.html").mkdir()  # it cannot be replaced
    with pytest.raises(OSError):  # noqa: PT011
        write_report(run_dir)
    assert not list(run_dir.glob("*.partial"))


# What it says


def test_what_the_report_says(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run",
        reward=lambda i, step: None if (i, step) == (3, 8) else i + step / 2 * (i != 2),
        evaluation=EvaluationConfig(held_out=("judge",)),
    )
    page = Page(write_report(run_dir))
    assert "ddpo (is) on emoji towards compressibility, seed 0" in page.text
    # Samples 0 and 1 gained 4, sample 2 nothing, sample 3 has no score: 8 / 3 in 32 queries and 8 seconds.
    assert "gain, paired +2.7 ± 5.7 (95 %), better in 2 of 3" in page.text
    assert "gain per 1,000 queries +83.3 +1,333 per hour of training" in page.text
    assert "queries 32" in page.text and "training time 7 s 0.9 s a step" in page.text
    for title in ("reward", "reward over time", "judge held out: never trained on", "approximate KL", "seconds a step"):
        assert title in page.text
    assert "diffusionrl train --name 'a run; rm -rf ~'" in page.text
    for said in ("NVIDIA H100", "2.13.0", "1.25 GB", "samples_per_prompt: 1", "threads 8"):
        assert said in page.text
    best, worst, failed = re.split(
        "Highest reward at the evaluation of step 8|Lowest reward at the evaluation of step 8|Without a valid score", page.text
    )[1:]
    assert best.split()[:3] == ["a", "dog", "5.000"] and worst.split()[:3] == ["an", "owl", "2.000"]
    assert "a fox invalid evaluation, step 8" in failed


def test_the_slider_holds_every_evaluation_of_the_same_samples(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run"))
    data = data_of(report)
    assert data["labels"] == ["before training", "step 4 · 16 queries", "step 8 · 32 queries"]
    assert [[score for _, score, _, _ in stop] for stop in data["cells"]] == [
        ["0.000", "1.000", "2.000", "3.000"],
        ["2.000", "3.000", "4.000", "5.000"],
        ["4.000", "5.000", "6.000", "7.000"],
    ]
    assert data["cells"][0][0][2:] == ["", None] and data["cells"][2][0][2:] == ["+4.000", True]
    tiles = [image for image in Page(report).tags("img") if "data-image" in image]
    for tile, (number, *_) in zip(tiles, data["cells"][-1], strict=True):
        assert tile["data-image"] == str(number)
        assert data["images"][number] is None, "an image that the page shows is not in it twice"
        assert (tile["src"] or "").startswith("data:image/png;base64,")
    assert sum(image is not None for image in data["images"]) == 8


def test_an_image_that_comes_again_is_in_the_page_once(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", draw=lambda index, step: noise(0, 0)))
    assert data_of(report)["images"] == [None]
    assert len({image["src"] for image in Page(report).tags("img")}) == 1


def test_a_long_run_is_thinned_and_keeps_what_it_left_out(tmp_path: Path) -> None:
    evaluations = [Evaluated(step, step, {}) for step in range(200)]
    for count in range(1, 201):
        kept = thinned(evaluations[:count])
        assert kept[0].step == 0 and kept[-1].step == count - 1 and len(kept) <= 21
    assert {e.step for e in thinned(evaluations[:150])[:-1]} <= {e.step for e in thinned(evaluations[:100])} | set(
        range(100, 150)
    )
    report = write_report(make_run(tmp_path / "run", steps=60, every=2, prompts=["a cat"] * 60))
    data = data_of(report)
    assert len(data["labels"]) == 16 and data["labels"][-1] == "step 60 · 240 queries"
    assert sum(len(stop) for stop in data["cells"]) <= MAX_IMAGES


def test_warnings_stand_on_top(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert not any(section.get("class") for section in Page(write_report(run_dir)).tags("section"))
    alarms = [{"step": 4, "kind": "guard", "message": "reward and <judge> part"}, {"kind": "alarm"}]
    (run_dir / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms) + "[1]\n{half a li")
    page = Page(write_report(run_dir))
    assert "2 warnings" in page.text and "guard step 4 reward and <judge> part" in page.text
    assert page.text.index("2 warnings") < page.text.index("Same prompts")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "stopped.json",
            {"reason": "stopped", "message": "the loss is <nan>"},
            "stopped the loss is <nan> (8 of 9 steps are done)",
        ),
        ("stopped.json", {"reason": "failed", "message": "KeyError: 'x'"}, "failed KeyError: 'x'"),
        ("stopped.json", {"reason": "interrupted", "message": "SIGUSR1"}, "interrupted by SIGUSR1; 8 of 9"),
        (
            "finished.json",
            {"steps": 8, "exported_step": 4, "stopped": "judge fell", "reason": "stopped"},
            "stopped by the guard: judge fell (8 of 9 steps are done; export/ holds the weights of step 4)",
        ),
        (None, None, "ended without a word, as a killed process does; 8 of 9 steps are done"),
    ],
)
def test_what_stopped_it(tmp_path: Path, file: str | None, content: Any, said: str) -> None:
    run_dir = make_run(tmp_path / "run", finished=False)
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("steps: 8\n", "steps: 9\n", 1))
    if file is not None:
        (run_dir / file).write_text(json.dumps(content))
    assert said in Page(write_report(run_dir)).text
    with FileLock(run_dir / "lock"):
        kind = read_run(run_dir).ending.kind
    assert kind == ("running" if file is None else content["reason"])


@pytest.mark.parametrize("model", ["emoji", "some/model"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_result_loads_in_five_lines(tmp_path: Path, model: str, training: Any) -> None:
    code = code_of(write_report(make_run(tmp_path / "a 'run'", model=model, policy=PolicyConfig(training=training))))
    assert len(code.splitlines()) <= 5
    compile(code, "load.py", "exec")
    assert repr(str(tmp_path / "a 'run'" / "export"))[1:-1] in code
    assert ("pipe.unet =" in code) == (training == "full") and ('load_pipeline("emoji")' in code) == (model == "emoji")


def test_the_lines_draw_what_was_trained_where_the_model_says_nothing_of_clipping(tiny_folder: Path, tmp_path: Path) -> None:
    """As a PNDM scheduler's file may not: DDIM then clips the estimate of x0 by default, which a run never does."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    for file in (model / "scheduler" / "scheduler_config.json", model / "model_index.json"):
        settings = json.loads(file.read_text().replace("DDIMScheduler", "PNDMScheduler"))
        settings.pop("clip_sample", None)
        file.write_text(json.dumps(settings))
    page = code_of(write_report(make_run(tmp_path / "run", model=str(model))))
    run = read_run(tmp_path / "run")
    environment = ENVIRONMENT | {"versions": {"diffusionrl": "0", "torch": "0", "diffusers": "0"}}
    card = make_card(run.config, environment, run.metrics, ["a cat"], full=False)
    for lines in (page, card):
        assert "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)" in lines
    names: dict[str, Any] = {}
    exec("\n".join(page.splitlines()[:3]), names)
    assert names["pipe"].scheduler.config.clip_sample is False


@pytest.mark.parametrize("training", ["lora", "full"])
def test_what_was_learned_on_the_embedded_model_draws_by_the_lines_of_the_page(tmp_path: Path, training: str) -> None:
    load_policy("emoji", training=training).export(tmp_path / "run" / "export")
    sampling = SamplingConfig(num_steps=2, guidance=3.0)
    run_dir = make_run(tmp_path / "made", policy=PolicyConfig(training=training), sampling=sampling)  # type: ignore[arg-type]
    (tmp_path / "run" / "export").rename(run_dir / "export")
    (tmp_path / "load.py").write_text(code_of(write_report(run_dir)))
    assert runpy.run_path(str(tmp_path / "load.py"))["image"].size == (64, 64)


# Whatever is in a run


NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "'\"><svg onload=alert(3)>",
    "{{ 7 * 7 }}",
    "\ud800",
    "a\0b",
]


def test_nothing_in_a_run_is_markup(tmp_path: Path) -> None:
    plain = Page(write_report(make_run(tmp_path / "plain", prompts=["a cat"] * 8)))
    run_dir = make_run(tmp_path / "<b>run<", prompts=[*NASTY, "x" * 10_000_000, "a cat"], model="</title><script>")
    (run_dir / "alarms.jsonl").write_text(json.dumps({"kind": "<script>", "message": "</script><script>alert(4)"}))
    (run_dir / "finished.json").unlink()
    (run_dir / "stopped.json").write_text(json.dumps({"reason": "stopped", "message": "<script>alert(5)</script>"}))
    (run_dir / "env.json").write_text(json.dumps({"command": ["<script>"], "versions": {"<script>": "<script>"}}))
    lines = (run_dir / "metrics.jsonl").read_text().replace("grad_norm", "<script>alert(6)</script>' onload='alert(7)")
    (run_dir / "metrics.jsonl").write_text(lines)
    report = write_report(run_dir)
    page = Page(report)
    assert report.stat().st_size < 1_000_000
    assert "49" not in {word.strip() for word in page.text.split()}
    for name in ("script", "svg", "img", "style", "title", "figure"):
        assert len(page.tags(name)) == len(plain.tags(name)), name
    known = {name for _, attributes in plain.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert "(10,000,000 characters)" in page.text and "<script>alert(1)</script>" in page.text


def test_the_page_forbids_the_network_and_asks_nothing_of_it(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    policy = next(meta["content"] or "" for meta in page.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    assert parts["default-src"] == "'none'" and parts["img-src"] == "data:"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", parts["script-src"]) and re.fullmatch(r"'sha256-[\w+/=]+'", parts["style-src"])
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_a_half_written_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    newest = run_dir / "samples" / "step_000008"
    (newest / "00001.png").write_bytes((newest / "00001.png").read_bytes()[:40])
    (newest / "00002.png").unlink()
    samples = newest / "samples.jsonl"
    samples.write_text(samples.read_text()[:-20] + '\n{"index": "three"}\n[]\n')
    (run_dir / "samples" / "step_x").mkdir()
    (run_dir / "samples" / "step_000009").mkdir()
    (run_dir / "env.json").write_text("{")
    page = write_report(run_dir)
    assert [cell[0] for cell in data_of(page)["cells"][-1]][1:] == [-1, -1]
    for file in ("metrics.jsonl", "samples"):
        (run_dir / file).rename(tmp_path / file)
    assert "There is no evaluation yet" in Page(write_report(run_dir)).text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "steps: ["),
        ("config.yaml", "- 1"),
        ("config.yaml", "seed: 1"),
        ("metrics.jsonl", "{\n"),
        ("metrics.jsonl", "[1]\n"),
    ],
)
def test_a_broken_run_is_named(tmp_path: Path, capsys: Any, file: str, content: str) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / file).write_text(content)
    assert main(["report", str(run_dir)]) == 2
    assert f"{run_dir} cannot be read as a run" in capsys.readouterr().err


def test_a_report_on_request(tmp_path: Path, capsys: Any) -> None:
    run_dir = make_run(tmp_path / "run")
    assert main(["report", str(run_dir)]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err


# Images, curves, intervals


def test_an_image_becomes_as_small_as_it_must(tmp_path: Path) -> None:
    for size, kind in ((64, "png"), (512, "webp")):
        noise(0, 0, size).save(tmp_path / f"{size}.png")
        uri = thumbnails.data_uri(tmp_path / f"{size}.png")
        assert uri is not None and uri.startswith(f"data:image/{kind};base64,")
        assert len(uri) * 3 / 4 <= thumbnails.MAX_BYTES + 30
    Image.new("RGB", (300, 200), "red").save(tmp_path / "flat.png", compress_level=0)
    assert (thumbnails.data_uri(tmp_path / "flat.png") or "").startswith("data:image/webp")
    (tmp_path / "text.png").write_text("no image")
    assert thumbnails.data_uri(tmp_path / "text.png") is None
    assert thumbnails.data_uri(tmp_path / "nothing.png") is None


def test_an_image_that_changes_is_read_again(tmp_path: Path) -> None:
    noise(0, 0).save(tmp_path / "x.png")
    before = thumbnails.data_uri(tmp_path / "x.png")
    noise(0, 1).save(tmp_path / "x.png")
    os.utime(tmp_path / "x.png", (1, 1))
    assert thumbnails.data_uri(tmp_path / "x.png") != before


numbers = st.none() | st.floats(-1e30, 1e30)


@settings(max_examples=50)
@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 1e6)), max_size=10), st.sampled_from([1, 100]))
def test_a_curve_stays_in_its_box(points: list[tuple[float | None, float | None, float]], times: int) -> None:
    points = points * times
    x, y, spread = zip(*points, strict=True) if points else ((), (), ())
    chart = draw("t", "x", [Line("a", x, y, spread, dots=True), Line("b", x, y)], marks=[0.0])
    there = [point for point in points if point[0] is not None and point[1] is not None]
    assert (chart is None) == (not there)
    for line in chart.lines if chart else []:
        assert chart is not None and 0 < len(line["points"]) <= curves.MAX_POINTS
        for px, py in line["dots"]:
            assert chart.left <= px <= chart.right and chart.top <= py <= chart.bottom
    for at, _ in chart.x_ticks if chart else []:
        assert chart is not None and chart.left <= at <= chart.right


def test_a_thinned_curve_keeps_means_and_extremes() -> None:
    values = [float(i % 10) for i in range(3000)]
    chart = draw("t", "x", [Line("a", list(range(3000)), values)])
    assert chart is not None
    assert [y for _, _, y in chart.lines[0]["points"]] == [4.5] * 300
    edges = [float(y) for y in re.findall(r" (-?[\d.]+)", chart.lines[0]["band"])]
    (at_low, low), *_, (at_high, high) = chart.y_ticks
    per_unit = (at_high - at_low) / (float(high) - float(low))
    assert [min(edges), max(edges)] == pytest.approx([at_low + per_unit * (value - float(low)) for value in (9, 0)], abs=0.3)


def test_gaps_stay_gaps() -> None:
    chart = draw("t", "x", [Line("a", [0, 1, 2, 3], [1.0, None, 2.0, 1.0])])
    assert chart is not None and chart.lines[0]["path"].count("M") == 2


@pytest.mark.parametrize(
    ("value", "said"), [(12_000, "12k"), (-0.5, "−0.5"), (0.0002, "0.0002"), (2e-5, "2e−5"), (0, "0"), (2.5e6, "2.5M")]
)
def test_tick_labels(value: float, said: str) -> None:
    assert curves.tick_label(value) == said


def test_a_mean_is_said_to_the_digits_that_its_interval_leaves() -> None:
    assert plus_minus(Estimate(-26.5612, -26.9933, -26.1291, 3, "seeds")) == "−26.56 ± 0.43"
    assert plus_minus(Estimate(9.073, -7.927, 26.073, 3, "seeds"), sign=True) == "+9 ± 17"
    assert plus_minus(mean_interval([2.5])) == "2.5" and plus_minus(mean_interval([])) == "–"


# Comparison


def runs_of(tmp_path: Path, names: list[str], **settings: Any) -> list[Path]:
    return [
        make_run(tmp_path / name / f"seed_{seed}", seed=seed, reward=lambda i, step, s=seed: i + step * (1 + s) / 8, **settings)  # type: ignore[misc]
        for name, seed in itertools.product(names, (0, 1, 2))
    ]


def test_runs_that_differ_in_the_seed_alone_are_taken_together(tmp_path: Path) -> None:
    ours = runs_of(tmp_path, ["ddpo"])
    other = make_run(tmp_path / "rwr", algorithm=RWRConfig(), kl=0.0)
    page = compare_page.write_comparison([*ours, other], tmp_path / "compare.html")
    text = Page(page).text
    assert "ddpo · rwr 4 runs; those that differ in the seed alone are taken together" in text
    # Rewards 2.5, 3.5, 4.5 after 8 steps, and gains of 1, 2, 3, over the seeds; over its four samples for the single run.
    assert "ddpo 3.5 ± 2.5 +2.0 ± 2.5 0.92" in text and "3 seeds" in text
    assert "rwr 5.5 ± 2.1 +4 0.92" in text and "4 samples" in text
    for title in ("reward against queries", "reward against time", "reward against KL", "judge"):
        assert title in text
    assert "policy/approx_kl summed over the steps" in text
    differs = text.split("What differs")[1]
    assert "seed 0, 1, 2 0" in differs and "algorithm.name ddpo rwr" in differs and "algorithm.clip_range 0.0001 –" in differs
    assert "sampling" not in differs
    assert "The runs with seed 0: the same noise" in text
    assert len(data_of(page)["cells"][0]) == 4 * 2, "a tile for each prompt and group"


def test_what_the_guard_measures_has_its_place(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = {
            "eval/kl_per_step": 2.0,
            "eval/vendi": 1.5,
            "eval/saturation": 0.5,
            "eval/judge_change": 0.1,
            "guard/streak": 1,
        }
        lines = [line | measured if "eval/judge" in line else line for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown, more = Page(write_report(runs[0])).text.split("Curves")[1].split("more")[:2]
    assert "kl_per_step from the reference model" in shown and "vendi effective number" in shown
    assert (
        "eval/saturation" not in shown and "eval/saturation" in more and "eval/judge_change" in more and "guard/streak" in more
    )
    text = Page(compare_page.write_comparison(runs, tmp_path / "compare.html")).text
    assert "eval/kl_per_step, as measured at the evaluations" in text
    assert "reward gain judge kl_per_step vendi queries" in text


def test_what_updates_of_a_further_task_moved_is_no_measured_kl(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        lines = [
            json.loads(line) | {"faces/policy/approx_kl": 5.0} for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(compare_page.write_comparison(runs, tmp_path / "compare.html")).text
    assert "policy/approx_kl summed over the steps" in text and "as measured at the evaluations" not in text


def test_one_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("first", "again")]
    text = Page(compare_page.write_comparison(runs, tmp_path / "compare.html")).text
    assert "first · again 2 runs" in text and "seeds" not in text.split("Results")[1].split("Curves")[0].replace(
        "over seeds", ""
    )


def test_runs_with_other_stops_stand_at_their_newest_evaluation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "often", every=2), make_run(tmp_path / "seldom", every=8)]
    data = data_of(compare_page.write_comparison(runs, tmp_path / "compare.html"))
    assert data["labels"] == ["before training", "8 queries", "16 queries", "24 queries", "32 queries"]
    often, seldom = ([stop[i][1] for stop in data["cells"]] for i in (0, 1))
    assert often == ["0.000", "1.000", "2.000", "3.000", "4.000"] and seldom == ["0.000", "0.000", "0.000", "0.000", "4.000"]


def test_what_makes_rewards_differ_is_said(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", prompts=["a cat"]),
        make_run(tmp_path / "b", prompts=["a dog"], finished=False, algorithm=DDPOConfig(clip_range=1e-3)),
    ]
    config = (runs[1] / "config.yaml").read_text().replace("- compressibility", "- aesthetic")
    (runs[1] / "config.yaml").write_text(config)
    text = Page(compare_page.write_comparison(runs, tmp_path / "compare.html")).text
    assert "differ in the reward, so their rewards are not of one kind" in text
    assert "The runs have no prompt in common" in text and "b: ended, without a word" in text


def test_bad_comparisons(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, other = make_run(Path("run")), make_run(Path("other"), seed=1)
    (Path("empty") / "samples").mkdir(parents=True)
    (Path("empty") / "config.yaml").write_text((run / "config.yaml").read_text())
    for arguments, said in [
        ([run], "at least two run folders"),
        ([run, "run/../run"], "is named twice"),
        ([run, "nowhere"], "nowhere is no run folder: it has no config.yaml"),
        ([run, "empty"], "empty has no evaluation yet"),
        ([run, other, "--out", "no/folder/x.html"], "choose another --out"),
    ]:
        assert main(["compare", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))
    assert main(["compare", "run", "other"]) == 0
    assert "comparison: compare.html" in capsys.readouterr().out
    with pytest.raises(UserError):
        compare_page.write_comparison([], Path("x.html"))
