"""The parts that a training step is made of, for a loop of one's own; the trainer is built of the same ones.

    optimization = Optimization(policy.trainable(), OptimizerConfig())
    for step in range(1, steps + 1):
        follow(policy, algorithm, step - 1)
        rollout = draw(policy, algorithm, reward, prompts, sampling, seed, step)
        figures = learn(policy, algorithm, optimization, rollout, seed, step)

N is the number of samples, T of denoising steps; a latent has the shape ``policy.latent_shape``, a sample ``sample_shape``.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Mixture, Reward, Scores
from diffusionrl.runs.signal import COSINE, SAMPLES, UPDATES
from diffusionrl.sampling.rollout import Rollout, collect, make_table
from diffusionrl.training.optimization import Halves, Optimization

AVERAGE = "average"
"""The copy that is evaluated and exported, under ``optimizer.average``."""


def follow(policy: Policy, algorithm: Algorithm, done: int) -> dict[str, float]:
    """The algorithm's older copies of the policy follow it, after so many steps. Returns the decays, to log."""
    decays = {name: decay(done) for name, decay in algorithm.copies.items()}
    for name, decay in decays.items():
        policy.copies.follow(name, decay)
    return {f"policy/decay_of_{name}": decay for name, decay in decays.items()}


def draw(
    policy: Policy,
    algorithm: Algorithm,
    reward: Reward | Mixture | None,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    step: int,
    group_size: int = 1,
    purpose: str = "rollout",
    timeout: float = 600.0,
) -> Rollout:
    """A sample a prompt, drawn as the algorithm asks and scored. What is drawn depends on (seed, purpose, step), its place and
    its prompt alone.

    Args:
        reward: see ``diffusionrl.rewards.base.Reward``. None: no sample has a score yet (``scored`` gives them).
        prompts: N of them; the samples of a group are ``group_size`` equal ones in a row.
        timeout: seconds for one call of the reward.

    Returns:
        With latents (N, T + 1, ...) and log-probabilities (N, T), or (N, 1, ...) and (N, 0) where the algorithm looks at
        endpoints alone; images (N, *sample_shape); N scores. Of several processes, the tensors are of this one's samples.

    Raises:
        UserError, RunStopped, Interrupted: see ``collect``.
    """
    with policy.copies.used(algorithm.sampled_by) if algorithm.sampled_by is not None else nullcontext():
        return collect(
            policy,
            _no_score if reward is None else reward,
            prompts,
            sampling,
            seed,
            purpose,
            step,
            algorithm.logprob_reduction,
            algorithm.needs,
            timeout,
            group_size,
            algorithm.table(make_table(policy, sampling), seed, step),
            algorithm.shared_start,
        )


def _no_score(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [math.nan] * len(images)


def scored(rollout: Rollout, values: Tensor) -> Rollout:
    """With other scores, (N,); what is not finite is no valid one."""
    values = values.double().cpu()
    return replace(rollout, scores=Scores(values.nan_to_num(0.0, 0.0, 0.0), values.isfinite()), reward=None)


def learn(
    policy: Policy,
    algorithm: Algorithm,
    optimization: Optimization,
    rollout: Rollout,
    seed: int,
    step: int,
    advantages: Tensor | None = None,
) -> dict[str, float]:
    """The updates of one step, each an optimizer step on some of the work that the samples make.

    Args:
        advantages: one a sample, (N,), float32, in the place of those that the algorithm makes of the scores.

    Returns:
        The algorithm's figures, means over the updates; "ratio/max_gap" before the first one; "grad_norm" before it is clipped,
        and "grad_rms" after.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; the weights are as before that update.
    """
    advantages = algorithm.advantages(rollout) if advantages is None else advantages
    logged: dict[str, list[Tensor]] = {}
    norms: list[float] = []
    halves: list[Halves] = []
    samples = 0
    first: dict[str, float] = {}
    for rows in algorithm.updates(rollout, advantages, seed, step):
        if len(rows) == 0:
            continue
        figures, norm, agreement = optimization.update(algorithm, policy, rollout, rows, advantages)
        if agreement is not None:
            halves.append(agreement)
            samples += len(torch.unique(rows[:, 0]))
        _average(policy, optimization)
        gap = figures.pop("ratio_gap", None)
        if gap is not None:
            first.setdefault("ratio/max_gap", gap.max().item())
        for key, values in figures.items():
            logged.setdefault(key, []).append(values)
        norms.append(norm)
    means = {key: torch.cat(values).nanmean().item() for key, values in logged.items()}
    norm = sum(norms) / max(1, len(norms))
    return first | means | _signal(halves, samples) | {"grad_norm": norm, "grad_rms": optimization.rms(norm)}


def _average(policy: Policy, optimization: Optimization) -> None:
    """The average of the weights follows an update; while there are few, it forgets faster."""
    decay, updates = optimization.config.average, optimization.updates
    if decay > 0:
        policy.copies.follow(AVERAGE, min(decay, (1 + updates) / (10 + updates)))


def _signal(halves: Sequence[Halves], samples: int) -> dict[str, float]:
    """What the halves of a step's updates, made of so many samples, say; see ``runs/signal.py``."""
    product, first, second = (sum(column) for column in zip(*halves, strict=True)) if halves else (0.0, 0.0, 0.0)
    if first * second == 0:  # none, or no gradient
        return {}
    return {COSINE: product / math.sqrt(first * second), UPDATES: len(halves), SAMPLES: samples}
