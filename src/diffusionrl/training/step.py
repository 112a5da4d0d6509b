"""One training step: sample, score, weigh and update, for every task in turn."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusionrl import devices, processes
from diffusionrl.config import TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.evaluation import recent
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.optimization import Optimization
from diffusionrl.training.parts import draw, follow, learn
from diffusionrl.training.pretraining import Pretraining
from diffusionrl.training.tasks import Task


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
        metrics |= follow(self.policy, self.tasks[0].algorithm, step - 1)
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

    def _train_on(self, task: Task, step: int, samples: Path | None) -> dict[str, float]:
        """One pass through the picture."""
        rollout = self._samples(task, step)
        if samples is not None:
            recent.write_recent(rollout, samples, step, task.name)
        task.check_scores(rollout, step)
        advantages = task.advantages(rollout)
        began = time.perf_counter()
        update = learn(self.policy, task.algorithm, self.optimization, rollout, task.seed, step, advantages)
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
        size, timeout = task.settings.samples_per_prompt, self.config.rewards.timeout
        asked = (task.reward, prompts, self.config.sampling, task.seed, step, size, purpose, timeout)
        return draw(self.policy, task.algorithm, *asked)

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
