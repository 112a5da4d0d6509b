"""Small settings of every objective, which the tests share."""

from collections.abc import Callable, Sequence
from typing import Any

import tiny_pipelines as tiny
from torch import Tensor

from diffusionrl.algorithms import (
    AWM,
    CRD,
    D3PO,
    DGPO,
    DPO,
    EPG,
    GRPO,
    KTO,
    NFT,
    ORW,
    PSO,
    RAM,
    VGRPO,
    AlignProp,
    DRaFT,
    DRTune,
    FlowAWR,
    FlowBP,
    FlowDPPO,
    GRPOFast,
    GRPOGuard,
    MixGRPO,
    OfflinePSO,
    ReFL,
    TempFlow,
)
from diffusionrl.algorithms.forward_process import ForwardProcess
from diffusionrl.algorithms.policy_gradient import SharedOut
from diffusionrl.algorithms.reward_gradient import RewardGradient
from diffusionrl.config import (
    AlignPropConfig,
    AWMConfig,
    CRDConfig,
    D3POConfig,
    DGPOConfig,
    DPOConfig,
    DRaFTConfig,
    DRTuneConfig,
    EPGConfig,
    FlowAWRConfig,
    FlowBPConfig,
    FlowDPPOConfig,
    GRPOConfig,
    GRPOFastConfig,
    GRPOGuardConfig,
    KTOConfig,
    MixGRPOConfig,
    NFTConfig,
    OfflinePSOConfig,
    ORWConfig,
    PSOConfig,
    RAMConfig,
    ReFLConfig,
    TempFlowConfig,
    VGRPOConfig,
    WindowConfig,
)
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import differentiable

FEW = {"noisings": 2, "micro_batch_size": 3}
LOW_BETA = {"beta": 30.0}  # the published ones multiply the rounding of an error by thousands
FORWARD: dict[str, Callable[..., ForwardProcess]] = {
    "nft": lambda **more: NFT(NFTConfig(**FEW | more), 1.0),
    "awm": lambda **more: AWM(AWMConfig(**FEW | more), 1.0),
    "ram": lambda **more: RAM(RAMConfig(**FEW | more), 1.0),
    "flow-awr": lambda **more: FlowAWR(FlowAWRConfig(**FEW | more), 1.0),
    "v-grpo": lambda **more: VGRPO(VGRPOConfig(**FEW | more), 1.0),
    "epg": lambda **more: EPG(EPGConfig(**FEW | more), 1.0),
    "dgpo": lambda **more: DGPO(DGPOConfig(**FEW | more), 1.0),
    "crd": lambda **more: CRD(CRDConfig(**FEW | {"reference_guidance": None} | more), 1.0),
    "orw": lambda **more: ORW(ORWConfig(**FEW | {"inverse_temperature": 5.0} | more), 1.0),
    "dpo": lambda **more: DPO(DPOConfig(**FEW | LOW_BETA | more), 1.0),
    "kto": lambda **more: KTO(KTOConfig(**FEW | LOW_BETA | more), 1.0),
    "pso-offline": lambda **more: OfflinePSO(OfflinePSOConfig(**FEW | more), 1.0),
}
REWARD_GRADIENT: dict[str, Callable[..., RewardGradient]] = {
    "draft": lambda **more: DRaFT(DRaFTConfig(**{"last_steps": 2, "micro_batch_size": 3} | more), 1.0),
    "draft-lv": lambda **more: DRaFT(DRaFTConfig(**{"variant": "lv", "micro_batch_size": 3} | more), 1.0),
    "alignprop": lambda **more: AlignProp(AlignPropConfig(**{"micro_batch_size": 3} | more), 1.0),
    "refl": lambda **more: ReFL(ReFLConfig(**{"late": 0.5, "micro_batch_size": 3} | more), 1.0),
    "drtune": lambda **more: DRTune(DRTuneConfig(**{"trained_steps": 2, "micro_batch_size": 3} | more), 1.0),
    "flowbp": lambda **more: FlowBP(FlowBPConfig(**{"trained_steps": 2, "micro_batch_size": 3} | more), 1.0),
}


def flow_policy(steps: int, guidance: float = 1.0) -> PipelinePolicy:
    """A tiny SD3 on images of 8 x 8, with an adapter."""
    arguments = tiny.call_of("sd3") | {"height": 8, "width": 8}
    return PipelinePolicy(tiny.build("sd3"), steps=steps, guidance=guidance, arguments=arguments, lora_rank=2)


@differentiable
def lightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3))


def d3po(**more: Any) -> D3PO:
    """Which looks at trajectories."""
    return D3PO(D3POConfig(**{"micro_batch_size": 3} | more), 2.0)


def pso(**more: Any) -> PSO:
    """Which looks at trajectories too."""
    return PSO(PSOConfig(**{"micro_batch_size": 3} | more), 2.0)


WINDOW = WindowConfig(2, "random")
SLIDES = WindowConfig(2, "progressive", every=1)
GUIDANCE = 2.0
REVERSE: dict[str, Callable[..., SharedOut]] = {
    "grpo": lambda **more: GRPO(GRPOConfig(**more), GUIDANCE),
    "grpo-fast": lambda **more: GRPOFast(GRPOFastConfig(**{"window": WINDOW} | more), GUIDANCE),
    "mixgrpo": lambda **more: MixGRPO(MixGRPOConfig(**{"window": SLIDES} | more), GUIDANCE),
    "grpo-guard": lambda **more: GRPOGuard(GRPOGuardConfig(**more), GUIDANCE),
    "flow-dppo": lambda **more: FlowDPPO(FlowDPPOConfig(**more), GUIDANCE),
    "tempflow": lambda **more: TempFlow(TempFlowConfig(**more), GUIDANCE),
}
"""The policy gradients beside DDPO and DiffusionRL, which train on samples drawn with ``GUIDANCE``."""
