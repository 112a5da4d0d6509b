"""What a reward does not see: diversity, distance from the reference model, and simple statistics of the images."""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from diffusionrl import interruption
from diffusionrl.data.prompts import members_of
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.sampling.rollout import Rollout, predict
from diffusionrl.transitions import gaussian_kl

PAIRS = 32
"""(sample, denoising step) pairs at which policy and reference are compared: a few percent of what the samples cost."""
_LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Three numbers an image, (N,) each, of images in [0, 1], (N, 3, H, W); of videos, (N, F, 3, H, W), means over their
    frames; of sounds, (N, C, S), none.

    - saturation: that of HSV, (max - min) / max over the channels, averaged over the pixels; 0 where a pixel is black;
    - sharpness: the variance of the Laplacian of the luminance (kernel 0 1 0, 1 -4 1, 0 1 0), inside the border;
    - high_frequency: the share of the luminance's energy, its mean left out, at more than a quarter cycle a pixel, which is
      half of what the pixels can carry; 0 for an even image.
    """
    if images.ndim == 3:
        return {}
    if images.ndim == 5:
        frames = image_statistics(images.flatten(0, 1))
        return {name: values.view(images.shape[:2]).mean(1) for name, values in frames.items()}
    highest, lowest = images.amax(1), images.amin(1)
    saturation = torch.where(highest > 0, (highest - lowest) / highest.clamp(min=1e-12), 0.0).mean((1, 2))
    luminance = torch.einsum("nchw,c->nhw", images, torch.tensor(_LUMINANCE))
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    laplacian = conv2d(luminance[:, None], kernel[None, None])[:, 0]
    energy = torch.fft.fft2(luminance - luminance.mean((1, 2), keepdim=True)).abs() ** 2
    height, width = luminance.shape[1:]
    high = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2 > 0.25**2
    total = energy.sum((1, 2))
    share = torch.where(total > 1e-6, (energy * high).sum((1, 2)) / total.clamp(min=1e-6), 0.0)
    return {"saturation": saturation, "sharpness": laplacian.var((1, 2), correction=0), "high_frequency": share}


def vendi_score(embeddings: Tensor) -> float:
    """The effective number of different samples among n (Friedman & Dieng, arXiv 2210.02410, Def. 3.1): exp of the Shannon
    entropy of the eigenvalues of K / n, where K is the cosine similarity. 1 where all are alike, n where all are orthogonal.

    Args:
        embeddings: of length 1, (n, D). NaN where one is not finite.
    """
    if not embeddings.isfinite().all():
        return nan
    kernel = (embeddings @ embeddings.T).double() / len(embeddings)
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp().item()


def mean_distance(embeddings: Tensor) -> float:
    """Mean cosine distance of two different samples of n, n at least 2; embeddings of length 1, (n, D)."""
    count = len(embeddings)
    similarities = (embeddings @ embeddings.T).double()
    return 1 - ((similarities.sum() - similarities.diagonal().sum()) / (count * (count - 1))).item()


def diversity(embeddings: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean distance and Vendi score among the images of one prompt, averaged over the prompts that have several.

    Nothing where every prompt has one image.
    """
    groups = [embeddings[members] for members in members_of(prompts).values() if len(members) > 1]
    if not groups:
        return {}
    distance, vendi = ([measure(group) for group in groups] for measure in (mean_distance, vendi_score))
    return {"diversity": sum(distance) / len(groups), "vendi": sum(vendi) / len(groups)}


@torch.no_grad()
def distance_from_reference(policy: Policy, rollout: Rollout, guidance: float, batch_size: int) -> dict[str, float]:
    """How far the policy is from the reference at latents that the policy visits: ``PAIRS`` of them at most, each of another
    sample, spread evenly over the denoising steps.

    - kl_per_step: KL(policy || reference) of the sampler's Gaussians, in nats, summed over the latent dimensions and averaged
      over the steps with fresh noise; left out where no step has any;
    - prediction_distance: |difference of the predicted noises| / |the reference's|;
    - prediction_norm: |the predicted noise| / |the reference's|.

    Args:
        rollout: with trajectories.

    Raises:
        UserError: the policy keeps no reference.
    """
    stochastic = (rollout.table.fresh > 0).nonzero().flatten()
    steps = stochastic if len(stochastic) else torch.arange(len(rollout.table))
    count = min(PAIRS, len(rollout.prompts))
    steps = steps[torch.arange(count) * len(steps) // count].to(rollout.latents.device)
    divergences, distances, norms = [], [], []
    for part in chunks(count, batch_size):
        interruption.check()
        rows, samples = steps[part], torch.arange(part.start, part.stop, device=steps.device)
        x = rollout.latents[samples, rows]
        arguments = (policy, rollout.table, x, rows, rollout.prompts_of(samples), guidance)
        own = predict(*arguments)
        with policy.reference():
            reference = predict(*arguments)
        mean, reference_mean = (rollout.table.mean(rows, x0, noise) for x0, noise in (own, reference))
        divergences.append(gaussian_kl(mean, reference_mean, rollout.table.std(rows, x), "sum"))
        of_reference = reference[1].flatten(1).norm(dim=1)
        distances.append((own[1] - reference[1]).flatten(1).norm(dim=1) / of_reference)
        norms.append(own[1].flatten(1).norm(dim=1) / of_reference)
    found = {"prediction_distance": torch.cat(distances).mean().item(), "prediction_norm": torch.cat(norms).mean().item()}
    return found | ({"kl_per_step": torch.cat(divergences).mean().item()} if len(stochastic) else {})
