"""A task: a reward, the prompts that it is trained on, and whatever belongs to the two alone.

A run has one task, or several that are trained in turn in every step (DiffusionRL, arXiv 2401.12244, Algorithm 1): rewards are
not added up; each is normalised among its own samples and has its own optimizer steps. Policy and optimizer are shared.
"""

import copy
import math
import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import TaskConfig, TrainConfig
from diffusionrl.data.prompts import Prompt, fingerprint, members_of
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.rewards import Mixture, Scores
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.preferences import JudgedImages


class BrokenModel(RunStopped):
    """A model makes images that are not finite.

    Args:
        step: whose weights they are; 0: the model as it came.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(f"{message}. Try policy.dtype float32 or a lower optimizer.learning_rate")
        self.step = step


class Task:
    """One task of a run.

    Args:
        settings: an entry of ``config.all_tasks``; the first task has no name.
        algorithm: an object of its own, as are its statistics.
        judged: images that are trained on in the place of samples; prompts and reward are then for evaluations.

    Attributes:
        seed: the run's for the first task, which draws as if it were alone; derived from it and the name for others.
        invalid: (invalid samples, samples) of the last steps.
        redrawn: samples that took the place of others, since the run began.
    """

    def __init__(
        self,
        settings: TaskConfig,
        prompts: Sequence[Prompt],
        reward: Mixture,
        algorithm: Algorithm,
        config: TrainConfig,
        judged: JudgedImages | None = None,
    ) -> None:
        self.settings, self.prompts, self.reward, self.algorithm, self.judged = settings, prompts, reward, algorithm, judged
        self.name, self.limits, self.config = settings.name, config.rewards, config
        self.seed = seeds.address(config.seed, f"task/{self.name}") if self.name else config.seed
        self.invalid: deque[tuple[int, int]] = deque(maxlen=self.limits.invalid_window)
        self.redrawn = 0
        self._fingerprint = fingerprint(prompts)
        self._said: str | None = None
        self._broken: dict[int, str] = getattr(prompts, "broken", {})  # of a file whose lines are read as they are drawn

    @property
    def prefix(self) -> str:
        """Of its metrics."""
        return f"{self.name}/" if self.name else ""

    def prompts_of(self, step: int, groups: Sequence[int] | None = None, attempt: int = 0) -> list[Prompt]:
        """Which prompt a sample of a step gets depends on the seed, the step and its index alone.

        Args:
            groups: those that are drawn anew, for the ``attempt``-th time; None: all of them, for the first time.
        """
        asked = range(self.settings.prompts_per_step) if groups is None else groups
        again = (attempt,) if attempt else ()
        drawn = [self.prompts[seeds.address(self.seed, "prompt", step, i, *again) % len(self.prompts)] for i in asked]
        return [prompt for prompt in drawn for _ in range(self.settings.samples_per_prompt)]

    def advantages(self, rollout: Rollout) -> Tensor:
        """What each of a step's samples counts, (N,), float32: as the algorithm says, or 1 in a blind run. Called once a
        step."""
        return rollout.scores.valid.float() if self.config.blind else self.algorithm.advantages(rollout)

    def check_scores(self, rollout: Rollout, step: int) -> None:
        """Say why samples of a step have no valid score, where that was not said before.

        Raises:
            BrokenModel: no image of the step is finite.
            RunStopped: too many samples of the last steps have no valid score; of fewer steps, where the run ends here.
        """
        scores, whose, count = rollout.scores, self.settings.whose, len(rollout.prompts)
        if rollout.broken_images == count:
            raise BrokenModel(f"{whose}step {step}: {scores.error}", step - 1)
        self.invalid.append((int((~scores.valid).sum()), count))
        invalid, total = (sum(column) for column in zip(*self.invalid, strict=True))
        judged = len(self.invalid) == self.limits.invalid_window or step == self.config.last_step
        if judged and invalid > self.limits.max_invalid * total:
            raise RunStopped(
                f"{whose}{invalid} of {total} samples of the last {len(self.invalid)} steps have no "
                f"valid score; the reward's last error: {scores.error}"
            )
        self.warn(scores, f"step {step}")

    def warn(self, scores: Scores, where: str) -> None:
        """Say why samples have no valid score, once for each reason."""
        if scores.error in (None, self._said) or scores.valid.all() or not processes.is_main():
            return
        self._said = scores.error
        told = f"{int((~scores.valid).sum())} of {len(scores.valid)} samples have no valid score: {scores.error}"
        with suppress(OSError):
            print(f"warning: {self.settings.whose}{where}: {told}", file=sys.stderr, flush=True)

    def require_scores(self, rollout: Rollout, step: int) -> None:
        """What an evaluation must have, of whose images some may be broken or not scored while the run goes on.

        Raises:
            BrokenModel: no image is finite, or some are not and the run ends here.
            RunStopped: no sample has a valid score, and the run begins or ends here.
        """
        scores, end = rollout.scores, step == self.config.last_step
        where = f"{self.settings.whose}the evaluation {f'after step {step}' if step else 'before training'}"
        if rollout.broken_images == len(rollout.prompts) or (end and rollout.broken_images):
            raise BrokenModel(f"{where}: {scores.error}", step)
        if not scores.valid.any() and (step == 0 or end):
            raise RunStopped(f"{where} has no valid score; the reward's last error: {scores.error}")
        self.warn(scores, where)

    def metrics(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """What a step's samples scored, and what that gave."""
        scores = rollout.scores.values[rollout.scores.valid]
        groups = members_of([prompt.key for prompt in rollout.prompts]).values()
        parts = rollout.scores.parts
        means = {f"reward/{name}": part.nanmean().item() for name, part in parts.items()} if len(parts) > 1 else {}
        return {
            "prompts/broken": len(self._broken),
            "reward/mean": scores.mean().item(),
            "reward/std": scores.std(correction=0).item() if len(scores) else math.nan,
            "reward/invalid": int((~rollout.scores.valid).sum()),
            "reward/broken_images": rollout.broken_images,
            **means,  # each reward of a mixture on its own, as it came
            **{f"reward/{name}": count for name, count in self._counts().items()},
            "advantage/idle_prompts": sum(not advantages[group].any() for group in groups),
            "advantage/prompts": len(groups),
            **(self.judged.metrics() if self.judged else {}),
            **({"advantage/redrawn": self.redrawn} if self.config.redraw_queries else {}),
        }

    def capture(self) -> dict[str, Any]:
        """A copy of all that a training step changes, as JSON values."""
        return {
            "invalid": list(self.invalid),
            "redrawn": self.redrawn,
            "algorithm": copy.deepcopy(self.algorithm.state_dict()),
            "reward": dict(self.reward.statistics),
            "counts": self._counts(),
            "prompts": self._fingerprint,
            "broken": list(self._broken.items()),
            "judged": self.judged.capture() if self.judged else None,
        }

    def _counts(self) -> dict[str, int]:
        """Of all processes."""
        counts: Counter[str] = Counter()
        for each in processes.ask(self.reward.counts()):
            counts.update(each)
        return dict(counts)

    def check(self, state: dict[str, Any]) -> None:
        """Raises UserError where a captured state is of other prompts, or of other images."""
        if self.judged and state["judged"]:
            self.judged.check(state["judged"])
        if state["prompts"] != self._fingerprint and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"{self.settings.whose}the prompts are not those that the run began with: choose another --name, "
                "or go on all the same with --checkpoint.allow-changes"
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Be as at ``capture``."""
        if self.judged and state["judged"]:
            self.judged.restore(state["judged"])
        self.invalid = deque(map(tuple, state["invalid"]), self.limits.invalid_window)
        self.redrawn = state["redrawn"]
        self.algorithm.load_state_dict(copy.deepcopy(state["algorithm"]))
        self.reward.statistics = {name: (mean, std) for name, (mean, std) in state["reward"].items()}
        self.reward.go_on_counting(state["counts"] if processes.is_main() else dict.fromkeys(state["counts"], 0))
        if state["prompts"] == self._fingerprint:
            self._broken.clear()
            self._broken.update((place, said) for place, said in state["broken"])
