"""A network of one's own as a policy: what holds for pipelines holds for it, in Python and on the command line."""

import importlib.util
import json
import math
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import own_points
import pytest
import torch
from objectives import FORWARD, REVERSE, REWARD_GRADIENT, d3po, pso
from peft import PeftModel
from safetensors.torch import load_model
from torch import Tensor

from diffusionrl import NetworkPolicy, Prompt, TrainConfig, UserError, train
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main
from diffusionrl.config import DDPOConfig, EvaluationConfig, NFTConfig, OptimizerConfig, PolicyConfig, SamplingConfig
from diffusionrl.data.prompts import fingerprint
from diffusionrl.policies.own import check_policy
from diffusionrl.runs import checkpoint
from diffusionrl.sampling.rollout import Rollout, collect, denoise_step, draw_noise, make_table, sample_trajectories
from diffusionrl.training.optimization import Optimization
from diffusionrl.training.parts import draw, follow, learn, scored
from diffusionrl.training.trainer import Trainer
from diffusionrl.transitions import flow_grid, karras_grid, log_density, variance_preserving_grid

LORA = own_points.LORA
FULL = PolicyConfig(training="full")
SPARING = replace(LORA, gradient_checkpointing=True)
PROMPTS = [Prompt("a", {"place": np.array([1.0, 0.0])}), Prompt("b", {"place": [0.0, 1.0]})]
CPS = SamplingConfig(num_steps=4, sampler="cps", eta=0.7, guidance=1.0, batch_size=8)
CONFIG = TrainConfig(
    prompts_per_step=2,
    samples_per_prompt=4,
    steps=2,
    sampling=CPS,
    algorithm=DDPOConfig(updates_per_step=1, clip_range=1e3, normalisation="group"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    evaluation=EvaluationConfig(num_samples=4),
)
HERE = Path(__file__).parent


def policy_of(settings: PolicyConfig = LORA, moved: bool = True, **more: Any) -> NetworkPolicy:
    """Its adapter is moved off zero, so that it matters."""
    policy = own_points.make_policy(settings, 0, **more)
    for index, (name, weight) in enumerate(policy.trainable().items()):
        if moved and "lora_B" in name:
            weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
    return policy


def rollout_of(policy: NetworkPolicy, sampling: SamplingConfig = CPS) -> Rollout:
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    return collect(policy, own_points.to_the_right, prompts, sampling, 0, "test", 0, group_size=4)


# The distribution that is known


BARS = torch.linspace(0.9999, 0.98, 1000).double().cumprod(0).float()
MEAN, VARIANCE = 1.5, 0.25


class Exact(torch.nn.Module):
    """What the best of networks says of x0 ~ N(MEAN, VARIANCE), by the time that it is told."""

    def __init__(self, kind: str, prediction: str) -> None:
        super().__init__()
        self.kind, self.prediction, self.unused = kind, prediction, torch.nn.Linear(1, 1)

    def forward(self, x: Tensor, time: Tensor, condition: None) -> Tensor:
        alpha, sigma = {
            "flow": lambda: (1 - time / 1000, time / 1000),
            "variance preserving": lambda: (BARS[time.long()].sqrt(), (1 - BARS[time.long()]).sqrt()),
            "noise over signal": lambda: ((1 + time**2).rsqrt(), time * (1 + time**2).rsqrt()),
        }[self.kind]()
        alpha, sigma = alpha[:, None], sigma[:, None]
        x0 = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * MEAN)
        noise = (x - alpha * x0) / sigma
        return {"sample": x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[self.prediction]


@pytest.mark.parametrize(
    ("kind", "path", "prediction", "samplers"),
    [
        ("flow", flow_grid, "flow", ["ode", "flow_grpo"]),
        ("flow", partial(flow_grid, shift=3.0), "sample", ["ode", "precise"]),
        ("variance preserving", partial(variance_preserving_grid, BARS), "epsilon", ["ode", "ddim"]),
        ("variance preserving", partial(variance_preserving_grid, BARS), "v_prediction", ["ddim"]),
        ("noise over signal", karras_grid, "sample", ["ode", "ddim"]),
        ("noise over signal", karras_grid, "epsilon", ["ode"]),
    ],
)
def test_sampling_gives_the_distribution_that_an_exact_network_knows(
    kind: str, path: Any, prediction: Any, samplers: list[str]
) -> None:
    shape = (50,)  # independent dimensions
    policy = NetworkPolicy(Exact(kind, prediction), path, prediction, shape, show=own_points.show, settings=FULL)
    for sampler in samplers:
        eta = 0.0 if sampler == "ode" else 1.0
        table = make_table(policy, SamplingConfig(num_steps=200, sampler=sampler, eta=eta))  # type: ignore[arg-type]
        prompts = [Prompt("")] * 40
        start, noise = draw_noise(policy, table, prompts, 0, "test", 0, range(40))
        samples = sample_trajectories(policy, table, prompts, start, noise, 1.0).latents[:, -1]
        error = math.sqrt(VARIANCE / samples.numel())
        assert abs(samples.mean() - MEAN) < 5 * error + 0.01, sampler
        assert abs(samples.std() / math.sqrt(VARIANCE) - 1) < 0.06, sampler


# What holds for pipelines


@pytest.mark.parametrize("settings", [LORA, FULL, SPARING], ids=["lora", "full", "sparing"])
@pytest.mark.parametrize(
    ("path", "prediction"), [(flow_grid, "flow"), (partial(variance_preserving_grid, BARS), "epsilon"), (karras_grid, "sample")]
)
def test_ratio_gradient_and_reference(settings: PolicyConfig, path: Any, prediction: str) -> None:
    """Before the first update the ratio is 1 exactly; a replay is equal; the gradient reaches every tensor; without the adapter
    it is what it was; an older copy is what it was."""
    policy = policy_of(settings, moved=False, path=path, prediction=prediction)
    before = rollout_of(policy)
    policy.copies.follow("then")
    for index, weight in enumerate(policy.trainable().values()):
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    drawn = rollout_of(policy)
    assert torch.equal(drawn.latents, rollout_of(policy).latents) and not torch.equal(drawn.latents, before.latents)
    with policy.copies.used("then"):
        assert torch.equal(rollout_of(policy).latents, before.latents)
    if settings is FULL:
        with pytest.raises(UserError, match="keeps no reference"), policy.reference():
            pass
    else:
        with policy.reference():
            assert torch.equal(rollout_of(policy).latents, before.latents)
    prompts, rows = drawn.prompts, torch.full((8,), 1)
    mean, std = denoise_step(policy, drawn.table, drawn.latents[:, 1], rows, prompts, 1.0)
    assert torch.equal(log_density(drawn.latents[:, 2], mean, std), drawn.log_probs[:, 1])
    mean.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in policy.trainable().values())


