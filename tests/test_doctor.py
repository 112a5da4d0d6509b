"""The doctor: for each check, the fault that it is for is planted and found; a healthy configuration passes them all."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl import TrainConfig, diagnose, load_policy
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main, parse_train
from diffusionrl.config import (
    DDPOConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardsConfig,
    RWRConfig,
    SamplingConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.doctor import Finding, _tiny_rollout, check_groups, costs, examine, resources
from diffusionrl.doctor.costs import Cost, limit_bytes, measure, used_bytes
from diffusionrl.doctor.resources import Costs, something_to_learn
from diffusionrl.doctor.update import rows_of_an_update
from diffusionrl.policies import StableDiffusionPolicy
from diffusionrl.rewards import Mixture, as_mixture
from diffusionrl.runs import checkpoint
from diffusionrl.sampling import rollout
from diffusionrl.training.optimization import Optimization
from diffusionrl.training.trainer import Trainer

CONFIG = TrainConfig(
    steps=4,
    prompts_per_step=2,
    samples_per_prompt=4,
    sampling=SamplingConfig(num_steps=4, guidance=3.0, batch_size=8),
    algorithm=DDPOConfig(updates_per_step=2, min_count=4, micro_batch_size=8),
    evaluation=EvaluationConfig(num_samples=4),
)
CHECKS = [
    *("groups", "images", "scores", "repeatable", "variation", "speed", "ratio", "gradient", "policy", "reference"),
    *("export", "memory", "disk", "time"),
]
Metadata = Sequence[dict[str, Any]]


def brightness(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture
def tiny(tiny_folder: Path) -> Callable[..., StableDiffusionPolicy]:
    return lambda **settings: load_policy(str(tiny_folder), **settings)


def found_in(
    config: TrainConfig, policy: StableDiffusionPolicy, reward: Any = brightness, until: str = ""
) -> dict[str, Finding]:
    """What the doctor finds, up to a check, by check."""
    found = {}
    for finding in diagnose(config, policy, reward, ["a cat", "a dog"]):
        assert (finding.verdict == "pass") == (not finding.remedy), finding
        found[finding.check] = finding
        if finding.check == until:
            break
    return found


def trainer_of(
    config: TrainConfig, policy: StableDiffusionPolicy, reward: Any = brightness, prompts: int = 2, held_out: Any = None
) -> Trainer:
    texts = [Prompt(f"a cat, number {i}") for i in range(prompts)]
    return Trainer(policy, reward, texts, make_algorithm(config), config, held_out)


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    """Of what did not pass; time and speed are the machine's."""
    return {check: finding.verdict for check, finding in found.items() if finding.verdict != "pass" and check != "speed"}


# Healthy


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, algorithm=DDPOConfig(variant="sf", updates_per_step=1, normalisation="group")),
        replace(CONFIG, policy=PolicyConfig(training="full"), optimizer=OptimizerConfig(learning_rate=1e-5)),
        replace(CONFIG, policy=PolicyConfig(dtype="bfloat16", lora_targets=("all",))),
        replace(CONFIG, algorithm=RWRConfig(updates_per_step=3, batch_size=8), rewards=RewardsConfig(normalise=True)),
    ],
    ids=["ddpo", "score function", "full", "bfloat16", "rwr"],
)
def test_a_healthy_configuration_passes(tiny: Callable[..., StableDiffusionPolicy], config: TrainConfig) -> None:
    settings = {name: getattr(config.policy, name) for name in ("training", "dtype", "lora_targets")}
    found = found_in(config, tiny(**settings))
    assert not verdicts(found), found
    assert list(found) == [check for check in CHECKS if check != "ratio" or isinstance(config.algorithm, DDPOConfig)]


