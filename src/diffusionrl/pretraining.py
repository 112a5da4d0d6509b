"""The pretraining loss: real pairs of image and caption, which hold the model to what it was (DiffusionRL, arXiv 2401.12244).

After the tasks of a training step come optimizer steps on

    L_pre = weight * E |noise - noise_theta(alpha_t x0 + sigma_t noise, t, c)|^2,        noise ~ N(0, I)

without guidance, for t uniform over the times that the model was trained at. They are steps of their own with the tasks'
optimizer (Algorithm 1), not a term of the tasks' loss. Where the paper is silent, or its code differs:
- the paper gives the weight no value; under AdamW the number of steps matters more (here 1 to the 5 of a task);
- captions are dropped at a rate, as in the model's own training: the paper does not say;
- x0 is the mean of the VAE's posterior (``Policy.encode``); the code draws from it;
- the error is that of the noise, as in the equation, for v prediction too; there, the code takes the error of v.
"""

import csv
import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.algorithms.denoising import denoising_losses
from diffusionrl.config import PretrainingConfig, TrainConfig
from diffusionrl.emoji.scenes import draw_scene
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.optimization import Optimization
from diffusionrl.policies.base import Policy
from diffusionrl.prompts import Prompt
from diffusionrl.rewards import Scores
from diffusionrl.rollout import Rollout, make_table

_METADATA = ("metadata.jsonl", "metadata.csv")
_FORMATS = ("JPEG", "PNG", "WEBP")  # of Pillow's some forty decoders, the ones that are needed
_EXAMPLE = '{"file_name": "0001.png", "text": "a cat"}'


class Pairs(Protocol):
    """Images with captions.

    Attributes:
        fingerprint: a run that is taken up must have the same.
        broken: what is wrong with the images that were found not to decode, by their number.
    """

    fingerprint: str
    broken: dict[int, str]

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """The pair that a number picks."""
        ...


def load_pairs(config: PretrainingConfig) -> Pairs | None:
    """What ``pretraining.source`` names; None where the loss is off.

    Raises:
        UserError: no such folder, no captions in it, or its first image does not decode.
    """
    if not config.source:
        return None
    return ScenePairs() if config.source == "emoji" else FolderPairs(Path(config.source), config.max_broken)


class ScenePairs:
    """The endless training set of the embedded world, with its own distribution."""

    def __init__(self) -> None:
        self.fingerprint = "emoji"
        self.broken: dict[int, str] = {}

    def draw(self, address: int) -> tuple[Image.Image, str]:
        scene = draw_scene(address, 0)
        return scene.image, scene.caption


class FolderPairs:
    """A folder in the convention of ``datasets``' imagefolder: metadata.jsonl or metadata.csv with file_name and text. Images
    are JPEG, PNG or WebP.

    In the place of an image that does not decode stands the next that does.

    Raises:
        UserError: as in ``load_pairs``.
    """

    def __init__(self, folder: Path, max_broken: int = 0) -> None:
        self.folder, self.max_broken = folder, max_broken
        self.broken: dict[int, str] = {}
        if not folder.is_dir():
            raise UserError(f'pretraining.source {str(folder)!r}: no such folder; give one of images and captions, or "emoji"')
        found = [folder / name for name in _METADATA if (folder / name).is_file()]
        if len(found) != 1:
            said = "both" if found else "neither"
            raise UserError(
                f"pretraining.source {str(folder)!r} has {said} of {' and '.join(_METADATA)}: "
                f"captions are read from one of them, lines like {_EXAMPLE}"
            )
        self._entries = list(_read_metadata(found[0]))
        if not self._entries:
            raise UserError(f"{found[0]} holds no caption: write a line an image like {_EXAMPLE}")
        self.fingerprint = hashlib.sha256(json.dumps(self._entries).encode()).hexdigest()
        try:
            self.draw(0)
        except RunStopped as error:
            raise UserError(str(error)) from error

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """Raises RunStopped where more than ``max_broken`` have turned out broken."""
        for further in range(len(self._entries)):
            place = (address + further) % len(self._entries)
            name, caption = self._entries[place]
            try:
                with Image.open(self.folder / name, formats=_FORMATS) as image:
                    return ImageOps.exif_transpose(image).convert("RGB"), caption
            except Exception as error:  # Pillow raises whatever a broken file leads it to
                self.broken[place] = f"{self.folder / name} ({type(error).__name__}: {error})"
                _check_broken(self.broken, self.max_broken)
        raise RunStopped(f"no image in {self.folder} decodes")


def _check_broken(broken: dict[int, str], limit: int) -> None:
    """Raises RunStopped where there are more."""
    if len(broken) > limit:
        raise RunStopped(
            f"{len(broken)} images do not decode as JPEG, PNG or WebP, more than pretraining.max_broken = {limit}: "
            f"{'; '.join(list(broken.values())[:3])}"
        )


def _read_metadata(file: Path) -> Iterator[tuple[str, str]]:
    """(file name, caption) of each line. Raises UserError naming file and line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    for number, row in _rows_of_csv(text) if file.suffix == ".csv" else _rows_of_jsonl(text):
        if isinstance(row, Exception):
            raise UserError(f"{file}:{number}: {row}; each line is like {_EXAMPLE}") from row
        yield _checked(row, f"{file}:{number}")


def _rows_of_csv(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there, or the error that ends it."""
    rows = csv.DictReader(io.StringIO(text))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        yield rows.line_num, error


