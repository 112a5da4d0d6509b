"""Small settings of every objective, which the tests share."""

from collections.abc import Callable

from diffusionrl.algorithms import (
    AWM,
    CRD,
    DGPO,
    EPG,
    GRPO,
    NFT,
    ORW,
    RAM,
    VGRPO,
    FlowAWR,
    FlowDPPO,
    GRPOFast,
    GRPOGuard,
    MixGRPO,
    TempFlow,
)
from diffusionrl.algorithms.forward_process import ForwardProcess
from diffusionrl.algorithms.policy_gradient import SharedOut
from diffusionrl.config import (
    AWMConfig,
    CRDConfig,
    DGPOConfig,
    EPGConfig,
    FlowAWRConfig,
    FlowDPPOConfig,
    GRPOConfig,
    GRPOFastConfig,
    GRPOGuardConfig,
    MixGRPOConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    TempFlowConfig,
    VGRPOConfig,
    WindowConfig,
)

FEW = {"noisings": 2, "micro_batch_size": 3}
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
}

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
