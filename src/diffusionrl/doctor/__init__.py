"""Tries one tiny step of a configuration and says what is wrong with it. docs/doctor.md lists the checks.

Everything is the run's own: model, rewards, prompts, algorithm, optimizer, sampler; only the number of samples is small. The
trainer is left as it was found.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.doctor.control import check_control, require_control
from diffusionrl.doctor.export import check_export, check_images
from diffusionrl.doctor.findings import Finding
from diffusionrl.doctor.groups import check_groups
from diffusionrl.doctor.resources import (
    Costs,
    check_disk,
    check_memory,
    check_time,
    measure_beside,
    measure_embedding,
    measure_sampling,
    measure_update,
    something_to_learn,
)
from diffusionrl.doctor.reward import check_repeats, check_scores, check_variation, normalised
from diffusionrl.doctor.update import check_update, rows_of_an_update
from diffusionrl.sampling.rollout import Rollout, collect, make_table
from diffusionrl.training.parts import follow
from diffusionrl.training.trainer import Trainer

__all__ = ["Finding", "check_groups", "examine", "require_control"]

_SAMPLES = 8


def examine(trainer: Trainer, control: bool = False) -> Iterator[Finding]:
    """Every check in turn, each as soon as it is done; at the end what noise does, where the ``control`` is asked for."""
    before, micro_batch_size = trainer.state.capture(0), trainer.algorithm.micro_batch_size
    try:
        yield from _examine(trainer)
        if control:
            trainer.algorithm.micro_batch_size = micro_batch_size
            trainer.state.restore(before)
            yield check_control(trainer)
    except torch.OutOfMemoryError as error:
        remedy = "try again with --sampling.batch-size 1 --algorithm.micro-batch-size 1: they change memory and speed alone"
        yield Finding("fail", "memory", f"not even a tiny step fits: {str(error).partition('.')[0]}", remedy)
    finally:
        trainer.algorithm.micro_batch_size = micro_batch_size
        trainer.state.restore(before)


def _examine(trainer: Trainer) -> Iterator[Finding]:
    yield check_groups(trainer)
    denoise, decode = measure_sampling(trainer)
    embedding = measure_embedding(trainer)
    sampling = replace(trainer.config.sampling, batch_size=min(_SAMPLES, denoise.tried, decode.tried))
    rollout = _tiny_rollout(trainer, sampling)
    yield check_images(rollout)
    held_out, beside = measure_beside(trainer, rollout)
    yield check_scores(trainer, rollout, held_out)
    if rollout.scores.valid.any():
        yield check_repeats(trainer, rollout)
        yield check_variation(trainer, rollout)
    rollout = normalised(trainer, rollout)
    follow(trainer.policy, trainer.algorithm, 0)
    rollout, advantages = something_to_learn(trainer, rollout)
    rows = rows_of_an_update(trainer, rollout, advantages)
    update = measure_update(trainer, rollout, rows, advantages)
    costs = Costs(denoise, decode, update, beside, embedding)
    speed, time = check_time(trainer, rollout, advantages, costs)
    yield speed
    memory = check_memory(trainer, rollout, advantages, costs)
    trainer.algorithm.micro_batch_size = min(trainer.algorithm.micro_batch_size, update.tried)
    yield from check_update(trainer, rollout, rows, advantages)
    yield check_export(trainer, rollout)
    yield memory
    yield check_disk(trainer)
    yield time


def _tiny_rollout(trainer: Trainer, sampling: SamplingConfig) -> Rollout:
    """Eight samples: as many of one prompt as the run takes, at most four, or two in the place of judged images, which cost the
    same. Two whole groups for a reward that looks at them."""
    config = trainer.config
    grouped = bool(trainer.reward.grouped)
    least = 1 if trainer.tasks[0].judged is None else 2
    group = config.samples_per_prompt if grouped else max(least, min(config.samples_per_prompt, 4))
    prompts: list[Prompt] = (list(trainer.prompts) * _SAMPLES)[: 2 if grouped else _SAMPLES // group]
    return collect(
        trainer.policy,
        trainer.reward,
        [prompt for prompt in prompts for _ in range(group)],
        sampling,
        config.seed,
        "doctor",
        0,
        trainer.algorithm.logprob_reduction,
        trainer.algorithm.needs,
        config.rewards.timeout,
        group,
        trainer.algorithm.table(make_table(trainer.policy, sampling), config.seed, 1),
        trainer.algorithm.shared_start,
    )
