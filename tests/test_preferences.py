"""The preference objectives' promises: the papers' formulas, where they meet others, and judged images from disk."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from datasets import Dataset
from faults import die_at, finish, finish_together, what_it_made
from objectives import FORWARD, d3po, flow_policy
from PIL import Image
from test_forward_process import alike, endpoints, gradient, learned, parts_of, small, square, whole_loss
from torch import Tensor

from diffusionrl import TrainConfig, UserError, diagnose, train
from diffusionrl.algorithms.groups import both, labels_of, pairs_of
from diffusionrl.cli import main
from diffusionrl.config import D3POConfig, DPOConfig, KTOConfig, PolicyConfig, SamplingConfig
from diffusionrl.data.preferences import load_preferences
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import Scores
from diffusionrl.runs.alarms import PATIENCE, Watch
from diffusionrl.runs.checkpoint import folder_of
from diffusionrl.sampling.rollout import Rollout, collect
from diffusionrl.training.preferences import JudgedImages

assert die_at  # named by a string


@pytest.fixture(scope="module")
def flow() -> PipelinePolicy:
    return flow_policy(3)


@pytest.fixture(params=["velocity", "noise"])
def policy(request: Any, make_policy: Any, flow: PipelinePolicy) -> Any:
    return flow if request.param == "velocity" else make_policy(lora_rank=2)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


def scored(values: Sequence[float], size: int, invalid: Sequence[int] = ()) -> Rollout:
    """Samples that are nothing but scores."""
    nothing, valid = torch.zeros(0), torch.tensor([i not in invalid for i in range(len(values))])
    scores = Scores(torch.tensor(values), valid)
    return Rollout(None, [Prompt("")] * len(values), nothing, nothing, nothing, scores, {}, group_size=size)  # type: ignore[arg-type]


# Pairs


@pytest.mark.parametrize(
    ("values", "count", "invalid", "expected"),
    [
        ([3, 1, 4, 2, 5, 5, 5, 5], 1, (), [[(2, 1)], []]),
        ([3, 1, 4, 2, 7, 6, 5, 5], 2, (), [[(2, 1), (0, 3)], [(4, 7), (5, 6)]]),
        ([3, 1, 4, 2, 7, 6, 5, 5], 2, (2, 4, 5), [[(0, 1)], []]),
        ([3, 1, 4, 2, 7, 6, 5, 5], 2, (0, 1, 2, 5), [[], [(4, 7)]]),
    ],
)
def test_the_best_against_the_worst(values: Any, count: int, invalid: Any, expected: Any) -> None:
    pairs = pairs_of(scored([float(value) for value in values], 4, invalid), count)
    assert pairs == expected
    labels = labels_of(pairs, 8).tolist()
    assert [labels[w] for group in expected for w, _ in group] == [1.0] * sum(map(len, expected))
    assert labels.count(0) == 8 - 2 * sum(map(len, expected)) and sum(labels) == 0


def test_a_row_stays_true_when_samples_are_counted_from_elsewhere() -> None:
    rows = torch.tensor([[10, -2, 0, 77], [12, 3, 1, 88]])
    assert both(rows).tolist() == [[10, 0, 77], [12, 1, 88], [8, 0, 77], [15, 1, 88]]
    shifted = rows.clone()
    shifted[:, 0] -= 8
    assert torch.equal(both(shifted)[:, 0], both(rows)[:, 0] - 8)


def test_winner_and_loser_share_level_and_noise_and_updates_take_whole_groups(flow: PipelinePolicy) -> None:
    algorithm, rollout = FORWARD["dpo"](noisings=3, pairs_per_group=2, updates_per_step=2), endpoints(flow, 3, 4, [1])
    updates = list(algorithm.updates(rollout, algorithm.advantages(rollout), 0, 1))
    assert sorted(len({int(row[0]) // 4 for row in rows}) for rows in updates) == [1, 2]
    rows = torch.cat(updates)
    assert len(rows) == 3 * (1 + 2 + 2) and 1 not in both(rows)[:, 0]
    values = rollout.scores.values
    assert bool((values[rows[:, 0]] > values[rows[:, 0] + rows[:, 1]]).all())
    at = algorithm.noised(flow, rollout, both(rows))
    winners, losers = at.true.noise.chunk(2)
    assert torch.equal(winners, losers) and torch.equal(*at.levels.sigma.chunk(2))


# The papers' formulas, by independent code in float64


def test_dpo_is_equation_14(policy: Any) -> None:
    algorithm = FORWARD["dpo"](beta=40.0, pairs_per_group=2, reference_weight=0.3)
    with learned(policy, []):
        rollout = endpoints(policy)
        advantages = algorithm.advantages(rollout)
        rows = next(algorithm.updates(rollout, advantages, 0, 1))
        found, figures = algorithm.losses(policy, rollout, rows, advantages[rows[:, 0]])
        parts = parts_of(policy, algorithm, rollout, both(rows))
        own, reference = square(parts["own"] - parts["v"]), square(parts["reference"] - parts["v"])
        (w, l), (rw, rl) = own.chunk(2), reference.chunk(2)  # noqa: E741
        expected = -torch.log(1 / (1 + torch.exp(40.0 / 2 * ((w - rw) - (l - rl)))))
        anchor = square(parts["own"] - parts["reference"]).view(2, -1).mean(0)
        torch.testing.assert_close(found.double(), expected + 0.3 * anchor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(figures["policy/chosen_gain"].double(), rw - w, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(figures["policy/rejected_gain"].double(), rl - l, rtol=1e-3, atol=1e-6)
        assert torch.equal(figures["policy/ranked_right"].double(), (rw - w > rl - l).double())

        def direct(errors: Tensor, others: dict[str, Tensor], _: Tensor) -> Tensor:
            gain = others["reference"] - errors
            winners, losers = gain.chunk(2)
            return -torch.log(torch.sigmoid(20.0 * (winners - losers))).mean()

        plain = FORWARD["dpo"](beta=40.0, pairs_per_group=2)
        one = gradient(plain, policy, rollout)
        assert alike(one, whole_loss(Pairwise(plain), policy, rollout, direct), 1e-4)


class Pairwise:
    """DPO whose rows are of single samples, for code that looks at one sample a row."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def updates(self, *given: Any) -> Any:
        return map(both, self.inner.updates(*given))


