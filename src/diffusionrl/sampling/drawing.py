"""Images to choose among, drawn while a person chooses."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusionrl.choosing.board import Round
from diffusionrl.choosing.choices import image_name
from diffusionrl.config import SamplingConfig
from diffusionrl.data.media import shown, write_sample
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import require
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.sampling.rollout import draw_noise, make_table, sample_trajectories


class Drawing:
    """Rounds of a model, whose prompts come in turn. A round depends on the seed and its number alone.

    Args:
        folder: of the choices, which they are drawn to.

    Raises:
        UserError: the model makes no images.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[Prompt], sampling: SamplingConfig, size: int, seed: int, folder: Path
    ) -> None:
        require(policy.show is not None or len(policy.sample_shape) == 3, f"{policy.source} makes no images to be chosen among")
        self.policy, self.prompts, self.sampling, self.size, self.seed = policy, prompts, sampling, size, seed
        self.folder = folder

    def round(self, number: int) -> Round:
        """Whether or not it is drawn yet."""
        return Round(self.prompts[number % len(self.prompts)].text, self._files(number))

    def _files(self, number: int) -> list[Path]:
        return [self.folder / f"{image_name(number, place)}.png" for place in range(self.size)]

    @torch.no_grad()
    def draw(self, number: int) -> Round:
        """With its images written."""
        asked = [self.prompts[number % len(self.prompts)]] * self.size
        table = make_table(self.policy, self.sampling)
        start, noise = draw_noise(self.policy, table, asked, self.seed, "choose", number, range(self.size))
        ends = []
        for part in chunks(self.size, self.sampling.batch_size):
            drawn = sample_trajectories(self.policy, table, asked[part], start[part], noise[part], self.sampling.guidance)
            ends.append(self.policy.decode(drawn.latents[:, -1], asked[part]).cpu())
        (self.folder / "images").mkdir(exist_ok=True)
        for image, file in zip(shown(self.policy.show, torch.cat(ends))[0], self._files(number), strict=True):
            write_sample(image, file)
        return self.round(number)
