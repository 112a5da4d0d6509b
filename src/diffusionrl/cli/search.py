"""``diffusionrl sample --search NAME``."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from diffusionrl.cli.parsing import check_reward, quiet_libraries, settings_of
from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.config.run import plain
from diffusionrl.config.search import SEARCHES, AnySearch, DemonConfig
from diffusionrl.errors import one_of, require
from diffusionrl.paths import expand

if TYPE_CHECKING:
    from diffusionrl.sampling.search import Found


@dataclass(frozen=True)
class SearchImagesConfig:
    """For each prompt and seed an image that a reward likes better, from the same weights; see docs/search.md. The same command
    again goes on where it was stopped."""

    model: str = "emoji"
    """As in sample."""
    model_config: str | None = None
    """Of a single file: as in train."""
    lora: Path | None = None
    """As in evaluate."""
    prompts: tuple[str, ...] = ("a cat", "a dog", "a butterfly", "a doctor")
    """One image a prompt and seed; or a built-in set, or one file of prompts."""
    seeds: tuple[int, ...] = (0, 1)
    """Before the search, an image is what sample makes of its seed."""
    reward: tuple[str, ...] = ("compressibility",)
    """As in train; by default the run's, as are all settings below."""
    held_out: tuple[str, ...] = ()
    """Rewards that the search does not see, to be compared before and after it."""
    out: Path = Path("searched")
    """Folder for images, scores and report.html."""
    search: AnySearch = field(default_factory=DemonConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)

    def __post_init__(self) -> None:
        for what in ("prompts", "seeds", "reward"):
            require(len(getattr(self, what)) >= 1, f"{what} names none: give one or more")


def run(name: str, arguments: Sequence[str]) -> None:
    """Search as ``--search NAME`` says, with the other arguments."""
    if name not in SEARCHES:
        raise one_of("search", name, SEARCHES)
    settings = settings_of(arguments)
    default = SearchImagesConfig(
        reward=settings.reward,
        held_out=settings.evaluation.held_out,
        search=SEARCHES[name](),
        sampling=settings.sampling,
        rewards=settings.rewards,
    )
    kind = tyro.conf.AvoidSubcommands[SearchImagesConfig]
    config = tyro.cli(kind, default=default, args=arguments, prog=f"diffusionrl sample --search {name}")
    config.search.check_sampling(config.sampling)
    for entry in (*config.reward, *config.held_out):
        check_reward(entry.partition("=")[0])
    from diffusionrl.runs.places import check_model_name  # which imports NumPy

    check_model_name(config.model)
    quiet_libraries()
    _search(dataclasses.replace(config, out=expand(config.out)))


def _search(config: SearchImagesConfig) -> None:
    from diffusionrl.data.prompts import prompts_given
    from diffusionrl.policies import find_trained, load_trained
    from diffusionrl.report.search_page import write_search_page
    from diffusionrl.rewards import load_mixture, try_mixture
    from diffusionrl.rewards.loading import require_world
    from diffusionrl.runs.work import check_folder, held
    from diffusionrl.sampling.rollout import metadata_of
    from diffusionrl.sampling.search import check_search, search
    from diffusionrl.sampling.search_folder import KIND, SearchFolder

    check_folder(config.out, KIND)
    prompts = prompts_given(config.prompts)
    reward = load_mixture(config.reward, config.rewards)
    held_out = load_mixture(config.held_out, config.rewards) if config.held_out else None
    check_search(reward, held_out, prompts, config.seeds, config.search, config.sampling, config.rewards)
    named = [entry.partition("=")[0] for entry in (*config.reward, *config.held_out)]
    require_world(named, config.rewards, find_trained(config.model, config.lora, config.model_config).base)
    policy = load_trained(config.model, config.lora, config.model_config, config.sampling, prompts[0])
    tried = [prompts[0], prompts[-1]]
    texts, metadata = [prompt.text for prompt in tried], metadata_of(tried, policy.sampling_rate)
    for each in (reward, held_out):
        if each is not None:
            try_mixture(each, policy.sample_shape, texts, metadata, (len(config.seeds),), config.rewards.timeout)
    settings = _settings(config, [prompt.text for prompt in prompts], policy.about.get("weights"))
    with held(config.out, KIND, settings):
        folder = SearchFolder(config.out)
        parts = (config.seeds, config.search, config.sampling, held_out, config.rewards, folder.done)
        progress = _Progress(len(prompts) * len(config.seeds), len(folder.done))
        try:
            for found in search(policy, reward, prompts, *parts):
                folder.keep(found, policy.show, policy.sampling_rate)
                progress.show(found)
        finally:  # whatever stopped it: what is there, is there to be seen
            if folder.done:
                folder.write_grids(len(config.seeds))
                print(f"report: {write_search_page(config.out)}", flush=True)


def _settings(config: SearchImagesConfig, prompts: list[str], weights: str | None) -> dict[str, Any]:
    """What makes the images: a search that is taken up must have the same."""
    found = plain(dataclasses.asdict(config)) | {"prompts": prompts, "weights": weights}
    del found["out"]
    for name in ("timeout", "max_invalid", "invalid_window", "cache", "human"):
        del found["rewards"][name]
    return json.loads(json.dumps(found, default=str))


class _Progress:
    """A line an image."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._new, self._began = total, done, 0, time.perf_counter()

    def show(self, found: "Found") -> None:
        self._done, self._new = self._done + 1, self._new + 1
        left = timedelta(seconds=round((time.perf_counter() - self._began) / self._new * (self._total - self._done)))
        before, after = (_said(found.scores[side]["reward"]) for side in ("before", "after"))
        print(
            f"image {self._done:>{len(str(self._total))}}/{self._total}  reward {before} -> {after}  "
            f"queries {found.spent.queries}  {left} left  {found.prompt.text[:40]!r}, seed {found.seed}",
            flush=True,
        )


def _said(score: float) -> str:
    return f"{score:.3f}" if math.isfinite(score) else "invalid"
