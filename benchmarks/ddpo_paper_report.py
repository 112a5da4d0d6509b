"""What the runs of ``ddpo_paper.py`` say: JSON, plots and tables."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ddpo_paper_runs import BEYOND, GRID_SEED, LEARNING_RATES, METHODS, POOLS, QUERIES, REWARDS, SEEDS

from diffusionrl.emoji.vocabulary import ACTIVE_ANIMALS, with_article
from diffusionrl.evaluation.intervals import LEVEL, student_t_quantile
from diffusionrl.report.compare_page import write_comparison
from diffusionrl.runs.lines import read_metrics

UNITS = {"compressibility": "minus kB", "incompressibility": "kB", "aesthetic": "rating", "clip-score": "similarity"}


@dataclass(frozen=True)
class Curve:
    """One quantity of the fixed-seed evaluations of several seeds: rows are seeds, columns the same queries."""

    queries: list[int]
    values: list[list[float]]

    def summary(self, column: int = -1) -> dict[str, Any]:
        """Mean over seeds and half the width of its 95 % interval at one column."""
        return summarise([row[column] for row in self.values])


def summarise(values: Sequence[float]) -> dict[str, Any]:
    if len(values) > 1:
        half = student_t_quantile(LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    else:
        half = math.nan
    return {"mean": statistics.mean(values), "half_width_95": half, "seeds": list(values)}


def curve(folder: Path, group: str, key: str = "eval/reward", limit: float = math.inf) -> Curve | None:
    """Of the finished seeds of ``group``; None where there are none."""
    rows = []
    for run_dir in sorted((folder / group).glob("seed_*")):
        if (run_dir / "seconds.json").is_file():
            lines = [line for line in read_metrics(run_dir) if key in line and line["queries"] <= limit]
            rows.append([(line["queries"], line[key]) for line in lines])
    if not rows:
        return None
    return Curve([queries for queries, _ in rows[0]], [[value for _, value in row] for row in rows])


def text(summary: dict[str, Any], digits: int = 2) -> str:
    return f"{summary['mean']:.{digits}f} ± {summary['half_width_95']:.{digits}f}"


def gain(found: Curve) -> dict[str, Any]:
    """Last minus first evaluation, seed by seed."""
    return summarise([row[-1] - row[0] for row in found.values])


def draw(panels: Sequence[tuple[str, str, dict[str, Curve]]], file: Path) -> None:
    """Panels side by side: (title, y label, curves by name), each a mean with its 95 % band."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, label, curves) in zip(axes[0], panels, strict=True):
        for name, found in curves.items():
            summaries = [found.summary(column) for column in range(len(found.queries))]
            means = [each["mean"] for each in summaries]
            halves = [each["half_width_95"] for each in summaries]
            (line,) = axis.plot(found.queries, means, label=name, marker="o", markersize=3)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(found.queries, low, high, color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="reward queries", ylabel=label)
        axis.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


class Report:
    """Collects tables (Markdown), figures (JSON) and plots (PNG); ``name`` is the paper's."""

    def __init__(self, folder: Path, out: Path, name: str) -> None:
        self.folder, self.out, self.name = folder, out, name
        self.json: dict[str, Any] = {}
        self.lines: list[str] = [f"# The tables of `benchmarks/{name}_paper.py`", ""]

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]

    def curves(self, groups: dict[str, str], key: str = "eval/reward", limit: float = math.inf) -> dict[str, Curve]:
        found = {name: curve(self.folder, group, key, limit) for name, group in groups.items()}
        return {name: each for name, each in found.items() if each is not None}

    def gains(self, title: str, tag: str, unit: str, curves: dict[str, Curve], digits: int = 2) -> None:
        """A table of first and last values and the gain, and the same in JSON."""
        rows = []
        for name, each in curves.items():
            first, last, rise = each.summary(0), each.summary(), gain(each)
            self.json.setdefault(tag, {})[name] = {"queries": each.queries, "values": each.values, "gain": rise}
            rows.append([name, text(first, digits), text(last, digits), text(rise, digits), str(len(each.values))])
        if rows:
            self.table(title, ["", f"before ({unit})", "after", "gain", "seeds"], rows)

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.json").write_text(json.dumps(self.json, indent=1) + "\n")
        (self.out / f"{self.name}_tables.md").write_text("\n".join(self.lines))
        print("\n".join(self.lines))


