"""Nothing assumes the CPU: whole runs on a device that is another one, with the numbers of the CPU. See ``pretend.py``."""

import json
import shutil
from pathlib import Path
from typing import Any

import pretend
import pytest
import tiny_pipelines as tiny
import torch

from diffusionrl.algorithms import EPG, GRPO
from diffusionrl.cli import main
from diffusionrl.config import EPGConfig, GRPOConfig, OptimizerConfig, SamplingConfig
from diffusionrl.config.judges import DiffusionClassifierConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.policies import make_policy
from diffusionrl.rewards import load_reward, score
from diffusionrl.sampling.rollout import collect
from diffusionrl.training.optimization import Optimization

pytestmark = pytest.mark.usefixtures("no_picture")

SMALL = [
    *("--prompts-per-step", "2", "--samples-per-prompt", "2", "--evaluation.num-samples", "2"),
    *("--evaluation.every", "0", "--evaluation.embeddings.model", "none"),
]
CLIPPED = ["--algorithm.updates-per-step", "1", "--algorithm.normalisation", "group"]
ALGORITHMS = {
    "ddpo": CLIPPED,
    "rwr": ["--algorithm.updates-per-step", "2", "--algorithm.batch-size", "4"],
}
_COPY = torch.ops.aten._to_copy.default
BRIGHTNESS = """
def brightness(images, prompts, metadata):  # a JPEG file would be a byte longer for a number that is rounded otherwise
    return images.flatten(1).mean(1)
"""


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures.py").write_text(BRIGHTNESS)
    return "pictures:brightness"


