"""Whatever a reward does, the run goes on, and learns exactly what the samples that have a score teach."""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import FORWARD, REVERSE, REWARD_GRADIENT, d3po, lightness, pso
from own_points import make_painter
from safetensors.torch import load_file
from torch import Tensor

from diffusionrl import RunStopped, TrainConfig, UserError, train
from diffusionrl import config as config_module
from diffusionrl.algorithms import DDPO, RWR, DiffusionRL
from diffusionrl.algorithms.advantages import PromptStatistics, batch_advantages, group_advantages
from diffusionrl.config import (
    CheckpointConfig,
    DDPOConfig,
    DiffusionRLConfig,
    EvaluationConfig,
    OptimizerConfig,
    RWRConfig,
    SamplingConfig,
)
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.rewards import RewardCall, Scores, as_mixture, score, within
from diffusionrl.runs import checkpoint
from diffusionrl.sampling.rollout import Rollout, collect
from diffusionrl.training.optimization import accumulate_gradient

SAMPLING = SamplingConfig(num_steps=3, guidance=2.0, sampler="cps", eta=0.7, batch_size=8)
PROMPTS = [Prompt("a cat"), Prompt("a dog")] * 4


def brightness(images: Tensor, prompts: Any, metadata: Any) -> list[float]:
    return images.mean((1, 2, 3)).tolist()


def raises(images: Tensor, prompts: Any, metadata: Any) -> Any:
    raise ConnectionError("the scorer is gone")


def hangs(images: Tensor, prompts: Any, metadata: Any) -> Any:
    time.sleep(30)


def ends_its_thread(images: Tensor, prompts: Any, metadata: Any) -> Any:
    raise SystemExit(3)


def broken_json(images: Tensor, prompts: Any, metadata: Any) -> Any:
    return json.loads("{")


def dead_worker(images: Tensor, prompts: Any, metadata: Any) -> Any:
    process = os.fork()
    if process == 0:
        os._exit(9)
    _, status = os.waitpid(process, 0)
    if status:
        raise ChildProcessError(f"the worker died with status {status}")


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "exception": (raises, "ConnectionError: the scorer is gone"),
    "hang": (hangs, "no scores within 0.2 s"),
    "SystemExit": (ends_its_thread, "SystemExit: 3"),
    "dead worker": (dead_worker, "the worker died"),
    "broken JSON": (broken_json, "JSONDecodeError"),
    "NaN": (lambda images, prompts, metadata: [float("nan")] * len(images), "it returned nan for 'a"),
    "infinity": (lambda images, prompts, metadata: [float("inf")] * len(images), "it returned inf for 'a"),
    "None": (lambda images, prompts, metadata: [None] * len(images), "it returned nan for 'a"),
    "nothing": (lambda images, prompts, metadata: None, "a NoneType"),
    "too short": (lambda images, prompts, metadata: [1.0], "a list of length 1"),
    "too long": (lambda images, prompts, metadata: [1.0] * 99, "a list of length 99"),
    "a matrix": (lambda images, prompts, metadata: torch.zeros(len(images), 2), "a Tensor of shape"),
    "words": (lambda images, prompts, metadata: ["good"] * len(images), "a list"),
    "a number": (lambda images, prompts, metadata: 1.0, "a float"),
    "complex": (lambda images, prompts, metadata: [1j] * len(images), "a list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_and_counts_what_failed(tmp_path: Path, fault: str) -> None:
    """The second of four steps fails; no score of it is used, nothing is scored 0, and the third step is as ever."""
    broken, _ = FAULTS[fault]
    calls: list[int] = []

    def failing_once(images: Tensor, prompts: Any, metadata: Any) -> Any:
        calls.append(1)
        return (broken if len(calls) == 4 else brightness)(images, prompts, metadata)  # trial, evaluation, step 1, step 2

    config = TrainConfig(
        steps=3,
        prompts_per_step=4,
        run_dir=tmp_path / "run",
        sampling=SAMPLING,
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        evaluation=EvaluationConfig(every=0, num_samples=2),
        checkpoint=CheckpointConfig(every=1, keep=4),
        rewards=RewardsConfig(timeout=0.2 if fault == "hang" else 60.0),
    )
    train(config, policy=make_painter(), reward=failing_once, prompts=["a cat", "a dog"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("reward/invalid") for line in lines] == [None, 0, 4, 0]
    assert lines[2]["reward/mean"] is None
    weights = [load_file(checkpoint.folder_of(tmp_path / "run", step) / "policy.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "a step without scores changed weights"
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])


def test_a_reward_that_hangs_from_the_start_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run", sampling=SAMPLING, rewards=RewardsConfig(timeout=0.2))
    with pytest.raises(UserError, match=r"no scores for a few grey images within 0.2 s .*hangs"):
        train(config, policy=make_painter(), reward=hangs, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"hang", "SystemExit"}))  # which only a thread survives