@pytest.mark.parametrize("settings", [LORA, FULL], ids=["lora", "full"])
def test_a_step_is_the_same_after_a_checkpoint_and_the_export_draws_the_same(settings: PolicyConfig, tmp_path: Path) -> None:
    straight, resumed = policy_of(settings), policy_of(settings, moved=False)
    reward = own_points.to_the_right
    ours, theirs = (Trainer(each, reward, PROMPTS, make_algorithm(CONFIG), CONFIG) for each in (straight, resumed))
    ours.step(1)
    checkpoint.save(tmp_path, ours.state.capture(1))
    theirs.state.restore(checkpoint.load(checkpoint.folder_of(tmp_path, 1)))
    for trainer in (ours, theirs):
        trainer.step(2)
    weights = straight.trainable()
    assert all(torch.equal(weight, weights[key]) for key, weight in resumed.trainable().items())
    straight.export(tmp_path / "export")
    network: Any = own_points.network()
    if settings is LORA:
        network = PeftModel.from_pretrained(network, tmp_path / "export").merge_and_unload()
    else:
        load_model(network, tmp_path / "export" / "model.safetensors")
    again = NetworkPolicy(network, flow_grid, "flow", (2,), own_points.where, show=own_points.show, settings=FULL)
    drawn, base = rollout_of(straight).latents, rollout_of(policy_of(FULL)).latents
    assert (drawn - base).abs().max() > 1e-2, "something was learned"
    torch.testing.assert_close(rollout_of(again).latents, drawn, rtol=0, atol=1e-5)


OBJECTIVES: dict[str, Callable[..., Any]] = {**FORWARD, **REWARD_GRADIENT, **REVERSE, "d3po": d3po, "pso": pso}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_it(name: str) -> None:
    policy, algorithm = policy_of(), OBJECTIVES[name]()
    before = {key: weight.detach().clone() for key, weight in policy.trainable().items()}
    metrics = Trainer(policy, own_points.to_the_right, PROMPTS, algorithm, CONFIG).step(1)
    assert metrics["grad_norm"] > 0 and math.isfinite(metrics["grad_norm"])
    assert metrics.get("ratio/max_gap", 0.0) < 1e-5
    assert all(not torch.equal(weight, before[key]) for key, weight in policy.trainable().items())


