"""Whether a model that was loaded does what a model does, found by asking it once: numbers that are finite, and other ones for
other prompts. Libraries fill what is missing with chance or nothing, and do not always say so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.base import Policy

_TEXTS = ("red cat", "blue owl")  # as short as any model reads


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Raises UserError in the place of whatever a library comes across in parts that do not fit each other."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"model {name!r} was loaded, and fails when it is asked: {type(error).__name__}: {error}. Do tokenizer, text "
            "encoder and networks belong together? Compare their configurations with those of the model it was made from"
        ) from error


@torch.no_grad()
def check_sound(policy: Policy, pipeline: Any, name: str, steps: int, example: Prompt | None) -> None:
    """Raises UserError where the model cannot be asked, where what it says of pure noise is not finite, where it says the same
    whatever the prompt, or where a tokenizer has words that its text encoder has not."""
    _check_vocabularies(pipeline, name)
    prompts = [Prompt(text, media=example.media if example else {}) for text in _TEXTS]
    with asking(name):
        start = policy.start(prompts[:1], [0])
        levels = policy.grid(steps).levels[torch.zeros(1, dtype=torch.long)]
        said = [policy.denoise(start, levels, [prompt], None) for prompt in prompts]
        decoded = policy.decode(start, prompts[:1])
    if not all(each.isfinite().all() for pair in said for each in pair):
        _explain(pipeline, name, levels.alpha, "predicts")
    if not decoded.isfinite().all():
        _explain(pipeline, name, levels.alpha + 1, "decodes")
    embed = getattr(policy, "embed", None)  # elsewhere a template may leave little of so short a text
    if embed is not None and torch.equal(*(embed([text]) for text in _TEXTS)):
        raise UserError(
            f"model {name!r} says the same whatever the prompt: its tokenizer has {len(pipeline.tokenizer)} entries. Is its "
            "vocabulary there (tokenizer.json, or vocab.json and merges.txt)? Fetch the model again"
        )


def _check_vocabularies(pipeline: Any, name: str) -> None:
    for part, tokenizer in pipeline.components.items():
        encoder = pipeline.components.get(part.replace("tokenizer", "text_encoder"))
        if not (part.startswith("tokenizer") and hasattr(tokenizer, "get_vocab") and hasattr(encoder, "get_input_embeddings")):
            continue
        words, known = tokenizer.get_vocab(), getattr(encoder.get_input_embeddings(), "num_embeddings", None)
        beyond = [word for word, number in words.items() if known is not None and number >= known]
        if beyond:
            raise UserError(
                f"model {name!r}: its {part} has {len(words)} entries, and its text encoder knows {known}: "
                f"{', '.join(beyond[:3])} would be none. Were words added to one of them alone "
                "(textual inversion)? Take both from one model"
            )


def _explain(pipeline: Any, name: str, alpha: Tensor, what: str) -> None:
    broken = [
        part
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        and any(not weight.isfinite().all() for weight in module.parameters() if weight.is_floating_point())
    ]
    if broken:
        raise UserError(f"model {name!r}: weights of {', '.join(broken)} are not finite: the file is broken, fetch it again")
    if alpha.item() == 0:
        raise UserError(
            f"model {name!r}: its schedule begins without any signal (zero terminal SNR), of which a network that predicts the "
            "noise says nothing: set rescale_betas_zero_snr to false in scheduler/scheduler_config.json"
        )
    raise UserError(f"model {name!r} {what} what is not finite, from weights that are: try policy.dtype float32")
