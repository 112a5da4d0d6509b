"""Scores to advantages: relative to the step, to a prompt's recent rewards, or to a prompt's samples of the step.

Everywhere: population standard deviation; invalid samples leave the statistics and get advantage 0; equal scores get 0.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.algorithms import AdvantageConfig
from diffusionrl.data.prompts import keep_newest, members_of
from diffusionrl.rewards.base import Scores
from diffusionrl.sampling.rollout import Rollout

EPSILON = 1e-6
_REMEMBERED = 65_536  # prompts; at 32 rewards each, about 100 MB


def standardise(values: Tensor, reference: Tensor, spread: Tensor | None = None) -> Tensor:
    """(values - mean) / (std + 1e-6) with the statistics of ``reference``, or the deviation of ``spread`` where it is given;
    zeros where there is nothing to compare with. Of rewards below 1, the epsilon is relative to the largest, so that small ones
    are not lost in it.

    In double precision, from the first of the reference on: the rounding of a mean can exceed the epsilon, which would tell
    equal scores apart. Returns float32.
    """
    if len(reference) == 0:
        return torch.zeros(len(values))
    values, reference = values.double(), reference.double()
    epsilon = EPSILON * min(1.0, reference.abs().max().item())
    values, reference = values - reference[0], reference - reference[0]
    deviation = (reference if spread is None else spread.double() - spread[0]).std(correction=0) + epsilon
    return ((values - reference.mean()) / deviation).float() if deviation > 0 else torch.zeros(len(values))


def batch_advantages(scores: Scores) -> Tensor:
    """Relative to all valid samples of the step (DiffusionRL, arXiv 2401.12244). Returns (N,)."""
    return torch.where(scores.valid, standardise(scores.values, scores.values[scores.valid]), 0.0)


def group_advantages(scores: Scores, prompts: Sequence[str], common_scale: bool = False) -> Tensor:
    """Relative to the valid samples of the same prompt in this step. Returns (N,).

    Args:
        common_scale: from a prompt's mean as many standard deviations of the whole step, not of the prompt's samples
            ("global_std" of Flow-GRPO's code): prompts whose samples hardly differ count little.
    """
    advantages = torch.zeros(len(scores.values))
    spread = scores.values[scores.valid] if common_scale else None
    for members in members_of(prompts).values():
        reference = scores.values[members][scores.valid[members]]
        advantages[members] = standardise(scores.values[members], reference, spread)
    return torch.where(scores.valid, advantages, 0.0)


def centred_advantages(scores: Scores, prompts: Sequence[str]) -> Tensor:
    """Less the mean of the valid samples of the same prompt in this step, in units of the reward. Returns (N,)."""
    advantages = torch.zeros(len(scores.values))
    for members in members_of(prompts).values():
        reference = scores.values[members][scores.valid[members]].double()
        if len(reference):
            advantages[members] = (scores.values[members].double() - reference.mean()).float()
    return torch.where(scores.valid, advantages, 0.0)


class PromptStatistics:
    """Relative to a prompt's recent rewards (DDPO, App. D.3: "running mean and standard deviation per context").

    The paper gives no more; buffer, minimum and order are those of its code: the step's rewards enter the buffer first, and a
    prompt with fewer than ``min_count`` remembered rewards takes the statistics of the whole step. Prompts that 65,536 others
    have been sampled after are forgotten: beyond as many, a prompt hardly comes back.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self._buffers: dict[str, deque[float]] = {}

    def advantages(self, scores: Scores, prompts: Sequence[str]) -> Tensor:
        """Remember the valid scores, then standardise every sample. Returns (N,)."""
        advantages = torch.zeros(len(scores.values))
        for prompt, members in members_of(prompts).items():
            buffer = self._buffers.pop(prompt, None) or deque(maxlen=self.buffer_size)
            self._buffers[prompt] = buffer  # as the last, also where it was known
            buffer.extend(scores.values[members][scores.valid[members]].tolist())
            remembered = torch.tensor(list(buffer), dtype=torch.float64)
            enough = len(buffer) >= self.min_count
            advantages[members] = standardise(scores.values[members], remembered if enough else scores.values[scores.valid])
        keep_newest(self._buffers, _REMEMBERED)
        return torch.where(scores.valid, advantages, 0.0)

    def state_dict(self) -> dict[str, list[float]]:
        """Every prompt's remembered rewards, oldest first; the prompt that was sampled last is the last."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._buffers = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


class Advantages:
    """Advantages as an algorithm's settings say, and what has to be remembered for them."""

    def __init__(self, config: AdvantageConfig) -> None:
        self.config, self.statistics = config, PromptStatistics(config.buffer_size, config.min_count)

    def of(self, rollout: Rollout, keys: Sequence[str] | None = None) -> Tensor:
        """Of a step's samples, clamped, (N,).

        Args:
            keys: which samples are compared with each other, one a sample; None: those of one prompt.
        """
        keys = keys or [prompt.key for prompt in rollout.prompts]
        if self.config.combine == "advantages" and len(rollout.scores.parts) > 1:
            advantages = self._combined(rollout, keys)
        else:
            advantages = self._relative(rollout.scores, keys)
        return advantages.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def _combined(self, rollout: Rollout, keys: Sequence[str]) -> Tensor:
        """The weighted sum of each reward's own advantages, scaled to a standard deviation of 1 over the step. A sample counts
        where all rewards are valid."""
        scores, total = rollout.scores, torch.zeros(len(rollout.scores.values))
        for name, part in scores.parts.items():
            own = Scores(part.nan_to_num(0.0, 0.0, 0.0), scores.valid)
            total += rollout.reward_weights.get(name, 1.0) * self._relative(own, keys)
        spread = total[scores.valid].double().std(correction=0).item() if scores.valid.any() else 0.0
        return total / (spread + EPSILON)

    def _relative(self, scores: Scores, keys: Sequence[str]) -> Tensor:
        match self.config.normalisation:
            case "prompt":
                return self.statistics.advantages(scores, keys)
            case "batch":
                return batch_advantages(scores)
            case "group":
                return group_advantages(scores, keys)
            case "group-mean":
                return group_advantages(scores, keys, common_scale=True)

    def state_dict(self) -> dict[str, Any]:
        """Whatever must survive a restart, as plain JSON values."""
        return {"prompt_statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state["prompt_statistics"])
