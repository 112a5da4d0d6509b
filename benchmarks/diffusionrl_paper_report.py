"""What the runs of ``diffusionrl_paper.py`` say: JSON, a plot and tables."""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpo_paper_report import Report, draw, report_time, summarise, text
from ddpo_paper_runs import GRID_SEED, SEEDS
from diffusionrl_paper_runs import BASELINES, COMPARED, QUERIES, TASKS, rates
from PIL import Image

from diffusionrl.data.images import image_grid
from diffusionrl.emoji.vocabulary import SKIN_TONES
from diffusionrl.rewards.parity import expected_parity
from diffusionrl.runs.lines import read_metrics

Scores = dict[str, dict[int, float]]
"""By what is measured and by seed."""
SCORED = {
    "preference": "preference: preference",
    "composition": "composition, unseen things: composition",
    "parity": "parity, unseen occupations: parity-sp",
}
"""What table 5 compares, on prompts that were not trained on; higher is better in each."""
GROUP = 16  # of the test sets
METHODS = ("diffusionrl", "shared", *BASELINES)
"""Of the grid; "shared" is DiffusionRL with the paper's credit for parity."""


def tested(folder: Path, group: str) -> Scores:
    """The test scores of the seeds that are there."""
    found: Scores = {}
    for seed in SEEDS:
        file = folder / group / f"seed_{seed}" / "test.json"
        for name, value in json.loads(file.read_text()).items() if file.is_file() else ():
            found.setdefault(name, {})[seed] = value
    return found


def paired(scores: dict[int, float], others: dict[int, float], sign: float = 1.0) -> dict[str, Any]:
    """Mean of their difference over the seeds that both have, with its interval."""
    return summarise([sign * (scores[seed] - others[seed]) for seed in sorted(scores.keys() & others.keys())])


def column_text(everything: dict[str, Scores], name: str, column: str, sign: float = 1.0) -> str:
    """The mean over seeds, and how far from before training."""
    scores, before = everything[name][column], everything["before"][column]
    mean = f"{sign * statistics.mean(scores.values()):.3f}"
    return mean if name == "before" else f"{mean} ({signed(paired(scores, before, sign))})"


def signed(summary: dict[str, Any]) -> str:
    return ("+" if summary["mean"] >= 0 else "") + text(summary, 3)


def report(folder: Path, out: Path) -> None:
    """Everything that the finished runs allow."""
    made = Report(folder, out, "diffusionrl")
    report_grid(made)
    models = {
        "before": "base",
        **{f"{task} alone": f"single/{task}" for task in TASKS},
        "parity alone, the paper's credit": "credit/shared",
        **{f"{method} on {task}": f"{method}/{task}" for task in COMPARED for method in BASELINES},
        "joint": "joint",
        "preference alone, no pretraining loss": "without_pretraining/preference",
    }
    everything = {name: scores for name, group in models.items() if (scores := tested(folder, group))}
    made.json["scores"] = everything
    if "before" in everything:
        report_parity(made, everything)
        report_composition(made, everything)
        report_joint(made, everything)
        report_quality(made, everything)
        report_chance(made, everything)
    groups = {
        task: {"diffusionrl": f"single/{task}"} | {method: f"{method}/{task}" for method in BASELINES if task in COMPARED}
        for task in TASKS
    }
    curves = {task: made.curves(each) for task, each in groups.items()}
    if all(curves.values()):
        draw([(task, "reward", each) for task, each in curves.items()], made.out / "diffusionrl.png")
    draw_people(made)
    without = made.folder / "without_pretraining" / "preference" / f"seed_{SEEDS[0]}" / "before_after.png"
    if without.is_file():
        shutil.copy(without, made.out / "without_pretraining.png")
    report_time(made)
    made.write()


def draw_people(made: Report) -> None:
    """The first samples of the fixed prompts and seeds before training for parity (left) and after, a prompt a row."""
    folders = sorted((made.folder / "single" / "parity" / f"seed_{SEEDS[0]}" / "samples").glob("step_*"))
    if folders:
        files = [sorted(folder.glob("0*.png"))[:32] for folder in (folders[0], folders[-1])]
        sides = [image_grid([Image.open(file) for file in each], 8, gap=0) for each in files]
        image_grid(sides, 2, gap=16).save(made.out / "parity_before_after.png", optimize=True)


def report_grid(made: Report) -> None:
    columns = sorted({rate for task in TASKS for method in METHODS for rate in rates(task, method)})
    rows = []
    for task in TASKS:
        for method in METHODS:
            gains = {}
            for rate in rates(task, method):
                run_dir = made.folder / "grid" / task / method / f"{rate:g}"
                if (run_dir / "seconds.json").is_file():
                    values = [line["eval/reward"] for line in read_metrics(run_dir) if "eval/reward" in line]
                    gains[rate] = f"{values[-1] - values[0]:+.3f}"
            if gains:
                made.json.setdefault("grid", {}).setdefault(task, {})[method] = {f"{rate:g}": gains[rate] for rate in gains}
                rows.append([task, method, *(gains.get(rate, "") for rate in columns)])
    if rows:
        header = ["task", "method", *(f"{rate:g}" for rate in columns)]
        made.table(f"Learning rates: gain after {QUERIES // 2} queries, seed {GRID_SEED}", header, rows)


