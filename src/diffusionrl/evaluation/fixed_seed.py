"""Fixed-seed evaluation: the same prompts and the same noise every time, so that differences are the policy's."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config import SamplingConfig
from diffusionrl.data.images import image_grid
from diffusionrl.data.media import shown, stills, write_inputs, write_sample
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture, Reward, RewardCall, Scores, as_mixture
from diffusionrl.sampling.gathering import gather_scores
from diffusionrl.sampling.rollout import Needs, Rollout, collect, metadata_of


@dataclass(frozen=True)
class Evaluation:
    """A rollout on the fixed seeds, and what rewards that are not trained on say of it.

    Attributes:
        rollout: with the scores of the reward that is trained on.
        held_out: by name, (N,), NaN where invalid.
        statistics: of the images, by name, (N,).
        group_sizes: by name, of the rewards that look at whole groups, how many samples in a row make one.
    """

    rollout: Rollout
    held_out: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    group_sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of the valid scores."""
        return self._estimate("reward", self._values)[0]

    @property
    def standard_error(self) -> float:
        """Of that mean."""
        return self._estimate("reward", self._values)[1]

    @property
    def _values(self) -> Tensor:
        return torch.where(self.rollout.scores.valid, self.rollout.scores.values, torch.nan)

    def _estimate(self, name: str, values: Tensor) -> tuple[float, float]:
        return mean_and_error(by_group(values, self.group_sizes.get(name, 1)))

    @property
    def beside(self) -> dict[str, Tensor]:
        """What is known beside the reward, by name: its parts where it has several, the held-out rewards, the statistics."""
        parts = self.rollout.scores.parts
        return (parts if len(parts) > 1 else {}) | self.held_out | self.statistics

    @property
    def by_sample(self) -> dict[str, Tensor]:
        """The reward, and what is known beside it, (N,) each, NaN where invalid."""
        return {"reward": self._values} | self.beside

    def rescored(self, scores: Scores) -> "Evaluation":
        """The same samples with other scores."""
        return replace(self, rollout=replace(self.rollout, scores=scores))

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl: the reward, and what is known beside it."""
        scores = self.rollout.scores
        metrics = {
            "eval/reward": self.mean,
            "eval/reward_se": self.standard_error,
            "eval/invalid": int((~scores.valid).sum()),
            "eval/broken_images": self.rollout.broken_images,
        }
        for name, values in self.beside.items():
            metrics[f"eval/{name}"], metrics[f"eval/{name}_se"] = self._estimate(name, values)
        return metrics


def by_group(values: Tensor, size: int) -> Tensor:
    """The mean of the finite values of each group of ``size`` in a row, (N,) -> (N / size,), NaN where there is none. The
    samples of a group share what scores them, so that groups are what can be counted."""
    return values if size == 1 else values.view(-1, size).nanmean(1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of the finite values, and its standard error; NaN where there are too few."""
    values = values[values.isfinite()]
    mean = values.mean().item() if len(values) else math.nan
    return mean, values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluate(
    policy: Policy,
    reward: Reward | Mixture,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingConfig,
    seed: int,
    held_out: Mixture | None = None,
    timeout: float = 600.0,
    samples_per_prompt: int = 1,
    needs: Needs = "endpoints",
) -> Evaluation:
    """Score ``num_samples`` images over the prompts in turn, ``samples_per_prompt`` of each at a turn, which are a group for
    rewards that look at groups; ``timeout`` is for one call of the rewards, in seconds, and ``needs`` says what is kept of a
    sample.

    Raises:
        UserError: a reward looks at whole groups, and there are none.
    """
    asked = [prompts[i // samples_per_prompt % len(prompts)] for i in range(num_samples)]
    size = samples_per_prompt
    rollout = collect(policy, reward, asked, sampling, seed, "evaluation", 0, needs=needs, timeout=timeout, group_size=size)
    mixture = as_mixture(reward)
    group_sizes = dict.fromkeys((*mixture.grouped, "reward") if mixture.grouped else (), size)
    if held_out is None:
        return Evaluation(rollout.whole(), group_sizes=group_sizes)
    own = [asked[i] for i in rollout.own]
    texts, metadata = [prompt.text for prompt in own], metadata_of(own, rollout.sampling_rate)
    call = RewardCall(held_out, rollout.images, texts, metadata, group_size=size)
    call.start()
    parts = gather_scores(call.result(timeout), rollout.shares).parts
    return Evaluation(rollout.whole(), parts, group_sizes=group_sizes | dict.fromkeys(held_out.grouped, size))


def write_samples(evaluation: Evaluation, folder: Path) -> str | None:
    """``grid.png``, every sample, images that its prompt names, and ``samples.jsonl``. Files are named by the index, never by a
    prompt's text. Returns why samples cannot be shown, where they cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    rollout = evaluation.rollout
    images, failed = shown(rollout.show, rollout.images)
    image_grid(stills(images), columns=8).save(folder / "grid.png")
    with (folder / "samples.jsonl").open("w") as lines:
        for index, sample in enumerate(images):
            write_sample(sample, folder / f"{index:05d}.png", rollout.sampling_rate)
            write_inputs(rollout.prompts[index].media, folder, index)
            lines.write(json.dumps(sample_entry(rollout, index, evaluation.beside)) + "\n")
    return failed


def sample_entry(rollout: Rollout, index: int, beside: Mapping[str, Tensor]) -> dict[str, Any]:
    """A line of samples.jsonl; ``beside`` is what is known beside the reward, by name, (N,) each."""
    valid = bool(rollout.scores.valid[index])
    reward = rollout.scores.values[index].item() if valid else None
    entry = {"index": index, "prompt": rollout.prompts[index].text, "reward": reward, "valid": valid}
    return entry | {name: finite_or_none(values[index].item()) for name, values in beside.items()}


def finite_or_none(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