def report(folder: Path, out: Path) -> None:
    """Everything that the finished runs allow."""
    made = Report(folder, out, "ddpo")
    report_grid(made)
    report_methods(made)
    report_alignment(made)
    report_generalisation(made)
    report_high_rates(made)
    compressibility = "fig4/compressibility"
    report_variants(
        made,
        "Guidance in the update or not (Fig. 10), RWR-sparse on compressibility",
        "fig10",
        {
            "guided prediction trained": f"{compressibility}/rwr-sparse",
            "conditional prediction trained": "fig10/conditional",
            "guided, all samples kept, no reward": "fig10/control",
        },
    )
    rounds = {f"{n} rounds": f"fig11/rounds_{n}" if n != 4 else f"{compressibility}/rwr" for n in (1, 2, 4, 16)}
    report_variants(made, "Interleaving of RWR (Fig. 11) on compressibility", "fig11", rounds)
    reductions = {"mean, clip 1.6e-3": f"{compressibility}/ddpo-is", "sum, clip 0.8": "reduction/sum"}
    report_variants(made, "Log-probability averaged or summed, DDPO-IS on compressibility", "reduction", reductions)
    for size, kinds in POOLS.items():
        pool = {kind: f"advantages/pool_{size}/{kind}" for kind in kinds}
        report_variants(made, f"Advantages with {size} prompts, DDPO-IS on compressibility", f"advantages_{size}", pool)
    report_differences(made)
    report_time(made)
    made.write()
    compare(folder)


def report_grid(made: Report) -> None:
    rows, tried = [], sorted({*LEARNING_RATES, *BEYOND.values()})
    for reward, methods in (("compressibility", METHODS), ("aesthetic", METHODS), ("clip-score", ("ddpo-is",))):
        for method in methods:
            cells = []
            for rate in tried:
                run_dir = made.folder / "grid" / reward / method / f"{rate:g}"
                done = (run_dir / "seconds.json").is_file()
                lines = [line for line in read_metrics(run_dir) if "eval/reward" in line] if done else []
                if not lines:
                    cells.append("")
                    continue
                rise = lines[-1]["eval/reward"] - lines[0]["eval/reward"]
                cells.append(f"{rise:+.2f} ({lines[-1]['eval/emoji-judge']:.2f})")
                made.json.setdefault("grid", {}).setdefault(reward, {}).setdefault(method, {})[f"{rate:g}"] = rise
            rows.append([reward, method, *cells])
    made.table(
        f"Learning rates: gain (and share that the judge names) after {QUERIES} queries, seed {GRID_SEED}",
        ["reward", "method", *(f"{rate:g}" for rate in tried)],
        rows,
    )


CONTROLS = {"compressibility": "fig10/control", "aesthetic": "fig10/control_aesthetic"}
CONTROL = "RWR's loss, no reward"


def report_methods(made: Report) -> None:
    panels = []
    for reward in REWARDS:
        groups = {method: f"fig4/{reward}/{method}" for method in METHODS}
        if reward in CONTROLS:
            groups[CONTROL] = CONTROLS[reward]
        curves = made.curves(groups, limit=QUERIES)
        made.gains(f"Figure 4: {reward}", f"fig4_{reward}", UNITS[reward], curves)
        judged = made.curves(groups, "eval/emoji-judge", QUERIES)
        made.gains(f"Figure 4: {reward}, the share that the judge names", f"fig4_{reward}_judge", "share", judged)
        if curves:
            panels.append((reward, UNITS[reward], curves))
    if panels:
        draw(panels, made.out / "fig4.png")


