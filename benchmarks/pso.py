"""Does tuning keep a model of four steps sharp? Objectives on ``emoji-turbo``, re-noised in four steps without guidance.

    python -m diffusionrl.emoji.recipe turbo        # the model, once
    python benchmarks/pso.py                        # may be stopped and taken up again
    python benchmarks/pso.py pso denoise --steps 20

The paper's claim (PSO, arXiv 2410.03190): learning to denoise good images blurs such a model, PSO raises the reward and does
not. ``denoise`` is RWR-sparse: the plain denoising loss on the better half of the samples. The reward is the embedded
preference model. Beside its gain on 90 fixed seeds, with its standard error, stands the change of the held-out judge. Of the
samples of the tuned model, one a subject and seed: how many the classifier names, their kernel distance to fresh scenes, and
their sharpness (scenes have 3.4). One run each. Writes benchmarks/pso.json, and prints the table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from diffusionrl import TrainConfig, train
from diffusionrl.config import (
    D3POConfig,
    DDPOConfig,
    DPOConfig,
    EvaluationConfig,
    GRPOConfig,
    OfflinePSOConfig,
    OptimizerConfig,
    PSOConfig,
    RWRConfig,
    SamplingConfig,
)
from diffusionrl.config.algorithms import AlgorithmConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.classifier import load_classifier
from diffusionrl.emoji.recipe.flow_quality import embed, fresh_scenes, kernel_distance, named_right, sharpness
from diffusionrl.emoji.vocabulary import SUBJECTS, with_article
from diffusionrl.policies import EMBEDDED_MODEL, load_policy
from diffusionrl.policies.loading import load_pipeline, make_policy
from diffusionrl.sampling.rollout import collect

RESULTS = Path(__file__).with_suffix(".json")
SAMPLING = SamplingConfig(4, 1.0, "renoise", 1.0, batch_size=48)
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "denoise": RWRConfig("rwr", "sparse", percentile=0.5, updates_per_step=4, batch_size=48, train_guided=False),
    "pso": PSOConfig(pairs_per_group=4),
    "pso-offline": OfflinePSOConfig(pairs_per_group=4),
    "d3po": D3POConfig(pairs_per_group=4),
    "dpo": DPOConfig(pairs_per_group=4, beta=500.0),
    "ddpo": DDPOConfig(normalisation="group", clip_range=1e-3),
    "grpo": GRPOConfig(clip_range=1e-3),
}


def tune(arm: str, model: str, steps: int, folder: Path) -> dict[str, float]:
    config = TrainConfig(
        steps=steps,
        prompts_per_step=6,
        samples_per_prompt=8,
        reward=("preference",),
        sampling=SAMPLING,
        algorithm=ALGORITHMS[arm],
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every=0, num_samples=90, held_out=("emoji-judge",)),
        run_dir=folder,
    )
    # Handed over, so that the judges of the embedded world do not refuse a folder.
    train(config, policy=make_policy(load_pipeline(model), SAMPLING, lora_rank=16))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "gain": last["eval/reward_change"],
        "se": last["eval/reward_change_se"],
        "judge": last["eval/emoji-judge_change"],
        "queries": last["queries"],
    }


def quality(model: str, lora: Path | None, samples_per_subject: int) -> dict[str, float]:
    policy = load_policy(model, lora=lora)
    names = [name for name in SUBJECTS for _ in range(samples_per_subject)]
    prompts = [Prompt(with_article(name)) for name in names]
    images = collect(policy, lambda images, *_: [0.0] * len(images), prompts, SAMPLING, 0, "quality", 0).images
    clip = CLIPModel.from_pretrained(EMBEDDED_MODEL.parent / "clip", dtype=torch.float32)
    return {
        "named": named_right(load_classifier(), images, names).mean().item(),
        "kid": kernel_distance(embed(clip, images), embed(clip, fresh_scenes(2000))),
        "sharpness": sharpness(images),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| | gain of the reward | of the judge | named, % | distance to scenes | sharpness |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        gain = f"{found['gain']:+.3f} ± {found['se']:.3f} | {found['judge']:+.3f}" if "gain" in found else "|"
        lines.append(f"| {name} | {gain} | {100 * found['named']:.1f} | {found['kid']:.3f} | {found['sharpness']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=list(ALGORITHMS))
    parser.add_argument("--model", default="runs/emoji/turbo/pipeline")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples-per-subject", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/pso"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    for arm in ("before", *asked.arms):
        if arm in results:
            continue
        folder = asked.runs / arm
        learned = tune(arm, asked.model, asked.steps, folder) if arm != "before" else {}
        lora = folder / "export" if arm != "before" else None
        results[arm] = learned | quality(asked.model, lora, asked.samples_per_subject)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table({arm: results[arm]}).splitlines()[-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
