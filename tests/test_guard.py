"""What is measured beside the reward, against closed forms; the guard's rule on made-up histories; whole runs that it stops."""

import json
import math
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import finish, tiny_run, what_it_made
from safetensors.torch import load_file
from torch import Tensor

from diffusionrl import TrainConfig, UserError
from diffusionrl.config import EvaluationConfig, GuardConfig, SamplingConfig
from diffusionrl.config.judges import CLIPScoreConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.evaluation.fixed_seed import evaluate, mean_and_error
from diffusionrl.evaluation.guard import Verdict, judge
from diffusionrl.evaluation.measures import distance_from_reference, diversity, image_statistics, mean_distance, vendi_score
from diffusionrl.policies import StableDiffusionPolicy
from diffusionrl.report.picture import draw_before_after
from diffusionrl.rewards.clip import load_embedder
from diffusionrl.runs import checkpoint
from diffusionrl.runs.lines import read_lines, read_metrics
from diffusionrl.sampling.rollout import Rollout, predict
from diffusionrl.training.monitor import compare, paired, read_samples
from diffusionrl.transitions import SAMPLERS, NoiseLevels, variance_preserving_grid

# Measures


def test_the_vendi_score_counts_what_is_different() -> None:
    assert vendi_score(torch.eye(8)[[3] * 5]) == pytest.approx(1)
    assert vendi_score(torch.eye(8)[:5]) == pytest.approx(5)
    assert vendi_score(torch.eye(8)[[0, 0, 1, 1]]) == pytest.approx(2)
    angle = 0.7  # two samples: eigenvalues (1 ± cos) / 2
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    shares = [(1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2]
    assert vendi_score(pair) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)
    assert math.isnan(vendi_score(torch.tensor([[1.0, 0.0], [math.nan, 0.0]])))


def test_diversity_is_among_the_images_of_one_prompt() -> None:
    embeddings = torch.eye(8)[[0, 0, 0, 1, 5]]
    assert mean_distance(embeddings[:2]) == pytest.approx(0)
    assert mean_distance(embeddings[1:4]) == pytest.approx(2 / 3)
    found = diversity(embeddings, ["a cat", "a dog", "a cat", "a dog", "an ant"])  # cats alike, dogs not, one ant
    assert found["diversity"] == pytest.approx(0.5)
    assert found["vendi"] == pytest.approx(1.5)
    assert diversity(embeddings, list("abcde")) == {}


def test_image_statistics_of_simple_images() -> None:
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    grey, board = torch.full((16, 16), 0.5), ((rows + columns) % 2).float()
    slow, fast = (0.5 + 0.25 * torch.cos(2 * math.pi * k / 16 * columns) for k in (2, 6))
    images = torch.stack([torch.stack([each] * 3) for each in (grey, board, slow, fast)])
    red = torch.stack([grey, torch.zeros(16, 16), torch.zeros(16, 16)])
    found = image_statistics(torch.cat([images, red[None], torch.zeros(1, 3, 16, 16)]))
    torch.testing.assert_close(found["saturation"], torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(found["high_frequency"], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]), atol=1e-4, rtol=0)
    assert found["sharpness"][[0, 4, 5]].abs().max() < 1e-10
    assert found["sharpness"][1] == pytest.approx(16, rel=1e-3)  # the Laplacian is 4 on black and -4 on white
    assert found["sharpness"][3] > 10 * found["sharpness"][2]


class Shifted:
    """A policy whose predicted noise differs from the reference's by a constant."""

    device, latent_shape = torch.device("cpu"), (1, 2, 2)

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def denoise(self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float) -> Any:
        return torch.zeros_like(x), torch.ones_like(x) + self.shift

    @contextmanager
    def reference(self) -> Iterator[None]:
        before, self.shift = self.shift, 0.0
        yield
        self.shift = before


