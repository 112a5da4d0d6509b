"""A run in one call, from Python or from the command line."""

import copy
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusionrl import devices, interruption, processes
from diffusionrl.algorithms import Algorithm, make_algorithm
from diffusionrl.config import MIN_PAIRS, DPOConfig, RewardGradientConfig, TaskConfig, TrainConfig
from diffusionrl.config.algorithms import PolicyGradientConfig
from diffusionrl.config.presets import emoji
from diffusionrl.data.entries import check_encodes, from_entry
from diffusionrl.data.media import one_of_each_size
from diffusionrl.data.pairs import load_pairs
from diffusionrl.data.preferences import Preferences, load_preferences
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.doctor import Finding, check_groups, examine, require_control
from diffusionrl.errors import UserError
from diffusionrl.paths import expand
from diffusionrl.policies import check_model, check_quantization, load_policy
from diffusionrl.policies.base import Policy
from diffusionrl.policies.own import check_policy, require_answers
from diffusionrl.policies.trained import begin_from_run
from diffusionrl.report.run_page import keep_report
from diffusionrl.rewards import (
    Mixture,
    Reward,
    as_mixture,
    load_mixture,
    require_gradient,
    try_gradient,
    try_mixture,
)
from diffusionrl.rewards.base import grey
from diffusionrl.rewards.clip import load_embedder
from diffusionrl.rewards.loading import require_world
from diffusionrl.runs.folder import NoFolder, RunFolder, TrainResult, tell_result
from diffusionrl.runs.hub import push
from diffusionrl.runs.places import located
from diffusionrl.sampling.rollout import make_table, metadata_of
from diffusionrl.training.tasks import Task
from diffusionrl.training.trainer import Trainer

_SIZED = 1000  # prompts at most whose images are looked at before a run starts


def train(
    config: TrainConfig | None = None,
    policy: Policy | None = None,
    reward: Reward | Mixture | str | Sequence[str] | None = None,
    prompts: str | Iterable[str | Prompt] | None = None,
    algorithm: Algorithm | None = None,
) -> TrainResult:
    """Train a policy towards a reward; a run that was begun in the same folder goes on from its newest checkpoint. Started on
    several processes (``torchrun``, ``accelerate launch``), they train together; see docs/processes.md.

    Args:
        config: everything; by default the preset "emoji". The parts below take the place of what it names.
        policy: from ``load_policy``, ``NetworkPolicy`` of a network of your own, or whatever answers as they do.
        reward: any function (images, prompts, metadata) -> scores (see ``diffusionrl.rewards.base.Reward``), a ``Mixture``, or
            names as in ``config.reward``.
        prompts: texts, ``Prompt`` with metadata, or objects as of a JSONL file; one text names a set or a file.
        algorithm: an object like those in ``diffusionrl.algorithms``; by default the one of ``config.algorithm``.

    Raises:
        UserError: something that the user can mend; raised before anything slow, with nothing written.
        RunStopped: the run had to end early.
        Interrupted: a signal asked it to save and stop.
    """
    config, reward, prompts = _settle(config, policy, reward, prompts)
    named = expand(config.run_dir or Path("runs") / (config.name or time.strftime("%Y%m%d-%H%M%S")))
    run_dir = named.absolute()  # a reward may change the working directory
    processes.start(config.policy.device, config.rewards.timeout)
    with interruption.noted(), RunFolder(run_dir, config, keep_report) if processes.is_main() else NoFolder(config) as folder:
        finished = processes.tell(folder.finished)
        if finished:
            if processes.is_main():
                print(f"{run_dir} is finished: {finished}")
            result = tell_result(run_dir)
        else:
            trainer = _prepare(config, policy, reward, prompts, algorithm)
            groups = check_groups(trainer)
            if groups.verdict != "pass" and processes.is_main():
                print(f"warning: {groups.said}: {groups.remedy}", file=sys.stderr)
            try:
                result = trainer.run(folder)
            except interruption.Interrupted as error:
                error.saved_in = run_dir if trainer.at_start is not None else None
                raise
    if config.push_to_hub is not None and processes.is_main():
        result = dataclasses.replace(result, not_pushed=_push(run_dir, config.push_to_hub))
    return dataclasses.replace(result, run_dir=named)