def test_dpo_of_two_samples_has_the_gradient_of_dgpo(policy: Any) -> None:
    beta = 40.0
    with learned(policy, []):
        rollout = endpoints(policy, groups=2, size=2)
        rollout = replace(rollout, scores=Scores(torch.tensor([-1.0, 1.0, 1.0, -1.0]), torch.ones(4, dtype=torch.bool)))
        pairs, groups = (gradient(FORWARD[name](beta=beta, levels=(0.0, 1.0)), policy, rollout) for name in ("dpo", "dgpo"))
        assert alike(pairs, beta * groups, 1e-4)  # DGPO's loss is not multiplied by beta, and has two rows a pair


UTILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "kahneman-tversky": lambda u: 1 - torch.sigmoid(u),
    "loss-averse": lambda u: 1 - torch.log(torch.sigmoid(u)),
    "risk-seeking": lambda u: 1 + torch.log(1 - torch.sigmoid(u)),
}


@pytest.mark.parametrize("utility", UTILITIES)
def test_kto_has_the_gradient_of_the_papers_loss(flow: PipelinePolicy, utility: str) -> None:
    algorithm = FORWARD["kto"](beta=30.0, utility=utility, rejected_weight=0.5)
    with learned(flow, []):
        rollout = endpoints(flow, invalid=[2])
        label = algorithm.advantages(rollout).sign().double()

        def loss(own: Tensor, others: dict[str, Tensor], rows: Tensor) -> Tensor:
            gain, y = others["reference"] - own, label[rows[:, 0]]
            centre = gain.detach().mean().clamp(min=0)
            weight = torch.where(y > 0, 1.0, 0.5)
            return (weight * UTILITIES[utility](y * 30.0 * (gain - centre))).mean()

        assert alike(gradient(algorithm, flow, rollout), whole_loss(algorithm, flow, rollout, loss), 1e-4)


