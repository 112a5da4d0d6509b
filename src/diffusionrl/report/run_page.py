"""``report.html``: one run on one page."""

import shlex
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffusionrl.evaluation.intervals import overall
from diffusionrl.report.curves import Chart, Line, draw
from diffusionrl.report.page import (
    MAX_IMAGES,
    MAX_TEXT,
    Pictures,
    cell,
    cut,
    decimals,
    duration,
    number,
    plus_minus,
    render,
    scrubber,
    signed,
    thinned,
    write_page,
)
from diffusionrl.report.record import Evaluated, Run, Sample, read_run, time_unit
from diffusionrl.report.thumbnails import data_uri
from diffusionrl.runs.signal import COSINE, Signal, signal_of
from diffusionrl.runs.usage import about_of, is_own, loading_lines

MAX_TILES = 48
PICKED = 6  # best, worst and failed samples
MAX_CHARTS = 40
MAX_CONFIG = 20_000  # characters
MAX_ALARMS = 20
KL = "policy/approx_kl"
NOTES = {
    "reference_kl": "from the reference model at fixed states, nats; every denoising step alike",
    "reference_distance": "from the reference model at fixed states, of its predictions",
    "kl_per_step": "from the reference model, nats a denoising step",
    "diversity": "cosine distance within a prompt",
    "vendi": "effective number of different images of a prompt",
}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, from what is in it. Returns its path.

    Raises:
        UserError: it is no run folder.
        OSError: it cannot be written.
    """
    target = run_dir / "report.html"
    write_page(target, render("report.html.jinja", **_content(read_run(run_dir))))
    return target


def keep_report(run_dir: Path) -> None:
    """``write_report`` for a run that goes on: whatever keeps it from being written is said, and does no more harm."""
    try:
        write_report(run_dir)
    except Exception as error:
        print(f"warning: report.html was not written: {type(error).__name__}: {error}", file=sys.stderr)


def _content(run: Run) -> dict[str, Any]:
    pictures = Pictures()
    stops = thinned(run.evaluations)
    tiles = _tiles(stops)
    labels = [_stop_label(each) for each in stops]
    places = decimals(stops)
    cells = [[cell(each.samples.get(i), stops[0].samples.get(i), pictures, places) for i in tiles] for each in stops]
    scrubbed = scrubber(pictures, labels, cells)
    marks = [float(each.queries) for each in stops]
    return {
        "run": run,
        "figures": _figures(run),
        "headline": _headline(run),
        "prompts": [(cut(s.prompt), _inputs(s)) for s in (stops[-1].samples[i] for i in tiles)],
        "num_samples": len(run.evaluations[-1].samples) if run.evaluations else 0,
        "num_evaluations": len(run.evaluations),
        "scrubber": scrubbed,
        "charts": _main_charts(run, marks),
        "more_charts": _other_charts(run, marks),
        "picked": _picked(run, pictures, places),
        "picked_at": _picked_at(run),
        "command": _command(run),
        "load": _load(run),
        "config": cut(run.config_text, MAX_CONFIG),
        "alarms": [{key: cut(text, MAX_TEXT * 2) for key, text in alarm.items()} for alarm in run.alarms[-MAX_ALARMS:]],
        "num_alarms": len(run.alarms),
        "machine": _machine(run),
        "versions": _versions(run),
    }


def _tiles(stops: Sequence[Evaluated]) -> list[int]:
    """The samples that the scrubber shows: the first ones, as many as there is room for."""
    if not stops:
        return []
    return sorted(stops[-1].samples)[: min(MAX_TILES, MAX_IMAGES // len(stops))]


def _stop_label(evaluation: Evaluated) -> str:
    return "before training" if evaluation.step == 0 else f"step {evaluation.step:,} · {evaluation.queries:,} queries"


def _headline(run: Run) -> str:
    algorithm = run.config.get("algorithm") or {}
    what = str(algorithm.get("name")) + (f" ({algorithm['variant']})" if "variant" in algorithm else "")
    rewards = run.config.get("reward")
    named = ", ".join(map(str, rewards)) if isinstance(rewards, list) else str(rewards)
    return cut(f"{what} on {run.config.get('model')} {'blind to' if run.config.get('blind') else 'towards'} {named}")


def gains(run: Run) -> tuple[list[float], list[str]]:
    """Of each sample of the last evaluation, over the same prompt and seed before training, where both are valid; and its
    prompt."""
    if len(run.evaluations) < 2:
        return [], []
    before, after = run.evaluations[0].samples, run.evaluations[-1].samples
    pairs = [(before[i].reward, sample) for i, sample in after.items() if i in before]
    paired = [(sample.reward - a, sample.prompt) for a, sample in pairs if a is not None and sample.reward is not None]
    return [gain for gain, _ in paired], [prompt for _, prompt in paired]


def _figures(run: Run) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, and what about it."""
    if not run.metrics:
        return []
    rewards = [value for value in run.column("eval/reward")[1] if value is not None]
    queries, hours = int(run.metrics[-1]["queries"]), run.metrics[-1]["hours"]
    figures = []
    if rewards:
        said = f"from {number(rewards[0])}" if len(rewards) > 1 else "before training"
        figures.append(("reward, fixed seeds", number(rewards[-1]), said))
    found, prompts = gains(run)
    if found:
        gain = overall(found, prompts)
        value, plus_or_minus, half = plus_minus(gain, sign=True).partition(" ± ")
        said = f"± {half} (95 %), " if plus_or_minus else ""
        better = sum(each > 0 for each in found)
        figures.append(("gain, paired", value, f"{said}better in {better} of {len(found)}"))
        if queries and hours:
            rates = signed(1000 * gain.value / queries), f"{signed(gain.value / hours)} per hour of training"
            figures.append(("gain per 1,000 queries", *rates))
    figures.append(("queries", f"{queries:,}", "rewards computed for training"))
    figures += [_signal(signal) for signal in [signal_of(run.metrics)] if signal is not None]
    figures.append(("training time", duration(hours), _seconds_a_step(run)))
    invalid = sum(value or 0 for value in run.column("reward/invalid")[1])
    if invalid:
        figures.append(("invalid", f"{invalid:,.0f}", "samples of training without a score"))
    return figures