def _rows_of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there, or the error in its place."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, error


def _checked(row: Any, where: str) -> tuple[str, str]:
    entry = row if isinstance(row, dict) else {}
    for column in ("file_name", "text"):
        if not isinstance(entry.get(column), str) or not entry[column].strip():
            raise UserError(f"{where} has no {column}: an entry is like {_EXAMPLE}")
    name = PurePath(entry["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: {str(name)!r} is outside of the folder: file names are relative to it")
    return str(name), entry["text"].strip()


class Pretraining:
    """The loss on pairs, as an objective of the optimizer: a real image is an endpoint that nobody sampled."""

    def __init__(self, pairs: Pairs, config: TrainConfig, micro_batch_size: int) -> None:
        self.pairs, self.config, self.micro_batch_size = pairs, config, micro_batch_size

    def train(self, policy: Policy, optimization: Optimization, step: int) -> dict[str, float]:
        """The optimizer steps of a training step. Returns its metrics.

        Raises:
            RunStopped: too many images do not decode.
            NonFiniteError: a loss or the gradient is not finite.
        """
        began, settings = time.perf_counter(), self.config.pretraining
        losses, norms = [], []
        for update in range(settings.updates):
            indices = range(update * settings.batch_size, (update + 1) * settings.batch_size)
            draws = [seeds.address(self.config.seed, "pretraining", step, i) for i in indices]
            rows = torch.stack([torch.arange(len(draws)), torch.tensor(draws)], 1)
            weights = torch.full((len(draws),), settings.weight)
            figures, norm = optimization.update(self, policy, self.batch(policy, step, indices), rows, weights)
            losses.append(figures["pretraining/loss"].mean().item())
            norms.append(norm)
        for broken in processes.ask(list(self.pairs.broken.items())):
            self.pairs.broken.update(broken)
        _check_broken(self.pairs.broken, settings.max_broken)  # of all processes together
        return {
            "pretraining/loss": sum(losses) / len(losses),
            "pretraining/grad_norm": sum(norms) / len(norms),
            "pretraining/broken": len(self.pairs.broken),
            "time/pretraining": time.perf_counter() - began,
        }

    def batch(self, policy: Policy, step: int, indices: range) -> Rollout:
        """Pairs as samples; which one is drawn depends on the seed, the step and its index alone. Of several processes, each
        draws its share, and does not know the captions of the others."""
        seed, dropped = self.config.seed, self.config.pretraining.drop_caption
        own = processes.share(len(indices))
        pairs = self._draw([seeds.address(seed, "pretraining_pair", step, indices[i]) for i in own])
        without = [seeds.numpy_generator(seed, "pretraining_caption", step, indices[i]).random() < dropped for i in own]
        captions = ["" if drop else caption for (_, caption), drop in zip(pairs, without, strict=True)]
        prompts = [Prompt("")] * len(indices)
        prompts[own.start : own.stop] = map(Prompt, captions)
        images = torch.stack([_cropped(image, policy.image_size) for image, _ in pairs])
        nothing = torch.zeros(len(indices))
        return Rollout(
            prompts=prompts,
            embeddings=policy.embed(captions),
            latents=policy.encode(images)[:, None],
            images=images,
            # Not looked at, where only endpoints are trained on.
            table=make_table(policy, self.config.sampling),
            log_probs=torch.zeros(len(pairs), 0),
            scores=Scores(nothing, nothing == 0),
            seconds={},
        )

    def _draw(self, addresses: Sequence[int]) -> list[tuple[Image.Image, str]]:
        """Raises RunStopped on all processes where one of them finds too many broken images."""
        pairs: list[tuple[Image.Image, str]] = []
        error = None
        try:
            pairs = [self.pairs.draw(address) for address in addresses]
        except RunStopped as raised:
            error = raised
        for said in processes.ask(str(error) if error else None):
            if said is not None:
                raise RunStopped(said) from error
        return pairs

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sample = rows[:, 0].to(rollout.latents.device)
        clean, embeddings = rollout.latents[sample, -1], rollout.embeddings[sample]
        errors = denoising_losses(policy, clean, embeddings, rows[:, 1].tolist(), guidance=1.0)
        return advantages.to(clean.device)[sample] * errors, {"pretraining/loss": errors.detach()}

    def capture(self) -> dict[str, Any]:
        """What a training step changes, and what it must find again."""
        return {"pairs": self.pairs.fingerprint, "broken": list(self.pairs.broken.items())}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Be as at ``capture``; None is of a run that had no such loss.

        Raises:
            UserError: it is of other pairs.
        """
        if state is None:
            return
        if state["pairs"] != self.pairs.fingerprint and not self.config.checkpoint.allow_changes:
            raise UserError(
                "pretraining.source holds other captions than the run began with: choose another --name, "
                "or go on all the same with --checkpoint.allow-changes"
            )
        if state["pairs"] == self.pairs.fingerprint:
            self.pairs.broken.clear()
            self.pairs.broken.update((place, said) for place, said in state["broken"])


def _cropped(image: Image.Image, size: int) -> Tensor:
    """The largest square in the middle, resized, in [0, 1], (3, size, size)."""
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255
