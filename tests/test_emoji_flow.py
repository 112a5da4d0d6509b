"""The embedded flow model: a plain ``StableDiffusion3Pipeline`` that draws what it is asked for, and the stage that made it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from diffusionrl.cli import main, parse_train
from diffusionrl.emoji.classifier import load_classifier
from diffusionrl.emoji.recipe import flow
from diffusionrl.emoji.recipe.flow import FlowConfig, build_pipeline, encode_captions, train_flow, zero_rows
from diffusionrl.emoji.recipe.flow_quality import draw_samples, kernel_distance, load_flow, named_right
from diffusionrl.emoji.recipe.publish import WEIGHTS
from diffusionrl.emoji.vocabulary import with_article

FOLDER = WEIGHTS / "flow"
CAPTIONS = ["a cat", "a dog and an apple", "a rhinoceros", ""]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load_flow(FOLDER)


def toy_config(out: Path) -> FlowConfig:
    return FlowConfig(
        out=out,
        pipeline=WEIGHTS / "pipeline",
        clip=WEIGHTS / "clip",
        num_steps=3,
        batch_size=6,
        num_scenes=8,
        num_layers=2,
        num_heads=1,
        save_every=1,
        device="cpu",
    )


def test_the_folder_is_small_and_half_precision() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 25e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for file in weights:
        floats = [weight for weight in load_file(file).values() if weight.is_floating_point()]
        assert {weight.dtype for weight in floats} == {torch.float16}


def test_plain_diffusers_loads_it_and_a_plain_call_draws() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)


@pytest.mark.parametrize(("rows", "names"), [(1, "cat lion panda car strawberry hamburger"), (256, "cat panda car")])
def test_samples_show_what_was_asked_for(pipeline: StableDiffusion3Pipeline, rows: int, names: str) -> None:
    """A handful; the published figure, over 535 samples, is in the weights' figures.json."""
    subjects = names.split()
    images = draw_samples(pipeline, [with_article(name) for name in subjects], zero_rows=rows)
    assert named_right(load_classifier(), images, subjects).sum() >= len(subjects) - 1


def test_the_published_figures_meet_the_bar() -> None:
    published = json.loads((WEIGHTS / "figures.json").read_text())
    assert published["flow_subject_accuracy"] >= 0.95


def test_training_sees_the_text_that_the_pipeline_sees(pipeline: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    trained_on = build_pipeline(toy_config(tmp_path))
    texts, pooled = encode_captions(trained_on, CAPTIONS)
    for rows in (1, 256):
        seen, _, seen_pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=rows
        )
        assert torch.equal(seen[:, :16], texts) and not seen[:, 16:].any() and seen.shape[1] == 16 + rows
        assert torch.equal(seen_pooled, pooled)


def test_text_encoders_are_those_that_they_were_made_from(tmp_path: Path) -> None:
    """The hidden states before the last layer, scaled; after it for the second, whose last layer changes nothing."""
    pipeline, ids = build_pipeline(toy_config(tmp_path)), torch.tensor([[929, 3, 77, 930]])
    first = flow.CLIPTextModel.from_pretrained(WEIGHTS / "pipeline" / "text_encoder", dtype=torch.float32)
    before, after = first(ids, output_hidden_states=True), pipeline.text_encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(after.hidden_states[-2], before.hidden_states[-2] * flow.TEXT_SCALE, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.text_embeds, before.pooler_output[:, : flow.POOLED_DIM], rtol=1e-4, atol=1e-4)
    clip = flow.CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    after = pipeline.text_encoder_2(ids, output_hidden_states=True)
    torch.testing.assert_close(after.hidden_states[-2], clip.text_model(ids, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(after.text_embeds, clip.get_text_features(ids).pooler_output)


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_flow(toy_config(tmp_path / "whole"))

    def interrupted(config: FlowConfig, step: int) -> tuple[int, int]:
        if step == 1:
            raise KeyboardInterrupt
        return zero_rows(config, step)

    monkeypatch.setattr(flow, "zero_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_flow(toy_config(tmp_path / "parts"))
    monkeypatch.undo()
    train_flow(toy_config(tmp_path / "parts"))
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("average.") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    kept = load_flow(tmp_path / "whole" / "pipeline").transformer.state_dict()
    assert all(torch.equal(kept[name], whole[f"average.{name}"]) for name in kept)
    assert not torch.equal(whole["average.proj_out.weight"], whole["model.proj_out.weight"])


def test_a_teacher_expects_what_the_first_pipeline_does() -> None:
    """At a point of the flow whose noise for the signal is that of a step of Stable Diffusion."""
    teacher, captions = flow.Teacher(WEIGHTS / "pipeline", ["", "a cat"], "cpu"), torch.tensor([1])
    alpha = flow.DDIMScheduler.from_pretrained(WEIGHTS / "pipeline" / "scheduler").alphas_cumprod[500]
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    time = (sigma / (signal + sigma))[None]
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = teacher.unet(x, torch.tensor([500]), teacher.texts[captions]).sample
    found, known = teacher.velocity(x / (signal + sigma), time, captions)
    torch.testing.assert_close(found, (sigma * x + signal * v) - (signal * x - sigma * v), rtol=1e-3, atol=1e-3)
    assert known.all() and not teacher.velocity(x, torch.tensor([0.99]), captions)[1].any()


def test_heads_begin_by_looking_at_neighbours() -> None:
    transformer = flow.build_transformer(FlowConfig(), 192, 160, 16)
    positions = transformer.pos_embed.pos_embed[0]
    attention = transformer.transformer_blocks[0].attn
    queries, keys = (layer(positions)[:, :32] for layer in (attention.to_q, attention.to_k))
    seen = (queries @ keys.T).argmax(1)  # of the first head, which looks one column to the right
    inner = torch.arange(64) % 8 < 7
    assert torch.equal(seen[inner], torch.arange(64)[inner] + 1)


def test_batches_with_many_zero_rows_are_smaller() -> None:
    config = FlowConfig()
    found = [zero_rows(config, step) for step in range(1000)]
    assert {rows for rows, _ in found} == set(flow.ZERO_ROWS)
    assert all((80 + rows) * size <= 80 * config.batch_size + (80 + rows) / 2 for rows, size in found)
    assert abs(sum(rows == 1 for rows, _ in found) / 1000 - flow.ZERO_ROWS[1]) < 0.06


def test_the_kernel_distance_is_zero_for_equal_distributions_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(500, 8, generator=draw), torch.randn(500, 8, generator=draw)
    assert abs(kernel_distance(first, second)) < 0.05
    assert kernel_distance(first, second + 1) > 0.5


def test_the_model_brings_its_preset() -> None:
    config = parse_train(["--model", "emoji-flow", "--steps", "3"])
    assert (config.model, config.sampling.sampler, config.steps) == ("emoji-flow", "cps", 3)
    assert parse_train(["--model", "emoji-flow", "--preset", "emoji"]).sampling.sampler == "ddim"


@pytest.mark.usefixtures("no_picture")
def test_it_is_trained_and_drawn_from_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [*("--steps", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2"), *("--evaluation.num-samples", "2")]
    assert main(["train", "--model", "emoji-flow", *quick, "--sampling.num-steps", "3", "--run-dir", "run"]) == 0
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["ratio/max_gap"] == 0
    assert 'load_pipeline("emoji-flow")' in Path("run/export/README.md").read_text()
    assert main(["sample", "--model", "run", "--prompts", "a cat", "--seeds", "0", "--out", "drawn"]) == 0