def _signal(signal: Signal) -> tuple[str, str, str]:
    """How much of what the run moved is noise."""
    if not signal.is_seen:
        return "random walk", "all of it?", f"no signal is seen in {signal.updates:,} updates: halves agree by chance"
    low, high = (f"{100 * signal.walk(sigmas):.0f}" for sigmas in (2, -2))
    said = f"of what {signal.updates:,} updates moved ({low} to {high}); half at {signal.needed:,.0f} samples"
    return "random walk", f"{100 * signal.walk():.0f} %", said


def _signal_chart(run: Run, task: str, marks: list[float]) -> Chart | None:
    """How far the two halves of each update agree, and their mean so far."""
    lines, values = run.column(f"{task}{COSINE}")
    queries, known = [line["queries"] for line in lines], [value or 0.0 for value in values]
    means = [total / count for count, total in enumerate(accumulate(known), 1)]
    drawn = [Line("of a step", queries, values, faint=True), Line("mean so far", queries, means, colour=6)]
    note = "cosine of the gradients of two halves of an update's groups: 0 is a random walk"
    return draw(f"signal {task.removesuffix('/')}".strip(), "queries", drawn, note, marks, from_zero=True)


def _seconds_a_step(run: Run) -> str:
    steps = int(run.metrics[-1]["step"])
    return f"{number(run.metrics[-1]['hours'] * 3600 / steps, 3)} s a step" if steps else ""