def _push(run_dir: Path, repo_id: str) -> str | None:
    """Upload what a run exported. The run is finished: where the hub does not take it, that is said, and returned."""
    try:
        print(f"pushed: {push(run_dir / 'export', repo_id, private=True)}")
        return None
    except UserError as error:
        command = shlex.join(["diffusionrl", "push", str(run_dir), repo_id, "--private"])
        print(f"warning: {error}; or later: {command}", file=sys.stderr)
        return str(error)


def diagnose(
    config: TrainConfig | None = None,
    policy: Policy | None = None,
    reward: Reward | Mixture | str | Sequence[str] | None = None,
    prompts: str | Iterable[str | Prompt] | None = None,
    algorithm: Algorithm | None = None,
    control: bool = False,
) -> Iterator[Finding]:
    """Try one tiny step of what ``train`` would do with the same arguments, and write nothing; see docs/doctor.md.

    Args:
        control: try, besides, what a few whole steps on a reward of noise do to the scores.

    Returns:
        What each check found, as soon as it is known.

    Raises:
        UserError: something that the user can mend.
    """
    config, reward, prompts = _settle(config, policy, reward, prompts)
    if control:
        require_control(config, algorithm)
    yield from examine(_prepare(config, policy, reward, prompts, algorithm), control)


def _prepare(
    config: TrainConfig,
    policy: Policy | None,
    reward: Reward | Mixture | None,
    prompts: Sequence[Prompt] | None,
    algorithm: Algorithm | None,
) -> Trainer:
    """Everything that a run needs, loaded and tried."""
    chosen = load_prompts(config.prompts, config.max_broken_prompts) if prompts is None else prompts
    if not chosen:
        raise UserError("there is no prompt to train on: prompts is empty")
    _check_shares(config)
    if not config.model.startswith("<"):  # a pipeline that was handed over, whose world its maker knows
        _check_judges(config, reward is None)
    pairs = load_pairs(config.pretraining)
    preferences = load_preferences(config.preferences, config.max_broken_preferences)
    if preferences is not None:
        _check_preferences(preferences, config)
    if policy is None:
        check_quantization(config.policy.quantization, devices.choose(config.policy.device))
    else:
        check_policy(policy, chosen[0], config.sampling.num_steps)
    shape = check_model(config.model, config.model_config) if policy is None else policy.sample_shape
    if policy is None and config.sampling.arguments:  # which may ask for another one
        shape = None
    trained = policy
    if shape is None:  # which its settings do not tell
        trained = _load(config, chosen[0])
        shape = trained.sample_shape
    rate = None if trained is None else trained.sampling_rate
    own = algorithm or make_algorithm(config)
    mixture = load_mixture(config.reward, config.rewards) if reward is None else as_mixture(reward)
    held_out = load_mixture(config.evaluation.held_out, config.rewards) if config.evaluation.held_out else None
    _check_groups(config, mixture, held_out)
    sizes = (config.samples_per_prompt, config.evaluation.samples_per_prompt)
    _try(mixture, chosen, shape, config, sizes, rate, own)
    if held_out is not None:
        _try(held_out, chosen, shape, config, sizes[1:], rate)
    further = [_load_task(each, config, own, shape, rate) for each in config.tasks]
    embed = load_embedder(config.evaluation.embeddings, config.model)
    trained = trained or _load(config, chosen[0])
    if pairs is not None or preferences is not None:
        trained.encode(grey(shape)[None])  # which not every policy can
    for some in (chosen, *(task.prompts for task in further)):
        for prompt in one_of_each_size(some[:_SIZED]):
            trained.start([prompt], [0])  # all latents have one shape
    table = make_table(trained, config.sampling)
    if isinstance(config.algorithm, PolicyGradientConfig):
        config.algorithm.check_steps(len(table.stochastic))
    if isinstance(config.algorithm, RewardGradientConfig):
        config.algorithm.check_steps(len(table))
    if own.needs_reward_gradient:
        _check_decoder(trained, config, chosen[0])
    if own.needs_reference:
        _check_reference(trained, config)
    if processes.count() > 1 and config.policy.training == "full":
        trained.shard()
    return Trainer(trained, mixture, chosen, own, config, held_out, embed, further, pairs, preferences)