def report_alignment(made: Report) -> None:
    shown = tuple(f"{with_article(name)} " for name in ACTIVE_ANIMALS)
    rows: dict[str, list[list[float]]] = {"shown with activities": [], "never shown with activities": []}
    queries: list[int] = []
    for seed in SEEDS:
        run_dir = made.folder / "fig5" / f"seed_{seed}"
        if not (run_dir / "seconds.json").is_file():
            continue
        folders = sorted((run_dir / "samples").glob("step_*"))
        queries = [64 * int(folder.name.removeprefix("step_")) for folder in folders]
        means: dict[str, list[float]] = {name: [] for name in rows}
        for folder in folders:
            samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
            for name, wanted in (("shown with activities", True), ("never shown with activities", False)):
                chosen = [sample["reward"] for sample in samples if sample["prompt"].startswith(shown) == wanted]
                means[name].append(statistics.mean(chosen))
        for name, row in means.items():
            rows[name].append(row)
    curves = {name: Curve(queries, values) for name, values in rows.items() if values}
    judged = made.curves({"judge": "fig5"}, "eval/emoji-judge")
    made.gains("Figure 5: alignment (CLIP score) on animal x activity", "fig5", UNITS["clip-score"], curves)
    made.gains("Figure 5: the judge names the animal", "fig5_judge", "share", judged)
    if curves:
        draw([("alignment", UNITS["clip-score"], curves), ("held-out judge", "share named", judged)], made.out / "fig5.png")


def report_generalisation(made: Report) -> None:
    rows = []
    for reward in REWARDS:
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            file = made.folder / "fig4" / reward / "ddpo-is" / f"seed_{seed}" / "elsewhere.json"
            if file.is_file():
                for name, values in json.loads(file.read_text()).items():
                    found.setdefault(name, []).append(values["after"] - values["before"])
        if found:
            trained, *others = found
            for name in others:
                found[f"{name} - {trained}"] = [a - b for a, b in zip(found[name], found[trained], strict=True)]
            summaries = {name: summarise(values) for name, values in found.items()}
            made.json.setdefault("fig12", {})[reward] = summaries
            rows.append([reward, *(text(each) for each in summaries.values())])
            names = list(summaries)
    if rows:
        made.table("Figure 12: gain of DDPO-IS on prompts it was not trained on", ["reward", *names], rows)


def report_high_rates(made: Report) -> None:
    """Appendix A: DDPO-IS for 2,048 queries; and DDPO-SF at twice its learning rate, of ``guard.py``'s runs.

    The runs' names and the key in JSON say hacked and over-optimised, which is not shown: noise as a reward does the same.
    """
    for reward in ("incompressibility", "aesthetic"):
        group = {reward: f"fig4/{reward}/ddpo-is"}
        keys = {"reward": "reward", "judge": "emoji-judge", "gold rule": "emoji-gold"}
        curves = {name: made.curves(group, f"eval/{key}") for name, key in keys.items()}
        if curves["reward"]:
            show_curves(made, f"DDPO-IS on {reward}", {name: found[reward] for name, found in curves.items()})
    file, panels = Path(__file__).parent / "guard.json", []
    runs = json.loads(file.read_text()) if file.is_file() else {}
    for reward in ("incompressibility", "aesthetic"):
        seeds = [run for name, run in runs.items() if name.startswith(f"hacked-{reward}/")]
        if seeds:
            keys = {"reward": "reward", "judge": "judge", "gold rule": "gold_rule", "gold rule x judge": "gold"}
            if reward == "incompressibility":
                keys = {"reward": "reward", "judge": "judge", "reward x judge": "gold"}
            found = {name: Curve(seeds[0]["queries"], [run[key] for run in seeds]) for name, key in keys.items()}
            show_curves(made, f"DDPO-SF on {reward} (python benchmarks/guard.py)", found)
            worth = {name: each for name, each in found.items() if name not in ("reward", "judge")}
            panels += [(f"{reward}: reward", UNITS[reward], {"reward": found["reward"]} | worth)]
            panels += [(f"{reward}: judge", "share named", {"judge": found["judge"]})]
    if panels:
        draw(panels, made.out / "high_rate.png")


def show_curves(made: Report, title: str, found: dict[str, Curve]) -> None:
    """A table of what was measured at five moments, the last one among them; and all of it in JSON."""
    made.json.setdefault("over_optimisation", {})[title] = {
        name: {"queries": each.queries, "values": each.values} for name, each in found.items()
    }
    queries = next(iter(found.values())).queries
    columns = sorted({round(i * (len(queries) - 1) / 4) for i in range(5)})
    rows = [[str(queries[column]), *(text(each.summary(column)) for each in found.values())] for column in columns]
    made.table(f"Appendix A: {title}", ["queries", *found], rows)


def report_variants(made: Report, title: str, tag: str, groups: dict[str, str]) -> None:
    curves = made.curves(groups)
    if len(curves) < len(groups):  # nothing to compare yet
        return
    made.gains(title, tag, "minus kB", curves)
    if len(curves) == len(groups):
        draw([(tag, "minus kB", curves)], made.out / f"{tag}.png")


