"""``diffusionrl evaluate``."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from diffusionrl.cli.parsing import check_rewards, quiet_libraries, settings_of
from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.errors import UserError, require
from diffusionrl.paths import expand, is_there
from diffusionrl.runs.hub import is_single_file


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on fixed seeds, with intervals; see docs/evaluate.md. What is not given is the run's, or the preset's."""

    model: str = "emoji"
    """"emoji", a folder in diffusers' format, a hub id, a single .safetensors file, file.py:function, or a run folder (its
    model with what it learned)."""
    model_config: str | None = None
    """Of a single file, also of the baseline: as in train."""
    lora: Path | None = None
    """On that model: a safetensors file, or a folder with pytorch_lora_weights.safetensors in it."""
    baseline: str | None = None
    """A model or a run that draws the same prompts and noise, for differences and win rates."""
    reward: tuple[str, ...] = ("compressibility",)
    """Rewards as in train, without weights. Each is reported on its own."""
    prompts: str = "ddpo-animals"
    """A built-in set, a text file (one prompt a line) or a JSONL file ("prompt" and any metadata)."""
    samples_per_prompt: int = 1
    """With several, intervals of means are over prompts."""
    num_samples: int | None = None
    """Images, over the prompts in turn; by default samples_per_prompt for each of them. All are in memory at once."""
    seed: int = 0
    """The same seed draws the same noise."""
    out: Path = Path("evaluation.json")
    """Everything, down to the sample; it must not exist."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)

    def __post_init__(self) -> None:
        require(len(self.reward) >= 1, "reward names no reward")
        require(self.samples_per_prompt >= 1, f"samples_per_prompt must be at least 1, not {self.samples_per_prompt}")
        require(self.num_samples is None or self.num_samples >= 1, f"num_samples must be at least 1, not {self.num_samples}")
        require(
            self.model_config is None or any(map(is_single_file, (self.model, self.baseline or ""))),
            "model_config describes a single .safetensors file, and neither model nor baseline is one",
        )
        for name in self.reward:
            if "=" in name:
                raise UserError(f"evaluate reports each reward on its own: leave out the weight of {name!r}")


def run(arguments: Sequence[str]) -> None:
    run = settings_of(arguments)
    names = tuple(dict.fromkeys(name.partition("=")[0] for name in (*run.reward, *run.evaluation.held_out)))
    default = EvaluateConfig(reward=names, prompts=run.prompts, seed=run.seed, sampling=run.sampling, rewards=run.rewards)
    config = tyro.cli(EvaluateConfig, default=default, args=arguments, prog="diffusionrl evaluate")
    from diffusionrl.data.prompts import load_prompts  # which imports NumPy

    prompts = load_prompts(config.prompts)
    check_rewards(config.reward, config.rewards)
    config = dataclasses.replace(config, out=expand(config.out))
    if is_there(config.out):
        raise UserError(f"{config.out} exists: choose another --out")
    from diffusionrl.runs.places import check_model_name

    for model in (config.model, config.baseline):
        if model is not None:
            check_model_name(model)
    quiet_libraries()
    from diffusionrl.evaluation.assessment import report, score_model, table
    from diffusionrl.policies import find_trained, load_trained
    from diffusionrl.rewards import load_mixture, try_mixture
    from diffusionrl.rewards.loading import require_world
    from diffusionrl.sampling.rollout import metadata_of

    given = [(config.model, config.lora), *([(config.baseline, None)] if config.baseline else [])]
    asked = [(model, lora, config.model_config if is_single_file(model) else None) for model, lora in given]
    found = [find_trained(*each) for each in asked]
    for trained in found:
        require_world(config.reward, config.rewards, trained.base)
    rewards = load_mixture(config.reward, config.rewards)
    size = config.samples_per_prompt
    count = config.num_samples or len(prompts) * size
    rewards.require_groups(size, "samples_per_prompt", count, "num_samples")
    shape, first = found[0].sample_shape, None
    if shape is None:  # which its settings do not tell
        first = load_trained(*asked[0], config.sampling, prompts[0])
        shape = first.sample_shape
    rate = first.sampling_rate if first else None
    texts, metadata = [prompt.text for prompt in prompts[:2]], metadata_of(prompts[:2], rate)
    try_mixture(rewards, shape, texts, metadata, (size,), config.rewards.timeout)
    sheets = []
    for each, trained in zip(asked, found, strict=True):
        print(f"{trained.name}: {count} samples", flush=True)
        policy = first if first is not None and each is asked[0] else load_trained(*each, config.sampling, prompts[0])
        settings = (size, config.sampling, config.seed, config.rewards.timeout, count)
        sheets.append(score_model(trained.name, policy, rewards, prompts, *settings))
    result = report(*sheets)
    settings_said = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result | {"settings": settings_said}, indent=2) + "\n")
    print(f"\n{table(result)}\n\neverything: {config.out}")
    for sheet in sheets:
        if sheet.error:
            print(f"warning: some scores are invalid; the last error for {sheet.name}: {sheet.error}", file=sys.stderr)
