"""Which images are shown together."""

from collections.abc import Sequence
from pathlib import Path

from diffusionrl import seeds
from diffusionrl.choosing.board import Round
from diffusionrl.errors import require


def plan(images: Sequence[tuple[Path, str]], size: int, count: int | None, seed: int) -> list[Round]:
    """Rounds of ``size`` images of one prompt, fewer where it has fewer, prompts and images in random order.

    Args:
        images: with their prompts. One that is alone with its prompt is left out.
        count: of rounds: fewer, or, over the images again in other rounds, more. None: each image comes once, but for those
            that fill up a prompt's last round.

    Raises:
        UserError: no prompt has two images.
    """
    groups: dict[str, list[Path]] = {}
    for file, prompt in images:
        groups.setdefault(prompt, []).append(file)
    several = {prompt: files for prompt, files in groups.items() if len(files) > 1}
    require(bool(several), f"no prompt has two images to choose among ({len(images)} images of {len(groups)} prompts)")
    rounds: list[Round] = []
    while not rounds or (count is not None and len(rounds) < count):
        draw = seeds.numpy_generator(seed, "choose", len(rounds))
        found = []
        for prompt, files in several.items():
            order = [files[i] for i in draw.permutation(len(files))]
            shown = min(size, len(order))
            found += [Round(prompt, tuple((order * 2)[first : first + shown])) for first in range(0, len(order), shown)]
        rounds += [found[i] for i in draw.permutation(len(found))]
    return rounds[:count]
