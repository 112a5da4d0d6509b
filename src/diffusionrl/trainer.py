"""The loop. It knows no algorithm, no reward and no model by name."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import TrainConfig
from diffusionrl.errors import RunStopped
from diffusionrl.evaluation import Evaluation, evaluate, write_samples
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.prompts import Prompt
from diffusionrl.rewards import Mixture, Reward, as_mixture
from diffusionrl.rollout import Rollout, collect
from diffusionrl.tracking import Tracker, peak_memory_gb

MAX_INVALID_SHARE = 0.5


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, and the evaluations before the first and after the last step."""

    run_dir: Path
    before: Evaluation
    after: Evaluation


class Trainer:
    """One run: ``Trainer(...).run()``."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward | Mixture,
        prompts: Sequence[Prompt],
        algorithm: Algorithm,
        config: TrainConfig,
        run_dir: Path,
        held_out: Mixture | None = None,
    ) -> None:
        self.policy, self.prompts, self.algorithm, self.config = policy, prompts, algorithm, config
        self.reward, self.held_out = as_mixture(reward), held_out
        self.parameters = list(policy.trainable().values())
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.learning_rate, settings.betas, settings.epsilon, settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min(1.0, (update + 1) / max(1, settings.warmup))
        )
        self.run_dir = run_dir

    def run(self) -> TrainResult:
        """Train to the end. The weights are exported however it ends.

        Raises:
            UserError: the run folder exists.
            RunStopped: too many samples without a valid score, or a loss or gradient that is not finite.
        """
        tracker = Tracker(self.run_dir, self.config, self.policy.device)
        before = after = self._evaluate(0)
        tracker.log({"step": 0, "queries": 0} | before.metrics())
        try:
            for step in range(1, self.config.steps + 1):
                metrics = self.step(step)
                every = self.config.evaluation.every
                if step == self.config.steps or (every and step % every == 0):
                    after = self._evaluate(step)
                    metrics |= after.metrics()
                tracker.log(metrics)
        finally:  # whatever ended the run, what it learned is kept
            self.policy.export(self.run_dir / "export")
        return TrainResult(self.run_dir, before, after)

    def step(self, step: int) -> dict[str, float]:
        """Sample, score, weigh, update: one pass through the picture. Returns the step's metrics."""
        config = self.config
        rollout = collect(
            self.policy,
            self.reward,
            self._prompts_of(step),
            config.sampling,
            config.seed,
            "rollout",
            step,
            self.algorithm.logprob_reduction,
            self.algorithm.needs,
        )
        self._check_scores(rollout)
        advantages = self.algorithm.advantages(rollout)
        began = time.perf_counter()
        update = self._update(rollout, advantages, step)
        scores = rollout.scores.values[rollout.scores.valid]
        return {
            "step": step,
            "queries": step * config.samples_per_step,
            "reward/mean": scores.mean().item(),
            "reward/std": scores.std(correction=0).item(),
            "reward/invalid": int((~rollout.scores.valid).sum()),
            **self._part_metrics(rollout),
            **update,
            "time/rollout": rollout.seconds["rollout"],
            "time/reward": rollout.seconds["reward"],
            "time/update": time.perf_counter() - began,
            "peak_memory_gb": peak_memory_gb(self.policy.device),
        }

    def _part_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Each reward of a mixture on its own, as it came; and whatever rewards count."""
        parts = rollout.scores.parts
        means = {f"reward/{name}": part.nanmean().item() for name, part in parts.items()} if len(parts) > 1 else {}
        return means | {f"reward/{name}": count for name, count in self.reward.counts().items()}

    def _prompts_of(self, step: int) -> list[Prompt]:
        """Which prompt a sample gets depends on the seed, the step and its index alone."""
        drawn = [
            self.prompts[seeds.address(self.config.seed, "prompt", step, i) % len(self.prompts)]
            for i in range(self.config.prompts_per_step)
        ]
        return [prompt for prompt in drawn for _ in range(self.config.samples_per_prompt)]

    def _check_scores(self, rollout: Rollout) -> None:
        invalid = int((~rollout.scores.valid).sum())
        if invalid > MAX_INVALID_SHARE * len(rollout.prompts):
            raise RunStopped(
                f"{invalid} of {len(rollout.prompts)} samples have no valid score; "
                f"the reward's last error: {rollout.scores.error}"
            )

    def _update(self, rollout: Rollout, advantages: Tensor, step: int) -> dict[str, float]:
        logged: dict[str, list[Tensor]] = {}
        norms: list[float] = []
        first: dict[str, float] = {}
        for rows in self.algorithm.updates(rollout, advantages, self.config.seed, step):
            if len(rows) == 0:
                continue
            figures = accumulate_gradient(self.algorithm, self.policy, rollout, rows, advantages)
            gap = figures.pop("ratio_gap", None)
            if gap is not None:
                first.setdefault("ratio/max_gap", gap.max().item())
            for key, values in figures.items():
                logged.setdefault(key, []).append(values)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
            if not norm.isfinite():
                raise RunStopped(
                    f"the gradient of step {step} is not finite; the weights are as before this update. "
                    "Try a lower optimizer.learning_rate or policy.dtype float32"
                )
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            norms.append(norm.item())
        means = {key: torch.cat(values).mean().item() for key, values in logged.items()}
        return first | means | {"grad_norm": sum(norms) / max(1, len(norms))}

    def _evaluate(self, step: int) -> Evaluation:
        """Evaluate on the fixed seeds and keep the samples; the first time, normalise the reward by it if that is asked for."""
        config = self.config
        found = evaluate(
            self.policy,
            self.reward,
            self.prompts,
            config.evaluation.num_samples,
            config.sampling,
            config.seed,
            self.held_out,
        )
        self._check_scores(found.rollout)
        if step == 0 and config.rewards.normalise:
            found = found.rescored(self.reward.calibrate(found.rollout.scores))
        write_samples(found, self.run_dir / "samples" / f"step_{step:06d}")
        return found


def accumulate_gradient(
    algorithm: Algorithm, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss over all rows, in micro-batches; how they are cut changes only rounding.

    Returns:
        The algorithm's figures, one number a row.
    """
    parts: list[dict[str, Tensor]] = []
    for micro in chunks(len(rows), algorithm.micro_batch_size):
        losses, figures = algorithm.losses(policy, rollout, rows[micro], advantages)
        (losses.sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
        parts.append(figures)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
