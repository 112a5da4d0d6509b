"""Detectors that are asked in words, OWLv2 (arXiv 2306.09683) and Grounding DINO (arXiv 2303.05499), through transformers.

An image is prepared as the checkpoint's settings say, in torch: transformers' own processors need torchvision or scipy for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffusionrl.errors import UserError
from diffusionrl.rewards.pretrained import load_image_settings, load_network, load_tokenizer
from diffusionrl.runs.hub import locate

FAMILIES = ("owlv2", "grounding-dino")


class Detector:
    """How sure a checkpoint is that things are in an image.

    Args:
        model, revision: a folder, or a hub id with its commit; see ``locate``.
        query: what is asked for an object, which stands for ``{object}``.
        threshold: boxes of lower confidence do not count.

    Raises:
        UserError: it is not there, is of no known family, has no safetensors or not all of its weights, or its image settings
            do not say how images are prepared.
    """

    def __init__(self, model: str, revision: str | None = None, query: str = "{object}", threshold: float = 0.0) -> None:
        source, what = locate(model, revision), f"detector {model!r}"
        self.model = load_network(what, "AutoModelForZeroShotObjectDetection", source)
        self.family = self.model.config.model_type
        if self.family not in FAMILIES:
            raise UserError(f"{what} is of the family {self.family}; there are {', '.join(FAMILIES)}")
        self.tokenizer = load_tokenizer(what, source)
        self._settings = load_image_settings(what, source)
        self.query, self.threshold = query, threshold

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model was trained to see them: padded to a square (OWLv2), resized, normalised."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        settings, (height, width) = self._settings, images.shape[-2:]
        size = settings["size"]
        if self.family == "owlv2":
            side = max(height, width)
            images = pad(images, (0, side - width, 0, side - height))
        if "shortest_edge" in size:
            target = get_size_with_aspect_ratio((height, width), size["shortest_edge"], size.get("longest_edge"))
        else:
            target = (size["height"], size["width"])
        images = interpolate(images, target, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1).to(images.device) for key in ("image_mean", "image_std"))
        return (images - mean) / std

    def confidences(self, images: Tensor, objects: Sequence[Sequence[str]]) -> list[Tensor]:
        """For each of B images, (B, 3, H, W) in [0, 1], one number in [0, 1] for each object that is asked of it.

        A box is for the object that it is likeliest to be; an object's confidence is that of its best box, 0 without one.
        Differentiable.
        """
        asked = [[self.query.replace("{object}", name) for name in names] for names in objects]
        pixels = self.preprocess(images.to(self.model.device))
        logits = (self._ask_owl if self.family == "owlv2" else self._ask_dino)(pixels, asked)
        found = []
        for scores in (each.sigmoid().cpu() for each in logits):
            best, chosen = scores.max(1)
            own = (chosen[:, None] == torch.arange(scores.shape[1])) & (best[:, None] >= self.threshold)
            found.append((scores * own).amax(0))
        return found

    def _ask_owl(self, pixels: Tensor, asked: list[list[str]]) -> list[Tensor]:
        """Logits, (boxes, objects) for each image. Images with fewer objects than others get queries that begin with token 0,
        which the model leaves out."""
        most = max(map(len, asked))
        tokens = self.tokenizer([text for texts in asked for text in texts], **_MAX_LENGTH)
        ids = torch.zeros(len(asked), most, tokens.input_ids.shape[1], dtype=torch.long)
        attention = torch.ones_like(ids)
        first = 0
        for row, texts in enumerate(asked):
            ids[row, : len(texts)] = tokens.input_ids[first : first + len(texts)]
            attention[row, : len(texts)] = tokens.attention_mask[first : first + len(texts)]
            first += len(texts)
        text = {"input_ids": ids.flatten(0, 1), "attention_mask": attention.flatten(0, 1)}
        logits = self.model(pixel_values=pixels, **{name: value.to(pixels.device) for name, value in text.items()}).logits
        return [each[:, : len(texts)] for each, texts in zip(logits, asked, strict=True)]

    def _ask_dino(self, pixels: Tensor, asked: list[list[str]]) -> list[Tensor]:
        """Logits, (boxes, objects) for each image: of the caption "cat. dog." the largest over an object's tokens."""
        phrases = [[" ".join(text.lower().replace(".", " ").replace("?", " ").split()) for text in texts] for texts in asked]
        tokens = self.tokenizer(
            [" ".join(f"{phrase}." for phrase in each) for each in phrases],
            padding=True,
            return_token_type_ids=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        ).to(pixels.device)
        begins, ends = tokens.pop("offset_mapping").unbind(-1)
        if begins.shape[1] > self.model.config.max_text_len:
            raise UserError(
                f"{begins.shape[1]} tokens of objects in one prompt, more than the detector's {self.model.config.max_text_len}"
            )
        logits = self.model(pixel_values=pixels, **tokens).logits[:, :, : begins.shape[1]]
        found = []
        for row, each in enumerate(phrases):
            columns, start = [], 0
            for phrase in each:
                own = (begins[row] >= start) & (ends[row] <= start + len(phrase)) & (ends[row] > begins[row])
                columns.append(logits[row][:, own].amax(1))
                start += len(phrase) + 2  # the dot and the space
            found.append(torch.stack(columns, 1))
        return found


_MAX_LENGTH: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
