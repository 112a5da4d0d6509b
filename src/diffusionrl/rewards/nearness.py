"""How near a sample is to an image that its prompt names in its metadata, as "target" or else as "image": PSNR and SSIM.

    PSNR = 10 log10(1 / MSE), in dB, over all pixels and channels of images in [0, 1]; at most 100, so that it is finite
    SSIM = mean of (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

with the local means m and (co)variances s under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, inside the
border, channel by channel; c_1 = 0.01^2, c_2 = 0.03^2 (Wang et al. 2004, IEEE Trans. Image Processing 13(4), Eq. 13), by
kornia.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.entries import is_array
from diffusionrl.data.media import open_image
from diffusionrl.errors import UserError, require
from diffusionrl.rewards.base import Reward, differentiable, register

_CLOSEST = 1e-10  # mean squared error
_WINDOW = 11
_NAMES = ("target", "image")


def targets_of(images: Tensor, metadata: Sequence[dict[str, Any]]) -> Tensor:
    """The image that each sample's prompt names, like ``images``, (B, 3, H, W).

    Raises:
        UserError: a prompt names none, it cannot be read, or it is of another size than the sample.
    """
    return torch.stack([_target(each, tuple(images.shape[1:])) for each in metadata]).to(images)


def _target(metadata: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    name = next((name for name in _NAMES if metadata.get(name) is not None), None)
    if name is None:
        raise UserError('a prompt names no image to be near to: give it "target" (or "image"), a file, or an array (3, H, W)')
    said = metadata[name]
    target = torch.as_tensor(np.asarray(said)).float() if is_array(said) else _pixels(said)
    where = f"{name} {said}" if isinstance(said, str | Path) else f"the {name} of a prompt"
    require(
        tuple(target.shape) == shape,
        f"{where} has the shape {tuple(target.shape)}, and samples {shape}: give them one size, as nothing is resized here",
    )
    return target


def _pixels(said: Any) -> Tensor:
    """(3, H, W) in [0, 1], of a file or PIL's image."""
    if isinstance(said, Image.Image):
        return _tensor(open_image(said))
    require(isinstance(said, str | Path), f"an image to be near to is a file or an array (3, H, W), no {type(said).__name__}")
    return _read(str(said))


@lru_cache(maxsize=256)
def _read(file: str) -> Tensor:
    return _tensor(open_image(Path(file)))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@differentiable
def psnr(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """dB, (B,)."""
    errors = (images - targets_of(images, metadata)).square().flatten(1).mean(1)
    return -10 * errors.clamp(min=_CLOSEST).log10()


@differentiable
def ssim(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """At most 1, (B,). Raises UserError for images smaller than the window."""
    least = min(images.shape[-2:])
    require(
        least >= _WINDOW, f"ssim looks through a window of {_WINDOW} x {_WINDOW} pixels, and the image has a side of {least}"
    )
    index: Tensor = _kornia().ssim(images, targets_of(images, metadata), _WINDOW, eps=0.0, padding="valid")
    return index.mean((1, 2, 3))


def _kornia() -> Any:
    """``kornia.metrics``. Raises UserError where kornia is not installed."""
    try:
        import kornia.metrics
    except ImportError as error:
        raise UserError(f"the reward ssim needs kornia ({error}): pip install 'diffusionrl[ssim]'") from error
    return kornia.metrics


register("psnr")(lambda config: psnr)


@register("ssim")
def _(config: RewardsConfig) -> Reward:
    _kornia()
    return ssim
