"""A diffusion model as its own judge: which of some prompts fits an image (Li et al., arXiv 2303.16203).

    p(c | x) = softmax_c( -mean_i || e_i - e(x_i, c) ||^2 ),      x_i = alpha_i * x + sigma_i * noise_i

where e is the noise (of linear flows the velocity, which is what their networks give), without guidance and without the
weights of the likelihood, both of which the paper found to do harm. All prompts are tried at the same (t_i, noise_i), which are
the same for every image too: only differences matter. Times are spread evenly over the model's own grid, in nested sets; after
each stage the best prompts alone go on. One that was left behind counts by what it lost to the winner at the noises of both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.config.judges import DiffusionClassifierConfig
from diffusionrl.config.presets import PRESETS
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import Prompt, prompts_given
from diffusionrl.devices import in_double
from diffusionrl.errors import UserError, require
from diffusionrl.rewards.base import Reward, grey, register
from diffusionrl.runs.places import EMBEDDED

if TYPE_CHECKING:
    from diffusionrl.policies import Policy


class DiffusionClassifier:
    """A judge of images.

    Args:
        policy: a model that encodes images.

    Raises:
        UserError: it cannot encode.
    """

    def __init__(self, policy: "Policy", config: DiffusionClassifierConfig) -> None:
        policy.encode(grey(policy.sample_shape)[None])  # which not every policy can
        self.policy, self.config = policy, config
        count, levels = config.trials[-1], policy.noise_levels
        self._levels = levels[torch.tensor([int((place + 0.5) * len(levels) / count) for place in spread(count)])]

    def log_probabilities(self, image: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Of each prompt among these, float64, (C,).

        Args:
            image: one sample, float32 in [0, 1], of the size that the model makes.

        Raises:
            UserError: the image has another size, or there are fewer than two prompts.
        """
        require(len(prompts) >= 2, "one prompt alone has nothing to be compared with: name two or more")
        if tuple(image.shape) != tuple(self.policy.sample_shape):
            wanted, found = (" x ".join(map(str, shape)) for shape in (self.policy.sample_shape, image.shape))
            raise UserError(f"the diffusion classifier {self.policy.source} sees samples of {wanted}, not of {found}")
        errors = self.errors(image, prompts)
        winner = errors.mean(1).nan_to_num(torch.inf).argmin()  # of those that were tried to the end
        return (errors[winner] - errors).nanmean(1).log_softmax(0)

    @torch.no_grad()
    def errors(self, image: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Of each prompt at each noise, float64, (C, trials), NaN where it was left behind before."""
        latent = self.policy.encode(image[None])
        found = torch.full((len(prompts), self.config.trials[-1]), torch.nan, dtype=torch.float64)
        alive, done = list(range(len(prompts))), 0
        for trials, keep in zip(self.config.trials, (*self.config.keep, len(prompts)), strict=True):
            rows = [(trial, prompt) for trial in range(done, trials) for prompt in alive]
            for first in range(0, len(rows), self.config.batch_size):
                part = torch.tensor(rows[first : first + self.config.batch_size])
                found[part[:, 1], part[:, 0]] = self._errors(latent, part[:, 0], [prompts[i] for i in part[:, 1].tolist()])
            ranked = found[alive, :trials].mean(1).argsort(stable=True)[:keep]
            alive, done = [alive[i] for i in sorted(ranked.tolist())], trials
        return found

    def _errors(self, latent: Tensor, trials: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """At one noise for each prompt, (B,)."""
        drawn = seeds.normal(0, "diffusion classifier", 0, trials.tolist(), self.policy.latent_shape).to(latent.device)
        levels = self._levels[trials]
        signal, noise = self.policy.denoise(levels.noisy(latent, drawn), levels, prompts, None)
        off = (noise - signal) - (drawn - latent) if self._levels.linear else noise - drawn
        sizes = in_double(off.flatten(1))
        return (sizes.square() if self.config.norm == "l2" else sizes.abs()).sum(1).cpu().double()


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order of which every beginning is spread evenly: by their bits, read backwards."""
    bits = max(1, (count - 1).bit_length())
    order = sorted(range(2**bits), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2))
    return [place for place in order if place < count]


def load_classifier(config: DiffusionClassifierConfig, example: Prompt) -> DiffusionClassifier:
    """By the model of the settings.

    Raises:
        UserError: there is no such model, or it cannot encode.
    """
    from diffusionrl.policies import load_trained  # imported late: serve-reward starts without diffusers

    sampling = PRESETS[config.model]().sampling if config.model in EMBEDDED else SamplingConfig()
    return DiffusionClassifier(load_trained(config.model, sampling=sampling, example=example), config)


@register("diffusion-classifier")
def diffusion_classifier(config: RewardsConfig) -> Reward:
    """The log-probability of an image's prompt among those of the settings."""
    settings = config.diffusion_classifier
    require(
        len(settings.prompts) >= 1,
        "the reward diffusion-classifier compares a prompt with others: name them, or the run's own set or file, with "
        "--rewards.diffusion-classifier.prompts",
    )
    others = list(prompts_given(settings.prompts))
    classifier = load_classifier(settings, others[0])

    def judge(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        values = []
        for image, prompt in zip(images, prompts, strict=True):
            classes = {prompt: Prompt(prompt)} | {each.text: each for each in others}
            values.append(classifier.log_probabilities(image, list(classes.values()))[0])
        return torch.stack(values)

    return judge
