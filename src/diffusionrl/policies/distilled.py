"""Checkpoints that were distilled: what is lost when they are trained as if they were not."""

import re
from typing import Any

_FEW_STEPS = re.compile(r"turbo|lightning|schnell|hyper-?sd|\blcm\b|distill|few-?step", re.IGNORECASE)


def distillation(pipeline: Any, source: str) -> str | None:
    """What to know of a checkpoint that is distilled, by its configuration or its name; None of one that does not look so."""
    few = bool(pipeline.config.get("is_distilled")) or _FEW_STEPS.search(source) is not None
    if few:
        return (
            f"{source} looks distilled to few steps: tuned on many steps with guidance, it loses that. Train its base model, "
            "or keep its own number of steps, sampling.guidance off and sampling.sampler renoise"
        )
    configs = [getattr(part, "config", None) for part in pipeline.components.values()]
    if any(getattr(config, "guidance_embeds", False) for config in configs):
        return (
            f"guidance is distilled into {source}: sampling.guidance is a number that it was trained with (3.5 for "
            "FLUX.1-dev), and there is no off. Use the same number in training and afterwards"
        )
    return None