def test_the_error_is_the_rewards_own(fault: str) -> None:
    broken, said = FAULTS[fault]
    found = score(broken, torch.zeros(2, 3, 8, 8), ["a cat", "a dog"], [{}, {}])
    assert not found.valid.any() and said in (found.error or "")


def test_a_hanging_reward_does_not_keep_the_next_call_from_its_scores() -> None:
    began: list[float] = []

    def hangs_once(images: Tensor, prompts: Any, metadata: Any) -> Any:
        began.append(time.monotonic())
        if len(began) == 1:
            time.sleep(5)
        return brightness(images, prompts, metadata)

    start = time.monotonic()
    sampling = replace(SAMPLING, batch_size=4)
    scores = collect(make_painter(), hangs_once, PROMPTS, sampling, 0, "test", 1, timeout=0.5).scores
    assert scores.valid.tolist() == [False] * 4 + [True] * 4
    assert "no scores within 0.5 s" in (scores.error or "")
    assert time.monotonic() - start < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDPO(DDPOConfig(min_count=1), 2.0),
        lambda: DDPO(DDPOConfig(normalisation="group"), 2.0),
        lambda: DDPO(DDPOConfig(normalisation="batch"), 2.0),
        lambda: RWR(RWRConfig(), 2.0),
        lambda: RWR(RWRConfig(normalisation="batch"), 2.0),
    ],
)
def test_the_gradient_is_exactly_that_of_the_batch_without_the_failed_samples(
    make_policy: Any, make: Callable[[], Any]
) -> None:
    policy, algorithm = make_policy(), make()
    whole = collect(policy, brightness, PROMPTS, SAMPLING, 0, "test", 1, needs=algorithm.needs)
    failed = torch.tensor([1, 4])
    kept = torch.tensor([i for i in range(8) if i not in failed])
    valid = torch.ones(8, dtype=torch.bool)
    valid[failed] = False
    values = torch.where(valid, whole.scores.values, torch.nan)
    with_failures = replace(whole, scores=Scores(values.nan_to_num(1e6), valid))
    without = Rollout(
        whole.table,
        [whole.prompts[i] for i in kept],
        whole.latents[kept],
        whole.log_probs[kept],
        whole.images[kept],
        Scores(values[kept], valid[kept]),
        {},
    )

    def gradient(rollout: Rollout, samples: Tensor) -> list[Tensor]:
        algorithm = make()
        advantages = algorithm.advantages(rollout)
        if isinstance(algorithm, DDPO):
            rows = torch.cat([torch.stack([samples, torch.full_like(samples, step)], 1) for step in range(3)])
        else:
            rows = torch.stack([samples, torch.arange(len(samples)) + 7], 1)
        for parameter in policy.trainable().values():
            parameter.grad = None
        accumulate_gradient(algorithm, policy, rollout, rows, advantages)
        return [parameter.grad.clone() for parameter in policy.trainable().values()]

    for one, other in zip(gradient(with_failures, kept), gradient(without, torch.arange(6)), strict=True):
        assert torch.equal(one, other)


values = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(3.0)), min_size=1, max_size=8)


@settings(max_examples=200)
@given(values, st.integers(0, 255), st.booleans())
def test_degenerate_groups_give_finite_advantages_and_invalid_samples_none(found: list[float], mask: int, alike: bool) -> None:
    if alike:
        found = [found[0]] * len(found)
    valid = torch.tensor([bool(mask >> i & 1) for i in range(len(found))])
    scores = Scores(torch.tensor(found), valid)
    prompts = ["a"] * len(found)
    for advantages in (
        batch_advantages(scores),
        group_advantages(scores, prompts),
        PromptStatistics(8, 1).advantages(scores, prompts),
    ):
        assert advantages.isfinite().all()
        assert not advantages[~valid].any()
        if alike or valid.sum() <= 1:
            assert not advantages.any(), "nothing to compare with teaches nothing"


