"""Judged images from disk in the place of samples that are drawn and scored: endpoints that are there already."""

import time
from typing import Any

import torch

from diffusionrl import processes, seeds
from diffusionrl.config import TrainConfig
from diffusionrl.data.preferences import MAX_BROKEN, Preferences
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, make_table
from diffusionrl.training import disk


class JudgedImages:
    """A step's samples from disk: ``prompts_per_step`` entries, each a group of its own."""

    def __init__(self, preferences: Preferences, config: TrainConfig) -> None:
        self.preferences, self.config = preferences, config

    def rollout(self, policy: Policy, seed: int, step: int) -> Rollout:
        """Scores are 1 for what was chosen and 0 for what was rejected. Which entry is drawn depends on the seed, the step and
        its index alone; of several processes, each draws its share.

        Raises:
            RunStopped: too many images do not decode.
        """
        began, size = time.perf_counter(), self.preferences.size
        own = processes.share(size * self.config.prompts_per_step, size)
        addresses = [seeds.address(seed, "preference", step, i) for i in range(own.start // size, own.stop // size)]
        drawn = disk.draw_all(self.preferences.draw, addresses)
        disk.share_broken(self.preferences, self.config.max_broken_preferences, MAX_BROKEN)
        said = processes.ask([(judged.prompt, judged.scores) for judged, _ in drawn])
        judged = [(Prompt(text), score) for each in said for text, scores in each for score in scores]
        images = torch.stack([disk.cropped(image, policy.sample_shape) for _, pair in drawn for image in pair])
        values = torch.tensor([score for _, score in judged])
        return Rollout(
            table=make_table(policy, self.config.sampling),  # of which noise levels may be looked at
            prompts=[prompt for prompt, _ in judged],
            latents=policy.encode(images)[:, None],
            log_probs=torch.zeros(len(images), 0),
            images=images,
            scores=Scores(values, torch.ones_like(values, dtype=torch.bool)),
            seconds={"rollout": time.perf_counter() - began, "reward": 0.0},
            group_size=size,
            batch_size=self.config.sampling.batch_size,
        )

    def metrics(self) -> dict[str, float]:
        return {"preferences/broken": len(self.preferences.broken), "preferences/ties": self.preferences.ties}

    def capture(self) -> dict[str, Any]:
        """See ``disk.capture``."""
        return disk.capture(self.preferences)

    def check(self, state: dict[str, Any]) -> None:
        """Raises UserError where a captured state is of other preferences."""
        disk.check(self.preferences, state, "preferences holds other judgements", self.config.checkpoint.allow_changes)

    def restore(self, state: dict[str, Any]) -> None:
        """See ``disk.restore``."""
        disk.restore(self.preferences, state)
