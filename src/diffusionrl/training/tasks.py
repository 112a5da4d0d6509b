"""A task: a reward, the prompts that it is trained on, and whatever belongs to the two alone.

A run has one task, or several that are trained in turn in every step (DiffusionRL, arXiv 2401.12244, Algorithm 1): rewards are
not added up; each is normalised among its own samples and has its own optimizer steps. Policy and optimizer are shared.
"""

import copy
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.config import TaskConfig, TrainConfig
from diffusionrl.data.prompts import Prompt, fingerprint, members_of
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.rewards import Mixture
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.preferences import JudgedImages


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

    def check_scores(self, rollout: Rollout) -> None:
        """Raises RunStopped when too many samples of the last steps have no valid score."""
        self.invalid.append((int((~rollout.scores.valid).sum()), len(rollout.prompts)))
        invalid, total = (sum(column) for column in zip(*self.invalid, strict=True))
        if len(self.invalid) == self.limits.invalid_window and invalid > self.limits.max_invalid * total:
            raise RunStopped(
                f"{self.settings.whose}{invalid} of {total} samples of the last {self.limits.invalid_window} steps have no "
                f"valid score; the reward's last error: {rollout.scores.error}"
            )

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