def test_guidance_leads_away_from_the_unconditional_prompt() -> None:
    away, policy = Prompt("", {"place": (-1.0, 0.0)}), policy_of(unconditional=Prompt("", {"place": (-1.0, 0.0)}))
    x, levels = torch.ones(1, 2), policy.grid(4).levels[torch.tensor([1])]
    plain, without = (policy.denoise(x, levels, [prompt], None)[0] for prompt in (PROMPTS[0], away))
    guided = policy.denoise(x, levels, PROMPTS[:1], 3.0)[0]
    torch.testing.assert_close(guided, without + 3 * (plain - without))
    assert torch.equal(policy_of().denoise(x, levels, PROMPTS[:1], 3.0)[0], plain), "there is none to lead away from"


def test_arrays_are_part_of_a_prompt() -> None:
    one, other = (Prompt("go", {"place": np.array(place)}) for place in ([1.0, 0.0], [0.0, 1.0]))
    assert one.key != other.key and one.key == Prompt("go", {"place": np.array([1.0, 0.0])}).key
    large = [Prompt("go", {"place": torch.arange(5000) + shift * (torch.arange(5000) == 2500)}) for shift in (0, 1)]
    assert fingerprint(large[:1]) != fingerprint(large[1:]), "which print alike"
    listed = {"prompt": "go", "place": np.array([1.0, 0.0]), "image": np.zeros((3, 4))}
    result = {}

    def seen(points: Tensor, prompts: Any, metadata: Any) -> Tensor:
        result.update(metadata[0])
        return points[:, 0]

    from diffusionrl.api import diagnose

    next(iter(diagnose(CONFIG, policy_of(), seen, [listed])))
    assert result["image"].shape == (3, 4)


# Runs


def few(run_dir: Path, **changed: Any) -> TrainConfig:
    return replace(CONFIG, run_dir=run_dir, **changed)


def test_a_show_that_fails_costs_pictures_and_not_the_run(tmp_path: Path) -> None:
    def broken(points: Tensor) -> Tensor:
        raise ValueError("no canvas")

    train(few(tmp_path / "run"), policy_of(show=broken), own_points.to_the_right, PROMPTS)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no pictures of the samples: ValueError: no canvas" in page
    assert len(list((tmp_path / "run" / "samples" / "step_000002").glob("0*.png"))) == 4
    wrong = policy_of(show=lambda points: points)
    train(few(tmp_path / "wrong"), wrong, own_points.to_the_right, PROMPTS)
    assert "show makes (4, 2) of 4 samples" in (tmp_path / "wrong" / "alarms.jsonl").read_text()


OPTIONS = [
    *("--steps", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2", "--evaluation.num-samples", "2"),
    *("--sampling.num-steps", "3", "--sampling.sampler", "cps", "--sampling.eta", "0.7", "--policy.lora-targets", "every"),
    *("--algorithm.updates-per-step", "1", "--algorithm.normalisation", "group", "--algorithm.clip-range", "1"),
    *("--prompts", "prompts.jsonl", "--reward", "points.py:to_the_right", "--model", "points.py:make_policy"),
]


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "own_points.py", "points.py")
    Path("prompts.jsonl").write_text('{"prompt": "a", "place": [1, 0]}\n{"prompt": "b", "place": [0, 1]}\n')
    return tmp_path


def test_the_command_line_takes_code(points: Path, capsys: pytest.CaptureFixture[str], no_picture: None) -> None:
    assert main(["doctor", *OPTIONS, "--optimizer.learning-rate", "0.01"]) == 0, capsys.readouterr().out
    said = " ".join(capsys.readouterr().out.split())
    assert "8 decoded, 2, finite, not blank" in said and "writes adapter_config.json" in said and "0 failed" in said
    assert main(["train", *OPTIONS, "--run-dir", "run"]) == 0, capsys.readouterr().err
    assert "Network, a network of one" in Path("run/report.html").read_text()
    assert "PeftModel.from_pretrained(network" in Path("run/export/README.md").read_text()
    assert main(["train", *OPTIONS, "--run-dir", "run", "--steps", "2"]) == 0, capsys.readouterr().err
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    Path("elsewhere").mkdir()
    shutil.move("run", "elsewhere/run")
    shutil.copy("points.py", "elsewhere/points.py")
    for model, code in (("elsewhere/run", 0), ("points.py:make_policy", 0), ("points.py:nothing", 2)):
        given = ["--prompts", "prompts.jsonl", "--sampling.num-steps", "3", "--sampling.sampler", "ode", "--sampling.eta", "0"]
        out = model.replace("/", "_").replace(":", "_")
        assert main(["sample", "--model", model, *given, "--seeds", "0", "--out", out]) == code, capsys.readouterr().err
    learned, base = (np.load(f"{each}/samples.npy") for each in ("elsewhere_run", "points.py_make_policy"))  # which is ours
    assert learned.shape == (2, 2) and not np.array_equal(learned, base)
    more = ["--baseline", "points.py:make_policy", "--num-samples", "2", "--out", "scores.json"]
    assert main(["evaluate", "--model", "elsewhere/run", *more]) == 0, capsys.readouterr().err
    assert main(["export", "elsewhere/run", "--step", "2", "--out", "again"]) == 0, capsys.readouterr().err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (points / "again" / name).read_bytes() == (points / "elsewhere/run/export" / name).read_bytes()