PAIRS = (("ddpo-is", "rwr"), ("ddpo-is", "rwr-sparse"), ("ddpo-sf", "rwr"), ("ddpo-sf", "rwr-sparse"), ("rwr-sparse", "rwr"))
OTHER_PAIRS = {
    "fig10": (("guided prediction trained", "conditional prediction trained"),),
    "fig11": (("2 rounds", "1 rounds"), ("4 rounds", "2 rounds"), ("16 rounds", "4 rounds")),
    "reduction": (("sum, clip 0.8", "mean, clip 1.6e-3"),),
    "advantages_16": (("group", "prompt"), ("batch", "prompt"), ("group", "batch")),
    "advantages_128": (("group", "prompt"), ("batch", "prompt"), ("group", "batch")),
    "advantages_2048": (("batch", "alone"), ("group", "batch")),
}


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean of first - second with its interval, paired over the seeds that both have."""
    return text(summarise([a - b for a, b in zip(first, second, strict=False)]))


def report_differences(made: Report) -> None:
    """Differences of the gains that the tables above hold, paired by seed, where all seeds are there."""
    gains: dict[str, dict[str, list[float]]] = {}
    for tag in (*OTHER_PAIRS, *(f"fig4_{reward}" for reward in REWARDS)):
        seeds = {name: each["gain"]["seeds"] for name, each in made.json.get(tag, {}).items()}
        gains[tag] = {name: values for name, values in seeds.items() if len(values) >= len(SEEDS)}
    drifts = {reward: gains[f"fig4_{reward}"].get(CONTROL, []) for reward in CONTROLS}
    drifts["incompressibility"] = [-saved for saved in drifts["compressibility"]]  # that loss saves them whatever the reward
    columns = {
        f"{reward} ({UNITS[reward].removeprefix('minus ')})": fig4_differences(gains[f"fig4_{reward}"], drifts[reward])
        for reward in REWARDS
        if drifts[reward] and gains[f"fig4_{reward}"].keys() >= set(METHODS)
    }
    if columns:
        names = next(iter(columns.values()))
        rows = [[name, *(column[name] for column in columns.values())] for name in names]
        made.table("Figure 4: differences of gains, paired over the seeds 0 to 2", ["", *columns], rows)
    rows = [
        [tag, f"{first} - {second}", difference(gains[tag][first], gains[tag][second])]
        for tag, pairs in OTHER_PAIRS.items()
        for first, second in pairs
        if gains[tag].keys() >= {first, second}
    ]
    if rows:
        made.table("Other differences of gains, kB, paired by seed", ["", "", "difference"], rows)


def fig4_differences(gains: dict[str, list[float]], drift: list[float]) -> dict[str, str]:
    """Between methods; and to what RWR-sparse's reward adds to the drift of its loss."""
    first = {name: values[: len(SEEDS)] for name, values in gains.items()}
    net = [gained - drifted for gained, drifted in zip(first["rwr-sparse"], drift, strict=True)]
    rows = {f"{a} - {b}": difference(first[a], first[b]) for a, b in (*PAIRS, ("ddpo-sf", "ddpo-is"))}
    rows["ddpo-sf - ddpo-is, all seeds of both"] = difference(gains["ddpo-sf"], gains["ddpo-is"])
    rows["net: rwr-sparse less its loss without reward"] = text(summarise(net))
    return rows | {f"{name} - net": difference(first[name], net) for name in ("ddpo-is", "ddpo-sf")}


def compare(folder: Path) -> None:
    """``compare_REWARD.html`` beside the runs of figure 4, with all methods and seeds on one page each."""
    for reward in REWARDS:
        runs = sorted(file.parent for file in (folder / "fig4" / reward).rglob("seconds.json"))
        if len(runs) > 1:
            print(f"side by side: {write_comparison(runs, folder / f'compare_{reward}.html')}")


def report_time(made: Report) -> None:
    seconds = [json.loads(file.read_text()) for file in made.folder.rglob("seconds.json")]
    made.json["runs"], made.json["processor_hours"] = len(seconds), sum(seconds) / 3600
    made.lines += [f"{len(seconds)} runs, {sum(seconds) / 3600:.1f} hours of one processor in all.", ""]
