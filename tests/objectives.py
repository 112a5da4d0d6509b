"""Small settings of every objective, which the tests share."""

from collections.abc import Callable

from diffusionrl.algorithms import AWM, CRD, DGPO, EPG, NFT, ORW, RAM, VGRPO, FlowAWR
from diffusionrl.algorithms.forward_process import ForwardProcess
from diffusionrl.config import (
    AWMConfig,
    CRDConfig,
    DGPOConfig,
    EPGConfig,
    FlowAWRConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    VGRPOConfig,
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
