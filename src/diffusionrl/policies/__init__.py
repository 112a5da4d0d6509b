"""Models as policies."""

from diffusionrl.policies.base import Policy
from diffusionrl.policies.files import EMBEDDED_MODEL
from diffusionrl.policies.loading import check_model, load_pipeline, load_policy, make_policy
from diffusionrl.policies.network import NetworkPolicy
from diffusionrl.policies.quantization import check_quantization
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy
from diffusionrl.policies.trained import find_trained, load_trained, put_export

__all__ = [
    "EMBEDDED_MODEL",
    "NetworkPolicy",
    "Policy",
    "StableDiffusionPolicy",
    "check_model",
    "check_quantization",
    "find_trained",
    "load_pipeline",
    "load_policy",
    "load_trained",
    "make_policy",
    "put_export",
]
