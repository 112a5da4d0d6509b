"""Images that are not finite: what is wrong with them, and where that began."""

from collections.abc import Sequence

from torch import Tensor

from diffusionrl.data.prompts import Prompt
from diffusionrl.rewards.base import are_whole, broken_image


def where_it_broke(latents: Tensor, images: Tensor, prompts: Sequence[Prompt]) -> str | None:
    """What is wrong where images are not finite, and where that began; latents are (B, T + 1, ...)."""
    whole = are_whole(images)
    said = broken_image(whole, [prompt.text for prompt in prompts])
    if said is None:
        return None
    finite = latents[int((~whole).nonzero()[0])].flatten(1).isfinite().all(1).cpu()
    if finite.all():
        return f"{said}: its latent is finite, so that the decoder overflows; try policy.dtype float32"
    began = int((~finite).nonzero()[0])
    where = f"denoising step {began} of {len(finite) - 1}" if began else "its start"
    return f"{said}: its latent is not finite from {where} on, which is the model's or the sampler's doing, not the reward's"
