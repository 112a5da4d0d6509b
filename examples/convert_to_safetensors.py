"""Weights that are published as a pickle only, made into a safetensors file, once and knowingly.

    python examples/convert_to_safetensors.py sac+logos+ava1-l14-linearMSE.pth aesthetic_head.safetensors
    diffusionrl train --reward aesthetic --rewards.aesthetic.model openai/clip-vit-large-patch14 \\
        --rewards.aesthetic.head aesthetic_head.safetensors

The package itself never reads a pickle, because loading one may run code. This script lets torch read the tensors in it and
nothing else (``weights_only=True``); still, convert only files whose source you trust. It works for a text model of BERTScore
too: put the result beside its config as ``model.safetensors``; and for a .ckpt of Stable Diffusion, whose weights lie under
"state_dict".
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(source: Path, target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} exists: choose another name")
    found = torch.load(source, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    tensors = {name: value.clone().contiguous() for name, value in found.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, target, {"format": "pt", "converted_from": source.name})
    print(f"{source} is a pickle; its {len(tensors)} tensors are now in {target}:")
    for name, tensor in tensors.items():
        print(f"  {name} {tuple(tensor.shape)} {tensor.dtype}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
