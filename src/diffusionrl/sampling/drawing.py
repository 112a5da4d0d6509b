"""Images to choose among, drawn while a person chooses."""

from collections.abc import Sequence
from pathlib import Path

from diffusionrl import seeds
from diffusionrl.choosing.board import Round
from diffusionrl.choosing.choices import image_name
from diffusionrl.config import SamplingConfig
from diffusionrl.data.media import shown, write_sample
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import require
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.samples import draw_images


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

    def draw(self, number: int) -> Round:
        """With its images written, each as ``draw_images`` draws it from a seed of its own."""
        asked = self.prompts[number % len(self.prompts)]
        jobs = [(asked, seeds.address(self.seed, "choose", number, place)) for place in range(self.size)]
        (self.folder / "images").mkdir(exist_ok=True)
        images, failed = shown(self.policy.show, draw_images(self.policy, jobs, self.sampling))
        require(failed is None, f"no pictures of the samples: {failed}")
        for image, file in zip(images, self._files(number), strict=True):
            write_sample(image, file)
        return self.round(number)
