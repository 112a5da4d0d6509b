"""``diffusionrl choose``."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from diffusionrl.cli.parsing import quiet_libraries, settings_of
from diffusionrl.config import SamplingConfig
from diffusionrl.config.checks import LARGEST
from diffusionrl.config.run import plain
from diffusionrl.errors import require
from diffusionrl.paths import expand

if TYPE_CHECKING:
    from diffusionrl.choosing.choices import Choices
    from diffusionrl.choosing.page import PageServer
    from diffusionrl.sampling.drawing import Drawing

_LOOK = 0.1  # seconds between two looks at whether there is something to draw
_AHEAD = 3  # rounds that a model has drawn before they are asked for


@dataclass(frozen=True)
class ChooseConfig:
    """Choose the better of two images, or the best of several, on a page of this machine; what is chosen is what --preferences
    reads. See docs/choose.md. The same command again goes on where it was stopped."""

    images: tyro.conf.Positional[Path | None] = None
    """A folder of images with captions, or a run, whose samples are shown; or a --model, which draws as you go."""
    prompt: str = ""
    """What all images show, of a folder without captions."""
    model: str | None = None
    """As in sample."""
    model_config: str | None = None
    """Of a single file: as in train."""
    lora: Path | None = None
    """As in evaluate."""
    prompts: tuple[str, ...] = ("a cat", "a dog", "a butterfly", "a doctor")
    """What a model draws, in turn: texts; or a built-in set, or one file of prompts."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Of a model; by default that of the run, or of the preset "emoji"."""
    size: int = 2
    """Images at a time; of more than two, the best is chosen, and is a pair with each of the others."""
    rounds: int | None = None
    """How often you choose: by default until each image of a folder has come once, and with a model until you finish."""
    seed: int = 0
    """Of the order, and of what a model draws."""
    port: int = 0
    """Of the page; 0 takes any free one."""
    out: Path = Path("judged")
    """Folder for what was chosen, with copies of the images."""

    def __post_init__(self) -> None:
        require(self.size >= 2, f"size must be at least 2, not {self.size}")
        require(self.rounds is None or self.rounds >= 1, f"rounds must be at least 1, not {self.rounds}")
        require(0 <= self.port <= 65535, f"port must lie between 0 and 65535, not {self.port}")
        require(len(self.prompts) >= 1, "prompts names none: give one or more")


def run(arguments: Sequence[str]) -> None:
    default = ChooseConfig(sampling=settings_of(arguments).sampling)
    config = tyro.cli(ChooseConfig, default=default, args=arguments, prog="diffusionrl choose")
    require(
        (config.images is None) != (config.model is None),
        "name one thing to choose among: a folder of images, a run, or --model with --prompts",
    )
    config = dataclasses.replace(config, out=expand(config.out))
    from diffusionrl.choosing.choices import KIND
    from diffusionrl.choosing.page import PageServer
    from diffusionrl.runs.work import check_folder

    check_folder(config.out, KIND)
    with PageServer(config.port) as page:
        (_among_images if config.model is None else _as_you_go)(config, page)


def _among_images(config: ChooseConfig, page: "PageServer") -> None:
    from diffusionrl.choosing.choices import KIND, Choices
    from diffusionrl.choosing.rounds import plan
    from diffusionrl.data.folders import size_of
    from diffusionrl.data.gallery import gallery
    from diffusionrl.runs.work import held

    place = expand(config.images or "")
    found = gallery(place, config.prompt)
    rounds = plan(found, config.size, config.rounds, config.seed)
    content = json.dumps([[str(file.relative_to(place)), prompt, size_of(file)] for file, prompt in found])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    settings = {"images": f"{len(found)} images, {digest}", "size": config.size, "seed": config.seed}
    with held(config.out, KIND, settings):
        choices = Choices(config.out)
        choices.rounds, choices.total = rounds, len(rounds)
        _wait(choices, page)


def _as_you_go(config: ChooseConfig, page: "PageServer") -> None:
    from diffusionrl.data.prompts import prompts_given
    from diffusionrl.runs.places import check_model_name

    model = str(config.model)
    prompts = prompts_given(config.prompts)
    check_model_name(model)
    quiet_libraries()
    from diffusionrl.choosing.choices import KIND, Choices
    from diffusionrl.policies import load_trained
    from diffusionrl.runs.work import held
    from diffusionrl.sampling.drawing import Drawing

    policy = load_trained(model, config.lora, config.model_config, config.sampling, prompts[0])
    drawing = Drawing(policy, prompts, config.sampling, config.size, config.seed, config.out)
    settings = plain(dataclasses.asdict(config)) | {"prompts": [prompt.text for prompt in prompts]}
    for name in ("images", "prompt", "rounds", "port", "out"):
        del settings[name]
    settings = json.loads(json.dumps(settings | {"weights": policy.about.get("weights")}, default=str))
    with held(config.out, KIND, settings):
        choices = Choices(config.out)
        choices.rounds, choices.total = [drawing.round(number) for number in range(len(choices.answers))], config.rounds
        _wait(choices, page, drawing)


def _wait(choices: "Choices", page: "PageServer", drawing: "Drawing | None" = None) -> None:
    """Until the person has finished, on the page or by Ctrl-C."""
    page.show(choices)
    of = "" if choices.total is None else f" of {choices.total}"
    print(f"choose at {page.address}", flush=True)
    print(f"{len(choices.answers)}{of} judged, in {choices.folder}; Ctrl-C ends, and the same command goes on", flush=True)
    with suppress(KeyboardInterrupt):
        while not choices.over.wait(_LOOK):
            number = len(choices.rounds)
            wanted = min(len(choices.answers) + _AHEAD, choices.total or LARGEST)
            if drawing is not None and number < wanted:
                choices.rounds.append(drawing.draw(number))
    more = f": train on them with --algorithm.name dpo, or kto, --preferences {choices.folder}" if choices.chosen else ""
    print(f"{choices.chosen} choices in {choices.folder}{more}", flush=True)
