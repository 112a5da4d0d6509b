"""A run in one call, from Python or from the command line."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusionrl import interruption
from diffusionrl.algorithms import Algorithm, make_algorithm
from diffusionrl.config import MIN_PAIRS, TrainConfig
from diffusionrl.doctor import Finding, check_groups, examine
from diffusionrl.errors import UserError
from diffusionrl.policies import check_model, load_policy
from diffusionrl.policies.base import Policy
from diffusionrl.presets import emoji
from diffusionrl.prompts import Prompt, load_prompts
from diffusionrl.report.run_page import keep_report
from diffusionrl.rewards import Mixture, Reward, as_mixture, load_mixture, try_mixture, within
from diffusionrl.rewards.clip import load_embedder
from diffusionrl.rollout import make_table
from diffusionrl.tracking import RunFolder, TrainResult, read_result
from diffusionrl.trainer import Trainer


def train(
    config: TrainConfig | None = None,
    policy: Policy | None = None,
    reward: Reward | Mixture | None = None,
    prompts: Sequence[str | Prompt] | None = None,
    algorithm: Algorithm | None = None,
) -> TrainResult:
    """Train a policy towards a reward; a run that was begun in the same folder goes on from its newest checkpoint.

    Args:
        config: everything; by default the preset "emoji". The parts below take the place of what it names.
        policy: from ``load_policy``, or your own.
        reward: any function (images, prompts, metadata) -> scores (see ``diffusionrl.rewards.base.Reward``), or a ``Mixture``.
        prompts: texts, or ``Prompt`` with metadata.
        algorithm: an object like those in ``diffusionrl.algorithms``; by default the one of ``config.algorithm``.

    Raises:
        UserError: something that the user can mend; raised before anything slow, with nothing written.
        RunStopped: the run had to end early.
        Interrupted: a signal asked it to save and stop.
    """
    config = config or emoji()
    run_dir = config.run_dir or Path("runs") / (config.name or time.strftime("%Y%m%d-%H%M%S"))
    config = dataclasses.replace(config, **_described(policy, reward, prompts))
    with interruption.noted(), RunFolder(run_dir, config, keep_report) as folder:
        if folder.finished:
            print(f"{run_dir} is finished: {folder.finished}")
            return read_result(run_dir)
        trainer = _prepare(config, policy, reward, prompts, algorithm)
        groups = check_groups(trainer)
        if groups.verdict != "pass":
            print(f"warning: {groups.said}: {groups.remedy}", file=sys.stderr)
        try:
            return trainer.run(folder)
        except interruption.Interrupted as error:
            error.saved_in = run_dir if trainer.at_start is not None else None
            raise


def diagnose(
    config: TrainConfig | None = None,
    policy: Policy | None = None,
    reward: Reward | Mixture | None = None,
    prompts: Sequence[str | Prompt] | None = None,
    algorithm: Algorithm | None = None,
) -> Iterator[Finding]:
    """Try one tiny step of what ``train`` would do with the same arguments, and write nothing; see docs/doctor.md.

    Returns:
        What each check found, as soon as it is known.

    Raises:
        UserError: something that the user can mend.
    """
    config = config or emoji()
    config = dataclasses.replace(config, **_described(policy, reward, prompts))
    yield from examine(_prepare(config, policy, reward, prompts, algorithm))


def _prepare(
    config: TrainConfig,
    policy: Policy | None,
    reward: Reward | Mixture | None,
    prompts: Sequence[str | Prompt] | None,
    algorithm: Algorithm | None,
) -> Trainer:
    """Everything that a run needs, loaded and tried."""
    if prompts is None:
        chosen = load_prompts(config.prompts, config.max_broken_prompts)
    else:
        chosen = [_as_prompt(prompt) for prompt in prompts]
    if not chosen:
        raise UserError("there is no prompt to train on: prompts is empty")
    image_size = check_model(config.model) if policy is None else policy.image_size
    mixture = load_mixture(config.reward, config.rewards) if reward is None else as_mixture(reward)
    held_out = load_mixture(config.evaluation.held_out, config.rewards) if config.evaluation.held_out else None
    _check_groups(config, mixture, held_out)
    samples = [chosen[0], chosen[-1]]
    sizes = (config.samples_per_prompt, config.evaluation.samples_per_prompt)
    for each, asked in [(mixture, sizes), (held_out, sizes[1:])] if held_out else [(mixture, sizes)]:
        trial = partial(try_mixture, each, image_size, [p.text for p in samples], [p.metadata for p in samples], asked)
        if not within(config.rewards.timeout, trial):
            seconds = f"{config.rewards.timeout:g} s (rewards.timeout)"
            raise UserError(f"the reward gave no scores for two grey images within {seconds}: {', '.join(each.rewards)}")
    embed = load_embedder(config.evaluation.embeddings, config.model)
    trained = policy or load_policy(config.model, **dataclasses.asdict(config.policy), seed=config.seed)
    make_table(trained, config.sampling)
    return Trainer(trained, mixture, chosen, algorithm or make_algorithm(config), config, held_out, embed)


def _check_groups(config: TrainConfig, mixture: Mixture, held_out: Mixture | None) -> None:
    """Raises UserError where rewards look at whole groups, and training or evaluation have none."""
    settings = config.evaluation
    size, step = config.samples_per_prompt, config.samples_per_step
    mixture.require_groups(size, "samples_per_prompt", step, "samples a step")
    for each in [mixture, held_out] if held_out else [mixture]:
        named = ("evaluation.samples_per_prompt", settings.num_samples, "evaluation.num_samples")
        each.require_groups(settings.samples_per_prompt, *named)
    watched = set(config.watched) & set(held_out.grouped if held_out else ())
    if config.guard.stop and watched and settings.num_samples < MIN_PAIRS * settings.samples_per_prompt:
        raise UserError(
            f"guard.stop watches {', '.join(sorted(watched))}, which scores groups: evaluation.num_samples must be at least "
            f"{MIN_PAIRS} groups of evaluation.samples_per_prompt, {MIN_PAIRS * settings.samples_per_prompt}"
        )


def _described(
    policy: Policy | None, reward: Reward | Mixture | None, prompts: Sequence[str | Prompt] | None
) -> dict[str, Any]:
    """What the configuration says of parts that were handed over in Python."""
    described: dict[str, Any] = {}
    if policy is not None:
        described["model"] = policy.source
    if reward is not None:
        described["reward"] = tuple(f"{name}={weight:g}" for name, weight in as_mixture(reward).weights.items())
    if prompts is not None:
        described["prompts"] = f"<{len(prompts)} prompts handed over in Python>"
    return described


def _as_prompt(prompt: str | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)
