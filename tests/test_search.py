"""Search without training: noise is blended as Demon says, budgets hold, and a search that was cut goes on to the same end."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

import diffusionrl
from diffusionrl.cli import main
from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.config.search import BestOfNConfig, DemonConfig, ParticlesConfig, SearchConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import Mixture
from diffusionrl.sampling.candidates import Case, coarser
from diffusionrl.sampling.rollout import draw_noise, make_table, sample_trajectories
from diffusionrl.sampling.search import Found, Temperature, blend, noise_weights, resample, search, softmax_weights
from diffusionrl.transitions import Grid, NoiseLevels, flow_grid, ode, variance_preserving_grid

SAMPLING = SamplingConfig(num_steps=12, guidance=1.0, sampler="cps", eta=0.7, batch_size=64)
ABAR = torch.linspace(0.9999, 0.97, 200, dtype=torch.float64).cumprod(0)


class GaussianMixture:
    """A policy whose denoiser is exact: equal modes in D dimensions, around their means."""

    device = torch.device("cpu")
    sampling_rate = None
    edits = False

    def __init__(self, means: Tensor, std: float = 0.3, linear: bool = True) -> None:
        self.means, self.std, self.linear = means.double(), std, linear
        self.sample_shape = self.latent_shape = tuple(means.shape[1:])
        self.passes = 0

    def grid(self, num_steps: int) -> Grid:
        return flow_grid(num_steps) if self.linear else variance_preserving_grid(ABAR, num_steps, "trailing", 0, 1.0)

    def start(self, prompts: Sequence[Prompt], addresses: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(a)) for a in addresses])

    def denoise(self, x: Tensor, levels: NoiseLevels, prompts: Any, guidance: Any) -> tuple[Tensor, Tensor]:
        self.passes += len(x)
        alpha, sigma, x = levels.alpha[:, None, None].double(), levels.sigma[:, None, None].double(), x.double()[:, None]
        variance = (alpha * self.std) ** 2 + sigma**2
        of_mode = self.means + alpha * self.std**2 / variance * (x - alpha * self.means)  # (B, modes, D)
        log_weight = -((x - alpha * self.means) ** 2).sum(-1) / (2 * variance[..., 0])
        x0 = (log_weight.softmax(1)[..., None] * of_mode).sum(1)
        return x0.float(), ((x[:, 0] - alpha[:, 0] * x0) / sigma[:, 0]).float()

    def decode(self, latents: Tensor, prompts: Any, gradient: bool = False) -> Tensor:
        return latents


def modes(count: int = 8, dimensions: int = 16) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(5))


def near(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    """How near to the first mode."""
    return -(images - modes()[0]).square().mean(1)


def find(config: SearchConfig, seeds: Sequence[int] = (0,), reward: Any = near, **settings: Any) -> list[Found]:
    policy = GaussianMixture(modes())
    return list(search(policy, reward, ["a"], seeds, config, **({"sampling": SAMPLING} | settings)))  # type: ignore[arg-type]


def mean(found: Sequence[Found], side: str = "after") -> float:
    return sum(each.scores[side]["reward"] for each in found) / len(found)


# Weights and noise


def test_blended_noise_has_the_length_of_gaussian_noise() -> None:
    noise = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for weights in ([1, 1, 1, 1, 1], [1, -1, 0.5, 0, 0], [0, 0, 1e-9, 0, 0], [-3, 0, 0, 0, 0]):
        mixed = blend(noise, torch.tensor(weights, dtype=torch.float64))
        assert mixed.norm().item() == pytest.approx(math.sqrt(2 * 3 * 4 * 4), rel=1e-5)
    alone = blend(noise, torch.tensor([0.0, 0, 0, 0, -2]))
    assert torch.allclose(alone, -noise[4] * math.sqrt(96) / noise[4].norm(), atol=1e-6)


def test_weights_in_closed_form() -> None:
    values = torch.tensor([1.0, 3.0, math.nan, 2.0], dtype=torch.float64)
    tanh = noise_weights(values, "tanh", Temperature(0.5))
    assert torch.allclose(tanh, torch.tensor([-2.0, 2.0, 0.0, 0.0]).double().tanh())
    boltzmann = noise_weights(values, "boltzmann", Temperature(0.5))
    assert boltzmann.sum().item() == pytest.approx(1) and boltzmann[2] == 0
    assert (boltzmann[1] / boltzmann[0]).item() == pytest.approx(math.exp(4))
    best = noise_weights(values, "best", Temperature(0.5))
    assert best.tolist() == [0, 1, 0, 0]
    assert torch.equal(noise_weights(values, "boltzmann", Temperature(1e-4)), best)
    assert noise_weights(values, "tanh", Temperature(1e-4)).tolist() == [-1, 1, 0, 0]  # sign, as with a vision-language model


@pytest.mark.parametrize("kind", ["tanh", "boltzmann", "best"])
def test_scores_that_say_nothing(kind: Any) -> None:
    """Where none differs all noise is blended; where none is valid the first is taken, as without a search."""
    alike = noise_weights(torch.tensor([2.0, math.nan, 2.0]).double(), kind, Temperature("step"))
    assert alike.tolist() == ([1, 0, 0] if kind == "best" else [1, 0, 1])
    assert noise_weights(torch.full((3,), math.nan).double(), kind, Temperature("first")).tolist() == [1, 0, 0]


def test_temperatures() -> None:
    first, second = torch.tensor([0.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()
    alike = torch.zeros(2).double()
    for setting, wanted in (("first", [0, math.sqrt(2), math.sqrt(2)]), ("step", [0, math.sqrt(2), 2 * math.sqrt(2)])):
        tau = Temperature(setting)  # type: ignore[arg-type]
        assert [tau.of(values) for values in (alike, first, second)] == pytest.approx(wanted)
    assert Temperature(0.25).of(first) == 0.25


def test_resampling_copies_by_weight() -> None:
    weights = softmax_weights(torch.tensor([0.0, math.log(2), math.nan, 0.0]).double(), 1.0)
    assert weights.tolist() == pytest.approx([0.25, 0.5, 0, 0.25])
    for uniform in (0.01, 0.5, 0.99):
        assert resample(weights, uniform).tolist() == [0, 1, 1, 3]
    assert resample(softmax_weights(torch.full((3,), math.nan).double(), 1.0), 0.5).tolist() == [0, 1, 2]
    assert resample(softmax_weights(torch.tensor([1.0, 5.0]).double(), 0.0), 0.5).tolist() == [0, 1]


# Steps


@pytest.mark.parametrize("linear", [True, False])
def test_the_second_order_is_heuns(linear: bool) -> None:
    """Half the steps miss the end by a quarter (first order: by half), against an ODE of a thousand."""
    policy = GaussianMixture(modes(), linear=linear)

    def end(steps: int, order: int) -> Tensor:
        sampling = replace(SAMPLING, num_steps=steps, sampler="ode", eta=0.0)
        case = Case(policy, Mixture({"near": near}), [Prompt("a")], [3], BestOfNConfig(), sampling)  # type: ignore[arg-type]
        x = case.draw(0)[0][None]
        for row in range(steps):
            x = case.step(x, row, torch.zeros_like(x), case.ode, order)
        return x.flatten()

    exact = end(200 if not linear else 1000, 2)
    first = [(end(steps, 1) - exact).norm().item() for steps in (20, 40)]
    second = [(end(steps, 2) - exact).norm().item() for steps in (20, 40)]
    assert second[1] < first[1] / 3 and second[1] < second[0] / 2.5 and first[1] < first[0] / 1.5


def test_a_coarser_grid_goes_the_same_way() -> None:
    grid = flow_grid(10)
    found = coarser(grid, [4, 6, 9])
    assert torch.equal(found.sigma, grid.sigma[[4, 6, 9]]) and torch.equal(found.timesteps, grid.timesteps[[4, 6, 9]])
    assert torch.equal(found.sigma_next, torch.cat([grid.sigma[[6, 9]], grid.sigma_next[-1:]]))
    assert torch.equal(found.alpha_next, torch.cat([grid.alpha[[6, 9]], grid.alpha_next[-1:]]))
    assert torch.equal(coarser(grid, range(10)).sigma_next, grid.sigma_next)


def test_steps_of_a_search_are_the_samplers() -> None:
    policy = GaussianMixture(modes())
    case = Case(policy, Mixture({"near": near}), [Prompt("a")], [3], BestOfNConfig(), SAMPLING)  # type: ignore[arg-type]
    start, noise = case.draw(0)
    x = start[None]
    for row in range(len(case.table)):
        x = case.step(x, row, noise[None, :, row], case.table)
    whole = sample_trajectories(policy, case.table, [Prompt("a")], start, noise, 1.0).latents[:, -1]  # type: ignore[arg-type]
    assert torch.equal(x[0], whole) and case.spent.denoisings == len(case.table)
    middle = sample_trajectories(policy, ode(case.table.grid), [Prompt("a")], start, noise, 1.0).latents  # type: ignore[arg-type]
    case.lookahead = 12
    assert torch.equal(case.ends(middle[None, :, 5], 5)[0], middle[:, -1])
    assert torch.equal(case.ends(middle[None, :, -1], 12)[0], middle[:, -1])


# Searches


def test_demon_is_above_best_of_n_above_the_ode_at_equal_queries() -> None:
    """The order of the paper, where the score is exact and the reward is how near a sample is to one of eight modes."""
    seeds = range(12)
    drawn = find(BestOfNConfig(queries=48), seeds)
    tanh = find(DemonConfig(queries=48, candidates=4, lookahead=1), seeds)
    best = find(DemonConfig(queries=48, candidates=4, lookahead=1, weights="best"), seeds)
    assert {each.spent.queries for each in drawn} == {48} and {each.spent.queries for each in (*tanh, *best)} == {40}
    plain = find(BestOfNConfig(queries=1), seeds, sampling=replace(SAMPLING, sampler="ode", eta=0.0))
    assert mean(tanh) > mean(drawn) + 0.05 > mean(plain) + 1
    assert mean(tanh) > mean(best)


def test_particles_are_better_than_as_many_samples() -> None:
    seeds = range(12)
    steered = find(ParticlesConfig(queries=96, candidates=8, rounds=12, lookahead=1), seeds)
    drawn = find(BestOfNConfig(queries=8), seeds)
    assert {each.spent.queries for each in steered} == {96} and mean(steered) > mean(drawn) + 0.2


@pytest.mark.parametrize(
    "config",
    [
        BestOfNConfig(queries=10),
        DemonConfig(queries=20, candidates=4),
        DemonConfig(queries=20, candidates=4, order=2, tau="step", weights="boltzmann"),
        ParticlesConfig(queries=20, candidates=4, rounds=3),
    ],
)
def test_what_is_found_depends_on_prompt_and_seed_alone(config: SearchConfig) -> None:
    together, alone = find(config, (0, 1, 2)), find(config, (1,))
    assert torch.equal(together[1].after, alone[0].after) and torch.equal(together[1].before, alone[0].before)
    assert together[1].rounds == alone[0].rounds and not torch.equal(together[0].after, together[1].after)
    assert [each.index for each in together] == [0, 1, 2]
    assert all(each.spent.queries <= 20 for each in together)
    cut = find(config, (0, 1, 2), sampling=replace(SAMPLING, batch_size=3))
    assert torch.allclose(cut[1].after, alone[0].after, atol=1e-4)


def test_best_of_n_keeps_the_best_and_begins_with_the_plain_sample() -> None:
    (found,) = find(BestOfNConfig(queries=10), sampling=replace(SAMPLING, batch_size=4))
    values = [value for each in found.rounds for value in each.values]
    assert len(values) == 10 and [each.queries for each in found.rounds] == [4, 8, 10]
    assert values[0] == pytest.approx(found.scores["before"]["reward"])
    assert max(values) == pytest.approx(found.scores["after"]["reward"])  # type: ignore[type-var]
    policy = GaussianMixture(modes())
    table = make_table(policy, SAMPLING)  # type: ignore[arg-type]
    assert found.spent.denoisings == 10 * len(table)


@pytest.mark.parametrize("config", [DemonConfig(queries=20, candidates=4), ParticlesConfig(queries=20, candidates=4, rounds=5)])
def test_the_best_candidate_is_kept_where_it_is_asked_for(config: Any) -> None:
    last, best = find(config, range(4)), find(replace(config, keep="best"), range(4))
    assert [each.rounds for each in last] == [each.rounds for each in best]
    for each in best:
        values = [value for round_ in each.rounds for value in round_.values if value is not None]
        assert each.scores["after"]["reward"] == pytest.approx(max(values))
    assert any(not torch.equal(one.after, other.after) for one, other in zip(last, best, strict=True))


def test_passes_of_the_model_are_counted() -> None:
    policy = GaussianMixture(modes())
    config = DemonConfig(queries=20, candidates=4, lookahead=2, order=2)
    (found,) = search(policy, near, ["a"], (0,), config, SAMPLING)  # type: ignore[arg-type]
    assert policy.passes == found.spent.denoisings + SAMPLING.num_steps


def test_seconds_end_a_search() -> None:
    (found,) = find(BestOfNConfig(queries=None, seconds=1e-6))
    assert len(found.rounds) == 1
    (demon,) = find(DemonConfig(queries=None, seconds=1e-6, candidates=4))
    assert demon.spent.queries == 4
    (unbound,) = find(DemonConfig(queries=None, candidates=4, ode_after=0.0))
    assert unbound.spent.queries == 4 * 11  # the last row of this sampler has no fresh noise


# Rewards that fail, and that look at groups


def test_invalid_scores_leave_the_choice_to_the_others() -> None:
    def half(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        values = near(images, prompts, metadata)
        return torch.where(images[:, 0] > 0, values, torch.nan)

    (found,) = find(BestOfNConfig(queries=20), reward=half, rewards=RewardsConfig(max_invalid=0.95))
    values = [value for each in found.rounds for value in each.values]
    assert None in values and found.spent.invalid == values.count(None)
    assert found.scores["after"]["reward"] == pytest.approx(max(value for value in values if value is not None))
    demon = find(DemonConfig(queries=20, candidates=4), reward=half, rewards=RewardsConfig(max_invalid=1.0))
    assert demon[0].spent.invalid > 0 and demon[0].after.isfinite().all()


def test_too_many_invalid_scores_stop_with_the_rewards_error() -> None:
    def broken(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        raise RuntimeError("the judge is ill")

    with pytest.raises(RunStopped, match=r"20 of 20 scores for 'a' are invalid.*the judge is ill"):
        find(BestOfNConfig(queries=20), reward=broken)


class Spread:
    """How far apart the samples of a prompt are: of a group alone."""

    whole_groups = True

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> list[float]:
        assert len(set(prompts)) == 1 and len(images) == 3
        return [images.std(0).mean().item()] * 3


@pytest.mark.parametrize(
    "config", [BestOfNConfig(queries=12), DemonConfig(queries=24, candidates=4), ParticlesConfig(queries=24, candidates=6)]
)
def test_groups_are_searched_for_together(config: SearchConfig) -> None:
    policy = GaussianMixture(modes())
    found = list(search(policy, Spread(), ["a", "b"], (3, 4, 5), config, SAMPLING))  # type: ignore[arg-type]
    assert [(each.prompt.text, each.seed) for each in found] == [(p, s) for p in "ab" for s in (3, 4, 5)]
    assert mean(found[:3]) > mean(found[:3], "before") and len({each.scores["after"]["reward"] for each in found[:3]}) == 1
    assert {each.spent.queries for each in found} == {config.queries}
    left = search(policy, Spread(), ["a", "b"], (3, 4, 5), config, SAMPLING, done={0, 1, 2, 4})  # type: ignore[arg-type]
    assert [(each.index, each.after.tolist()) for each in left] == [(i, found[i].after.tolist()) for i in (3, 5)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DemonConfig(queries=8), "one round of demon asks for 16: raise it, or lower search.candidates"),
        (lambda: BestOfNConfig(queries=0), "at least 1"),
        (lambda: BestOfNConfig(queries=None), "give search.queries or search.seconds"),
        (lambda: DemonConfig(tau=0.0), "search.tau must be positive"),
        (lambda: DemonConfig(candidates=1), "at least 2"),
        (lambda: find(DemonConfig(), sampling=SamplingConfig(sampler="ode", eta=0.0)), "an ODE has none.*best-of-n"),
        (lambda: find(ParticlesConfig(), sampling=SamplingConfig(eta=0.0)), "an ODE has none"),
        (lambda: find(DemonConfig(), reward=Spread()), "set the number of seeds to 2 or more"),
        (lambda: find(DemonConfig(), held_out=Mixture({"spread": Spread()})), "search is for single images"),
        (lambda: find(DemonConfig(), seeds=(1, 1)), "seeds names one twice"),
        (lambda: find(DemonConfig(), seeds=()), "seeds names none"),
        (lambda: find(DemonConfig(), rewards=RewardsConfig(normalise=True)), "give weights"),
    ],
)
def test_what_cannot_be_is_named_with_the_remedy(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


# The command


def run(*options: str) -> int:
    chosen = ["--sampling.num-steps", "4", "--prompts", "a cat", "a dog", "--seeds", "0", "1", "--out", "out"]
    small = ["--search.queries", "4", "--search.candidates", "2", "--search.lookahead", "1"]
    return main(["sample", "--search", "demon", "--reward", "compressibility", *chosen, *small, *options])


def test_from_the_command_line_and_taken_up(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--held-out", "emoji-judge") == 0
    said = capsys.readouterr().out
    assert "image 4/4" in said and "report: out/report.html" in said
    lines = Path("out/images.jsonl").read_text().splitlines(keepends=True)
    entry = json.loads(lines[0])
    assert entry["prompt"] == "a cat" and entry["spent"]["queries"] == 4 and set(entry["after"]) == {"reward", "emoji-judge"}
    assert [len(each["values"]) for each in entry["rounds"]] == [2, 2]
    pictures = {file: file.read_bytes() for file in Path("out").rglob("*.png")}
    assert len(pictures) == 4 + 4 + 2
    page = Path("out/report.html").read_text()
    assert "a dog · seed 1" in page and "reward against queries" in page and page.count("data:image/png") == 8
    # killed in the third image, as it wrote its line
    Path("out/images.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    for file in ("after/00003.png", "report.html"):
        (Path("out") / file).unlink()
    assert run("--held-out", "emoji-judge") == 0
    assert capsys.readouterr().out.count("image ") == 2

    def without_seconds(line: str) -> Any:
        entry = json.loads(line)
        del entry["spent"]["seconds"]
        return entry

    again = Path("out/images.jsonl").read_text().splitlines()
    assert list(map(without_seconds, again)) == list(map(without_seconds, lines))
    assert {file: file.read_bytes() for file in Path("out").rglob("*.png")} == pictures and Path("out/report.html").is_file()
    plain = ["--sampling.num-steps", "4", "--prompts", "a cat", "a dog", "--seeds", "0", "1", "--out", "plain"]
    assert main(["sample", *plain]) == 0
    for index in range(4):
        assert Path(f"plain/{index:05d}.png").read_bytes() == pictures[Path(f"out/before/{index:05d}.png")]
    assert run("--search.candidates", "4") == 2
    assert "out holds another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--search", "deamon"], "did you mean 'demon'"),
        (["--reward", "compressibility"], "--search best-of-n, demon or particles"),
        (["--search", "demon", "--search.queries", "4"], "one round of demon asks for 16"),
        (["--search", "demon", "--sampling.sampler", "ode", "--sampling.eta", "0"], "an ODE has none"),
        (["--search", "particles", "--reward", "aesthetik"], "did you mean 'aesthetic'"),
        (["--search", "best-of-n", "--reward"], "reward names none"),
        (["--search", "demon", "--out", "."], "is there, and no search"),
    ],
)
def test_options_that_cannot_be_are_found_at_once(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("something")
    code = None
    with suppress(SystemExit):  # tyro's
        code = main(["sample", *arguments])
    assert code in (None, 2)
    told = capsys.readouterr()
    assert said in " ".join((told.err + told.out).replace("│", " ").split())
    assert [file.name for file in Path(".").iterdir()] == ["mine.txt"]


def test_it_is_public() -> None:
    assert diffusionrl.search is search


@pytest.mark.parametrize("name", ["inpaint4", "flux_kontext", "wan", "stable_audio"])
def test_any_pipeline_is_searched(name: str) -> None:
    """Latents that are edited after each step, flows, videos, sound; what is before is the plain sample."""
    prompt = Prompt("a cat", media=tiny.examples(name)[0])
    policy = PipelinePolicy(tiny.build(name), prompt, steps=3, guidance=4.0, arguments=tiny.call_of(name))
    sampling = SamplingConfig(num_steps=3, guidance=4.0, sampler="ddim", eta=0.5, batch_size=2)

    def bright(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        return images.flatten(1).mean(1)

    for config in (DemonConfig(queries=6, candidates=3, lookahead=2), ParticlesConfig(queries=4, candidates=2, rounds=2)):
        (found,) = search(policy, bright, [prompt], (3,), config, sampling)
        assert [len(each.values) for each in found.rounds] == [config.candidates] * 2
        assert found.after.shape == policy.sample_shape and found.after.isfinite().all()
        assert not torch.equal(found.after, found.before)
    table = make_table(policy, sampling)
    start, noise = draw_noise(policy, table, [prompt], 3, "sample", 0, [0])
    drawn = sample_trajectories(policy, table, [prompt], start, noise, 4.0).latents[:, -1]
    assert torch.allclose(policy.decode(drawn, [prompt])[0], found.before, atol=1e-5)