def _line(run: Run, key: str, name: str, x: str = "queries", **style: Any) -> Line:
    lines, values = run.column(key)
    spread = [line.get(f"{key}_se") for line in lines] if f"{key}_se" in (lines[0] if lines else {}) else []
    scale = time_unit([run])[1] if x == "hours" else 1
    return Line(name, [line[x] * scale for line in lines], values, [value or 0.0 for value in spread], **style)


def _reward_lines(run: Run, x: str, task: str = "") -> list[Line]:
    return [
        _line(run, f"{task}reward/mean", "training", x, faint=True),
        _line(run, f"eval/{task}reward", "fixed seeds ± s.e.", x, colour=1, dots=True),
    ]


def _main_charts(run: Run, marks: list[float]) -> list[Chart]:
    held_out = [str(name).partition("=")[0] for name in (run.config.get("evaluation") or {}).get("held_out") or []]
    charts = [
        draw("reward", "queries", _reward_lines(run, "queries"), marks=marks),
        draw("reward over time", f"{time_unit([run])[0]} of training", _reward_lines(run, "hours")),
    ]
    further = {f"eval/{task}/reward": task for task in run.tasks()}
    for task in further.values():
        charts.append(draw(f"reward of task {cut(task)}", "queries", _reward_lines(run, "queries", f"{task}/"), marks=marks))
    for key in run.scores():
        if key in further:
            continue
        name = key.removeprefix("eval/")
        note = "held out: never trained on" if name in held_out else NOTES.get(name, "")
        charts.append(draw(name, "queries", [_line(run, key, "fixed seeds ± s.e.", colour=2, dots=True)], note, marks))
    if any(run.column(KL)[1]):  # 0 throughout where every update is on-policy
        line = _line(run, KL, KL, colour=3)
        summed = (run.config.get("algorithm") or {}).get("logprob_reduction") == "sum"
        unit = "denoising step" if summed else "latent dimension"
        charts.append(draw("approximate KL", "queries", [line], f"of a step's updates from its rollout, nats a {unit}", marks))
    charts += [_signal_chart(run, task, marks) for task in ("", *(f"{name}/" for name in run.tasks()))]
    parts = ["rollout", "reward", "update", *(["pretraining"] if run.column("time/pretraining")[0] else [])]
    times = [_line(run, f"time/{part}", part, colour=i) for i, part in enumerate(parts)]
    charts.append(
        draw("seconds a step", "queries", times, "a rollout lasts until its rewards are there", marks, from_zero=True)
    )
    return [chart for chart in charts if chart is not None]


def _other_charts(run: Run, marks: list[float]) -> list[Chart]:
    """Whatever else was logged."""
    shown = {
        "step",
        "queries",
        "hours",
        "reward/mean",
        "eval/reward",
        *run.scores(),
        *(f"{task}/reward/mean" for task in run.tasks()),
        *(f"{task}{COSINE}" for task in ("", *(f"{name}/" for name in run.tasks()))),
        *([KL] if any(run.column(KL)[1]) else []),
    }
    keys = dict.fromkeys(key for line in run.metrics for key in line)
    rest = [key for key in keys if key not in shown and "time/" not in key and not key.endswith("_se")]
    charts = [draw(key, "queries", [_line(run, key, key, colour=4)], "", marks) for key in rest[:MAX_CHARTS]]
    return [chart for chart in charts if chart is not None]


