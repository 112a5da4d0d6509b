"""Scores to advantages: relative to the step, to a prompt's recent rewards, or to a prompt's samples of the step.

Everywhere: population standard deviation; invalid samples leave the statistics and get advantage 0; equal scores get 0.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffusionrl.data.prompts import Prompt, keep_newest, members_of
from diffusionrl.rewards.base import Scores

EPSILON = 1e-6
_REMEMBERED = 65_536  # prompts; at 32 rewards each, about 100 MB


def standardise(values: Tensor, reference: Tensor) -> Tensor:
    """(values - mean) / (std + 1e-6) with the statistics of ``reference``; zeros where there is nothing to compare with. Of
    rewards below 1, the epsilon is relative to the largest, so that small ones are not lost in it.

    In double precision, from the first of the reference on: the rounding of a mean can exceed the epsilon, which would tell
    equal scores apart. Returns float32.
    """
    if len(reference) == 0:
        return torch.zeros(len(values))
    values, reference = values.double(), reference.double()
    epsilon = EPSILON * min(1.0, reference.abs().max().item())
    values, reference = values - reference[0], reference - reference[0]
    spread = reference.std(correction=0) + epsilon
    return ((values - reference.mean()) / spread).float() if spread > 0 else torch.zeros(len(values))


def batch_advantages(scores: Scores) -> Tensor:
    """Relative to all valid samples of the step (DiffusionRL, arXiv 2401.12244). Returns (N,)."""
    return torch.where(scores.valid, standardise(scores.values, scores.values[scores.valid]), 0.0)


def group_advantages(scores: Scores, prompts: Sequence[str]) -> Tensor:
    """Relative to the valid samples of the same prompt in this step. Returns (N,)."""
    advantages = torch.zeros(len(scores.values))
    for members in members_of(prompts).values():
        reference = scores.values[members][scores.valid[members]]
        advantages[members] = standardise(scores.values[members], reference)
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


def relative(
    scores: Scores,
    prompts: Sequence[Prompt],
    normalisation: Literal["prompt", "batch", "group"],
    statistics: PromptStatistics,
) -> Tensor:
    """By name: to a prompt's recent rewards, which ``statistics`` remembers, to the whole step, or to the samples of one prompt
    in it. Returns (N,)."""
    keys = [prompt.key for prompt in prompts]
    if normalisation == "prompt":
        return statistics.advantages(scores, keys)
    return group_advantages(scores, keys) if normalisation == "group" else batch_advantages(scores)