def train(run_dir: str, *options: str) -> list[dict[str, Any]]:
    """The metrics of a run."""
    assert main(["train", *SMALL, *options, "--run-dir", run_dir]) == 0
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() >= theirs.keys()  # a run that was to be shorter was evaluated once more
        for key, value in theirs.items():
            if value is None:
                assert ours[key] is None, key
            elif "time/" not in key and key != "peak_memory_gb":
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm(algorithm: str, tiny_folder: Path, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is stopped half way, and goes on."""
    options = ["--model", str(tiny_folder), *tiny.QUICK, "--prompts", "things", "--reward", reward]
    options += ["--algorithm.name", algorithm, *ALGORITHMS[algorithm]]
    steps = "2" if algorithm == "ddpo" else "1"
    expected = train("cpu", *options, "--steps", steps)
    with pretend.best_device(monkeypatch):
        found = train("there", *options, "--steps", "1")
        if algorithm == "ddpo":
            found = train("there", *options, "--steps", steps)
    assert json.loads(Path("there/env.json").read_text())["device"] == pretend.NAME
    assert_alike(found, expected)


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose condition is made on the CPU."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parent / "own_points.py", "there.py")
    options = ["--model", "there.py:make_policy", "--reward", "there.py:to_the_right", "--prompts", "things", *CLIPPED]
    options += ["--policy.lora-targets", "every", *tiny.QUICK]
    expected = train("cpu", *options, "--steps", "1")
    with pretend.best_device(monkeypatch):
        found = train("pretend", *options, "--steps", "1")
    assert_alike(found, expected)


@pytest.mark.parametrize("model", ["flux_kontext", "wan"], indirect=True)
def test_a_pipeline(model: Path, reward: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.node.callspec.params["model"]
    options = ["--model", str(model), *tiny.QUICK, *tiny.options_of(name), "--prompts", "prompts.jsonl", *CLIPPED]
    options += ["--reward", reward, "--steps", "1"]
    expected = train("cpu", *options)
    with pretend.best_device(monkeypatch):
        found = train("there", *options)
    assert_alike(found, expected)
    ours, theirs = (sorted(Path(run, "export").rglob("*.safetensors")) for run in ("there", "cpu"))
    assert [file.name for file in ours] == [file.name for file in theirs] != []


_GRPO = GRPO(GRPOConfig(updates_per_step=1, micro_batch_size=2), 2.0)
_EPG = EPG(EPGConfig(noisings=1, micro_batch_size=2), 2.0)


@pytest.mark.parametrize(("name", "algorithm"), [("sd1", _GRPO), ("sd3", _GRPO), ("sd3", _EPG)])
def test_the_host_does_not_wait_inside_a_rollout_or_an_update(
    name: str, algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that the host reads: of a rollout, the images of each batch; of an update, its loss, its gradient's norm, whether
    the weights are finite, and how far its halves agree."""
    run, read = pretend._run, []

    def counted(call: Any, args: Any, kwargs: Any) -> Any:
        found = run(call, args, kwargs)
        left = any(isinstance(each, pretend.Pretend) for each in pretend.leaves(args, kwargs))
        if left and not isinstance(found, pretend.Pretend) and call in (torch.ops.aten._local_scalar_dense.default, _COPY):
            read.append(call)
        return found

    monkeypatch.setattr(pretend, "_run", counted)
    flow = name == "sd3"
    sizes: dict[str, Any] = {"call": ("max_sequence_length=16",), **tiny.SIZE} if flow else {}
    sampling = SamplingConfig(2, 2.0, *(("flow_grpo", 0.7) if flow else ("ddim", 1.0)), batch_size=2, **sizes)
    prompts = [Prompt(text) for text in ("a cat", "a dog") for _ in range(2)]
    with pretend.best_device(monkeypatch):
        policy: Any = make_policy(tiny.build(name), sampling, device=pretend.NAME)
        optimization = Optimization(policy.trainable(), OptimizerConfig())
        levels = policy.noise_levels[torch.zeros(4).long()]  # made once, as the embeddings of a prompt
        policy.denoise(policy.start(prompts, range(4)), levels, prompts, 2.0)
        read.clear()
        rollout = collect(policy, lambda images, *_: images.mean((1, 2, 3)), prompts, sampling, 0, "x", 0, group_size=2)
        assert len(read) == 2
        read.clear()
        advantages = algorithm.advantages(rollout)
        for rows in algorithm.updates(rollout, advantages, 0, 0):
            optimization.update(algorithm, policy, rollout, rows, advantages)
        assert 1 <= len(read) <= 5


def test_the_doctor(
    tiny_folder: Path, reward: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_folder), *tiny.QUICK, "--prompts", "things", "--reward", reward, *SMALL, *CLIPPED]
    with pretend.best_device(monkeypatch):
        assert main(["doctor", *options, "--optimizer.learning-rate", "0.01"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "plain diffusers draws the same images" in said and "of the GPU" in said


@pytest.mark.parametrize("name", ["aesthetic", "clip-score", "composition", "emoji-judge", "parity", "preference"])
def test_a_reward_with_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [prompt for prompt in load_prompts("thing-pairs")[:2] for _ in range(2)]
    asked = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
    expected = score(load_reward(name), images, *asked)
    with pretend.best_device(monkeypatch):
        found = score(load_reward(name), images, *asked)
    assert torch.allclose(found.values, expected.values, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.valid.equal(expected.valid) and (expected.valid.any() or name == "emoji-judge")


@pytest.mark.parametrize("name", ["demon", "particles"])
def test_a_search(name: str, tiny_folder: Path, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--search.order", "2"] if name == "demon" else ["--search.rounds", "2"]
    options = ["sample", "--search", name, *own, "--model", str(tiny_folder), "--reward", reward, "--prompts", "a cat"]
    options += ["--sampling.num-steps", "3", "--search.queries", "4", "--search.candidates", "2"]
    assert main([*options, "--out", "cpu"]) == 0
    with pretend.best_device(monkeypatch):
        assert main([*options, "--out", "there"]) == 0
    expected, found = (
        [json.loads(line) for line in Path(out, "images.jsonl").read_text().splitlines()] for out in ("cpu", "there")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["after"]["reward"] == pytest.approx(theirs["after"]["reward"], rel=1e-3)
        assert ours["spent"]["denoisings"] == theirs["spent"]["denoisings"]


def test_a_diffusion_classifier(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = DiffusionClassifierConfig(model=str(tiny_folder), prompts=("a cat", "a dog"), trials=(2, 4), keep=(2,))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = (images, ["a cat", "an owl"], [{}, {}])
    expected = score(load_reward("diffusion-classifier", RewardsConfig(diffusion_classifier=judge)), *asked)
    with pretend.best_device(monkeypatch):
        found = score(load_reward("diffusion-classifier", RewardsConfig(diffusion_classifier=judge)), *asked)
    assert expected.valid.all() and torch.allclose(found.values, expected.values, atol=1e-3)


def test_the_pretraining_loss_and_half_precision(tiny_folder: Path, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", str(tiny_folder), *tiny.QUICK, "--prompts", "things", "--reward", reward, *CLIPPED]
    options += ["--pretraining.source", "emoji", "--pretraining.batch-size", "2", "--policy.dtype", "bfloat16", "--steps", "1"]
    with pretend.best_device(monkeypatch):
        assert train("run", *options)[-1]["ratio/max_gap"] < 1e-5
