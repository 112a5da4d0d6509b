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
from diffusionrl.config.algorithms.preference import D3POConfig, DPOConfig, KTOConfig, OfflinePSOConfig, PSOConfig
from diffusionrl.config.algorithms.reward_gradient import (
    AlignPropConfig,
    DRaFTConfig,
    DRTuneConfig,
    FlowBPConfig,
    ReFLConfig,
    RewardGradientConfig,
)

__all__ = [
    "ALGORITHMS",
    "AWMConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "AlignPropConfig",
    "CRDConfig",
    "ClippedConfig",
    "CopySchedule",
    "D3POConfig",
    "DDPOConfig",
    "DGPOConfig",
    "DPOConfig",
    "DRTuneConfig",
    "DRaFTConfig",
    "DiffusionRLConfig",
    "EPGConfig",
    "FlowAWRConfig",
    "FlowBPConfig",
    "FlowDPPOConfig",
    "ForwardProcessConfig",
    "GRPOConfig",
    "GRPOFastConfig",
    "GRPOGuardConfig",
    "KTOConfig",
    "MixGRPOConfig",
    "NFTConfig",
    "ORWConfig",
    "OfflinePSOConfig",
    "PSOConfig",
    "PolicyGradientConfig",
    "RAMConfig",
    "RWRConfig",
    "ReFLConfig",
    "RewardGradientConfig",
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
RewardGradient = DRaFTConfig | AlignPropConfig | ReFLConfig | DRTuneConfig | FlowBPConfig
Preference = DPOConfig | KTOConfig | D3POConfig | PSOConfig | OfflinePSOConfig
AlgorithmConfig = PolicyGradient | ForwardProcess | Preference | RewardGradient
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
    "draft": DRaFTConfig,
    "alignprop": AlignPropConfig,
    "refl": ReFLConfig,
    "drtune": DRTuneConfig,
    "flowbp": FlowBPConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "d3po": D3POConfig,
    "pso": PSOConfig,
    "pso-offline": OfflinePSOConfig,
}