def _picked(run: Run, pictures: Pictures, places: int) -> dict[str, list[dict[str, Any]]]:
    """Best, worst and failed samples of the last training steps, or of the last evaluation where there is none yet; and failed
    ones of the last three evaluations."""
    if not run.recent and not run.evaluations:
        return {}
    newest = [(step, sample) for step, samples in reversed(run.recent.items()) for sample in samples]
    found = newest or [(run.evaluations[-1].step, sample) for sample in run.evaluations[-1].samples.values()]
    scored = sorted(((step, s) for step, s in found if s.reward is not None), key=lambda each: each[1].reward or 0.0)
    count = min(PICKED, len(scored) // 2)
    failed = [(f"step {step:,}", sample) for step, sample in newest if sample.reward is None][:PICKED]
    for each in run.evaluations[:-4:-1]:
        failed += [(f"evaluation, step {each.step:,}", s) for s in each.samples.values() if s.reward is None]
    return {
        "best": [_shown(sample, pictures, places, f"step {step:,}") for step, sample in scored[::-1][:count]],
        "worst": [_shown(sample, pictures, places, f"step {step:,}") for step, sample in scored[:count]],
        "failed": [_shown(sample, pictures, places, when) for when, sample in failed[:PICKED]],
    }


def _inputs(sample: Sample) -> list[str]:
    return [uri for uri in map(data_uri, sample.inputs) if uri is not None]


def _picked_at(run: Run) -> str:
    """Where the best and the worst are from."""
    if not run.recent:
        return f"at the evaluation of step {run.evaluations[-1].step:,}" if run.evaluations else ""
    first, last = min(run.recent), max(run.recent)
    return f"in training, step {last:,}" if first == last else f"in training, steps {first:,} to {last:,}"


def _shown(sample: Sample, pictures: Pictures, places: int, when: str) -> dict[str, Any]:
    shown = cell(sample, None, pictures, places)
    return {
        "uri": pictures.uris[shown.image] if shown.image >= 0 else None,
        "sound": pictures.sounds.get(shown.image),
        "prompt": cut(sample.prompt),
        "inputs": _inputs(sample),
        "score": shown.score,
        "others": [(name, number(value)) for name, value in sample.scores.items()],
        "when": when,
        "error": cut(sample.error),
    }


def _command(run: Run) -> str:
    """As it was given, but for the path of Python's own files."""
    words = [str(word) for word in run.environment.get("command") or []]
    if words and Path(words[0]).name in ("__main__.py", "diffusionrl"):
        words[0] = "diffusionrl"
    return cut(shlex.join(words), MAX_CONFIG)


def _machine(run: Run) -> list[tuple[str, str]]:
    environment = run.environment
    found = [(name, environment.get(name)) for name in ("platform", "device", "threads", "seed", "resumed_from_step")]
    if "model" in environment:
        found.insert(0, ("model", _model(about_of(environment, run.config))))
    peak = max((value for value in run.column("peak_memory_gb")[1] if value is not None), default=None)
    named = [*found, ("peak memory", None if peak is None else f"{number(peak, 3)} GB")]
    return [(name.replace("_", " "), cut(str(value))) for name, value in named if value is not None]


def _model(about: dict[str, Any]) -> str:
    """The pipeline, what of it is trained, and whether its own call takes other steps than a run."""
    if is_own(about):
        return f"{about['network']}, a network of one's own"
    said = f"{about['pipeline']} ({', '.join(map(str, about['networks']))})"
    if about.get("first_order") is False:
        said += f"; steps are of first order, on the grid of its {about.get('scheduler')}, which takes others"
    return said


def _versions(run: Run) -> list[tuple[str, str]]:
    versions = run.environment.get("versions")
    listed = {"python": run.environment.get("python")} | (versions if isinstance(versions, dict) else {})
    return [(cut(str(name)), cut(str(value))) for name, value in listed.items() if value is not None]


def _load(run: Run) -> str:
    """What was learned, in plain diffusers."""
    model, about = run.config.get("model"), about_of(run.environment, run.config)
    own = str(model).startswith("<")
    prompts = [s.prompt for s in run.evaluations[-1].samples.values() if len(s.prompt) < 80] if run.evaluations else []
    base, export = "MODEL" if own else repr(str(model)), repr(str(run.folder / "export"))
    file = about.get("single_file") or {}
    lines = loading_lines(run.config, about, base, export, repr((prompts or ["a cat"])[0]), repr(file.get("config")))
    handed_over = "# MODEL: the folder or hub id of the pipeline that was handed over in Python\n"
    note = handed_over if own and not is_own(about) else ""
    return note + "\n".join(lines)
