"""Search at equal queries on the embedded worlds: 45 prompts, one seed each, and judges that the search does not see.

    python benchmarks/search.py --out search_results [--worlds emoji-flow] [--rewards aesthetic] [--queries 32]

Every search is a folder as ``diffusionrl sample --search`` leaves it, so the same command goes on where it was stopped. Writes
results.json and results.md: means with 95 % intervals over the prompts, and each search against the best of as many images,
pair by pair.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusionrl import search
from diffusionrl.config import SamplingConfig
from diffusionrl.config.presets import PRESETS
from diffusionrl.config.search import BestOfNConfig, DemonConfig, ParticlesConfig, SearchConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.evaluation.intervals import differences, mean_interval
from diffusionrl.policies import load_trained
from diffusionrl.policies.base import Policy
from diffusionrl.report.search_page import write_search_page
from diffusionrl.rewards import load_mixture
from diffusionrl.sampling.search_folder import SearchFolder, read_images

WORLDS = ("emoji-flow", "emoji")
REWARDS = ("aesthetic", "compressibility", "composition")
HELD_OUT = ("emoji-judge", "emoji-gold", "composition-judge")
SEED = 0


def searches(queries: int, candidates: int) -> dict[str, SearchConfig]:
    """By name; a plain sample, by the model's sampler or by the ODE, is a search of one candidate."""
    demon = DemonConfig(queries=queries, candidates=candidates)
    return {
        "ODE": BestOfNConfig(queries=1),
        "plain sample": BestOfNConfig(queries=1),
        "best-of-N": BestOfNConfig(queries=queries),
        "Demon, tanh": demon,
        "Demon, tanh, best kept": replace(demon, keep="best"),
        "Demon, Boltzmann": replace(demon, weights="boltzmann"),
        "best noise per step": replace(demon, weights="best"),
        "particles": ParticlesConfig(queries=queries, candidates=queries // 4, rounds=4),
    }


def find(folder: Path, policy: Policy, config: SearchConfig, sampling: SamplingConfig, reward: str) -> None:
    prompts = load_prompts("ddpo-animals")
    settings = {
        "search": asdict(config),
        "model": policy.source,
        "reward": [reward],
        "prompts": [prompt.text for prompt in prompts],
        "seeds": [SEED],
        "sampling": json.loads(json.dumps(asdict(sampling))),
    }
    with SearchFolder(folder, settings) as kept:
        mixture, held_out = load_mixture([reward]), load_mixture([each for each in HELD_OUT if each != reward])
        for found in search(policy, mixture, prompts, (SEED,), config, sampling, held_out, done=kept.done):
            kept.keep(found)
    write_search_page(folder)


def measured(folder: Path, baseline: Path, num_steps: int) -> dict[str, Any]:
    """Of one search: every score after it, and what it gains over the best of as many images as its queries, or its passes of
    the model, would have paid for."""
    entries, others = read_images(folder), {each["index"]: each for each in read_images(baseline)}
    paired = [(each, others[each["index"]]) for each in entries]
    after = [each["after"]["reward"] for each in entries]
    same = [best_of(other, each["spent"]["queries"]) for each, other in paired]
    passes = [best_of(other, round(each["spent"]["denoisings"] / num_steps)) for each, other in paired]
    return {
        "images": len(entries),
        "scores": {name: asdict(mean_interval([each["after"][name] for each in entries])) for name in entries[0]["after"]},
        "over_best_of_n": asdict(mean_interval(differences(after, same))),
        "over_best_of_n_at_equal_passes": asdict(mean_interval(differences(after, passes))),
        **{key: sum(each["spent"][key] for each in entries) / len(entries) for key in ("queries", "denoisings", "seconds")},
    }


def best_of(entry: dict[str, Any], count: int) -> float:
    """The best of the first so many candidates of a best-of-N."""
    values = [value for each in entry["rounds"] for value in each["values"]]
    return max(value for value in values[:count] if value is not None)


def table(results: dict[str, Any]) -> str:
    lines = []
    for title, rows in results.items():
        names = list(next(iter(rows.values()))["scores"])
        lines += [
            f"\n**{title}**\n",
            "| search | " + " | ".join(names) + " | queries | passes | over best-of-N | at equal passes |",
        ]
        lines.append("|" + " --- |" * (len(names) + 5))
        for name, each in rows.items():
            shown = [_shown(each["scores"][score]) for score in names]
            shown += [f"{each['queries']:.0f}", f"{each['denoisings']:.0f}"]
            shown += [_shown(each[key], "+") for key in ("over_best_of_n", "over_best_of_n_at_equal_passes")]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines).lstrip() + "\n"


def _shown(estimate: dict[str, float], sign: str = "") -> str:
    return f"{estimate['value']:{sign}.2f} ± {(estimate['high'] - estimate['low']) / 2:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("search_results"))
    parser.add_argument("--worlds", nargs="+", default=WORLDS)
    parser.add_argument("--rewards", nargs="+", default=REWARDS)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=4)
    chosen = parser.parse_args()
    results: dict[str, Any] = {}
    for world in chosen.worlds:
        sampling = PRESETS[world]().sampling
        policy = load_trained(world, sampling=sampling)
        for reward in chosen.rewards:
            folders = {}
            for name, config in searches(chosen.queries, chosen.candidates).items():
                folders[name] = chosen.out / world / reward / name.replace(" ", "-").replace(",", "").lower()
                own = replace(sampling, sampler="ode", eta=0.0) if name == "ODE" else sampling
                find(folders[name], policy, config, own, reward)
                print(f"{world}, {reward}, {name}: done", flush=True)
            baseline = folders["best-of-N"]
            results[f"{world}, {reward}"] = {
                name: measured(folder, baseline, sampling.num_steps) for name, folder in folders.items()
            }
            (chosen.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            (chosen.out / "results.md").write_text(table(results))


if __name__ == "__main__":
    main()
