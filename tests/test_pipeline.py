"""Any pipeline as a policy, held against the pipeline's own call: grid, samples, gradient, export, resume."""

from typing import Any

import tiny_pipelines as tiny
import torch
from torch import Tensor

from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.pipeline import PipelinePolicy

STEPS, GUIDANCE = 4, 4.0


def prompts_for(name: str) -> list[Prompt]:
    return [Prompt(text, media=media) for text, media in zip(("a cat", "a dog"), tiny.examples(name), strict=True)]


def policy_of(name: str, **settings: Any) -> PipelinePolicy:
    arguments = {"steps": STEPS, "guidance": GUIDANCE, "arguments": tiny.call_of(name), **settings}
    return PipelinePolicy(tiny.build(name), prompts_for(name)[0], **arguments)


def plain_call(pipeline: Any, name: str, prompt: Prompt, draw: int, **more: Any) -> Tensor:
    """The pipeline's own samples."""
    call = {"prompt": prompt.text, "num_inference_steps": STEPS, "output_type": "pt", "return_dict": False}
    call |= {"guidance_scale": GUIDANCE, "generator": torch.Generator().manual_seed(draw), **tiny.call_of(name), **prompt.media}
    if name == "qwen_image":
        call |= {"true_cfg_scale": call.pop("guidance_scale"), "negative_prompt": " "}
    with torch.no_grad():
        return torch.as_tensor(pipeline(**call | more)[0])
