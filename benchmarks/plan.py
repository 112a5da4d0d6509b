"""What models as published would need on cards of several sizes: the table of docs/plan.md. Nothing is measured.

python benchmarks/plan.py            # a quarter of an hour; prints the table and writes benchmarks/plan.json
python benchmarks/plan.py sdxl       # one model
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import MODELS, write

from diffusionrl.cli.parsing import quiet_libraries
from diffusionrl.config import TrainConfig
from diffusionrl.config.presets import PRESETS
from diffusionrl.doctor.plan import Findings, make_plan, read_card

CARDS = (8, 12, 16, 24, 48, 80)
SETTINGS = {
    "sd15": "ddpo-lora",
    "sdxl": "sdxl",
    "sd3-medium": "sd3.5-medium",
    "flux-dev": "flux.1-dev",
    "z-image": "z-image",
    "qwen-image": "qwen-image",
    "wan-1.3b": "wan2.1-1.3b",
}
"""The preset of each: its sizes, sampler and LoRA."""
HERE = Path(__file__).parent
SHORT = {
    "--policy.offload-text-encoders": "offload",
    "--policy.vae-slicing": "slicing",
    "--policy.vae-tiling": "tiling",
    "--policy.gradient-checkpointing": "checkpointing",
    "--policy.quantization int8": "int8",
    "--policy.quantization nf4": "nf4",
}


def settings_of(name: str, folder: Path) -> TrainConfig:
    config = PRESETS[SETTINGS[name]]()
    return replace(config, model=str(folder), policy=replace(config.policy, dtype="bfloat16"))


def plans_of(name: str) -> list[dict[str, Any]]:
    """On each card."""
    with tempfile.TemporaryDirectory() as folder:
        config, find = settings_of(name, write(name, Path(folder))), Findings()
        found = []
        for size in CARDS:
            plan = make_plan(config, read_card(f"{size} GB"), find)
            found.append(
                {
                    "card": size,
                    "fits": plan.fits,
                    "options": list(plan.options),
                    "batch_size": plan.batch,
                    "micro_batch_size": plan.micro,
                    "peak_gb": round(max(plan.peaks.values()) / 1e9, 2),
                    "peaks_gb": {phase: round(size / 1e9, 2) for phase, size in plan.peaks.items()},
                    "tflop_a_step": round(plan.needs.operations(plan.config) / 1e12),
                }
            )
    return found


def cell(plan: dict[str, Any]) -> str:
    """Sizes and what was added to the preset; or what one at a time would take."""
    options = ", ".join(SHORT.get(option, option) for option in plan["options"])
    if not plan["fits"]:
        return f"no: {plan['peak_gb']:.0f} GB"
    return f"{plan['batch_size']} / {plan['micro_batch_size']}" + (f"; {options}" if options else "")


def main() -> None:
    quiet_libraries()
    file = HERE / "plan.json"
    table = json.loads(file.read_text()) if file.is_file() else {}
    for name in sys.argv[1:] or MODELS:
        table[name] = plans_of(name)
        print(f"| {name} | {' | '.join(map(cell, table[name]))} |", flush=True)
        file.write_text(json.dumps(table, indent=1) + "\n")
    print(f"\n| model | {' | '.join(f'{size} GB' for size in CARDS)} |\n|{'---|' * (1 + len(CARDS))}")
    for name, plans in table.items():
        print(f"| {name} | {' | '.join(map(cell, plans))} |")


if __name__ == "__main__":
    main()
