"""The settings of each algorithm, as frozen dataclasses. Nothing here imports torch."""

from diffusionrl.config.algorithms.advantages import AdvantageConfig
from diffusionrl.config.algorithms.forward_process import (
    AWMConfig,
    CopySchedule,
    CRDConfig,
    DGPOConfig,
    EPGConfig,
    FlowAWRConfig,
    ForwardProcessConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    RWRConfig,
    VGRPOConfig,
)
from diffusionrl.config.algorithms.policy_gradient import (
    ClippedConfig,
    DDPOConfig,
    DiffusionRLConfig,
    FlowDPPOConfig,
    GRPOConfig,
    GRPOFastConfig,
    GRPOGuardConfig,
    MixGRPOConfig,
    PolicyGradientConfig,
    SharedOutConfig,
    TempFlowConfig,
    WindowConfig,
)

__all__ = [
    "ALGORITHMS",
    "AWMConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "CRDConfig",
    "ClippedConfig",
    "CopySchedule",
    "DDPOConfig",
    "DGPOConfig",
    "DiffusionRLConfig",
    "EPGConfig",
    "FlowAWRConfig",
    "FlowDPPOConfig",
    "ForwardProcessConfig",
    "GRPOConfig",
    "GRPOFastConfig",
    "GRPOGuardConfig",
    "MixGRPOConfig",
    "NFTConfig",
    "ORWConfig",
    "PolicyGradientConfig",
    "RAMConfig",
    "RWRConfig",
    "SharedOutConfig",
    "TempFlowConfig",
    "VGRPOConfig",
    "WindowConfig",
]

PolicyGradient = (
    DDPOConfig
    | DiffusionRLConfig
    | GRPOConfig
    | GRPOFastConfig
    | MixGRPOConfig
    | GRPOGuardConfig
    | FlowDPPOConfig
    | TempFlowConfig
)
ForwardProcess = (
    NFTConfig | AWMConfig | RAMConfig | FlowAWRConfig | VGRPOConfig | EPGConfig | DGPOConfig | CRDConfig | ORWConfig | RWRConfig
)
AlgorithmConfig = PolicyGradient | ForwardProcess
ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "ddpo": DDPOConfig,
    "diffusionrl": DiffusionRLConfig,
    "grpo": GRPOConfig,
    "grpo-fast": GRPOFastConfig,
    "mixgrpo": MixGRPOConfig,
    "grpo-guard": GRPOGuardConfig,
    "flow-dppo": FlowDPPOConfig,
    "tempflow": TempFlowConfig,
    "rwr": RWRConfig,
    "nft": NFTConfig,
    "awm": AWMConfig,
    "ram": RAMConfig,
    "flow-awr": FlowAWRConfig,
    "v-grpo": VGRPOConfig,
    "epg": EPGConfig,
    "dgpo": DGPOConfig,
    "crd": CRDConfig,
    "orw": ORWConfig,
}
