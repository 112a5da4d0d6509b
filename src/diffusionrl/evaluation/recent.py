"""``samples/recent``: the best, worst and failed images of the last training steps, to look at while a run goes on."""

import json
import shutil
from pathlib import Path

from diffusionrl.data.media import shown, write_inputs, write_sample
from diffusionrl.evaluation.fixed_seed import sample_entry
from diffusionrl.runs.checkpoint import step_of
from diffusionrl.sampling.rollout import Rollout

KEPT = 3
"""Steps."""
PICKED = 6
"""Images of each kind in a step, at most."""


def write_recent(rollout: Rollout, samples: Path, step: int, task: str = "") -> None:
    """Write ``samples/recent/step_N/`` in the format of an evaluation's folder (in it, one of its name for a further ``task``),
    and remove those of ``KEPT`` steps before and of all before that.

    Of the samples that this process drew: up to ``PICKED`` with the highest reward, as many with the lowest, and the first ones
    without a valid score, with the reward's last error. The same steps are left however often the run was interrupted.
    """
    folder = samples / "recent" / f"step_{step:06d}" / task
    folder.mkdir(parents=True, exist_ok=True)
    own, scores = rollout.own, rollout.scores
    ranked = sorted((i for i in own if scores.valid[i]), key=lambda i: (scores.values[i].item(), i))
    failed = [i for i in own if not scores.valid[i]][:PICKED]
    count = min(PICKED, len(ranked) // 2)
    parts = scores.parts if len(scores.parts) > 1 else {}
    picked = sorted([*ranked[:count], *ranked[len(ranked) - count :], *failed])
    images, _ = shown(rollout.show, rollout.images[[index - own.start for index in picked]])
    with (folder / "samples.jsonl").open("w") as lines:
        for index, image in zip(picked, images, strict=True):
            write_sample(image, folder / f"{index:05d}.png", rollout.sampling_rate)
            write_inputs(rollout.prompts[index].media, folder, index)
            error = {"error": scores.error} if index in failed else {}
            lines.write(json.dumps(sample_entry(rollout, index, parts) | error) + "\n")
    for old in (samples / "recent").glob("step_*"):
        of = step_of(old)
        if of is not None and of <= step - KEPT:
            shutil.rmtree(old)
