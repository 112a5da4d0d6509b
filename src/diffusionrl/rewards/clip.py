"""CLIP-type models as rewards: how well an image fits its prompt, by the similarity of their embeddings.

The score is what the checkpoint was trained to put out, exp(logit scale) * cosine: 100 * cosine for OpenAI's CLIP, the
PickScore for PickScore. Everything is differentiable in the images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from diffusionrl.config.judges import CLIPScoreConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import keep_newest
from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Reward, differentiable, register
from diffusionrl.rewards.pretrained import load_image_settings, load_network, load_tokenizer
from diffusionrl.runs.hub import locate

EMBEDDED_CLIP = Path(__file__).parent.parent / "emoji" / "weights" / "clip"
_REMEMBERED = 2048  # embeddings of texts, a few kilobytes each


class CLIP:
    """A ``CLIPModel``-type checkpoint: embeddings of images and texts, each of length 1.

    Args:
        model, revision: see ``locate``.
        processor: where the tokenizer and the image settings are, if not with the model.

    Raises:
        UserError: it is not there, is no such model, has no safetensors or not all of its weights, or its image settings do not
            say how images are prepared.
    """

    def __init__(
        self, model: str, revision: str | None = None, processor: str | None = None, processor_revision: str | None = None
    ) -> None:
        model = str(EMBEDDED_CLIP) if model == "emoji" else model
        weights = locate(model, revision)
        parts = locate(processor, processor_revision) if processor else weights
        what = f"CLIP model {model!r}"
        self.model = load_network(what, "AutoModel", weights)
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "logit_scale"):
            raise UserError(f"{model!r} is a {type(self.model).__name__}, not a model of images and texts like CLIP")
        self.tokenizer = load_tokenizer(what, parts)
        self._settings = load_image_settings(what, parts)
        self._texts: dict[str, Tensor] = {}

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model was trained to see them: resized, cropped, normalised. (B, 3, H, W) -> (B, 3, h, w)."""
        settings = self._settings
        size, crop = settings["size"], settings.get("crop_size")
        height, width = images.shape[-2:]
        if "shortest_edge" in size:
            edge, short = size["shortest_edge"], min(height, width)
            target = (edge * height // short, edge * width // short)  # the shorter one is the edge: floats would round below it
        else:
            target = (size["height"], size["width"])
        if target != (height, width):
            mode = "bicubic" if settings.get("resample", 3) == 3 else "bilinear"
            images = interpolate(images, target, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        if crop and settings.get("do_center_crop", True):
            high, wide = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            top, left = (target[0] - high) // 2, (target[1] - wide) // 2
            images = images[:, :, top : top + high, left : left + wide]
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1).to(images.device) for key in ("image_mean", "image_std"))
        return (images - mean) / std

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D), of length 1, on the CPU; differentiable."""
        pixels = self.preprocess(images.to(self.model.device))
        return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.cpu(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D), of length 1, on the CPU; the newest 2,048 are kept."""
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                tokens = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").to(self.model.device)
                self._texts[text] = normalize(self.model.get_text_features(**tokens).pooler_output.cpu(), dim=-1)
        found = torch.cat([self._texts[text] for text in texts])
        keep_newest(self._texts, _REMEMBERED)
        return found

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """exp(logit scale) * cosine of each image with its text, (B,); differentiable in the images."""
        scale = self.model.logit_scale.exp().item()
        return scale * (self.embed_images(images) * self.embed_texts(texts)).sum(-1)


def load_embedder(settings: CLIPScoreConfig, model: str) -> Callable[[Tensor], Tensor] | None:
    """``CLIP.embed_images`` of the model that the settings name. "auto" is the embedded CLIP where ``model``, the one that is
    trained, is the embedded one, and None where it is another: nothing is downloaded unasked. "none" is None always.

    Raises:
        UserError: see ``CLIP``.
    """
    name = settings.model
    if name == "none" or (name == "auto" and model not in ("emoji", "emoji-flow")):
        return None
    clip = CLIP("emoji" if name == "auto" else name, settings.revision, settings.processor, settings.processor_revision)
    return clip.embed_images


@register("clip-score")
def clip_score(config: RewardsConfig) -> Reward:
    """The similarity of image and prompt, in the units of the checkpoint."""
    settings = config.clip_score
    clip = CLIP(settings.model, settings.revision, settings.processor, settings.processor_revision)

    @differentiable
    def clip_score(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return clip.similarity(images, prompts)

    return clip_score