def test_the_trainer_is_left_as_it_was_found(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    examined, untouched = trainer_of(CONFIG, tiny()), trainer_of(CONFIG, tiny())
    assert list(examine(examined, control=True))[-1].check == "control"
    first, second = (
        {key: value for key, value in trainer.step(1).items() if not key.startswith(("time/", "peak"))}
        for trainer in (examined, untouched)
    )
    assert first == second
    for name, weight in untouched.policy.trainable().items():
        assert torch.equal(weight, examined.policy.trainable()[name])


# The command line


OPTIONS = "--prompts ddpo-animals --steps 2 --prompts-per-step 2 --samples-per-prompt 4 --sampling.num-steps 2"


def test_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(tiny_folder), *OPTIONS.split(), "--rewards.timeout", "60"]
    assert main(["doctor", *options]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(("pass", "warn"))] == CHECKS
    assert all(len(line) <= 120 for line in printed.splitlines())
    assert main(["doctor", *options, "--optimizer.learning-rate", "1e-30"]) == 1
    printed = capsys.readouterr().out
    assert "fail  policy" in printed and "→ raise optimizer.learning_rate" in printed and "1 failed" in printed
    assert main(["doctor", *options, "--reward", "compresibility"]) == 2
    assert "compressibility" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "the doctor writes nothing"


# Groups


def test_a_group_of_one_is_refused_where_a_group_is_needed(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--algorithm.normalisation", "group", "--samples-per-prompt", "1"])
    assert "samples_per_prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "verdict", "said"),
    [
        (replace(CONFIG, samples_per_prompt=1, algorithm=RWRConfig()), "fail", "alone with their prompt"),
        (replace(CONFIG, samples_per_prompt=4, algorithm=RWRConfig()), "pass", "relative to those of its prompt"),
        (replace(CONFIG, prompts_per_step=1, samples_per_prompt=1, algorithm=RWRConfig(normalisation="batch")), "fail", "noth"),
        (replace(CONFIG, algorithm=DDPOConfig(min_count=16, updates_per_step=2)), "warn", "min_count 16 is hardly reached"),
        (
            replace(CONFIG, samples_per_prompt=1, algorithm=DDPOConfig(min_count=1, updates_per_step=2)),
            "fail",
            "compared with themselves",
        ),
        (replace(CONFIG, algorithm=DDPOConfig(min_count=4, updates_per_step=2)), "pass", "100%"),
    ],
    ids=["rwr of one", "rwr of four", "a step of one", "never filled", "remembers itself", "filled at once"],
)
def test_groups(make_policy: Any, config: TrainConfig, verdict: str, said: str) -> None:
    found = check_groups(trainer_of(config, make_policy(), prompts=200))
    assert found.verdict == verdict and said in found.said


# The reward


def dice() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda images, prompts, metadata: torch.rand(len(images), generator=generator)


def noisy() -> Callable[..., Tensor]:
    roll = dice()
    return lambda images, prompts, metadata: brightness(images, prompts, metadata) + 0.005 * roll(images, prompts, metadata)


