"""Does the guard stop where the gold score peaks, and only there? Collapsing and healthy runs of the embedded model.

    python benchmarks/guard.py                         # makes the 20 runs, about 100 core-minutes, then the tables
    python benchmarks/guard.py --jobs 0                # the tables of the runs that are there
    python benchmarks/guard.py --jobs 0 --guard.noise 2  # the same with another rule
    python benchmarks/guard.py --replay runs/mine --guard.watch clip-score   # what the rule says of any run

The guard watches the CLIP score of image and prompt, as any user can. The gold score judges the guard, which cannot see it:
what an image is truly worth where the held-out classifier still names its subject, and nothing where it does not.

- collapsing: DDPO-SF at too high a learning rate, until the judge names little of what is drawn; incompressibility (gold =
  kilobytes * judge) and the aesthetic head (gold = the gold rule's rating * judge);
- healthy: DDPO-IS at its best learning rate, on compressibility (gold = kilobytes saved * judge) and, for a third as long as it
  takes to do harm, on incompressibility (gold as above). Whether their gold score falls is in the table.

The runs are not stopped, so that the whole gold curve is there; the rule is replayed on them, which is what ``--guard.stop``
does (``tests/test_guard.py`` holds the two together). A finished run is not made again and an unfinished one goes on.
Writes ``benchmarks/guard.json`` and the tables of docs/guard.md.
"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from ddpo_paper import finished, make
from ddpo_paper_runs import Run, base
from torch import Tensor

from diffusionrl.config import GuardConfig, TrainConfig
from diffusionrl.evaluation.guard import Verdict, judge
from diffusionrl.training.monitor import compare, evaluations_in, read_samples

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "guard.md"
BEGIN, END = "<!-- figures: benchmarks/guard.py writes these lines -->", "<!-- end of figures -->"
SEEDS = range(5)
TOLERANCE = 0.15
COLLAPSING = ("hacked-incompressibility", "hacked-aesthetic")
"""Names that ``guard.json`` keeps. That the reward is hacked is not shown: on a reward that is noise such runs collapse too."""
LOOKED_AT = {f"{name}/seed_0" for name in (*COLLAPSING, "compressibility", "incompressibility")}
LOOKED_AT |= {f"{name}/seed_1" for name in COLLAPSING}
"""``drop`` was set after a look at these; the others are the test."""


@dataclass(frozen=True)
class Config:
    """Measure the guard."""

    jobs: int = 1
    """Runs at a time, a thread each; 0 makes none."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """The rule that is replayed."""
    replay: tuple[Path, ...] = ()
    """Run folders: say what the rule finds in these, and nothing else."""
    folder: Path = HERE.parent / "runs" / "benchmarks" / "guard"


def watched(config: TrainConfig) -> TrainConfig:
    evaluation = replace(config.evaluation, every=1, num_samples=90, held_out=("clip-score", "emoji-judge", "emoji-gold"))
    return replace(config, evaluation=evaluation, guard=GuardConfig(watch=("clip-score",)))


def all_runs() -> Iterator[Run]:
    for seed in SEEDS:
        for name, method, reward, rate, steps in (
            ("hacked-incompressibility", "ddpo-sf", "incompressibility", 1e-2, 18),
            ("hacked-aesthetic", "ddpo-sf", "aesthetic", 1e-2, 16),
            ("compressibility", "ddpo-is", "compressibility", 5e-3, 16),
            ("incompressibility", "ddpo-is", "incompressibility", 5e-3, 10),
        ):
            yield Run(f"{name}/seed_{seed}", watched(replace(base(method, reward, 300 + seed, rate), steps=steps)))


def replayed(run_dir: Path, guard: GuardConfig) -> list[Verdict]:
    """The verdict at every evaluation, from the samples on disk."""
    logged, lines = evaluations_in(run_dir), list[dict[str, Any]]()
    compared = [key.removeprefix("eval/").removesuffix("_from_peak") for key in logged[-1] if key.endswith("_from_peak")]
    names = guard.watch or compared
    for line in logged:
        now = read_samples(run_dir, line["step"])
        lines.append(line | compare(now, lines, lambda step: read_samples(run_dir, step), names))
    return [judge(lines[: i + 1], names, guard) for i in range(len(lines))]


def gold_of(group: str, now: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
    """(N,), one a sample."""
    if group.endswith("incompressibility"):
        value = now["reward"]
    elif group == "compressibility":
        value = now["reward"] - first["reward"]
    else:
        value = now["emoji-gold"]
    return value * now["emoji-judge"]


def difference(now: Tensor, then: Tensor) -> tuple[float, float]:
    """Mean and standard error, paired."""
    apart = now - then
    return apart.mean().item(), apart.std().item() / math.sqrt(len(apart))


def measure(run_dir: Path, group: str, guard: GuardConfig) -> dict[str, Any]:
    """Where the gold score peaks, where the guard stops and what it keeps, in queries."""
    lines = evaluations_in(run_dir)
    samples = [read_samples(run_dir, line["step"]) for line in lines]
    golds = [gold_of(group, now, samples[0]) for now in samples]
    means = [gold.mean().item() for gold in golds]
    peak = max(range(len(means)), key=means.__getitem__)
    below = [difference(golds[peak], gold) for gold in golds]  # how much less than at the peak
    plateau = [i for i, (lost, error) in enumerate(below) if lost <= error]
    verdicts = replayed(run_dir, guard)
    stop = next((i for i, verdict in enumerate(verdicts) if verdict.message), None)
    steps = [line["step"] for line in lines]
    kept = steps.index(verdicts[-1 if stop is None else stop].best)
    queries = [line["queries"] for line in lines]
    return {
        "queries": queries,
        "reward": [line["eval/reward"] for line in lines],
        "clip_score": [line["eval/clip-score"] for line in lines],
        "judge": [line["eval/emoji-judge"] for line in lines],
        "gold_rule": [line["eval/emoji-gold"] for line in lines],
        "gold": means,
        "peak": queries[peak],
        "plateau": [queries[plateau[0]], queries[plateau[-1]]],
        "stop": None if stop is None else queries[stop],
        "kept": queries[kept],
        "gold_lost_at_stop": below[-1 if stop is None else stop],
        "gold_lost_at_kept": below[kept],
        "gold_lost_at_end": below[-1],
        "measures_percent": 100 * sum(line["time/measures"] for line in lines) / sum(line["time/evaluation"] for line in lines),
        "seconds": json.loads((run_dir / "seconds.json").read_text()),
    }


def lost(run: dict[str, Any]) -> bool:
    """Whether the gold score has fallen by the end."""
    below, error = run["gold_lost_at_end"]
    return below > 2 * error


def counts(found: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """The bars: how many runs, of how many."""
    collapsing = [each for name, each in found.items() if name.startswith(COLLAPSING)]
    healthy = [each for name, each in found.items() if not name.startswith(COLLAPSING)]
    stopped = [each for each in collapsing if each["stop"] is not None]
    of_peak = sum(abs(each["stop"] - each["peak"]) <= TOLERANCE * each["peak"] for each in stopped)
    of_run = sum(abs(each["stop"] - each["peak"]) <= TOLERANCE * each["queries"][-1] for each in stopped)
    on_plateau = sum(
        (1 - TOLERANCE) * each["plateau"][0] <= each["stop"] <= (1 + TOLERANCE) * each["plateau"][1] for each in stopped
    )
    kept = sum(each["plateau"][0] <= each["kept"] <= each["plateau"][1] for each in collapsing)
    end = "gold score more than two standard errors below its highest at the end"
    return {
        "collapsing runs that were stopped": (len(stopped), len(collapsing)),
        "stopped within 15 % of the queries of the gold score's highest value": (of_peak, len(collapsing)),
        "stopped within 15 % of the run's queries of it": (of_run, len(collapsing)),
        "stopped within 15 % of its plateau": (on_plateau, len(collapsing)),
        "kept weights from within its plateau": (kept, len(collapsing)),
        "healthy runs that were stopped": (sum(each["stop"] is not None for each in healthy), len(healthy)),
        f"collapsing runs with the {end}": (sum(map(lost, collapsing)), len(collapsing)),
        f"healthy runs with the {end}": (sum(map(lost, healthy)), len(healthy)),
    }


def bars(found: dict[str, dict[str, Any]]) -> list[str]:
    """The bars as lines: the runs that are the test, beside all."""
    test = counts({name: each for name, each in found.items() if name not in LOOKED_AT})
    rows = [f"| {what} | {{}} of {{}} | {{}} of {{}} |".format(*test[what], *all_of) for what, all_of in counts(found).items()]
    return [f"| | the test: {len(found.keys() - LOOKED_AT)} runs | all {len(found)} |", "|---|---|---|", *rows, ""]


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    header = "| run | reward | judge | gold | gold's peak (plateau) | stopped | kept | gold lost at stop / kept / end |"
    rows = [header, "|" + "---|" * 8]
    for name, each in found.items():
        curves = [f"{each[key][0]:.3g} → {each[key][-1]:.3g}" for key in ("reward", "judge")]
        gold = f"{each['gold'][0]:.3g} → {max(each['gold']):.3g} → {each['gold'][-1]:.3g}"
        low, high = each["plateau"]
        lost = " / ".join(
            "{:.2f} ± {:.2f}".format(*each[f"gold_lost_at_{key}"]) if each["stop"] is not None or key != "stop" else "–"
            for key in ("stop", "kept", "end")
        )
        rows.append(
            f"| {name}{' (seen)' * (name in LOOKED_AT)} | {' | '.join(curves)} | {gold} | {each['peak']} ({low} to {high}) "
            f"| {'–' if each['stop'] is None else each['stop']} | {each['kept']} | {lost} |"
        )
    return [*rows, ""]


def report(config: Config) -> None:
    """Print the tables; keep those of the default rule."""
    found = {}
    guard = replace(config.guard, watch=config.guard.watch or ("clip-score",))
    for run in all_runs():
        if finished(config.folder / run.name):
            found[run.name] = measure(config.folder / run.name, run.name.split("/")[0], guard)
    if not found:
        print("no run is finished yet")
        return
    minutes = sum(each["seconds"] for each in found.values()) / 60
    percent = sum(each["measures_percent"] for each in found.values()) / len(found)
    lines = [*bars(found), *table(found)]
    lines += [f"{len(found)} runs, {minutes:.0f} core-minutes; the measures take {percent:.1f} % of the time of an evaluation."]
    print("\n".join(lines))
    if config.guard == GuardConfig():
        (HERE / "guard.json").write_text(json.dumps(found, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}")


def say(run_dirs: Sequence[Path], guard: GuardConfig) -> None:
    for run_dir in run_dirs:
        lines, verdicts = evaluations_in(run_dir), replayed(run_dir, guard)
        print(f"{run_dir}: {len(lines)} evaluations, best at step {verdicts[-1].best}")
        for line, verdict in zip(lines, verdicts, strict=True):
            if verdict.alarm:
                print(f"  step {line['step']}, {line['queries']} queries: {verdict.alarm}: {verdict.message}")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    if config.replay:
        say(config.replay, config.guard)
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.jobs:
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda run: make(run, config.folder), all_runs()))
    report(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