def _check_preferences(preferences: Preferences, config: TrainConfig) -> None:
    """Raises UserError where the algorithm cannot learn from them."""
    if preferences.size == 1 and isinstance(config.algorithm, DPOConfig):
        raise UserError(f"preferences {config.preferences!r} are single images with a label: choose --algorithm.name kto")


def _check_reference(policy: Policy, config: TrainConfig) -> None:
    """Raises UserError where the algorithm leans on a reference model that the policy does not keep."""
    try:
        with policy.reference():
            pass
    except UserError as error:
        raise UserError(f"algorithm {config.algorithm.name} leans on the reference model: {error}") from error


def _check_decoder(policy: Policy, config: TrainConfig, example: Prompt) -> None:
    """Raises UserError where no gradient runs from samples to latents, or from latents through the pipeline's edits."""
    asked = f"algorithm {config.algorithm.name} follows the reward's gradient"
    if policy.edits:
        raise UserError(f"{asked}, and this pipeline edits its latents after each step, where none is known: choose another")
    latents = policy.start([example], [0]).requires_grad_()
    if not policy.decode(latents, [example], gradient=True).requires_grad:
        raise UserError(f"{asked}, and this pipeline's decoder passes none on: choose another algorithm (ddpo, nft ...)")


def _load(config: TrainConfig, example: Prompt) -> Policy:
    settings = dataclasses.asdict(config.policy)
    policy = load_policy(
        config.model,
        **settings,
        seed=config.seed,
        sampling=config.sampling,
        example=example,
        model_config=config.model_config,
    )
    if policy.about.get("distilled") and processes.is_main():
        print(f"warning: {policy.about['distilled']}", file=sys.stderr)
    return policy


def _check_judges(config: TrainConfig, own: bool) -> None:
    """Raises UserError where a judge of the embedded world is to judge another model; ``own``: the first task's rewards are
    those of the configuration."""
    for task in config.all_tasks if own else config.tasks:
        names = [entry.partition("=")[0] for entry in task.reward]
        require_world(names, config.rewards, config.model)
    require_world([entry.partition("=")[0] for entry in config.evaluation.held_out], config.rewards, config.model)


def _check_shares(config: TrainConfig) -> None:
    """Raises UserError where there is too little for each process to have a part of it, or what they cannot share."""
    if config.redraw_queries and processes.count() > 1:
        raise UserError("redraw_queries works on one process: the samples of a group stay where they were drawn")
    for task in config.all_tasks:
        processes.share(task.prompts_per_step * task.samples_per_prompt, task.samples_per_prompt)
    evaluation = config.evaluation
    processes.share(evaluation.num_samples, evaluation.samples_per_prompt, setting="evaluation.num_samples")
    if config.pretraining.source:
        processes.share(config.pretraining.batch_size, setting="pretraining.batch_size")


def _load_task(
    settings: TaskConfig, config: TrainConfig, algorithm: Algorithm, shape: tuple[int, ...], rate: int | None
) -> Task:
    """A further task, loaded and tried; its algorithm is a copy of the first one's before that has seen anything.

    Raises:
        UserError: naming the task.
    """
    try:
        prompts = load_prompts(settings.prompts, config.max_broken_prompts)
        reward = load_mixture(settings.reward, config.rewards)
        _require_groups(reward, settings, config)
        sizes = (settings.samples_per_prompt, config.evaluation.samples_per_prompt)
        _try(reward, prompts, shape, config, sizes, rate, algorithm)
    except UserError as error:
        raise UserError(f"{settings.whose}{error}") from error
    return Task(settings, prompts, reward, copy.deepcopy(algorithm), config)


def _try(
    reward: Mixture,
    prompts: Sequence[Prompt],
    shape: tuple[int, ...],
    config: TrainConfig,
    group_sizes: Sequence[int],
    sampling_rate: int | None = None,
    algorithm: Algorithm | None = None,
) -> None:
    """Raises UserError for a reward that cannot score a few grey images in time, or give the gradient that the algorithm that
    is trained with it asks for; warns of one that does not repeat itself."""
    timeout, differentiates = config.rewards.timeout, algorithm is not None and algorithm.needs_reward_gradient
    if differentiates:
        require_gradient(reward, config.algorithm.name)
    samples = [prompts[0], prompts[-1]]
    texts, metadata = [prompt.text for prompt in samples], metadata_of(samples, sampling_rate)
    unsteady = try_mixture(reward, shape, texts, metadata, group_sizes, timeout)
    if differentiates:
        try_gradient(reward, shape, texts, metadata)
    if unsteady and processes.is_main():
        print(
            f"warning: {', '.join(unsteady)}: the same grey image twice gets different scores, and noise is learned too; "
            "diffusionrl doctor says how much of it there is",
            file=sys.stderr,
        )


