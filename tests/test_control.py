"""A run beside its control on noise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.faults import tiny_run
from tests.synthetic import make_run

from diffusionrl import TrainConfig, UserError
from diffusionrl.cli import main
from diffusionrl.config import DPOConfig, EvaluationConfig, TaskConfig
from diffusionrl.report.control import blind_control, effects, noise_control, table
from diffusionrl.report.record import read_run

HELD_OUT = EvaluationConfig(held_out=("judge",))


def test_a_control_is_the_same_run_on_noise() -> None:
    tasks = (TaskConfig("second", reward=("jpeg",)),)
    config = TrainConfig(reward=("aesthetic=2", "compressibility"), evaluation=HELD_OUT, tasks=tasks, push_to_hub="a/b")
    control = noise_control(config, Path("runs/x-noise"))
    assert control.reward == ("noise",) and control.tasks[0].reward == ("noise",) and control.push_to_hub is None
    assert control.evaluation.held_out == ("aesthetic", "compressibility", "judge")
    assert control.run_dir == Path("runs/x-noise")
    same = {name: getattr(config, name) for name in ("reward", "tasks", "evaluation", "push_to_hub", "run_dir", "name")}
    assert replace(control, **same) == config, "nothing else differs"


def test_a_blind_control_is_the_same_run_with_one_weight() -> None:
    tasks = (TaskConfig("second", reward=("jpeg",)),)
    config = TrainConfig(reward=("aesthetic=2",), samples_per_prompt=2, redraw_queries=8, tasks=tasks, push_to_hub="a/b")
    control = blind_control(config, Path("runs/x-blind"))
    assert control.blind and control.reward == config.reward
    assert replace(control, blind=False, redraw_queries=8, push_to_hub="a/b", run_dir=None) == config, "nothing else differs"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": ("noise",)}, "was trained on noise: it is a control itself"),
        ({"blind": True}, "is blind: it is a control itself"),
        ({"reward": ("__main__:redness=1",)}, "handed over in Python"),
        ({"reward": ("tests.here:test.<locals>.redness",)}, "handed over in Python"),
        ({"prompts": "<3 prompts handed over in Python>"}, "handed over in Python"),
        ({"preferences": "pairs", "algorithm": DPOConfig()}, "judged images"),
    ],
)
def test_what_has_no_control(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        noise_control(TrainConfig(**settings), Path("x-noise"))


def _write(run: Path, scores: dict[str, float]) -> None:
    """Other scores into a run's samples: of each at its start, and so much more at its end."""
    for folder in sorted((run / "samples").glob("step_*")):
        step = int(folder.name.removeprefix("step_"))
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {name: line["index"] + gain * (step > 0) for name, gain in scores.items()}
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_the_reward_did_is_the_run_less_its_control(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", reward=lambda i, step: i + 3.0 * (step > 0), evaluation=HELD_OUT)
    config = yaml.safe_load((run / "config.yaml").read_text())
    control = make_run(tmp_path / "x-noise", evaluation=EvaluationConfig(held_out=("compressibility", "judge")))
    assert config["reward"] == ["compressibility"]
    _write(run, {"judge": -0.5})
    _write(control, {"compressibility": 1.0, "judge": -0.5})
    found = {each.score: each for each in effects(read_run(run), read_run(control))}
    compressibility = found["compressibility"]
    assert [compressibility.run.value, compressibility.control.value, compressibility.reward.value] == [3.0, 1.0, 2.0]
    assert found["judge"].reward.value == 0.0 and found["judge"].run.value == -0.5
    said = table(list(found.values()), read_run(run), read_run(control)).splitlines()
    assert said[1].split()[:4] == ["compressibility", "+3", "+1", "+2"]
    assert said[-1].split() == ["random", "walk", "-", "-"]


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "x", evaluation=HELD_OUT))
    with pytest.raises(UserError, match="other prompts"):
        effects(run, read_run(make_run(tmp_path / "y", prompts=["a", "b", "c", "d"], evaluation=HELD_OUT)))
    with pytest.raises(UserError, match="no evaluation after training in common"):
        effects(run, read_run(make_run(tmp_path / "z", steps=3, every=3, evaluation=HELD_OUT)))


def test_a_weighed_reward_is_not_set_beside_its_raw_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", evaluation=HELD_OUT)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"reward": ["compressibility=2"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    control = make_run(tmp_path / "y", evaluation=EvaluationConfig(held_out=("compressibility", "judge")))
    assert [each.score for each in effects(read_run(run), read_run(control))] == ["judge"]


def test_one_flag_trains_it_and_says_what_the_reward_did(
    tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--rewards.no-normalise", "--steps", "3", "--evaluation.held-out", "compressibility"]
    assert main([*tiny_run(tiny_folder, Path("run"), *options)]) == 0
    assert main(["compare", "run", "--control"]) == 0
    printed = capsys.readouterr().out
    assert "what the reward did" in printed and "comparison: compare.html" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if line][-4:] == ["incompressibility", "compressibility", "random", "comparison:"]
    control = yaml.safe_load(Path("run-noise/config.yaml").read_text())
    assert control["reward"] == ["noise"]
    first = [json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[0]) for run in ("run", "run-noise")]
    assert first[0]["eval/reward"] == first[1]["eval/incompressibility"], "they begin from the same images"
    assert main(["compare", "run", "--control", "--out", "again.html"]) == 0, "it is trained once"
    assert main(["compare", "run", "--blind"]) == 0
    assert "its blind run" in capsys.readouterr().out and yaml.safe_load(Path("run-blind/config.yaml").read_text())["blind"]
    assert "blind to incompressibility" in Path("run-blind/report.html").read_text()
    assert "blind to" in Path("run-blind/export/README.md").read_text()
    assert main(["compare", "run-blind", "--blind"]) == 2
    assert main(["compare", "run", "run-noise", "--control"]) == 2
    assert "--control takes one run folder, not 2" in capsys.readouterr().err
    assert main(["compare", "nowhere", "--control"]) == 2