def test_code_that_changed_between_two_starts(
    points: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    for changed, more, code, said in (
        ({}, [], 0, ""),
        (
            {"function": "other"},
            ["--steps", "2"],
            2,
            "points.py:to_the_right and the code of the model: not what",
        ),
        ({"file": "other"}, ["--steps", "2"], 0, "warning: the file of the model has changed since the run began"),
    ):
        found = {"function": "this", "file": "this"} | changed
        monkeypatch.setattr("diffusionrl.training.beginnings.code_of", lambda code, found=found: found)
        monkeypatch.setattr("diffusionrl.rewards.mixture.code_of", lambda code, found=found: found)
        assert main(["train", *OPTIONS, "--run-dir", "run", *more]) == code
        assert said in capsys.readouterr().err


def test_the_example_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HERE.parent / "examples" / "own_model.py"
    spec = importlib.util.spec_from_file_location("own_model", file)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "four_modes", partial(example.four_modes, steps=100))
    with torch.random.fork_rng(devices=[]):
        example.main(tmp_path / "run", steps=5)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/reward_change"] > 2 * last["eval/reward_change_se"] > 0


# What cannot be is said at once


class Odd:
    """A policy with some answers of another's."""

    def __init__(self, policy: NetworkPolicy, **answers: Any) -> None:
        self.policy, self.answers = policy, answers

    def __getattr__(self, name: str) -> Any:
        if name in self.answers:
            return self.answers[name]
        return getattr(self.policy, name)


def raising(*_: Any) -> Any:
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {"start": lambda prompts, addresses: torch.zeros(2, 3)},
            r"start gives \(2, 3\).* to be \(2, 2\), torch.float32 on cpu",
        ),
        ({"start": lambda prompts, addresses: torch.randn(2, 2)}, "start is not the same twice at the same addresses"),
        ({"start": lambda prompts, addresses: torch.zeros(2, 2).double()}, "torch.float64"),
        ({"denoise": lambda x, *_: (x, x + torch.randn(2, 2))}, "not the same twice at the same x, time and prompt"),
        ({"denoise": lambda x, *_: x}, r"denoise gives a Tensor, not \(x0, noise\)"),
        ({"denoise": raising}, "denoise raises KeyError: 'layer'"),
        ({"decode": lambda x, *_: x[:1]}, r"decode gives \(1, 2\)"),
        ({"grid": lambda steps: 3}, "grid is a int, not a diffusionrl.transitions.Grid"),
        ({"trainable": dict}, "trains nothing"),
        ({"about": {"weights": "1"}}, r"about names no \"network\": \['weights'\]"),
        ({"trainable": lambda: {"w": torch.nn.Parameter(torch.zeros(1), requires_grad=False)}}, "without gradient"),
        ({"device": torch.device("meta")}, "on cpu, with gradient: it has to be torch.float32 on meta"),
    ],
)
def test_what_answers_otherwise_is_named_before_anything_slow(answers: dict[str, Any], said: str, tmp_path: Path) -> None:
    policy = Odd(policy_of(), **answers)
    with pytest.raises(UserError, match=said):
        check_policy(policy, PROMPTS[0], 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        train(few(tmp_path / "run"), policy, own_points.to_the_right, PROMPTS)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_network_that_gives_another_shape() -> None:
    class Scalar(own_points.Network):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given)[:, :1]

    policy = NetworkPolicy(Scalar(), flow_grid, "flow", (2,), own_points.where, show=own_points.show, settings=LORA)
    with pytest.raises(UserError, match=r"the network gives \(2, 1\) for latents \(2, 2\)"):
        check_policy(policy, PROMPTS[0], 4)