def _check_groups(config: TrainConfig, mixture: Mixture, held_out: Mixture | None) -> None:
    """Raises UserError where rewards look at whole groups, and training or evaluation have none."""
    settings = config.evaluation
    _require_groups(mixture, config.all_tasks[0], config)
    if held_out is not None:
        _require_evaluated_groups(held_out, config)
    watched = set(config.watched) & set(held_out.grouped if held_out else ())
    if config.guard.stop and watched and settings.num_samples < MIN_PAIRS * settings.samples_per_prompt:
        raise UserError(
            f"guard.stop watches {', '.join(sorted(watched))}, which scores groups: evaluation.num_samples must be at least "
            f"{MIN_PAIRS} groups of evaluation.samples_per_prompt, {MIN_PAIRS * settings.samples_per_prompt}"
        )


def _require_groups(reward: Mixture, task: TaskConfig, config: TrainConfig) -> None:
    """Raises UserError where a task's reward looks at whole groups, and training or evaluation have none."""
    size = task.samples_per_prompt
    reward.require_groups(size, "samples_per_prompt", task.prompts_per_step * size, "samples a step")
    _require_evaluated_groups(reward, config)


def _require_evaluated_groups(reward: Mixture, config: TrainConfig) -> None:
    size, count = config.evaluation.samples_per_prompt, config.evaluation.num_samples
    reward.require_groups(size, "evaluation.samples_per_prompt", count, "evaluation.num_samples")


def _settle(
    config: TrainConfig | None,
    policy: Policy | None,
    reward: Reward | Mixture | str | Sequence[str] | None,
    prompts: str | Iterable[str | Prompt] | None,
) -> tuple[TrainConfig, Reward | Mixture | None, Sequence[Prompt] | None]:
    """The configuration with whole paths and with what is handed over in it; names become settings.

    Raises:
        UserError: a reward is neither a function nor a name, a prompt no text, or the policy none.
    """
    config = config or emoji()
    if policy is not None:
        require_answers(policy, "policy")
    if isinstance(reward, str) or (isinstance(reward, list | tuple) and reward and all(isinstance(r, str) for r in reward)):
        config = dataclasses.replace(config, reward=(reward,) if isinstance(reward, str) else tuple(reward))
        reward = None
    if not (reward is None or isinstance(reward, Mixture) or callable(reward)):
        raise UserError(
            f"reward is a {type(reward).__name__}: give a function (images, prompts, metadata) -> scores, names of rewards, or "
            "a Mixture of several functions"
        )
    if isinstance(prompts, str | Path):
        config, prompts = dataclasses.replace(config, prompts=str(prompts)), None
    chosen = None if prompts is None else [_as_prompt(prompt, index) for index, prompt in enumerate(prompts)]
    config = dataclasses.replace(config, **_described(policy, reward, chosen))
    return begin_from_run(located(config)), reward, chosen


def _described(policy: Policy | None, reward: Reward | Mixture | None, prompts: Sequence[Prompt] | None) -> dict[str, Any]:
    """What the configuration says of parts that were handed over in Python."""
    described: dict[str, Any] = {}
    if policy is not None:
        if getattr(policy, "settings", None) is not None:
            described["policy"] = policy.settings
        described["model"] = policy.source
        described["model_config"] = (policy.about.get("single_file") or {}).get("config")
    if reward is not None:
        described["reward"] = tuple(f"{name}={weight:g}" for name, weight in as_mixture(reward).weights.items())
    if prompts is not None:
        described["prompts"] = f"<{len(prompts)} prompts handed over in Python>"
    return described


def _as_prompt(prompt: Any, index: int) -> Prompt:
    """Raises UserError for what is no prompt."""
    where = f"prompts[{index}]"
    if isinstance(prompt, str) and prompt.strip():
        prompt = Prompt(prompt)  # to the letter
    found = prompt if isinstance(prompt, Prompt) else from_entry(prompt, Path(), where)
    check_encodes(found.text, where)
    return found