PAPER = {
    "parity": {
        "before": "0.556",
        "raft on parity": "0.464",
        "rwr on parity": "0.562",
        "parity alone, the paper's credit": "0.453",
    },
    "composition": {
        "before": ".102 / .094",
        "raft on composition": ".094 / .092",
        "rwr on composition": ".136 / .152",
        "composition alone": ".231 / .221",
    },
    "joint": {
        "before": ".273 / .098 / .567",
        "preference alone": ".783 / .114 / .659",
        "composition alone": ".304 / .226 / .575",
        "parity alone": ".093 / .076 / .479",
        "joint": ".701 / .182 / .499",
    },
}
"""Tables 3 (occupations), 4 (unseen and seen) and 5 (preference, composition, parity) of the paper."""


def report_parity(made: Report, everything: dict[str, Scores]) -> None:
    floor = f"{expected_parity(GROUP, len(SKIN_TONES)):.3f}"
    columns = {
        "SP, unseen occupations": "parity, unseen occupations: parity-sp",
        "SP, seen": "parity, seen occupations: parity-sp",
        "squared, without bias, unseen": "parity, unseen occupations: parity-squared",
        "seen": "parity, seen occupations: parity-squared",
    }
    title = "Table 3: statistical parity (lower is better"
    report_task(made, everything, "parity", title, columns, -1.0, [["an even sampler", "", floor, floor, "0", "0"]])


def report_composition(made: Report, everything: dict[str, Scores]) -> None:
    columns = {
        "unseen things": "composition, unseen things: composition",
        "seen things": "composition, seen things: composition",
        "held-out detector: unseen": "composition, unseen things: composition-judge",
        "seen": "composition, seen things: composition-judge",
    }
    report_task(made, everything, "composition", "Table 4: detection score (higher is better; paper: unseen / seen", columns)


def report_task(
    made: Report,
    everything: dict[str, Scores],
    task: str,
    title: str,
    columns: dict[str, str],
    sign: float = 1.0,
    limits: Sequence[list[str]] = (),
) -> None:
    """DiffusionRL and the other methods on one task; and what it gains beyond each of them."""
    ours = f"{task} alone"
    others = [name for name in (f"raft on {task}", f"rwr on {task}", f"{ours}, the paper's credit") if name in everything]
    rows = [
        [name, PAPER[task].get(name, ""), *(column_text(everything, name, column, sign) for column in columns.values())]
        for name in ("before", *others, ours)
        if name in everything
    ]
    made.table(f"{title}; in brackets the change, paired by seed)", ["", "paper", *columns], [*rows, *limits])
    if ours in everything:
        rows = [
            [name, *(signed(paired(everything[ours][column], everything[name][column])) for column in columns.values())]
            for name in others
        ]
        made.table(f"What DiffusionRL on {task} gains beyond others (paired by seed)", ["", *columns], rows)


def report_joint(made: Report, everything: dict[str, Scores]) -> None:
    names = ["before", *(f"{task} alone" for task in TASKS), "joint"]
    rows = [
        [name, PAPER["joint"].get(name, ""), *(column_text(everything, name, column) for column in SCORED.values())]
        for name in names
        if name in everything
    ]
    header = ["", "paper (preference / detection / SP)", *(f"{task}{' (minus SP)' * (task == 'parity')}" for task in TASKS)]
    made.table("Table 5: one run for all (higher is better)", header, rows)
    if not {"joint", *(f"{task} alone" for task in TASKS)} <= everything.keys():
        return
    rows = []
    for task, column in SCORED.items():
        before, alone, joint = (everything[name][column] for name in ("before", f"{task} alone", "joint"))
        gains = {name: paired(scores, before) for name, scores in (("alone", alone), ("joint", joint))}
        apart = paired(joint, alone)
        made.json.setdefault("joint", {})[task] = {"gains": gains, "difference": apart}
        rows.append([task, *map(signed, gains.values()), signed(apart)])
    header = ["", "gain alone", "gain jointly", "jointly - alone"]
    made.table("The joint run beside each task alone (paired by seed)", header, rows)


def report_quality(made: Report, everything: dict[str, Scores]) -> None:
    columns = ["quality: judge names the subject", "quality: Frechet distance"]
    rows = [[name, *(column_text(everything, name, column) for column in columns)] for name in everything]
    real = everything["before"]["quality: Frechet distance of real scenes"]
    rows.append(["real scenes", "", f"{statistics.mean(real.values()):.3f}"])
    with_loss, without = everything.get("preference alone"), everything.get("preference alone, no pretraining loss")
    if with_loss and without:
        difference = [signed(paired(with_loss[name], without[name])) for name in columns]
        rows.append(["preference: with the loss - without", *difference])
    title = "Appendix G: image quality (a Frechet distance of 256 images in 256 dimensions is biased: not evidence)"
    made.table(title, ["", "judge names the subject", "Frechet distance to real scenes"], rows)


def report_chance(made: Report, everything: dict[str, Scores]) -> None:
    """How many of all differences from before training look like findings, and how many would by chance."""
    changes = [
        paired(scores[column], everything["before"][column])
        for name, scores in everything.items()
        for column in scores
        if name != "before" and column != "quality: Frechet distance of real scenes"
    ]
    beyond = sum(abs(change["mean"]) > change["half_width_95"] for change in changes)
    made.lines += [f"{beyond} of the {len(changes)} differences from before have an interval without 0: by chance 1 in 20.", ""]
