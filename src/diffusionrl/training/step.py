"""One training step: sample, score, weigh and update, for every task in turn."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffusionrl import devices, processes
from diffusionrl.config import TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.evaluation import recent
from diffusionrl.policies.base import Policy
from diffusionrl.runs.signal import COSINE, SAMPLES, UPDATES
from diffusionrl.sampling.rollout import Rollout, collect, make_table
from diffusionrl.training.optimization import Halves, Optimization
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.tasks import Task

AVERAGE = "average"
"""The copy that is evaluated and exported, under ``optimizer.average``."""


class TrainingStep:
    """Called with a step's number, it makes that step."""

    def __init__(
        self,
        policy: Policy,
        tasks: Sequence[Task],
        config: TrainConfig,
        optimization: Optimization,
        pretraining: Pretraining | None = None,
    ) -> None:
        self.policy, self.tasks, self.config = policy, tasks, config
        self.optimization, self.pretraining = optimization, pretraining

    def __call__(self, step: int, samples: Path | None = None) -> dict[str, float]:
        """Every task in turn, then the pretraining loss if there is one. Returns the step's metrics.

        Args:
            samples: the run's folder for them, where the best, worst and failed ones are written; None writes none.

        Raises:
            RunStopped: too many samples without a valid score, or too many broken images.
            NonFiniteError: a loss or a gradient is not finite.
        """
        metrics: dict[str, float] = {"step": step}
        traffic = replace(processes.traffic)
        metrics |= self.follow(step - 1)
        self.optimization.done = (step - 1) / self.config.last_step
        for task in self.tasks:
            metrics |= {f"{task.prefix}{key}": value for key, value in self._train_on(task, step, samples).items()}
        metrics["queries"] = self.queries(step)
        if self.pretraining is not None:
            metrics |= self.pretraining.train(self.policy, self.optimization, step)
        return metrics | processes.metrics(traffic) | {"peak_memory_gb": devices.peak_bytes(self.policy.device) / 1e9}

    def queries(self, step: int) -> int:
        """Samples scored for training in so many steps."""
        return step * self.config.queries_per_step + sum(task.redrawn for task in self.tasks)

    def follow(self, done: int) -> dict[str, float]:
        """The algorithm's older copies of the policy follow it, after so many steps. Returns the decays, to log."""
        decays = {name: decay(done) for name, decay in self.tasks[0].algorithm.copies.items()}
        for name, decay in decays.items():
            self.policy.copies.follow(name, decay)
        return {f"policy/decay_of_{name}": decay for name, decay in decays.items()}

    def _train_on(self, task: Task, step: int, samples: Path | None) -> dict[str, float]:
        """One pass through the picture."""
        sampler = task.algorithm.sampled_by
        with self.policy.copies.used(sampler) if sampler is not None else nullcontext():
            rollout = self._samples(task, step)
        if samples is not None:
            recent.write_recent(rollout, samples, step, task.name)
        task.check_scores(rollout, step)
        advantages = task.algorithm.advantages(rollout)
        began = time.perf_counter()
        update = self._update(task, rollout, advantages, step)
        return {
            **task.metrics(rollout, advantages),
            **update,
            "time/rollout": rollout.seconds["rollout"],
            "time/reward": rollout.seconds["reward"],
            "time/update": time.perf_counter() - began,
        }

    def _samples(self, task: Task, step: int) -> Rollout:
        """Drawn and scored, or from disk."""
        if task.judged is not None:
            return task.judged.rollout(self.policy, task.seed, step)
        return self._redraw(task, self._collect(task, task.prompts_of(step), step, "rollout"), step)

    def _collect(self, task: Task, prompts: Sequence[Prompt], step: int, purpose: str) -> Rollout:
        return collect(
            self.policy,
            task.reward,
            prompts,
            self.config.sampling,
            task.seed,
            purpose,
            step,
            task.algorithm.logprob_reduction,
            task.algorithm.needs,
            self.config.rewards.timeout,
            task.settings.samples_per_prompt,
            task.algorithm.table(make_table(self.policy, self.config.sampling), task.seed, step),
            task.algorithm.shared_start,
        )

    def _redraw(self, task: Task, rollout: Rollout, step: int) -> Rollout:
        """Groups whose samples all score alike give way to those of other prompts, while there are queries for it."""
        left, attempt = self.config.redraw_queries, 1
        while left >= rollout.group_size and (idle := rollout.idle_groups()):
            idle = idle[: left // rollout.group_size]
            prompts = task.prompts_of(step, idle, attempt)
            drawn = self._collect(task, prompts, step, f"redraw/{attempt}")
            rollout, left, attempt = rollout.with_groups(idle, drawn), left - len(prompts), attempt + 1
            task.redrawn += len(prompts)
        return rollout

    def _average(self) -> None:
        """The average of the weights follows an update; while there are few, it forgets faster."""
        decay, updates = self.config.optimizer.average, self.optimization.updates
        if decay > 0:
            self.policy.copies.follow(AVERAGE, min(decay, (1 + updates) / (10 + updates)))

    def _update(self, task: Task, rollout: Rollout, advantages: Tensor, step: int) -> dict[str, float]:
        logged: dict[str, list[Tensor]] = {}
        norms: list[float] = []
        halves: list[Halves] = []
        samples = 0
        first: dict[str, float] = {}
        for rows in task.algorithm.updates(rollout, advantages, task.seed, step):
            if len(rows) == 0:
                continue
            figures, norm, agreement = self.optimization.update(task.algorithm, self.policy, rollout, rows, advantages)
            if agreement is not None:
                halves.append(agreement)
                samples += len(torch.unique(rows[:, 0]))
            self._average()
            gap = figures.pop("ratio_gap", None)
            if gap is not None:
                first.setdefault("ratio/max_gap", gap.max().item())
            for key, values in figures.items():
                logged.setdefault(key, []).append(values)
            norms.append(norm)
        means = {key: torch.cat(values).nanmean().item() for key, values in logged.items()}
        norm = sum(norms) / max(1, len(norms))
        return first | means | _signal(halves, samples) | {"grad_norm": norm, "grad_rms": self.optimization.rms(norm)}


def _signal(halves: Sequence[Halves], samples: int) -> dict[str, float]:
    """What the halves of a step's updates, made of so many samples, say; see ``runs/signal.py``."""
    product, first, second = (sum(column) for column in zip(*halves, strict=True)) if halves else (0.0, 0.0, 0.0)
    if first * second == 0:  # none, or no gradient
        return {}
    return {COSINE: product / math.sqrt(first * second), UPDATES: len(halves), SAMPLES: samples}
