"""What the runs of ``diffusionrl_paper.py`` say: JSON, a plot and tables."""

import json
from pathlib import Path
from typing import Any

from ddpo_paper_report import Report, draw, report_time, summarise, text
from ddpo_paper_runs import GRID_SEED, QUERIES, SEEDS
from diffusionrl_paper_runs import BASELINES, COMPARED, RATES, TASKS

from diffusionrl.emoji.vocabulary import SKIN_TONES
from diffusionrl.rewards.parity import expected_parity
from diffusionrl.tracking import read_metrics

Scores = dict[str, list[float]]
"""By what is measured, a value a seed."""
SCORED = {
    "preference": "preference: preference",
    "composition": "composition, seen things: composition",
    "parity": "parity, unseen occupations: parity-sp",
}
"""What table 5 compares; higher is better in each."""
GROUP = 16  # of the test sets


def tested(folder: Path, group: str) -> Scores:
    """The test scores of the seeds that are there."""
    found: Scores = {}
    for seed in SEEDS:
        file = folder / group / f"seed_{seed}" / "test.json"
        for name, value in json.loads(file.read_text()).items() if file.is_file() else ():
            found.setdefault(name, []).append(value)
    return found


def report(folder: Path, out: Path) -> None:
    """Everything that the finished runs allow."""
    made = Report(folder, out, "diffusionrl")
    report_grid(made)
    groups = {
        "before": "base",
        **{f"{task} alone": f"single/{task}" for task in TASKS},
        "parity alone, leave-one-out": "credit/leave-one-out",
        **{f"{method} on {task}": f"{method}/{task}" for task in COMPARED for method in BASELINES},
        "joint": "joint/with_pretraining",
        "joint, no pretraining loss": "joint/without_pretraining",
    }
    everything = {name: scores for name, group in groups.items() if (scores := tested(folder, group))}
    made.json["scores"] = everything
    report_parity(made, everything)
    report_composition(made, everything)
    report_joint(made, everything)
    report_quality(made, everything)
    curves = made.curves({task: f"single/{task}" for task in TASKS})
    if curves:
        draw([(task, "reward", {"alone": each}) for task, each in curves.items()], made.out / "diffusionrl.png")
    report_time(made)
    made.write()


def report_grid(made: Report) -> None:
    rows = []
    for task in TASKS:
        for method in ("diffusionrl", *BASELINES):
            cells = []
            for rate in RATES:
                run_dir = made.folder / "grid" / task / method / f"{rate:g}"
                if (run_dir / "seconds.json").is_file():
                    values = [line["eval/reward"] for line in read_metrics(run_dir) if "eval/reward" in line]
                    cells.append(f"{values[-1] - values[0]:+.3f}")
                    made.json.setdefault("grid", {}).setdefault(task, {}).setdefault(method, {})[f"{rate:g}"] = cells[-1]
            if len(cells) == len(RATES):
                rows.append([task, method, *cells])
    if rows:
        header = ["task", "method", *(f"{rate:g}" for rate in RATES)]
        made.table(f"Learning rates: gain after {QUERIES} queries, seed {GRID_SEED}", header, rows)


def rows_of(everything: dict[str, Scores], names: list[str], columns: list[str], sign: float = 1.0) -> list[list[str]]:
    """Means with intervals of those that are there."""
    return [
        [name, *(text(summarise([sign * value for value in everything[name][column]]), 3) for column in columns)]
        for name in names
        if name in everything
    ]


def report_parity(made: Report, everything: dict[str, Scores]) -> None:
    names = ["before", "raft on parity", "rwr on parity", "parity alone", "parity alone, leave-one-out"]
    sp = [f"parity, {kind} occupations: parity-sp" for kind in ("unseen", "seen")]
    rows = rows_of(everything, names, sp, -1.0)
    squared = rows_of(everything, names, [name.replace("-sp", "-squared") for name in sp], -1.0)
    floor = f"{expected_parity(GROUP, len(SKIN_TONES)):.3f}"
    rows = [[*row, *more[1:]] for row, more in zip(rows, squared, strict=True)]
    header = ["", "SP, unseen occupations", "SP, seen", "squared, without bias, unseen", "seen"]
    made.table("Table 3: statistical parity (lower is better)", header, [*rows, ["an even sampler", floor, floor, "0", "0"]])


def report_composition(made: Report, everything: dict[str, Scores]) -> None:
    names = ["before", "raft on composition", "rwr on composition", "composition alone"]
    columns = [
        f"composition, {kind} things: {reward}"
        for reward in ("composition", "composition-judge")
        for kind in ("unseen", "seen")
    ]
    header = ["", "unseen things", "seen things", "held-out detector: unseen", "seen"]
    made.table("Table 4: detection score (higher is better)", header, rows_of(everything, names, columns))


def report_joint(made: Report, everything: dict[str, Scores]) -> None:
    names = ["before", *(f"{task} alone" for task in TASKS), "joint", "joint, no pretraining loss"]
    made.table("Table 5: one run for all (higher is better)", ["", *TASKS], rows_of(everything, names, list(SCORED.values())))
    if not {"before", "joint", *(f"{task} alone" for task in TASKS)} <= everything.keys():
        return
    kept: dict[str, dict[str, Any]] = {}
    for task, column in SCORED.items():
        before, alone, joint = (everything[name][column] for name in ("before", f"{task} alone", "joint"))
        triples = list(zip(before, alone, joint, strict=True))
        ratios = [a / j if a < 0 else j / a for _, a, j in triples]  # SP is better where it is smaller
        shares = [(j - b) / (a - b) for b, a, j in triples]
        kept[task] = {"ratio": summarise(ratios), "share_of_gain": summarise(shares)}
    made.json["kept"] = kept
    rows = [[task, text(each["ratio"]), text(each["share_of_gain"])] for task, each in kept.items()]
    made.table("What the joint run keeps of each task alone", ["", "ratio of scores", "share of the gain"], rows)


def report_quality(made: Report, everything: dict[str, Scores]) -> None:
    columns = ["quality: judge names the subject", "quality: Frechet distance"]
    rows = rows_of(everything, list(everything), columns)
    real = everything.get("before", {}).get("quality: Frechet distance of real scenes")
    if real:
        rows.append(["real scenes", "", text(summarise(real), 3)])
    made.table("Appendix G: image quality", ["", "judge names the subject", "Frechet distance to real scenes"], rows)
