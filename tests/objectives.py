"""Small settings of every objective, which the tests share."""

from collections.abc import Callable
from typing import Any

from diffusionrl.algorithms import AWM, CRD, D3PO, DGPO, DPO, EPG, KTO, NFT, ORW, RAM, VGRPO, FlowAWR
from diffusionrl.algorithms.forward_process import ForwardProcess
from diffusionrl.config import (
    AWMConfig,
    CRDConfig,
    D3POConfig,
    DGPOConfig,
    DPOConfig,
    EPGConfig,
    FlowAWRConfig,
    KTOConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    VGRPOConfig,
)

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
}


def d3po(**more: Any) -> D3PO:
    """Which looks at trajectories."""
    return D3PO(D3POConfig(**{"micro_batch_size": 3} | more), 2.0)