def test_what_is_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy, a Network, is no policy: it has no about, .*NetworkPolicy makes one"):
        train(few(tmp_path / "run"), own_points.network(), own_points.to_the_right, PROMPTS)  # type: ignore[arg-type]
    for settings, more, said in (
        (replace(LORA, quantization="int8"), {}, "policy.quantization is for diffusers pipelines"),
        (replace(LORA, lora_targets=("attention",)), {}, "no layer 'attention'; its layers' names end in inner, outer; every"),
        (LORA, {"decode": lambda x: x[:, 5]}, r"decode fails on latents \(1, 2\) on cpu: IndexError"),
        (LORA, {"show": None}, r"samples of the shape \(2,\) are no images"),
        (LORA, {"path": karras_grid}, "'flow' is a velocity on a linear path"),
    ):
        with pytest.raises(UserError, match=said):
            policy_of(settings, **more)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def make_policy(settings, seed):\n    raise OSError('no weights')", "cannot be made: OSError: no weights"),
        ("def make_policy(settings):\n    pass", "takes 1 positional argument but 2 were given"),
        ("make_policy = 3", "is a int, not a function (settings, seed) -> policy"),
        ("import nowhere_at_all", "does not import: ModuleNotFoundError"),
        ("def make_policy(settings, seed):\n    return 3", "is no policy"),
        (
            "import own_points\nfrom diffusionrl.config import PolicyConfig\n"
            "def make_policy(settings, seed):\n    return own_points.make_policy(PolicyConfig(training='full'), seed)",
            "policy.training full, not lora",
        ),
    ],
)
def test_code_that_makes_no_policy(points: Path, body: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"broken_{abs(hash(body))}"
    Path(f"{name}.py").write_text(body + "\n")
    options = [each.replace("points.py:make", f"{name}.py:make") for each in OPTIONS]
    assert main(["train", *options, "--run-dir", "run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


def test_a_file_that_is_not_there_is_found_before_torch_is_imported(
    points: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("train", "doctor", "sample", "evaluate"):
        monkeypatch.setattr(f"diffusionrl.cli.{command}.quiet_libraries", lambda: pytest.fail("something slow has begun"))
        given = OPTIONS if command in ("train", "doctor") else []
        assert main([command, *given, "--model", "other.py:make_policy"]) == 2
        assert "model 'other.py:make_policy': there is no file other.py" in capsys.readouterr().err


def test_the_loop_of_the_docs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where the next prompt depends on the last sample: what it prints rises, in fewer episodes here."""
    page = (HERE.parent / "docs" / "own_model.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    loop = next(block for block in blocks if "follow(policy" in block)
    (tmp_path / "loop.py").write_text(loop.replace("range(20)", "range(10)"))
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(tmp_path / "loop.py"))
    returns = [float(line.split()[1].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(returns) == 10 and sum(returns[-3:]) > sum(returns[:3]) + 3


def test_the_parts_make_the_step_that_the_trainer_makes() -> None:
    """With an older copy that samples, and with an average."""
    config = replace(CONFIG, algorithm=NFTConfig(noisings=2), optimizer=OptimizerConfig(learning_rate=1e-2, average=0.9))
    ours, theirs = policy_of(), policy_of()
    trainer = Trainer(ours, own_points.to_the_right, PROMPTS, make_algorithm(config), config)
    own, optimization = make_algorithm(config), Optimization(theirs.trainable(), config.optimizer)
    for step in (1, 2):
        metrics = trainer.step(step)
        prompts = trainer.tasks[0].prompts_of(step)
        follow(theirs, own, step - 1)
        rollout = draw(theirs, own, own_points.to_the_right, prompts, CPS, 0, step, group_size=4)
        figures = learn(theirs, own, optimization, rollout, 0, step)
        assert all(figures[key] == metrics[key] for key in figures)
    assert all(torch.equal(weight, theirs.trainable()[key]) for key, weight in ours.trainable().items())
    copies = theirs.copies.tensors()
    assert len(copies) > len(ours.trainable()) and all(
        torch.equal(each, copies[key]) for key, each in ours.copies.tensors().items()
    )


def test_scores_that_come_later() -> None:
    policy, algorithm = policy_of(), make_algorithm(CONFIG)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    rollout = draw(policy, algorithm, None, prompts, CPS, 0, 1, group_size=4)
    assert not rollout.scores.valid.any() and rollout.images.shape == (8, 2) and rollout.latents.shape == (8, 5, 2)
    values = rollout.images[:, 0].clone()
    values[3] = torch.nan
    later = scored(rollout, values)
    assert later.scores.valid.tolist() == [True] * 3 + [False] + [True] * 4
    before = {key: weight.detach().clone() for key, weight in policy.trainable().items()}
    optimization = Optimization(policy.trainable(), CONFIG.optimizer)
    learn(policy, algorithm, optimization, later, 0, 1, advantages=torch.linspace(-1, 1, 8))
    assert any(not torch.equal(weight, before[key]) for key, weight in policy.trainable().items())
