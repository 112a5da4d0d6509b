"""One picture of a run: samples before, samples after, and the reward curve between them."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diffusionrl.data.images import image_grid
from diffusionrl.runs.folder import exported_step
from diffusionrl.runs.lines import read_metrics

_ROWS, _COLUMNS = 3, 5


def draw_before_after(run_dir: Path) -> Path:
    """Write ``before_after.png`` into the run folder, from its samples and metrics. Returns its path."""
    folders = sorted((run_dir / "samples").glob("step_*"))
    last = exported_step(run_dir, int(folders[-1].name.removeprefix("step_")))
    metrics = read_metrics(run_dir)
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    before, curve, after = figure.subplots(1, 3, width_ratios=(5, 4.4, 5))
    for axes, folder, title in ((before, folders[0], "before"), (after, folders[0].with_name(f"step_{last:06d}"), "after")):
        axes.imshow(_sheet(folder))
        axes.set_title(title)
        axes.axis("off")
    steps = [line for line in metrics if "reward/mean" in line]
    curve.plot([line["queries"] for line in steps], [line["reward/mean"] for line in steps], label="training", color="#4477aa")
    fixed = [line for line in metrics if "eval/reward" in line]
    curve.errorbar(
        [line["queries"] for line in fixed],
        [_number(line["eval/reward"]) for line in fixed],
        [_number(line["eval/reward_se"]) for line in fixed],
        fmt="o",
        capsize=3,
        label="fixed seeds ± s.e.",
        color="#cc6677",
    )
    curve.set_xlabel("reward queries")
    curve.set_title("reward")
    curve.grid(alpha=0.3)
    curve.legend(frameon=False)
    target = run_dir / "before_after.png"
    figure.savefig(target, dpi=110)
    return target


def _sheet(folder: Path) -> Image.Image:
    """The first samples of a folder."""
    tiles = [Image.open(file) for file in sorted(folder.glob("0*.png"))[: _ROWS * _COLUMNS]]
    return image_grid(tiles, _COLUMNS, gap=max(1, tiles[0].width // 32))


def _number(value: float | None) -> float:
    """metrics.jsonl writes numbers that are not finite as null."""
    return math.nan if value is None else value
