"""The loop. It knows no algorithm, no reward and no model by name."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusionrl import checkpoint, interruption, seeds
from diffusionrl.advantages import members_of
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.card import write_card
from diffusionrl.checkpoint import Checkpoint
from diffusionrl.config import TrainConfig
from diffusionrl.errors import RunStopped
from diffusionrl.monitor import Embed, Monitor
from diffusionrl.optimization import NonFiniteError
from diffusionrl.policies.base import Policy
from diffusionrl.prompts import Prompt
from diffusionrl.rewards import Mixture, Reward, as_mixture
from diffusionrl.rollout import Rollout, collect
from diffusionrl.state import TrainingState
from diffusionrl.tracking import RunFolder, TrainResult, peak_memory_gb, read_result


class Trainer:
    """One run: ``Trainer(...).run(folder)``."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward | Mixture,
        prompts: Sequence[Prompt],
        algorithm: Algorithm,
        config: TrainConfig,
        held_out: Mixture | None = None,
        embed: Embed | None = None,
    ) -> None:
        self.policy, self.prompts, self.algorithm, self.config = policy, prompts, algorithm, config
        self.reward = as_mixture(reward)
        self.monitor = Monitor(policy, self.reward, prompts, config, held_out, embed)
        self.state = TrainingState(policy, algorithm, self.reward, prompts, config)
        self.at_start: Checkpoint | None = None  # what the step in progress began from; None before the first evaluation

    def run(self, folder: RunFolder) -> TrainResult:
        """Train to the end, from the folder's newest checkpoint if it has one. The weights are exported however it ends.

        Raises:
            UserError: the disk is too small.
            RunStopped: too many samples without a valid score, a loss or gradient that is not finite, or a disk that cannot be
                written to. What was done before the step that failed is saved.
            Interrupted: a signal asked for it; the steps that were done are saved.
        """
        found = folder.find_checkpoint()
        folder.check_disk(self.disk_need(folder.run_dir))
        if found is not None:
            self.state.restore(found)
            print(f"going on after step {found.step}", flush=True)
        self.at_start = found
        try:
            folder.begin(found.step if found else None, self.policy.device)
            self.monitor.recall(folder.run_dir)
            interruption.begin_polling()
            done = self._steps(folder)
            self._export(folder)
            folder.finish(self.monitor.ending(done))
        except OSError as error:
            with suppress(OSError, RunStopped):
                self._rescue(folder)
            free = checkpoint.free_bytes(folder.run_dir) / 1e6
            raise RunStopped(
                f"{folder.run_dir} cannot be written to: {error}; {free:.1f} MB are free. "
                "Make room and give the same command again"
            ) from error
        except BaseException:
            self._rescue(folder)
            raise
        return read_result(folder.run_dir)

    def _rescue(self, folder: RunFolder) -> None:
        """Whatever ended the run, the steps that were done are kept.

        Raises:
            RunStopped: they cannot be written.
        """
        if self.at_start is None:
            return
        self.state.restore(self.at_start)
        checkpoint.save(folder.run_dir, self.at_start)
        try:
            self._export(folder)
        except OSError as error:
            raise RunStopped(f"the checkpoint is saved, but the weights cannot be exported: {error}") from error

    def _steps(self, folder: RunFolder) -> int:
        """Returns how many steps are done at the end."""
        if self.at_start is None:
            folder.log({"step": 0, "queries": 0} | self.monitor.evaluate(0, folder))
            self.at_start = self.state.capture(0)  # with the reward's normalisation
            if self.monitor.verdict.best == 0:
                checkpoint.save(folder.run_dir, self.at_start)
        steps, first = self.config.steps, self.at_start.step + 1
        if first > steps and self.at_start.state["score"] is None:  # stopped here, where it was not to be evaluated
            queries = steps * self.config.samples_per_step
            folder.log({"step": steps, "queries": queries} | self.monitor.evaluate(steps, folder))
        for step in range(first, steps + 1):
            if self.monitor.verdict.stop:
                break
            try:
                metrics = self.step(step)
            except NonFiniteError as error:
                raise RunStopped(
                    f"{error} not finite in step {step}; the weights are as before it, and the batch is in "
                    f"{error.save(folder.run_dir / 'debug' / f'step_{step:06d}')}. "
                    "Try a lower optimizer.learning_rate or policy.dtype float32, with --checkpoint.allow-changes"
                ) from error
            every, last = self.config.evaluation.every, step == steps
            if last or (every and step % every == 0):
                metrics |= self.monitor.evaluate(step, folder)
            folder.log(metrics)
            self.at_start = self.state.capture(step, metrics.get("eval/reward"))
            verdict = self.monitor.verdict
            if last or verdict.stop or verdict.best == step or step % self.config.checkpoint.every == 0:
                checkpoint.save(folder.run_dir, self.at_start)
                checkpoint.prune(folder.run_dir, self.config.checkpoint.keep, verdict.best)
        return self.at_start.step

    def _export(self, folder: RunFolder) -> None:
        """The weights that the monitor chooses.

        Raises:
            RunStopped: they are the guard's best ones, and their checkpoint is corrupted or gone.
        """
        assert self.at_start is not None
        chosen = self.monitor.exported_step(self.at_start.step)
        try:
            if chosen != self.at_start.step:
                self.state.restore(checkpoint.load(checkpoint.folder_of(folder.run_dir, chosen)))
            self.policy.export(folder.run_dir / "export")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        except checkpoint.Corrupted as error:
            raise RunStopped(
                f"the guard's best weights cannot be exported: {error}. --guard.no-stop exports the last"
            ) from error
        write_card(folder.run_dir, chosen)

    def disk_need(self, run_dir: Path) -> int:
        """Bytes that the run may write, beyond what is there: checkpoints, the export, and the samples of evaluations."""
        config = self.config
        weights = sum(parameter.nbytes for parameter in self.state.optimization.parameters.values())
        evaluations = 2 + (config.steps // config.evaluation.every if config.evaluation.every else 0)
        images = evaluations * config.evaluation.num_samples * 3 * self.policy.image_size**2
        there = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
        return 3 * weights * (config.checkpoint.keep + 2) + weights + images - there

    def step(self, step: int) -> dict[str, float]:
        """Sample, score, weigh, update: one pass through the picture. Returns the step's metrics.

        Raises:
            RunStopped: too many samples without a valid score.
            NonFiniteError: a loss or a gradient is not finite.
        """
        config = self.config
        rollout = collect(
            self.policy,
            self.reward,
            self.prompts_of(step),
            config.sampling,
            config.seed,
            "rollout",
            step,
            self.algorithm.logprob_reduction,
            self.algorithm.needs,
            config.rewards.timeout,
            config.samples_per_prompt,
        )
        self._check_scores(rollout)
        advantages = self.algorithm.advantages(rollout)
        began = time.perf_counter()
        update = self._update(rollout, advantages, step)
        scores = rollout.scores.values[rollout.scores.valid]
        groups = members_of([prompt.text for prompt in rollout.prompts]).values()
        return {
            "step": step,
            "queries": step * config.samples_per_step,
            "prompts/broken": len(getattr(self.prompts, "broken", ())),
            "reward/mean": scores.mean().item(),
            "reward/std": scores.std(correction=0).item() if len(scores) else math.nan,
            "reward/invalid": int((~rollout.scores.valid).sum()),
            **self._part_metrics(rollout),
            "advantage/idle_prompts": sum(not advantages[group].any() for group in groups),
            "advantage/prompts": len(groups),
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

    def prompts_of(self, step: int) -> list[Prompt]:
        """Which prompt a sample of a step gets depends on the seed, the step and its index alone."""
        drawn = [
            self.prompts[seeds.address(self.config.seed, "prompt", step, i) % len(self.prompts)]
            for i in range(self.config.prompts_per_step)
        ]
        return [prompt for prompt in drawn for _ in range(self.config.samples_per_prompt)]

    def _check_scores(self, rollout: Rollout) -> None:
        """Raises RunStopped when too many samples of the last steps have no valid score."""
        self.state.invalid.append((int((~rollout.scores.valid).sum()), len(rollout.prompts)))
        invalid, total = (sum(column) for column in zip(*self.state.invalid, strict=True))
        limit = self.config.rewards
        if len(self.state.invalid) == limit.invalid_window and invalid > limit.max_invalid * total:
            raise RunStopped(
                f"{invalid} of {total} samples of the last {limit.invalid_window} steps have no valid score; "
                f"the reward's last error: {rollout.scores.error}"
            )

    def _update(self, rollout: Rollout, advantages: Tensor, step: int) -> dict[str, float]:
        logged: dict[str, list[Tensor]] = {}
        norms: list[float] = []
        first: dict[str, float] = {}
        for rows in self.algorithm.updates(rollout, advantages, self.config.seed, step):
            if len(rows) == 0:
                continue
            figures, norm = self.state.optimization.update(self.algorithm, self.policy, rollout, rows, advantages)
            gap = figures.pop("ratio_gap", None)
            if gap is not None:
                first.setdefault("ratio/max_gap", gap.max().item())
            for key, values in figures.items():
                logged.setdefault(key, []).append(values)
            norms.append(norm)
        means = {key: torch.cat(values).mean().item() for key, values in logged.items()}
        norm = sum(norms) / max(1, len(norms))
        return first | means | {"grad_norm": norm, "grad_rms": self.state.optimization.rms(norm)}