def constant(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    return torch.full((len(images),), 0.7)


def dark(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """What no image of the model is."""
    return (images.mean((1, 2, 3)) < 0.01).float()


def length_of_the_prompt(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> list[float]:
    return [float(sum(map(ord, prompt))) for prompt in prompts]


def not_a_number(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    return images.mean((1, 2, 3)) * torch.nan


def once_not_a_number(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    scores = brightness(images, prompts, metadata)
    scores[0] = torch.nan
    return scores


class OutOfRange:
    range = (2.0, 3.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        return brightness(images, prompts, metadata)


def broken(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    if images.std() > 0:  # grey ones are tried before anything else
        raise RuntimeError("no detector here")
    return brightness(images, prompts, metadata)


@pytest.mark.parametrize(
    ("reward", "expected", "said"),
    [
        (dice(), {"repeatable": "fail"}, "the same image twice gets different scores"),
        (noisy(), {"repeatable": "warn"}, "noise is"),
        (constant, {"variation": "fail"}, "and so do black, white, grey and noise"),
        (dark, {"variation": "warn"}, "all 8 images score 0"),
        (length_of_the_prompt, {"variation": "warn"}, "tells prompts apart, not images"),
        (not_a_number, {"scores": "fail"}, "8 of 8 images have no valid score"),
        (once_not_a_number, {"scores": "warn"}, "of 8 images have no valid score"),
        (OutOfRange(), {"scores": "fail"}, "outside its range of 2 to 3"),
        (broken, {"scores": "fail"}, "no detector here"),
    ],
)
def test_rewards(tiny: Callable[..., StableDiffusionPolicy], reward: Any, expected: dict[str, str], said: str) -> None:
    found = found_in(CONFIG, tiny(), Mixture({"planted": reward}), until="variation")
    assert verdicts(found) == expected
    assert said in found[next(iter(expected))].said


def test_the_faulty_part_of_a_mixture_is_named(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    found = found_in(CONFIG, tiny(), Mixture({"fine": brightness, "stuck": constant}), until="variation")
    assert found["variation"].verdict == "fail" and found["variation"].said.startswith("stuck: ")


def test_a_held_out_reward_is_tried_too(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    trainer = trainer_of(CONFIG, tiny(), held_out=as_mixture(once_not_a_number))
    found = next(finding for finding in examine(trainer) if finding.check == "scores")
    assert found.verdict == "warn" and "held-out" in found.said


def sluggish(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    time.sleep(0.1 * len(images))
    return brightness(images, prompts, metadata)


QUICK = Cost((0.0, 0.001), (1e8, 1e6), 8)


@pytest.mark.parametrize(
    ("reward", "batch_size", "verdict", "said"),
    [
        (brightness, 8, "pass", "a step waits for it"),
        (sluggish, 8, "warn", "a step waits for it 9"),  # in ten: 0.8 s beside 8 * 4 denoising and 32 updating milliseconds
        (sluggish, 64, "fail", "rewards.timeout is 3 s"),
    ],
    ids=["quick", "slow", "too slow for the timeout"],
)
def test_speed(tiny: Callable[..., StableDiffusionPolicy], reward: Any, batch_size: int, verdict: str, said: str) -> None:
    """Eight images are tried, a batch of the run's size is reckoned with."""
    sampling = replace(CONFIG.sampling, batch_size=batch_size)
    config = replace(CONFIG, prompts_per_step=batch_size // 4, sampling=sampling, rewards=RewardsConfig(timeout=3.0))
    trainer = trainer_of(config, tiny(), reward)
    tried = _tiny_rollout(trainer, CONFIG.sampling)
    assert tried.scores.valid.all()
    speed, _ = resources.check_time(trainer, tried, trainer.algorithm.advantages(tried), Costs(QUICK, QUICK, QUICK))
    assert speed.verdict == verdict and said in speed.said


# The update


def test_log_probabilities_that_are_off(tiny: Callable[..., StableDiffusionPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rollout.sample_trajectories

    def planted(*arguments: Any) -> rollout.Trajectories:
        drawn = honest(*arguments)
        return replace(drawn, log_probs=drawn.log_probs + 3e-5)

    monkeypatch.setattr(rollout, "sample_trajectories", planted)
    found = found_in(CONFIG, tiny(), until="reference")
    assert verdicts(found) == {"ratio": "fail"} and "3.0e-05" in found["ratio"].said


def test_a_tensor_without_gradient(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    name, weight = next(item for item in policy.trainable().items() if ".lora_A." in item[0])
    weight.register_hook(torch.zeros_like)
    found = found_in(CONFIG, policy, until="reference")
    assert verdicts(found) == {"gradient": "fail"}
    assert f"1 of {len(policy.trainable())} trained tensors get no gradient: {name}" in found["gradient"].said


def test_a_gradient_below_epsilon(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    for weight in policy.trainable().values():
        weight.register_hook(lambda gradient: gradient * 1e-12)
    found = found_in(CONFIG, policy, until="reference")
    assert found["gradient"].verdict == "fail" and "lower optimizer.epsilon" in found["gradient"].remedy
    assert (
        found_in(replace(CONFIG, optimizer=OptimizerConfig(epsilon=1e-20)), policy, until="gradient")["gradient"].verdict
        == "pass"
    )


def test_a_gradient_that_is_not_finite(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    next(iter(policy.trainable().values())).register_hook(lambda gradient: gradient * torch.nan)
    found = found_in(CONFIG, policy, until="reference")
    assert verdicts(found) == {"gradient": "fail"} and "not finite" in found["gradient"].said


@pytest.mark.parametrize(
    ("optimizer", "verdict"),
    [(OptimizerConfig(learning_rate=1e-30), "fail"), (OptimizerConfig(warmup=100_000), "warn")],
    ids=["no learning rate", "a long warm-up"],
)
def test_a_policy_that_does_not_move(
    tiny: Callable[..., StableDiffusionPolicy], optimizer: OptimizerConfig, verdict: str
) -> None:
    found = found_in(replace(CONFIG, optimizer=optimizer), tiny(), until="policy")
    assert found["policy"].verdict == verdict and "optimizer.learning_rate" in found["policy"].remedy
    assert ("warmup" in found["policy"].remedy) == (optimizer.warmup > 1)


def test_a_reference_that_moves(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    policy.reference = nullcontext  # type: ignore[method-assign,assignment]
    found = found_in(CONFIG, policy, until="reference")
    assert verdicts(found) == {"reference": "fail"} and "the reference moves" in found["reference"].said


def test_a_decoder_that_moves(tiny: Callable[..., StableDiffusionPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, honest = tiny(), Optimization.update

    def planted(*arguments: Any) -> Any:
        policy.pipeline.vae.decoder.conv_out.weight.data += 0.01
        return honest(*arguments)

    monkeypatch.setattr(Optimization, "update", planted)
    assert "the decoder moves" in found_in(CONFIG, policy, until="reference")["reference"].said


# Images and the export


@pytest.mark.parametrize(("planted", "said"), [(torch.nan, "NaN"), (0.5, "blank")])
def test_images_that_show_nothing(tiny: Callable[..., StableDiffusionPolicy], planted: float, said: str) -> None:
    policy = tiny()
    decode = policy.decode
    policy.decode = lambda latents, prompts: torch.full_like(decode(latents, prompts), planted)  # type: ignore[method-assign]
    found = found_in(CONFIG, policy, until="images")
    assert found["images"].verdict == "fail" and said in found["images"].said


def test_an_export_that_drops_a_layer(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    export = policy.export

    def planted(folder: Path) -> None:
        export(folder)
        file = folder / "pytorch_lora_weights.safetensors"
        weights = load_file(file)
        dropped = next(name for name in weights if ".lora_B." in name)
        save_file(weights | {dropped: torch.zeros_like(weights[dropped])}, file)

    policy.export = planted  # type: ignore[method-assign]
    found = found_in(CONFIG, policy, until="export")
    assert verdicts(found) == {"export": "fail"} and "draws other images" in found["export"].said


def test_a_second_model_that_does_not_fit(tiny: Callable[..., StableDiffusionPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny()
    monkeypatch.setattr("diffusionrl.doctor.export.used_bytes", lambda device: 10_000_000)
    monkeypatch.setattr("diffusionrl.doctor.export.limit_bytes", lambda device: 10_100_000)
    found = found_in(CONFIG, policy, until="export")["export"]
    assert found.verdict == "warn" and "loaded a second time for it, 0.0 GB, and 0.0 GB are free" in found.said
    weights = sum(w.numel() for part in ("unet", "vae", "text_encoder") for w in getattr(policy.pipeline, part).parameters())
    monkeypatch.setattr("diffusionrl.doctor.export.limit_bytes", lambda device: 10_000_000 + 4 * weights)
    assert found_in(CONFIG, policy, until="export")["export"].verdict == "pass"


def test_an_export_that_does_not_load(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    policy = tiny()
    policy.export = lambda folder: None  # type: ignore[method-assign]
    assert "does not load" in found_in(CONFIG, policy, until="export")["export"].said


def test_a_pipeline_handed_over_cannot_be_loaded_again(make_policy: Any) -> None:
    assert verdicts(found_in(CONFIG, make_policy(), until="export")) == {"export": "warn"}


# Memory, disk, time


def test_memory_is_proposed_that_keeps_prompts_and_groups(
    tiny: Callable[..., StableDiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costs that are measured, on a machine where the update or the sampling does not fit."""
    megabyte = 1e6
    config = replace(CONFIG, prompts_per_step=16, algorithm=replace(CONFIG.algorithm, micro_batch_size=64))
    measured = Costs(
        Cost((0.0, 0.1), (500 * megabyte, 2 * megabyte), 2),
        Cost((0.0, 0.1), (500 * megabyte, 50 * megabyte), 2),
        Cost((0.0, 0.1), (500 * megabyte, 10 * megabyte), 2),
    )
    trainer = trainer_of(config, tiny())
    tried = _tiny_rollout(trainer, CONFIG.sampling)
    advantages = trainer.algorithm.advantages(tried)
    # Sampling peaks at 500 + 8 * 50 MB, updates at 500 + 64 * 10 MB.
    for limit, verdict, said in [
        (1500, "pass", ""),
        (1200, "warn", "--algorithm.micro-batch-size 32;"),
        (1000, "fail", "--sampling.batch-size 4 --algorithm.micro-batch-size 32;"),
        (700, "fail", "--sampling.batch-size 1 --algorithm.micro-batch-size 8;"),
        (500, "fail", "not even one at a time fits"),
    ]:
        monkeypatch.setattr(resources, "limit_bytes", lambda device, limit=limit: limit * megabyte)
        found = resources.check_memory(trainer, tried, advantages, measured)
        assert found.verdict == verdict and said in found.remedy, (limit, found)
        if found.remedy.startswith("--"):
            assert "stays 16 prompts x 4" in found.remedy
            given = ["--sampling.batch-size", "8", "--algorithm.micro-batch-size", "64"]
            proposed = parse_train([*given, *found.remedy.partition(";")[0].split()])
            sampling = replace(config.sampling, batch_size=proposed.sampling.batch_size)
            algorithm = replace(config.algorithm, micro_batch_size=proposed.algorithm.micro_batch_size)
            smaller = trainer_of(replace(config, sampling=sampling, algorithm=algorithm), trainer.policy)
            assert resources.check_memory(smaller, tried, advantages, measured).verdict == "pass"


def test_the_memory_of_an_evaluation_counts(
    tiny: Callable[..., StableDiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 8 samples, an evaluation of 64,000: their batches and all that is held of them, trajectories too."""
    config = replace(CONFIG, evaluation=EvaluationConfig(num_samples=64_000), sampling=replace(CONFIG.sampling, batch_size=32))
    trainer = trainer_of(config, tiny())
    tried = _tiny_rollout(trainer, CONFIG.sampling)
    advantages = trainer.algorithm.advantages(tried)
    cost = Cost((0.0, 0.1), (5e8, 1e7), 8)
    held = 2 * 64_000 * (tried.latents[0].nbytes + tried.images[0].nbytes)
    need = 5e8 + 32 * 1e7 + held
    for limit, verdict, remedy in [
        (need / 0.8, "pass", ""),
        (need / 0.9, "warn", "--sampling.batch-size"),
        (need / 1.5, "fail", "lower evaluation.num_samples"),
    ]:
        monkeypatch.setattr(resources, "limit_bytes", lambda device, limit=limit: limit)
        found = resources.check_memory(trainer, tried, advantages, Costs(cost, cost, cost))
        assert found.verdict == verdict and remedy in found.remedy, (limit, found)
        assert "GB at the peak, an evaluation" in found.said


def test_the_time_of_evaluations_counts(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    """A held-out reward of 0.1 s and an embedding of 0.05 s an image, over 5 evaluations of 40: 30 s beside little else."""
    config = replace(CONFIG, evaluation=EvaluationConfig(every=1, num_samples=40))
    trainer = trainer_of(config, tiny(), held_out=as_mixture(sluggish))
    trainer.monitor.embed = lambda images: time.sleep(0.05 * len(images)) or images  # type: ignore[func-returns-value]
    tried = _tiny_rollout(trainer, CONFIG.sampling)
    scores, beside = resources.measure_beside(trainer, tried)
    assert scores is not None and scores.valid.all() and beside == pytest.approx(0.15, rel=0.3)
    none = Cost((0.0, 0.0), (1e8, 1e6), 8)
    advantages = trainer.algorithm.advantages(tried)
    _, found = resources.check_time(trainer, tried, advantages, Costs(none, none, none, beside=0.15))
    assert "6 s an evaluation" in found.said and "30 s for 4 steps and 5 evaluations" in found.said, found.said


def test_an_update_is_measured_whole(tiny: Callable[..., StableDiffusionPolicy]) -> None:
    """Of a rollout that was drawn one by one, as of a slow model, whose micro-batches would be of one sample each."""
    trainer, sizes = trainer_of(CONFIG, tiny()), []
    tried, advantages = something_to_learn(trainer, _tiny_rollout(trainer, replace(CONFIG.sampling, batch_size=1)))
    losses = trainer.algorithm.losses

    def noted(policy: Any, rollout: Any, rows: Tensor, advantages: Tensor) -> Any:
        sizes.append(len(rows))
        return losses(policy, rollout, rows, advantages)

    trainer.algorithm.losses = noted  # type: ignore[method-assign]
    cost = resources.measure_update(trainer, tried, rows_of_an_update(trainer, tried, advantages), advantages)
    assert cost.tried > 1 and sizes == [1, 1, cost.tried]


def test_costs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB and 10 ms for each of a batch, on top of 50 ms; the clock is ours."""
    now = [0.0]
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(n: int) -> None:
        held = torch.ones(n, 2_000_000)
        time.sleep(0.02)  # for a look at it
        assert held.shape[0] == n
        now[0] += 0.05 + 0.01 * n

    before = used_bytes(torch.device("cpu"))
    found = measure(work, 16, torch.device("cpu"))
    assert found.tried == 16
    assert found.peak(64) - before == pytest.approx(64 * 8e6, rel=0.15)
    assert found.time(64) == pytest.approx(0.69)


def test_a_size_that_may_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def work(n: int) -> None:
        tried.append(n)
        torch.ones(n, 10_000_000)  # 40 MB each

    monkeypatch.setattr(costs, "limit_bytes", lambda device: used_bytes(device) + 400_000_000)
    found = measure(work, 64, torch.device("cpu"))
    assert tried == [1, 1, 4] and found.tried == 4


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    free = limit_bytes(cpu) - used_bytes(cpu)
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("70000000\n")
    (tmp_path / "memory.stat").write_text("anon 50000000\ninactive_file 20000000\n")
    assert limit_bytes(cpu) - used_bytes(cpu) == pytest.approx(50_000_000, abs=10_000_000) != free
    (tmp_path / "memory.max").write_text("max\n")
    assert limit_bytes(cpu) - used_bytes(cpu) > 60_000_000


def test_a_full_disk(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(replace(CONFIG, run_dir=tmp_path / "run"), make_policy())
    assert resources.check_disk(trainer).verdict == "pass"
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 1000)
    found = resources.check_disk(trainer)
    assert found.verdict == "fail" and str(tmp_path / "run") in found.said


def test_layout() -> None:
    finding = Finding("warn", "speed", "a reward that is rather slow, all in all", "make it faster, " * 4)
    printed = finding.layout(60).splitlines()
    assert printed[0].startswith("warn  speed        a reward") and all(len(line) <= 60 for line in printed)
    assert printed[1].startswith(" " * 19 + "→ make") and printed[2].startswith(" " * 21 + "faster")