def test_kto_measures_from_a_gain_of_all_and_never_from_a_loss(flow: PipelinePolicy) -> None:
    """z is above 0 where the policy is better than the reference on the whole, and else 0."""
    algorithm, slopes = FORWARD["kto"](beta=1.0), []
    algorithm.slope = lambda gain: slopes.append(gain) or gain.sigmoid() * (-gain).sigmoid()  # type: ignore[attr-defined, func-returns-value]
    rollout = endpoints(flow)
    advantages = algorithm.advantages(rollout)
    rows = next(algorithm.updates(rollout, advantages, 0, 1))
    for by in (0.1, -0.1):
        gains = torch.linspace(0, by, len(rows))
        algorithm.over = lambda rows, measure, gains=gains: gains  # type: ignore[method-assign, misc]
        algorithm.weights(flow, rollout, rows, advantages)
        centre = max(0.0, gains.double().mean().item())
        torch.testing.assert_close(slopes[-1], advantages[rows[:, 0]].sign().double() * (gains.double() - centre))


def test_kto_labels_by_the_sign_of_the_advantage_and_by_the_label_of_a_single_image(flow: PipelinePolicy) -> None:
    algorithm = FORWARD["kto"]()
    assert algorithm.advantages(scored([3.0, 1.0, 2.0, 2.0], 2)).sign().tolist() == [1, -1, 0, 0]
    assert algorithm.advantages(scored([1.0, 1.0, 0.0], 1)).tolist() == [1, 1, -1]


def trajectories(policy: Any, invalid: Sequence[int] = ()) -> Rollout:
    sampling = SamplingConfig(num_steps=3, guidance=2.0, batch_size=4)
    prompts = [Prompt(text) for text in ("a cat", "a dog") for _ in range(4)]
    found = collect(policy, brightness, prompts, sampling, 0, "test", 1, group_size=4)
    valid = torch.tensor([i not in invalid for i in range(8)])
    return replace(found, scores=Scores(torch.randn(8, generator=torch.Generator().manual_seed(3)), valid))


def test_d3po_is_the_papers_loss_step_by_step(make_policy: Any) -> None:
    policy, algorithm = make_policy(lora_rank=2), d3po(beta=0.7, clip_range=0.02, pairs_per_group=2)
    with learned(policy, []):
        rollout = trajectories(policy)
        advantages = algorithm.advantages(rollout)
        (rows,) = algorithm.updates(rollout, advantages, 0, 1)
        stochastic = (rollout.table.fresh > 0).nonzero().flatten().tolist()
        assert len(rows) == 4 * len(stochastic) and set(rows[:, 2].tolist()) == set(stochastic)
        found, figures = algorithm.losses(policy, rollout, rows, advantages[rows[:, 0]])

        def log_prob(sample: int, step: int) -> Tensor:
            """Of one step, by the table's own numbers."""
            table, x = rollout.table, rollout.latents[sample : sample + 1, step]
            with torch.no_grad():
                x0, noise = policy.denoise(x, table.grid.levels[torch.tensor([step])], [rollout.prompts[sample]], 2.0)
            mean = table.mean(torch.tensor([step]), x0, noise).double()
            std = table.fresh[step].double()
            gap = (rollout.latents[sample, step + 1].double() - mean) / std
            return (-0.5 * gap**2 - std.log() - 0.5 * np.log(2 * np.pi)).mean()

        clipped = []
        for row, loss in zip(rows.tolist(), found.tolist(), strict=True):
            ratios = []
            for sample in (row[0], row[0] + row[1]):
                own = log_prob(sample, row[2])
                with policy.reference():
                    ratios.append((own - log_prob(sample, row[2])).exp())
            kept = [ratio.clamp(0.98, 1.02) for ratio in ratios]
            clipped += [bool(one != other) for one, other in zip(ratios, kept, strict=True)]
            expected = -torch.log(torch.sigmoid(0.7 * kept[0].log() - 0.7 * kept[1].log()))
            assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert 0 < sum(clipped) < len(clipped) and figures["policy/clip_fraction"].mean() == sum(clipped) / len(clipped)
        assert figures["ratio_gap"].max() < 1e-5, "the samples are the policy's"


