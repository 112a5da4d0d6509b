"""Whether samples have anything to be compared with. Prompts are addressed, so a run's draws are known before it begins."""

from collections import Counter

from diffusionrl.doctor.findings import Finding
from diffusionrl.training.trainer import Trainer

_MAX_DRAWS = 20_000  # prompts looked at, a tenth of a second
_FEW, _MOST = 0.1, 0.5  # shares of samples


def check_groups(trainer: Trainer) -> Finding:
    """Group size against the normalisation, over the run's own prompts."""
    config = trainer.config
    if trainer.tasks[0].judged is not None:
        return Finding("pass", "groups", f"{config.prompts_per_step} judged entries a step, from disk")
    size = f"{config.prompts_per_step} prompts x {config.samples_per_prompt} a step"
    if trainer.algorithm.needs_reward_gradient:
        return Finding("pass", "groups", f"{size}, each by its own gradient")
    normalisation = getattr(config.algorithm, "normalisation", "batch")
    if normalisation == "batch":
        if config.samples_per_step > 1:
            return Finding("pass", "groups", f"{size}, each sample relative to all of the step")
        return Finding("fail", "groups", f"{size}: nothing to compare a sample with", "raise samples_per_prompt")
    steps = max(1, min(config.steps, _MAX_DRAWS // config.prompts_per_step))
    drawn = [Counter(prompt.key for prompt in trainer.tasks[0].prompts_of(step)) for step in range(1, steps + 1)]
    min_count = getattr(config.algorithm, "min_count", None) if normalisation == "prompt" else None
    if min_count is not None:
        return _remembered(drawn, min_count, size)
    return _alone(drawn, size, normalisation)


def _remembered(drawn: list[Counter[str]], min_count: int, size: str) -> Finding:
    """Statistics that are remembered for each prompt, and those of the whole step until there are enough."""
    seen: Counter[str] = Counter()
    own = alone = 0
    for counts in drawn:
        seen += counts
        own += sum(number for text, number in counts.items() if seen[text] >= min_count)
        alone += sum(number for text, number in counts.items() if min_count <= seen[text] == 1)
    total = sum(seen.values())
    told = f"{size}; {own / total:.0%} of the samples of {len(drawn)} steps are relative to their own prompt"
    if alone > _FEW * total:
        remedy = "raise algorithm.min_count to 2 or more, or samples_per_prompt"
        return Finding("fail", "groups", f"{size}; {alone / total:.0%} of the samples are compared with themselves", remedy)
    if own >= _MOST * total:
        return Finding("pass", "groups", told)
    remedy = (
        f"raise samples_per_prompt to algorithm.min_count ({min_count}) with prompts_per_step lower in proportion, "
        "use fewer prompts, or set algorithm.normalisation batch, which is what happens now"
    )
    return Finding("warn", "groups", f"{told}, the rest to the whole step, as min_count {min_count} is hardly reached", remedy)


def _alone(drawn: list[Counter[str]], size: str, normalisation: str) -> Finding:
    """Statistics of the prompt's samples in the step."""
    total = sum(sum(counts.values()) for counts in drawn)
    alone = sum(list(counts.values()).count(1) for counts in drawn)
    if alone <= _FEW * total:
        return Finding("pass", "groups", f"{size}, each sample relative to those of its prompt")
    told = f"{size}: {alone / total:.0%} of the samples are alone with their prompt, so their reward teaches nothing"
    remedy = f"raise samples_per_prompt (4, say, with prompts_per_step a quarter), as normalisation {normalisation!r} needs"
    return Finding("fail" if alone > _MOST * total else "warn", "groups", told, remedy)