def rollout_of(policy: Any, sampler: str, eta: float, count: int, steps: int = 4) -> Rollout:
    grid = variance_preserving_grid(torch.linspace(0.999, 0.01, 1000), steps)
    latents = torch.randn(count, steps + 1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(count, 0)
    return Rollout(SAMPLERS[sampler](grid, eta), [Prompt("a cat")] * count, latents, empty, empty, SimpleNamespace(), {})  # type: ignore[arg-type]


NO_DISTANCE = {"prediction_distance": 0.0, "prediction_norm": 1.0, "kl_per_step": 0.0}


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_distance_from_the_reference_of_a_shifted_mean(batch_size: int) -> None:
    policy: Any = Shifted(0.1)
    rollout = rollout_of(policy, "ddim", 1.0, 8)
    table = rollout.table
    found = distance_from_reference(policy, rollout, 1.0, batch_size)
    closed_form = (4 * (0.1 * table.kept) ** 2 / (2 * table.fresh**2)).mean().item()  # every step twice, 4 dimensions
    assert found["kl_per_step"] == pytest.approx(closed_form, rel=1e-5)
    assert found["prediction_distance"] == pytest.approx(0.1, rel=1e-5)
    assert found["prediction_norm"] == pytest.approx(1.1, rel=1e-5)
    assert distance_from_reference(Shifted(0.0), rollout, 1.0, 100) == NO_DISTANCE
    without_noise = distance_from_reference(policy, rollout_of(policy, "ode", 0.0, 8), 1.0, 100)
    assert without_noise.keys() == {"prediction_distance", "prediction_norm"}, "a deterministic step has no density"


def test_an_untouched_policy_is_its_reference(load_tiny: Any, make_policy: Any) -> None:
    def measure(policy: StableDiffusionPolicy) -> tuple[dict[str, float], Rollout]:
        sampling = SamplingConfig(num_steps=3, guidance=2.0, batch_size=4)
        found = evaluate(policy, grey, [Prompt("a cat"), Prompt("a dog")], 6, sampling, 0, needs="trajectories")
        return distance_from_reference(policy, found.rollout, 2.0, 4), found.rollout

    assert measure(StableDiffusionPolicy(load_tiny()))[0] == NO_DISTANCE
    policy = make_policy()
    found, rollout = measure(policy)
    assert found["kl_per_step"] > 0
    rows = torch.arange(6) * 3 // 6
    x = rollout.latents[torch.arange(6), rows]
    with torch.no_grad():
        noise = predict(policy, rollout.table, x, rows, rollout.prompts, 2.0)[1]
        with policy.reference():
            reference = predict(policy, rollout.table, x, rows, rollout.prompts, 2.0)[1]
    ratio = (noise - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    assert found["prediction_distance"] == pytest.approx(ratio.mean().item(), rel=1e-4)


def grey(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


def test_nothing_is_embedded_unasked() -> None:
    auto = CLIPScoreConfig(model="auto")
    assert load_embedder(auto, "some/model") is None
    assert load_embedder(CLIPScoreConfig(model="none"), "emoji") is None
    embed = load_embedder(auto, "emoji")
    assert embed is not None and embed(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).shape[0] == 2


def test_samples_per_prompt(make_policy: Any) -> None:
    prompts = [Prompt("a cat"), Prompt("a dog")]
    found = evaluate(make_policy(), grey, prompts, 7, SamplingConfig(num_steps=2), 0, samples_per_prompt=3)
    assert [prompt.text[2:] for prompt in found.rollout.prompts] == ["cat"] * 3 + ["dog"] * 3 + ["cat"]


# Comparison of evaluations


def test_paired_differences() -> None:
    then, noise = torch.arange(20.0), torch.tensor([1.0, -1.0] * 10)
    mean, error = paired(then + 2 + noise, then)
    assert mean == pytest.approx(2)
    assert error == pytest.approx(noise.std().item() / 20**0.5)
    one_missing = then.clone()
    one_missing[3] = math.nan
    assert paired(one_missing + 2, then)[0] == pytest.approx(2)
    for now, before in [(then[:5], then[:5]), (then, then[:19]), (then, None), (then * math.nan, then)]:
        assert all(math.isnan(number) for number in paired(now, before))


Series = Sequence[tuple[Tensor, Tensor]]


def history(series: Series) -> list[dict[str, Any]]:
    """The metrics of evaluations whose samples have these rewards and these scores of the held-out reward "held"."""
    store = {step: {"reward": reward, "held": held} for step, (reward, held) in enumerate(series)}
    lines: list[dict[str, Any]] = []
    for step, now in store.items():
        line: dict[str, Any] = {"step": step}
        for name, values in now.items():
            line[f"eval/{name}"], line[f"eval/{name}_se"] = mean_and_error(values)
        line |= compare(now, lines, store.__getitem__, ["held"])
        lines.append({key: value if math.isfinite(value) else None for key, value in line.items()})
    return lines


def replay(lines: Sequence[dict[str, Any]], config: GuardConfig | None = None) -> list[Verdict]:
    return [judge(lines[: i + 1], ["held"], config or GuardConfig()) for i in range(len(lines))]


def noise(seed: int, count: int = 64) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def parting(falls: Sequence[float], rises: Sequence[float] | None = None) -> Series:
    """Samples that differ from the first evaluation by a little noise, and by so much on average."""
    base = noise(0)
    rises = rises or [0.1 * i for i in range(len(falls))]
    return [(base + rise, base - fall + 0.1 * noise(100 + i)) for i, (fall, rise) in enumerate(zip(falls, rises, strict=True))]


# The rule


def test_the_guard_speaks_when_reward_and_held_out_score_part() -> None:
    lines = history(parting([0, 0, 0, 0.9, 1.0, 1.1, 1.2]))
    verdicts = replay(lines, GuardConfig(stop=True))
    assert [v.streak for v in verdicts] == [0, 0, 0, 1, 2, 3, 4]
    assert [v.alarm for v in verdicts] == [None] * 5 + ["reward-hacking", None], "once"
    assert [v.stop for v in verdicts] == [False] * 5 + [True, True]
    assert verdicts[5].best == 2, "the highest reward before the score fell"
    assert verdicts[5].fallen == ("held",)
    beyond = "3 standard errors in 3 evaluations in a row", "0.8 standard deviations between images"
    for said in ("held is below its peak of step", *beyond, "Best before: step 2"):
        assert said in verdicts[5].message
    assert not any(v.stop for v in replay(lines)), "only if asked"


def test_a_small_fall_counts_for_the_streak_and_stops_nothing() -> None:
    verdicts = replay(history(parting([0, 0.3, 0.4, 0.5, 0.6, 0.9, 0.6, 0.9, 0, 0.9, 0.9, 0.9])))
    assert [v.streak for v in verdicts] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert [bool(v.fallen) for v in verdicts] == [False] * 5 + [True, False, True, False] + [True] * 3
    assert [i for i, v in enumerate(verdicts) if v.alarm] == [5, 11], "once in a streak"
    assert [v.best for v in verdicts[:9]] == [0, 1, 2, 3, 4, 4, 6, 6, 8], "the highest reward before a fall that matters"


def test_a_score_that_recovers_begins_a_new_streak() -> None:
    verdicts = replay(history(parting([0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1])))
    assert [v.streak for v in verdicts] == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert [i for i, v in enumerate(verdicts) if v.alarm] == [6, 10]
    assert verdicts[-1].best == 7


def test_where_the_reward_falls_too_it_is_another_alarm() -> None:
    verdicts = replay(history(parting([0, 1, 1, 1], rises=[0, -0.1, -0.2, -0.3])))
    assert verdicts[-1].alarm == "held-out-falls"
    assert verdicts[-1].best == 0


def test_a_rising_or_flat_held_out_score_is_left_alone() -> None:
    for falls in ([-0.1 * i for i in range(12)], [0.0] * 12):
        assert not any(v.fallen for v in replay(history(parting(falls))))
    base = noise(0)
    flat = replay(history([(base + 0.1 * i, base) for i in range(12)]))  # to the bit: a standard error of 0
    assert not any(v.fallen for v in flat) and flat[-1].best == 11
    sunk = replay(history([(base, base - float(i > 0)) for i in range(4)]))
    assert sunk[-1].alarm is not None, "all samples alike: no noise at all"


@pytest.mark.parametrize("kept", [0.0, 0.9, 1.0])
def test_noise_alone_seldom_triggers(kept: float) -> None:
    """False alarms in 20 evaluations of 64 samples whose scores wander and lead nowhere: by noise that is new every time, that
    stays in part, and that adds up."""
    alarms, runs = 0, 100
    for run in range(runs):
        draws = torch.randn(20, 64, generator=torch.Generator().manual_seed(run))
        wander, series = torch.zeros(64), []
        for draw in draws:
            wander = kept * wander + draw
            series.append((draws[0], draws[0] + wander))
        alarms += any(v.alarm for v in replay(history(series), GuardConfig(drop=0)))
    assert alarms <= 0.03 * runs


def test_missing_scores_are_passed_over() -> None:
    series = list(parting([0, 0, 1, 1, 1, 1]))
    gone = torch.full((64,), math.nan)
    series[3] = (series[3][0], gone)
    series[4] = (gone, series[4][1])
    verdicts = replay(history(series))
    assert [v.streak for v in verdicts] == [0, 0, 1, 1, 2, 3]
    assert [i for i, v in enumerate(verdicts) if v.alarm] == [5]
    first_gone = replay(history([(series[0][0], gone), *series]))
    assert [v.streak for v in first_gone] == [0, 0, 0, 1, 1, 2, 3]
    never = replay(history([(reward, gone) for reward, _ in series]))
    assert never[-1] == Verdict()
    no_reward = replay(history([(gone, held) for _, held in series]))
    assert no_reward[-1].alarm == "held-out-falls" and no_reward[-1].best is None


def test_knobs() -> None:
    lines = history(parting([0, 0.02, 0.5]))
    assert replay(lines, GuardConfig(patience=1, drop=0.3))[-1].alarm == "reward-hacking"
    assert replay(lines, GuardConfig(patience=1, drop=0.3, noise=100.0))[-1].alarm is None
    assert replay(lines, GuardConfig(patience=1))[-1].alarm is None
    assert judge(lines, [], GuardConfig()) == Verdict()
    few = history([(reward[:9], held[:9]) for reward, held in parting([0, 5, 5, 5, 5])])
    assert not any(v.fallen for v in replay(few)), "fewer than ten samples have no noise to speak of"


@pytest.mark.parametrize(
    ("guard", "evaluation", "said"),
    [
        (GuardConfig(stop=True), EvaluationConfig(), "needs something to watch"),
        (GuardConfig(stop=True), EvaluationConfig(held_out=("clip-score",), every=0), "needs something to watch"),
        (GuardConfig(stop=True), EvaluationConfig(held_out=("clip-score",), num_samples=9), "needs something to watch"),
        (GuardConfig(watch=("clip-scor",)), EvaluationConfig(held_out=("clip-score",)), "names 'clip-scor'"),
    ],
)
def test_settings_that_cannot_work(guard: GuardConfig, evaluation: EvaluationConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(guard=guard, evaluation=evaluation)
    with pytest.raises(UserError, match="must be positive"):
        GuardConfig(noise=0)
    with pytest.raises(UserError, match="at least 1"):
        GuardConfig(patience=0)
    with pytest.raises(UserError, match="must not be negative"):
        GuardConfig(drop=-0.1)


# Whole runs: what is held out is the reward with the other sign, so the two cannot but part


def guarded(model: Path, run_dir: Path, *more: str) -> list[str]:
    options = """--steps 4 --evaluation.every 1 --evaluation.num-samples 10 --sampling.batch-size 10
        --evaluation.held-out compressibility
        --guard.patience 1 --guard.noise 0.01 --guard.drop 0 --optimizer.learning-rate 1e-2"""
    return tiny_run(model, run_dir, *options.split(), *more)


@pytest.fixture(scope="module")
def watched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the guard on that was neither stopped nor disturbed."""
    folder = tmp_path_factory.mktemp("watched")
    assert finish(guarded(tiny_folder, folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


def test_a_run_writes_its_measures_and_alarms(watched: Path) -> None:
    lines = read_metrics(watched)
    assert all(line.keys() >= {"eval/sharpness", "eval/kl_per_step", "guard/streak", "time/measures"} for line in lines)
    assert lines[0]["eval/kl_per_step"] == 0 and lines[-1]["eval/kl_per_step"] > 0
    assert "eval/diversity" not in lines[0], "no embeddings unasked"
    first, last = (read_samples(watched, step) for step in (0, 4))
    assert lines[-1]["eval/reward_change"] == pytest.approx((last["reward"] - first["reward"]).mean().item())
    alarms = read_lines(watched / "alarms.jsonl")
    assert alarms, "reward and held-out score are opposites"
    streaks = {line["step"]: line["guard/streak"] for line in lines}
    assert [alarm["step"] for alarm in alarms] == [step for step, streak in streaks.items() if streak == 1]
    assert all(alarm["message"].startswith("compressibility is below its peak") for alarm in alarms)
    assert "warning: step" in (watched.parent / "log").read_text()
    best = lines[-1]["guard/best_step"]
    checkpoint.verify(checkpoint.folder_of(watched, best))


@pytest.mark.parametrize("place", ["write:3", "prune:2"])
def test_a_killed_run_is_resumed_to_the_bit_with_the_guard_on(
    tiny_folder: Path, tmp_path: Path, watched: Path, place: str
) -> None:
    run_dir = tmp_path / "run"
    assert finish(guarded(tiny_folder, run_dir), tmp_path / "log", f"die_at:{place}") == -signal.SIGKILL
    assert finish(guarded(tiny_folder, run_dir), tmp_path / "log") == 0
    assert what_it_made(run_dir) == what_it_made(watched)
    assert (run_dir / "alarms.jsonl").read_text() == (watched / "alarms.jsonl").read_text(), "each once"


def test_the_guard_stops_a_run_and_exports_its_best(tiny_folder: Path, tmp_path: Path, watched: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = guarded(tiny_folder, run_dir, "--guard.stop")
    assert finish(command, log) == 0, log.read_text()
    stopped_at = read_lines(watched / "alarms.jsonl")[0]["step"]
    ending = json.loads((run_dir / "finished.json").read_text())
    assert ending["steps"] == stopped_at and "compressibility is below its peak" in ending["stopped"]
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(stopped_at + 1))
    best = ending["exported_step"]
    assert best < stopped_at
    kept = load_file(checkpoint.folder_of(run_dir, best) / "policy.safetensors").values()
    exported = load_file(run_dir / "export" / "pytorch_lora_weights.safetensors").values()
    assert sorted(w.sum().item() for w in kept) == pytest.approx(sorted(w.sum().item() for w in exported))
    assert sum(w.double().square().sum() for w in kept) == sum(w.double().square().sum() for w in exported)
    said = log.read_text()
    assert f"export/ holds step {best}" in said
    assert draw_before_after(run_dir).is_file(), "which such a run draws as well"
    made = what_it_made(run_dir)
    assert finish(command, log) == 0
    assert f"is finished: the guard stopped it at step {stopped_at}" in log.read_text()
    assert what_it_made(run_dir) == made
    if stopped_at < 4:
        assert finish(guarded(tiny_folder, run_dir, "--guard.no-stop"), log) == 0
        assert what_it_made(run_dir) == what_it_made(watched), "it goes on as if it had not been stopped"


def test_a_stop_survives_a_kill(tiny_folder: Path, tmp_path: Path) -> None:
    """After the last checkpoint, and before the run is exported and finished."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(guarded(tiny_folder, run_dir, "--guard.stop"), log) == 0
    names = ("alarms.jsonl", "finished.json", "metrics.jsonl")
    made, texts = what_it_made(run_dir), [(run_dir / name).read_text() for name in names]
    (run_dir / "finished.json").unlink()
    shutil.rmtree(run_dir / "export")
    assert finish(guarded(tiny_folder, run_dir, "--guard.stop"), log) == 0, log.read_text()
    assert what_it_made(run_dir) == made
    assert [(run_dir / name).read_text() for name in names] == texts


def test_a_best_checkpoint_that_is_gone_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(guarded(tiny_folder, run_dir, "--guard.stop"), log) == 0
    ending = json.loads((run_dir / "finished.json").read_text())
    (run_dir / "finished.json").unlink()
    (checkpoint.folder_of(run_dir, ending["exported_step"]) / "policy.safetensors").unlink()
    assert finish(guarded(tiny_folder, run_dir, "--guard.stop"), log) == 1
    assert "the guard's best weights cannot be exported" in log.read_text()
    assert finish(guarded(tiny_folder, run_dir, "--guard.no-stop"), log) == 0


def test_other_settings_of_the_guard_take_the_best_of_what_was_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """To a guard that forgives everything, the best evaluation is one whose checkpoint the strict one had pruned."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(guarded(tiny_folder, run_dir), log) == 0, log.read_text()
    file = run_dir / "metrics.jsonl"
    lines = read_lines(file)
    for line in lines:
        line["eval/reward"] = float(line["step"] == 1)  # as if step 1 had been the best, and were not kept
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(checkpoint.folder_of(run_dir, 1), ignore_errors=True)
    (run_dir / "finished.json").unlink()
    forgiving = guarded(tiny_folder, run_dir, "--guard.stop", "--guard.noise", "1e9")
    assert finish(forgiving, log) == 0, log.read_text()
    ending = json.loads((run_dir / "finished.json").read_text())
    assert ending["exported_step"] in checkpoint.complete_steps(run_dir) and ending["exported_step"] != 1
    assert (
        f"the guard's best is step 1, whose weights were not kept; it takes step {ending['exported_step']}" in log.read_text()
    )