def test_d3pos_updates_are_cut_freely_and_invalid_samples_leave_exactly(make_policy: Any) -> None:
    policy = make_policy(lora_rank=2)
    with learned(policy, []):
        rollout = trajectories(policy, invalid=[1, 6])
        whole, cut = (gradient(d3po(micro_batch_size=size), policy, rollout) for size in (64, 3))
        assert alike(cut, whole, 1e-5)
        spoilt = rollout.latents.clone()
        spoilt[[1, 6]] = float("inf")
        assert torch.equal(cut, gradient(d3po(), policy, replace(rollout, latents=spoilt)))


# Alarms


def test_chosen_and_rejected_that_both_fall_are_an_alarm() -> None:
    config = TrainConfig(samples_per_prompt=4, algorithm=DPOConfig())
    healthy = {"reward/mean": 0.0, "reward/std": 1.0, "reward/invalid": 0, "policy/denoising_loss": 0.1}
    falls = [(-0.01, -0.02), (0.01, -0.02), *[(-0.01, -0.02)] * PATIENCE, (-1e-5, -0.02)]
    watch, found = Watch(config), []
    for step, (chosen, rejected) in enumerate(falls, 1):
        line = healthy | {"step": step, "policy/chosen_gain": chosen, "policy/rejected_gain": rejected}
        found += [(alarm.step, alarm.kind, "raise algorithm.beta" in alarm.message) for alarm in watch.see(line)]
    assert found == [(2 + PATIENCE, "both-falling", True)]