def test_prompts_that_teach_nothing_are_counted(tmp_path: Path) -> None:
    def constant_for_cats(images: Tensor, prompts: Any, metadata: Any) -> list[float]:
        return [1.0 if "cat" in prompt else image.mean().item() for image, prompt in zip(images, prompts, strict=True)]

    config = TrainConfig(
        steps=1,
        prompts_per_step=6,
        samples_per_prompt=2,
        run_dir=tmp_path / "run",
        sampling=SAMPLING,
        algorithm=DDPOConfig(updates_per_step=1, normalisation="group"),
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config, policy=make_painter(), reward=constant_for_cats, prompts=["a cat", "a dog"])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert line["advantage/idle_prompts"] == 1


def test_a_run_whose_reward_is_gone_saves_and_stops_with_its_last_error(tmp_path: Path) -> None:
    calls: list[int] = []

    def dying(images: Tensor, prompts: Any, metadata: Any) -> Any:
        calls.append(1)
        return (brightness if len(calls) <= 4 else raises)(images, prompts, metadata)  # trial, evaluation, two steps

    config = TrainConfig(
        steps=20,
        prompts_per_step=4,
        run_dir=tmp_path / "run",
        sampling=SAMPLING,
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        evaluation=EvaluationConfig(every=0, num_samples=2),
    )
    with pytest.raises(RunStopped, match=r"8 of 12 samples of the last 3 steps .* ConnectionError: the scorer is gone"):
        train(config, policy=make_painter(), reward=dying, prompts=["a cat", "a dog"])
    assert checkpoint.complete_steps(tmp_path / "run") == [3]


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_non_finite_reaches_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    """Injected at several updates; weights and optimizer are as before it, and the batch can be looked at."""
    original, calls = DDPO.losses, []
    for nth in (1, 2, 4, 5, 7):
        calls.clear()
        run_dir = tmp_path / str(nth)

        def spoiled(self: Any, *arguments: Any, nth: int = nth) -> Any:
            losses, figures = original(self, *arguments)
            calls.append(1)
            if len(calls) != nth:
                return losses, figures
            if where == "loss":
                return losses * value, figures
            losses.register_hook(lambda gradient: gradient * value)
            return losses, figures

        monkeypatch.setattr(DDPO, "losses", spoiled)
        config = TrainConfig(
            steps=5,
            prompts_per_step=4,
            run_dir=run_dir,
            sampling=SAMPLING,
            algorithm=DDPOConfig(updates_per_step=2, min_count=1),
            evaluation=EvaluationConfig(every=0, num_samples=2),
        )
        with pytest.raises(RunStopped, match=r"not finite in step .* Try a lower optimizer\.learning_rate"):
            train(config, policy=make_painter(), reward=brightness, prompts=["a cat", "a dog"])
        (step,) = checkpoint.complete_steps(run_dir)
        assert step == (nth - 1) // 2
        saved = checkpoint.load(checkpoint.folder_of(run_dir, step))
        assert all(tensor.isfinite().all() for file in saved.tensors.values() for tensor in file.values())
        batch = load_file(run_dir / "debug" / f"step_{step + 1:06d}" / "batch.safetensors")
        assert {"latents", "rows", "losses", "advantages"} <= set(batch)
        assert len(json.loads((run_dir / "debug" / f"step_{step + 1:06d}" / "batch.json").read_text())) == len(batch["samples"])


class Counting:
    """An algorithm with a state of its own, saved or forgotten."""

    def __init__(self, inner: Any, forgets: bool) -> None:
        self.inner, self.forgets, self.seen = inner, forgets, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def advantages(self, rollout: Rollout) -> Tensor:
        self.seen += 1
        return self.inner.advantages(rollout) * self.seen

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() | ({} if self.forgets else {"seen": self.seen})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self.seen = state.get("seen", 0.0)


