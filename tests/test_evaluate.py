"""Evaluation on fixed seeds: intervals against known values, pairs, and the command from a model to its table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionrl.cli import main
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.evaluation import intervals
from diffusionrl.evaluation.assessment import Sheet, report, score_model, table
from diffusionrl.evaluation.intervals import (
    differences,
    mean_interval,
    overall,
    student_t_probability,
    student_t_quantile,
    win_rate,
)
from diffusionrl.rewards import Mixture

NAN = math.nan

# Intervals


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        *((1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157), (10, 2.228139)),
        *((29, 2.045230), (30, 2.042272), (60, 2.000298), (100, 1.983972), (1000, 1.962339)),
    ],
)
def test_students_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, abs=1e-6)


def test_students_quantiles_in_closed_form() -> None:
    for level in (0.5, 0.8, 0.95, 0.99):
        assert student_t_quantile(level, 1) == pytest.approx(math.tan(math.pi * level / 2))
        assert student_t_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)))
        assert student_t_probability(student_t_quantile(level, 7), 7) == pytest.approx(level)


def test_the_interval_of_a_mean() -> None:
    """1, 2, 3, 4: mean 2.5, standard deviation 1.290994, t(3) = 3.182446."""
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * 1.2909944 / 2
    assert (found.value, found.units) == (2.5, 4)
    assert (found.low, found.high) == (pytest.approx(2.5 - half, abs=1e-5), pytest.approx(2.5 + half, abs=1e-5))
    assert mean_interval([7.0]).value == 7 and math.isnan(mean_interval([7.0]).low)
    assert math.isnan(mean_interval([]).value)


def test_the_interval_of_a_win_rate() -> None:
    """Wilson's interval of 9 in 10, of 0 in 10 and of 5 in 10, as published tables give them."""
    assert [round(x, 4) for x in (lambda e: (e.value, e.low, e.high))(win_rate([1.0] * 9 + [-1.0]))] == [0.9, 0.5958, 0.9821]
    assert [round(x, 4) for x in (lambda e: (e.value, e.low, e.high))(win_rate([-1.0] * 10))] == [0.0, 0.0, 0.2775]
    assert [round(x, 4) for x in (lambda e: (e.value, e.low, e.high))(win_rate([1.0, -1.0] * 5))] == [0.5, 0.2366, 0.7634]
    assert win_rate([0.0] * 10) == win_rate([1.0, -1.0] * 5), "a tie counts half"
    assert math.isnan(win_rate([]).value)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Five normal numbers, 4,000 times: 95 % give or take three standard errors of that share."""
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [mean_interval(row.tolist()) for row in draws]
    assert sum(each.low <= 0 <= each.high for each in found) / 4000 == pytest.approx(
        0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000)
    )


@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), max_size=30))
def test_a_win_rate_lies_in_its_interval(gaps: list[float]) -> None:
    found = win_rate([gap for gap in gaps if not math.isnan(gap)])
    if found.units:
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_several_samples_a_prompt_count_by_prompt() -> None:
    prompts = ["a", "b", "c"] * 2
    found = overall([1.0, 2.0, 6.0, 3.0, 2.0, NAN], prompts)
    assert (found.value, found.units, found.unit) == (pytest.approx(10 / 3), 3, "prompts")
    assert found == mean_interval([2.0, 2.0, 6.0], "prompts")
    assert overall([1.0, 2.0, 6.0], prompts[:3]) == mean_interval([1.0, 2.0, 6.0])
    assert overall([1.0, 2.0], ["a", "a"]).unit == "samples", "of one prompt there is nothing else to count"


def test_an_invalid_score_leaves_both_sides_of_its_pair() -> None:
    gaps = differences([1.0, NAN, 3.0, 5.0], [0.0, 1.0, NAN, 7.0])
    assert gaps[0] == 1 and math.isnan(gaps[1]) and math.isnan(gaps[2]) and gaps[3] == -2
    sheets = [
        Sheet("new", ["a", "b"] * 2, {"r": [1.0, NAN, 3.0, 5.0]}),
        Sheet("old", ["a", "b"] * 2, {"r": [0.0, 1.0, NAN, 7.0]}),
    ]
    found = report(*sheets)["rewards"]["r"]
    assert (found["model"]["invalid"], found["baseline"]["invalid"]) == (1, 1)
    assert (found["win_rate"]["value"], found["win_rate"]["units"]) == (0.5, 2)
    assert found["difference"]["value"] == -0.5
    assert found["prompts"]["a"]["difference"]["value"] == 1 and found["prompts"]["b"]["win_rate"]["value"] == 0


def test_a_report_without_any_valid_score_is_json_and_a_table() -> None:
    found = report(Sheet("m", ["a", "b"], {"r": [NAN, NAN]}, "it is gone"), Sheet("m", ["a", "b"], {"r": [1.0, 2.0]}))
    assert json.loads(json.dumps(found, allow_nan=False))["errors"] == {"model": "it is gone"}
    assert "no valid score" in table(found) and "no valid pair" in table(found)


def test_the_table_shows_both_ends_of_many_prompts() -> None:
    prompts = [f"p{i:02}" for i in range(30)]
    said = table(report(Sheet("m", prompts, {"r": [float(i) for i in range(30)]})))
    assert "'p29'" in said and "'p00'" in said and "'p15'" not in said and "20 more" in said
    assert "30 samples" in said and f"[{intervals.mean_interval(list(map(float, range(30)))).low:.3f}" in said


# Models


def brightness(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_a_model_against_itself_neither_wins_nor_loses(make_policy: Any) -> None:
    prompts = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")]
    sheets = [
        score_model("m", make_policy(), Mixture({"brightness": brightness}), prompts, 2, SamplingConfig(num_steps=3), 0)
        for _ in range(2)
    ]
    assert len(set(sheets[0].scores["brightness"])) == 6, "every sample has noise of its own"
    found = report(*sheets)["rewards"]["brightness"]
    assert found["win_rate"]["value"] == 0.5
    assert (found["difference"]["value"], found["difference"]["low"], found["difference"]["high"]) == (0, 0, 0)
    for each in found["prompts"].values():
        assert (each["win_rate"]["value"], each["difference"]["value"]) == (0.5, 0)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    options = ["--model", str(tiny_folder), "--steps", "2", "--prompts-per-step", "2", "--samples-per-prompt", "2"]
    options += ["--sampling.num-steps", "3", "--evaluation.num-samples", "4", "--evaluation.held-out", "incompressibility"]
    options += ["--optimizer.learning-rate", "0.1", "--algorithm.micro-batch-size", "8", "--seed", "3"]
    (run_dir.parent / "prompts.txt").write_text("a cat\na dog\nan owl\na fox\n")
    assert main(["train", *options, "--run-dir", str(run_dir), "--prompts", str(run_dir.parent / "prompts.txt")]) == 0
    return run_dir


def test_a_run_is_evaluated_as_it_evaluated_itself(run: Path, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Its prompts, seed, sampling and rewards are the defaults; the baseline is what it began from."""
    out = tmp_path / "deep" / "e.json"
    assert main(["evaluate", "--model", str(run), "--baseline", str(tiny_folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("compressibility", "eval/reward"), ("incompressibility", "eval/incompressibility")):
        each = found["rewards"][name]
        assert each["model"]["value"] == pytest.approx(metrics[-1][key], rel=1e-5)
        assert each["baseline"]["value"] == pytest.approx(metrics[0][key], rel=1e-5)
        assert each["difference"]["value"] == pytest.approx(metrics[-1][key] - metrics[0][key], abs=1e-4)
        assert each["model"]["low"] < each["model"]["value"] < each["model"]["high"]
        assert set(each["prompts"]) == {"a cat", "a dog", "an owl", "a fox"}
    assert found["settings"]["seed"] == 3 and len(found["samples"]) == 4
    for said in (
        "compressibility, mean and 95 % interval over 4 samples",
        "difference",
        "wins",
        "of 4 pairs",
        "'a fox'",
        str(out),
    ):
        assert said in printed
    assert main(["evaluate", "--model", str(run), "--out", str(out)]) == 2
    assert "exists: choose another --out" in capsys.readouterr().err


def test_the_number_of_samples_can_be_the_runs(run: Path, tmp_path: Path) -> None:
    """Six over four prompts, as an evaluation of six samples would take them; and fewer than there are prompts."""
    for count, prompts in ((6, ["a cat", "a dog", "an owl", "a fox", "a cat", "a dog"]), (3, ["a cat", "a dog", "an owl"])):
        out = tmp_path / f"{count}.json"
        command = ["evaluate", "--model", str(run), "--reward", "compressibility", "--num-samples", str(count)]
        assert main([*command, "--out", str(out)]) == 0
        found = json.loads(out.read_text())
        assert [sample["prompt"] for sample in found["samples"]] == prompts
        kept = [json.loads(line) for line in (run / "samples" / "step_000002" / "samples.jsonl").read_text().splitlines()]
        for sample, own in zip(found["samples"], kept, strict=False):
            assert sample["model"]["compressibility"] == pytest.approx(own["reward"], rel=1e-5)


def test_a_lora_on_its_model_is_the_run(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--baseline", str(run), "--sampling.num-steps", "3", "--prompts", str(run.parent / "prompts.txt")]
    options += ["--reward", "incompressibility", "--samples-per-prompt", "2"]
    for number, lora in enumerate((run / "export", run / "export" / "comfyui.safetensors")):
        out = tmp_path / f"{number}.json"
        command = ["evaluate", "--model", str(tiny_folder), "--lora", str(lora), "--out", str(out), *options]
        assert main(command) == 0
        found = json.loads(out.read_text())["rewards"]["incompressibility"]
        assert found["model"]["unit"] == "prompts" and found["model"]["units"] == 4 and found["win_rate"]["units"] == 8
        assert (found["win_rate"]["value"], found["difference"]["value"]) == (0.5, 0)


def test_scores_that_fail_are_counted_and_said(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half_a_reward.py").write_text(
        "def half(images, prompts, metadata):\n"
        "    return [float('nan') if prompt == 'a dog' else float(image.mean()) for image, prompt in zip(images, prompts)]\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    options = ["--reward", "half_a_reward:half", "--prompts", "p.jsonl", "--sampling.num-steps", "2"]
    assert main(["evaluate", "--model", str(tiny_folder), "--baseline", str(tiny_folder), *options]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["rewards"]["half_a_reward:half"]
    assert (found["model"]["invalid"], found["model"]["units"], found["win_rate"]["units"]) == (1, 1, 1)
    assert found["prompts"]["a dog"]["difference"]["value"] is None
    heard = capsys.readouterr()
    assert "1 invalid" in heard.out and "some scores are invalid" in heard.err and "'a dog'" in heard.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "./nowhere"], "was not found"),
        (["--baseline", "./nowhere"], "was not found"),
        (["--lora", "nowhere.safetensors"], "LoRA nowhere.safetensors was not found"),
        (["--lora", "empty"], "LoRA empty is a folder without pytorch_lora_weights.safetensors"),
        (["--lora", "torn.safetensors"], "could not be loaded"),
        (["--lora", "other.safetensors"], "is it a LoRA of another model?"),
        (["--model", "untrained"], "has not trained yet"),
        (["--reward", "compresibility"], "did you mean 'compressibility'?"),
        (["--reward", "aesthetic=2"], "leave out the weight"),
        (["--prompts", "nowhere.txt"], "no such file"),
        (["--samples-per-prompt", "0"], "at least 1"),
        (["--num-samples", "0"], "num_samples must be at least 1"),
        (["--bseline", "emoji"], "--baseline"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], said: str) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").write_text("model: emoji\n")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 50)
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "p.txt").write_text("a cat\n")
    before = set(tmp_path.rglob("*"))
    try:
        code = main(["evaluate", "--prompts", "p.txt", "--sampling.num-steps", "2", *options])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    heard = capsys.readouterr()
    assert said in " ".join((heard.err + heard.out).replace("│", " ").split())
    assert "Traceback" not in heard.err
    assert set(tmp_path.rglob("*")) == before