# Bad settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": DPOConfig(), "samples_per_prompt": 1}, "set samples_per_prompt above 1"),
        ({"algorithm": KTOConfig(normalisation="batch"), "samples_per_prompt": 1}, "set samples_per_prompt above 1"),
        ({"algorithm": D3POConfig(), "samples_per_prompt": 1}, "set samples_per_prompt above 1"),
        (
            {"algorithm": DPOConfig(pairs_per_group=2), "samples_per_prompt": 3},
            "3 samples of a prompt .* do not make .* 2 pairs",
        ),
        ({"algorithm": D3POConfig(updates_per_step=3), "samples_per_prompt": 2, "prompts_per_step": 2}, "belong to one update"),
        ({"algorithm": D3POConfig(), "preferences": "judged"}, "preferences are learnt from by .* not by d3po"),
        ({"algorithm": DPOConfig(), "preferences": "judged", "max_queries": 9}, "preferences need no score"),
        ({"max_broken_preferences": -1}, "max_broken_preferences must not be negative"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPOConfig(beta=0.0),
        lambda: DPOConfig(pairs_per_group=0),
        lambda: KTOConfig(beta=-1.0),
        lambda: KTOConfig(rejected_weight=-1.0),
        lambda: D3POConfig(clip_range=1.0),
        lambda: D3POConfig(updates_per_step=0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize("algorithm", [DPOConfig(), KTOConfig(), D3POConfig()])
def test_full_fine_tuning_keeps_no_reference_to_compare_with(make_policy: Any, tmp_path: Path, algorithm: Any) -> None:
    sampling = SamplingConfig(num_steps=2)
    config = small(tmp_path / "run", algorithm, policy=PolicyConfig(training="full"), sampling=sampling)
    with pytest.raises(UserError, match="leans on the reference model: full fine-tuning keeps no reference"):
        train(config, policy=make_policy(lora_rank=None), reward=brightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


# From disk


def picture(seed: int, bright: bool) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(128 * bright, 128 + 127 * bright, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pairs_in(folder: Path, count: int = 6, suffix: str = ".jsonl") -> Path:
    """Bright pictures are chosen, dark ones rejected."""
    (folder / "deep").mkdir(parents=True)
    rows = []
    for i in range(count):
        picture(i, True).save(folder / f"{i}.png")
        picture(100 + i, False).save(folder / "deep" / f"{i}.webp", lossless=True)
        rows.append({"chosen": f"{i}.png", "rejected": f"deep/{i}.webp", "prompt": f"a cat, number {i}"})
    return written(folder, rows, suffix)


def labelled_in(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        picture(i, i % 3 > 0).save(folder / f"{i}.png")
    return written(folder, [{"file_name": f"{i}.png", "label": i % 3 > 0, "prompt": "a cat"} for i in range(count)])


def written(folder: Path, rows: Sequence[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    lines = [json.dumps(row) for row in rows]
    if suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (folder / f"metadata{suffix}").write_text("\n".join(lines) + "\n")
    return folder


def pick_a_pic(file: Path, labels: Sequence[float | None] = (1, 0, 0.5, None, 1)) -> Path:
    """jpg_0 is bright where it was chosen."""
    rows = []
    for i, label in enumerate(labels):
        names = (file.parent / f"{file.stem}_{i}_0.jpg", file.parent / f"{file.stem}_{i}_1.jpg")
        for name, bright in zip(names, (label != 0, label == 0), strict=True):
            picture(i, bright).save(name, quality=95)
        images = {f"jpg_{k}": name.read_bytes() for k, name in enumerate(names)}
        rows.append({**images, "label_0": label, "caption": f"a dog, number {i}", "user_id": i})
    Dataset.from_list(rows).to_parquet(str(file))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", "dataset"])
def test_pairs_are_read_from_folders_and_from_pick_a_pics_columns(tmp_path: Path, make_policy: Any, suffix: str) -> None:
    if suffix in (".parquet", "dataset"):
        (tmp_path / "data").mkdir()
        source = str(pick_a_pic(tmp_path / "data" / "train.parquet"))
        for picture_beside in (tmp_path / "data").glob("*.jpg"):
            picture_beside.unlink()
        source = f"dataset:{tmp_path / 'data'}:train" if suffix == "dataset" else source
    else:
        source = str(pairs_in(tmp_path / "data", suffix=suffix))
    found = load_preferences(source)
    assert found is not None and found.size == 2
    assert (len(found), found.ties) == ((3, 2) if suffix in (".parquet", "dataset") else (6, 0))
    judged, images = found.draw(1)
    assert judged.prompt == ("a dog, number 1" if found.ties else "a cat, number 1") and judged.scores == (1.0, 0.0)
    assert np.array(images[0]).mean() > np.array(images[1]).mean() + 50
    config = TrainConfig(prompts_per_step=5, preferences=source, algorithm=DPOConfig())
    rollout = JudgedImages(found, config).rollout(make_policy(), 0, 1)
    assert rollout.images.shape == (10, 3, 32, 32) and rollout.latents.shape == (10, 1, 4, 4, 4)
    assert rollout.scores.values.tolist() == [1.0, 0.0] * 5 and rollout.group_size == 2
    assert bool((rollout.images[::2].mean((1, 2, 3)) > rollout.images[1::2].mean((1, 2, 3)) + 0.2).all())
    again = JudgedImages(found, replace(config, prompts_per_step=2)).rollout(make_policy(), 0, 1)
    assert torch.equal(again.images, rollout.images[:4]), "by address"
    assert not torch.equal(JudgedImages(found, config).rollout(make_policy(), 0, 2).images, rollout.images)


OPTIONS = """train --sampling.num-steps 2 --sampling.guidance 1 --evaluation.num-samples 2 --evaluation.every 0 --steps 3
    --prompts-per-step 4 --checkpoint.every 1 --algorithm.noisings 2 --policy.device cpu --prompts things
    --optimizer.learning-rate 1e-2"""


def command(model: Path, source: Path, name: str, run_dir: Path, *more: str) -> list[str]:
    model_and_data = ["--model", str(model), "--preferences", str(source), "--run-dir", str(run_dir)]
    return [*OPTIONS.split(), "--algorithm.name", name, *model_and_data, *more]


@pytest.mark.parametrize(("name", "kind"), [("dpo", "folder"), ("pso-offline", "parquet"), ("kto", "labelled")])
def test_a_run_on_judged_images_that_is_killed_ends_as_if_it_had_not_been(
    tiny_folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    source = {
        "folder": lambda: pairs_in(tmp_path / "data"),
        "parquet": lambda: pick_a_pic(tmp_path / "data.parquet"),
        "labelled": lambda: labelled_in(tmp_path / "data"),
    }[kind]()
    if kind == "folder":  # one is broken, and passed over
        (source / "3.png").write_bytes((source / "3.png").read_bytes()[:500])
    broken = ["--max-broken-preferences", "1"]
    assert finish(command(tiny_folder, source, name, tmp_path / "run", *broken), tmp_path / "log") == 0, (
        tmp_path / "log"
    ).read_text()
    halves = command(tiny_folder, source, name, tmp_path / "halves", *broken)
    assert finish(halves, tmp_path / "log", "die_at:write:4") != 0
    assert finish(halves, tmp_path / "log") == 0 and "going on after step" in (tmp_path / "log").read_text()
    whole, killed = what_it_made(tmp_path / "run"), what_it_made(tmp_path / "halves")
    assert whole == killed
    line = whole["metrics"][-1]
    assert line["queries"] == 0 and line["preferences/ties"] == (2 if kind == "parquet" else 0)
    assert (line["policy/ranked_right"], line["preferences/broken"]) != (0.5, 0) and line["grad_norm"] > 0


def test_the_doctor_counts_no_sampling_where_images_are_judged(make_policy: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", DPOConfig(noisings=1), preferences=str(pairs_in(tmp_path / "data")))
    found = {each.check: each for each in diagnose(config, make_policy(), brightness, ["a cat", "a dog"])}
    assert {each.verdict for each in found.values()} <= {"pass", "warn"}
    assert "judged entries a step, from disk" in found["groups"].said
    assert "a step (updates alone; images are read beside it)" in found["time"].said


def test_labels_on_two_processes_teach_what_they_do_on_one(tiny_folder: Path, tmp_path: Path) -> None:
    """The gain of the whole update that KTO measures from is of both."""
    (tmp_path / "tiny").symlink_to(tiny_folder)
    labelled_in(tmp_path / "data")
    found = []
    for count in (1, 2):
        options = command(
            Path("./tiny"), Path("data"), "kto", Path(f"run_{count}"), "--steps", "2", "--sampling.batch-size", "2"
        )
        finish_together(options, tmp_path, count)
        checkpoint = folder_of(tmp_path / f"run_{count}", 2)
        found.append(what_it_made(tmp_path / f"run_{count}") | {"there": checkpoint.is_dir()})
    one, two = found
    assert one["there"] and one["files"]["policy.safetensors"] == two["files"]["policy.safetensors"]
    assert one["metrics"][-1]["policy/chosen_gain"] == pytest.approx(two["metrics"][-1]["policy/chosen_gain"], rel=1e-4)


def test_a_checkpoint_is_of_its_judgements(make_policy: Any, tmp_path: Path) -> None:
    source = pairs_in(tmp_path / "data")
    config = small(tmp_path / "run", DPOConfig(noisings=1), preferences=str(source), steps=1)
    train(config, policy=make_policy(), reward=brightness, prompts=["a cat"])
    written(source, [{"chosen": "0.png", "rejected": "1.png", "prompt": "a dog"}])
    with pytest.raises(UserError, match="preferences holds other judgements than the run began with"):
        train(replace(config, steps=2), policy=make_policy(), reward=brightness, prompts=["a cat"])


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("dpo", None, "no such folder"),
        ("dpo", {"chosen": "0.png", "prompt": "a cat"}, "jsonl:1 has no rejected"),
        ("dpo", {"chosen": "0.png", "rejected": "1.png"}, "jsonl:1 has no prompt"),
        ("dpo", {"chosen": "0.png", "rejected": "1.png", "prompt": " "}, "jsonl:1 has no prompt"),
        ("dpo", {"chosen": "0.png", "rejected": "0.png", "prompt": "a cat"}, "a pair needs a winner"),
        ("dpo", {"chosen": "0.png", "rejected": "9.png", "prompt": "a cat"}, "rejected '9.png' is no file"),
        ("dpo", {"chosen": "../0.png", "rejected": "1.png", "prompt": "a cat"}, "is outside of the folder"),
        ("dpo", {"chosen": "0.png", "rejected": "broken.png", "prompt": "a cat"}, "1 images do not decode"),
        ("kto", {"file_name": "0.png", "label": 2, "prompt": "a cat"}, "the label must be 1 or 0, not 2"),
        ("kto", {"file_name": "0.png", "label": 1, "prompt": "a cat"}, "all labels are alike"),
        ("ddpo", {"chosen": "0.png", "rejected": "1.png", "prompt": "a cat"}, "kto and pso-offline, not by ddpo"),
    ],
)
def test_bad_judgements_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, row: dict[str, Any] | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if row is not None:
        written(pairs_in(tmp_path / "data", count=2), [row])
        picture(1, True).save(tmp_path / "data" / "1.png")
        (tmp_path / "data" / "broken.png").write_bytes(b"nothing")
    try:
        code = main(["train", "--preferences", "data", "--algorithm.name", name, "--run-dir", "run"])
    except SystemExit as error:  # tyro's, of a value that does not fit another
        code = int(error.code or 0)
    assert code == 2 and said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "said"), [((0.5, None), "none of 2 pairs has a winner"), ((1, 0.7), "row 1: label_0 must be 0, 1, or 0.5")]
)
def test_pairs_without_a_winner(tmp_path: Path, labels: Sequence[float | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_preferences(str(pick_a_pic(tmp_path / "data.parquet", labels)))


def test_other_columns_and_labels_for_dpo(tmp_path: Path, make_policy: Any) -> None:
    Dataset.from_list([{"jpg_0": b"", "caption": "a cat"}]).to_parquet(str(tmp_path / "data.parquet"))
    with pytest.raises(UserError, match="has no column jpg_1, label_0"):
        load_preferences(str(tmp_path / "data.parquet"))
    config = small(tmp_path / "run", DPOConfig(), preferences=str(labelled_in(tmp_path / "single")))
    with pytest.raises(UserError, match=r"single images with a label: choose --algorithm\.name kto"):
        train(config, policy=make_policy(), reward=brightness, prompts=["a cat"])


# Latents of images


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_pipeline_encodes_what_it_decodes(name: str) -> None:
    """The same pictures that its VAE makes of them alone; and where the two differ, it says so."""
    policy = PipelinePolicy(tiny.build(name), steps=2, guidance=1.0, arguments=tiny.call_of(name), lora_rank=2)
    images = torch.rand(3, *policy.sample_shape, generator=torch.Generator().manual_seed(0))
    latents = policy.encode(images)
    assert latents.shape == (3, *policy.latent_shape)
    vae = policy.pipeline.vae
    with torch.no_grad():
        alone = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5
    decoded = policy.decode(latents, [Prompt("a cat")] * 3)
    torch.testing.assert_close(decoded, alone.clamp(0, 1), atol=1e-4, rtol=0)
    assert decoded.std() > 0.02, "not grey"
    own = policy.decode
    policy.decode = lambda latents, prompts: own(latents * 1.2, prompts)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="makes no latents of an image that it would decode to the same"):
        policy.encode(images)