def whole_and_resumed(make_policy: Any, run_dir: Path, make: Callable[[], Any]) -> tuple[Any, Any]:
    """The final weights of a run in one piece, and of the same one taken up from its first step."""
    config = TrainConfig(
        steps=2,
        prompts_per_step=4,
        samples_per_prompt=2,
        run_dir=run_dir,
        sampling=SAMPLING,
        algorithm=DDPOConfig(updates_per_step=2, min_count=1),
        optimizer=OptimizerConfig(max_grad_norm=math.inf),  # which would hide how long a gradient is
        evaluation=EvaluationConfig(every=0, num_samples=2),
        checkpoint=CheckpointConfig(every=1, keep=2),
    )
    final = []
    for _ in range(2):
        train(config, policy=make_policy(), reward=lightness, prompts=["a cat", "a dog"], algorithm=make())
        last = checkpoint.folder_of(run_dir, 2)
        final.append(load_file(last / "policy.safetensors"))
        shutil.rmtree(last)  # as if it had been killed before
        (run_dir / "finished.json").unlink()
    assert json.loads((run_dir / "env.json").read_text())["resumed_from_step"] == 1
    return final[0], final[1]


ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ddpo-is": lambda: DDPO(DDPOConfig(updates_per_step=2, min_count=1), 2.0),
    "ddpo-sf": lambda: DDPO(DDPOConfig(variant="sf", updates_per_step=1, min_count=1), 2.0),
    "ddpo-group": lambda: DDPO(DDPOConfig(normalisation="group", updates_per_step=2), 2.0),
    "diffusionrl": lambda: DiffusionRL(DiffusionRLConfig(timesteps_per_step=2, normalisation="prompt", min_count=1), 2.0),
    "rwr": lambda: RWR(RWRConfig(updates_per_step=3, batch_size=4), 2.0),
    **FORWARD,
    **REWARD_GRADIENT,
    "d3po": d3po,
    "pso": pso,
    **REVERSE,
    "rwr-sparse": lambda: RWR(RWRConfig(variant="sparse", updates_per_step=3, batch_size=4), 2.0),
}


def test_the_list_of_algorithms_is_complete() -> None:
    assert {name.removesuffix(end) for name in ALGORITHMS for end in ("", "-is", "-sf", "-group", "-sparse")} >= set(
        config_module.ALGORITHMS
    )


@pytest.mark.parametrize(("name", "rank", "tensors"), [("ddpo-is", None, 50), ("nft", 4, 10)], ids=["full", "lora and copies"])
def test_a_unet_resumes_exactly(make_policy: Any, tmp_path: Path, name: str, rank: int | None, tensors: int) -> None:
    whole, resumed = whole_and_resumed(lambda: make_policy(lora_rank=rank), tmp_path, ALGORITHMS[name])
    assert len(whole) > tensors and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_resumes_exactly(tmp_path: Path, name: str) -> None:
    whole, resumed = whole_and_resumed(make_painter, tmp_path, ALGORITHMS[name])
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_algorithm_that_forgets_its_state_is_found_out(tmp_path: Path) -> None:
    """The test above can fail: it does for an algorithm that has a state and does not save it."""
    for forgets in (False, True):
        whole, resumed = whole_and_resumed(
            make_painter, tmp_path / str(forgets), lambda forgets=forgets: Counting(ALGORITHMS["ddpo-group"](), forgets)
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole) != forgets


def test_a_checkpoint_of_other_weights_is_refused(make_policy: Any, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=1,
        prompts_per_step=4,
        run_dir=tmp_path / "run",
        sampling=SAMPLING,
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config, policy=make_policy(), reward=brightness, prompts=["a cat"])
    more = replace(config, steps=2, checkpoint=CheckpointConfig(allow_changes=True))
    with pytest.raises(UserError, match="other weights"):
        train(more, policy=make_policy(lora_rank=2), reward=brightness, prompts=["a cat"])


def test_threads_use_the_gpu_of_the_thread_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device belongs to a thread, and a reward may say "cuda" without a number."""
    current = threading.local()
    current.gpu = 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(current, "gpu", gpu))
    seen: list[int] = []

    def where(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        seen.append(torch.cuda.current_device())
        return images.mean((1, 2, 3))

    call = RewardCall(as_mixture(where), torch.rand(1, 3, 8, 8), ["a"], [{}])
    call.start()
    assert call.result(10).valid.all()
    assert within(10, lambda: seen.append(torch.cuda.current_device()))
    assert seen == [3, 3]
