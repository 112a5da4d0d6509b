"""The reward on a few images of the model's own: valid, repeatable, not constant."""

from dataclasses import replace

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.data.prompts import members_of
from diffusionrl.doctor.findings import Finding
from diffusionrl.errors import UserError
from diffusionrl.rewards import Mixture, RewardCall, Scores
from diffusionrl.sampling.rollout import Rollout, metadata_of
from diffusionrl.training.trainer import Trainer

# The part of a reward's spread that is its own noise: rounding below the first, more noise than signal above the second.
_ROUNDING, _NOISE = 1e-3, 0.5


def ask(trainer: Trainer, reward: Mixture, rollout: Rollout, images: Tensor, group_size: int) -> Scores:
    """What a reward says of images for the rollout's prompts. One that looks at groups sees the images over and over, until the
    last group of ``group_size`` is whole, each group with one prompt."""
    size = group_size if reward.grouped else 1
    rows = torch.arange(-(-len(images) // size) * size)
    prompts = [rollout.prompts[row // size * size % len(rollout.prompts)] for row in rows.tolist()]
    texts, metadata = [prompt.text for prompt in prompts], metadata_of(prompts, trainer.policy.sampling_rate)
    call = RewardCall(reward, images[rows % len(images)], texts, metadata, group_size=size)
    call.start()
    return call.result(trainer.config.rewards.timeout)


def check_scores(trainer: Trainer, rollout: Rollout, held_out: Scores | None) -> Finding:
    """Finite and in range; those of held-out rewards too."""
    found = {"": rollout.scores} | ({"held-out ": held_out} if held_out is not None else {})
    for kind, scores in found.items():
        invalid, total = int((~scores.valid).sum()), len(scores.valid)
        if invalid:
            stops = not kind and invalid > trainer.config.rewards.max_invalid * total
            told = f"{invalid} of {total} {rollout.kind}s have no valid {kind}score: {scores.error}"
            remedy = "mend the reward: a run stops when more than rewards.max_invalid of its samples have no score"
            return Finding("fail" if stops else "warn", "scores", told, remedy)
    ranges = [
        f"{part.min():.3g} to {part.max():.3g}" + (f" ({name})" if len(rollout.scores.parts) > 1 else "")
        for name, part in rollout.scores.parts.items()
    ]
    return Finding("pass", "scores", f"finite and valid on {len(rollout.prompts)} {rollout.kind}s: {', '.join(ranges)}")


def check_repeats(trainer: Trainer, rollout: Rollout) -> Finding:
    """The same images again: noise of the reward's own, as a share of how much images differ."""
    kind = rollout.kind
    again = ask(trainer, trainer.reward, rollout, rollout.images, trainer.config.samples_per_prompt)
    lost = rollout.scores.valid & ~again.valid[: len(rollout.scores.valid)]
    if lost.any():
        told = f"{int(lost.sum())} of {len(lost)} {kind}s have a score once, and none the next time: {again.error}"
        return Finding("warn", "repeatable", told, "mend the reward: samples without a score teach nothing")
    worst, name = max((_noise(part, again.parts[name]), name) for name, part in rollout.scores.parts.items())
    if worst <= _ROUNDING:
        return Finding("pass", "repeatable", f"the same {kind} twice gets the same score")
    told = f"{_of(name, rollout)}the same {kind} twice gets different scores: noise is {worst:.0%} of what tells {kind}s apart"
    remedy = "seed whatever the reward draws, switch dropout off, and set a judge's temperature to 0"
    return Finding("fail" if worst > _NOISE else "warn", "repeatable", told, remedy)


def _noise(first: Tensor, second: Tensor) -> float:
    """Standard deviation between the two scores of an image over that of all scores; 0 where there is nothing to compare."""
    both = (first.isfinite() & second.isfinite()).nonzero().flatten()
    if len(both) == 0:
        return 0.0
    pairs = torch.stack([first[both], second[both]]).double()
    spread = pairs.std(correction=0).item()
    return (pairs[0] - pairs[1]).square().mean().div(2).sqrt().item() / spread if spread else 0.0


def check_variation(trainer: Trainer, rollout: Rollout) -> Finding:
    """Whether the reward tells images apart: of different prompts, and of one."""
    parts = {name: part for name, part in rollout.scores.parts.items() if part.isfinite().sum() > 1}
    flat = [name for name, part in parts.items() if _alike(part)]
    if flat:
        return _flat(trainer, rollout, flat[0])
    groups = [group for group in members_of([prompt.key for prompt in rollout.prompts]).values() if len(group) > 1]
    values = rollout.scores.values
    if groups and not _shared(trainer) and all(_alike(values[group]) for group in groups):
        remedy = f"choose a reward that looks at the {rollout.kind}; samples of one prompt are what a policy learns from"
        if trainer.reward.grouped:
            remedy = "a score that all the samples of a prompt share needs algorithm.normalisation batch"
        told = f"{rollout.kind}s of one prompt all score alike: the reward tells prompts apart, not {rollout.kind}s"
        return Finding("warn", "variation", told, remedy)
    spread = values[rollout.scores.valid].std(correction=0).item()
    return Finding("pass", "variation", f"scores differ, standard deviation {spread:.3g}")


def _shared(trainer: Trainer) -> bool:
    """Whether a score that all the samples of a prompt share teaches something: it is compared with other groups' scores."""
    algorithm = trainer.config.algorithm
    normalisation = getattr(algorithm, "normalisation", "batch")
    return bool(trainer.reward.grouped) and (
        normalisation == "batch" or (normalisation == "prompt" and hasattr(algorithm, "min_count"))
    )


def _flat(trainer: Trainer, rollout: Rollout, name: str) -> Finding:
    """All images score alike. Does anything at all change the score?"""
    told = f"{_of(name, rollout)}all {len(rollout.prompts)} {rollout.kind}s score {rollout.scores.parts[name].nanmean():.3g}"
    if name in trainer.reward.grouped:  # two groups may well be alike
        return Finding(
            "warn", "variation", told, "equal groups teach nothing: choose prompts whose groups differ, or larger groups"
        )
    size = rollout.images.shape[1:]
    noise = seeds.normal(trainer.config.seed, "doctor", 0, [0], tuple(size)).sigmoid()
    extremes = torch.cat([torch.zeros(1, *size), torch.ones(1, *size), noise, torch.full((1, *size), 0.5)])
    extremes = torch.cat([rollout.images[:1], extremes])
    found = ask(trainer, trainer.reward, rollout, extremes, trainer.config.samples_per_prompt).parts[name]
    if not _alike(found):
        remedy = "equal scores teach nothing: choose prompts that are less easy (or less hard), or a finer reward"
        return Finding("warn", "variation", told, remedy)
    remedy = f"the reward is constant: look at what it does with its {rollout.kind}s"
    others = {"sound": "silence, constant sounds and noise", "sample": "zeros, ones and noise"}
    return Finding("fail", "variation", f"{told}, and so do {others.get(rollout.kind, 'black, white, grey and noise')}", remedy)


def _alike(scores: Tensor) -> bool:
    found = scores[scores.isfinite()]
    return len(found) == 0 or bool(found.max() == found.min())


def _of(name: str, rollout: Rollout) -> str:
    return f"{name}: " if len(rollout.scores.parts) > 1 else ""


def normalised(trainer: Trainer, rollout: Rollout) -> Rollout:
    """As the run would normalise the rewards, by its first evaluation; as they are where that cannot be done."""
    if not trainer.config.rewards.normalise:
        return rollout
    try:
        return replace(rollout, scores=trainer.reward.calibrate(rollout.scores))
    except UserError:  # a constant reward, which has been named
        return rollout
