"""Models from other tools: single files, fp16 variants, shards; and weights that are missing or left over."""

import html
import json
import runpy
import shutil
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import single_files
import tiny_pipelines as tiny
import torch
import yaml
from diffusers.loaders import single_file_utils
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl.cli import main
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError
from diffusionrl.policies import StableDiffusionPolicy, check_model, load_pipeline, load_policy
from diffusionrl.policies.files import fetch
from diffusionrl.policies.quantization import is_quantized
from diffusionrl.policies.single_file import look_into
from diffusionrl.runs.usage import loading_lines

QUICK = [
    *("--sampling.num-steps", "2", "--sampling.guidance", "2", "--sampling.batch-size", "2", "--steps", "1"),
    *("--prompts-per-step", "2", "--samples-per-prompt", "2", "--evaluation.num-samples", "2"),
    *("--algorithm.updates-per-step", "1", "--algorithm.train-fraction", "1", "--evaluation.embeddings.model", "none"),
]


@pytest.fixture(autouse=True)
def width_of_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers knows the width of FLUX by heart, and splits its layers there: the tiny one's takes its place."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    numbers = tuple(32 if number == 3072 else number for number in convert.__code__.co_consts)
    assert numbers != convert.__code__.co_consts
    monkeypatch.setattr(convert, "__code__", convert.__code__.replace(co_consts=numbers))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's single file, and the folder that the same pipeline was saved to; each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def save(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            pipeline = single_files.build(family)
            pipeline.save_pretrained(folder / "pipeline")
            save_file(single_files.weights_of(family, pipeline), folder / f"{family}.safetensors")
            made[family] = folder / f"{family}.safetensors", folder / "pipeline"
        return made[family]

    return save


def draw(pipeline: Any, family: str) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return torch.as_tensor(pipeline("a cat", **settings, **tiny.call_of(single_files.FAMILIES[family])).images)


def as_said(about: dict[str, Any], model: Path, config: Path | None = None) -> Any:
    """The pipeline of the lines that a report gives, up to what was learned."""
    *lines, _, _ = loading_lines({}, about, repr(str(model)), "'export'", "'a cat'", repr(str(config)))
    assert all("diffusionrl" not in line for line in lines if "import" in line)
    made: dict[str, Any] = {}
    exec("\n".join(lines), made)
    return made["pipe"]


def edit(file: Path, change: Callable[[dict[str, Tensor]], object], to: Path | None = None) -> Path:
    weights = load_file(file)
    change(weights)
    save_file(weights, to or file, metadata={"format": "pt"})
    return to or file


# Single files


@pytest.mark.parametrize("family", single_files.FAMILIES)
def test_a_single_file_draws_what_its_folder_draws(saved: Any, family: str, no_network: None) -> None:
    """And so do the lines of plain diffusers that a report gives; all without a network."""
    file, folder = saved(family)
    expected = draw(load_pipeline(str(folder)), family)
    pipeline = load_pipeline(str(file), config=str(folder))
    torch.testing.assert_close(draw(pipeline, family), expected, rtol=0, atol=1e-5)
    about = {"pipeline": type(pipeline).__name__, "makes": "image", "single_file": look_into(file, str(folder)).about}
    torch.testing.assert_close(draw(as_said(about, file, folder), family), expected, rtol=0, atol=1e-5)


def test_stable_diffusion_takes_the_fast_road(saved: Any) -> None:
    file, folder = saved("sd1")
    policy = load_policy(str(file), model_config=str(folder))
    assert isinstance(policy, StableDiffusionPolicy) and policy.sample_shape == check_model(str(file), str(folder))


def test_precision_is_that_of_a_folder(saved: Any) -> None:
    file, folder = saved("flux_whole")
    pipeline = load_pipeline(str(file), torch.bfloat16, config=str(folder))
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    precisions = {name: {weight.dtype for weight in part.parameters()} for name, part in networks.items()}
    assert precisions.pop("vae") == {torch.float32}
    assert len(precisions) == 3 and all(each == {torch.bfloat16} for each in precisions.values())


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed: pip install 'diffusionrl[int8]'")
@pytest.mark.parametrize("family", ["sd1", "sd3", "flux", "flux_whole"])
def test_a_quantised_base_is_that_of_a_folder(saved: Any, family: str, no_network: None) -> None:
    """Whether the network is in the file with all the others or alone."""
    file, folder = saved(family)
    found = load_pipeline(str(file), config=str(folder), quantization="int8")
    expected = load_pipeline(str(folder), quantization="int8")
    quantised = [{name for name, part in each.components.items() if is_quantized(part)} for each in (found, expected)]
    assert quantised[0] == quantised[1] and len(quantised[0]) == 1
    torch.testing.assert_close(draw(found, family), draw(expected, family), rtol=0, atol=1e-5)


def test_the_lines_of_a_folder_load_what_the_run_had(saved: Any) -> None:
    about = {"pipeline": "StableDiffusionPipeline", "makes": "image"}
    for dtype, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        *lines, _, _ = loading_lines({"policy": {"dtype": dtype}}, about, repr(str(saved("sd1")[1])), "'export'", "'a cat'")
        made: dict[str, Any] = {}
        exec("\n".join(lines), made)
        assert made["pipe"].dtype == wanted and ("torch" in "".join(lines)) == (dtype == "bfloat16")


@pytest.mark.usefixtures("no_network", "no_picture")
def test_a_run_of_a_single_file(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains, goes on, samples, evaluates, and says how it is loaded."""
    file, folder = saved("sd1")
    monkeypatch.chdir(tmp_path)
    chosen = ["--model", str(file), "--model-config", str(folder)]
    for steps in ("1", "2"):
        assert main(["train", *chosen, *QUICK, "--steps", steps, "--run-dir", "run"]) == 0, capsys.readouterr().err
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2 and metrics[-1]["ratio/max_gap"] == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model_config"] == str(folder)
    line = 'StableDiffusionPipeline.from_single_file("file of the base model", config="folder of a pipeline of its family"'
    card = Path("run/export/README.md").read_text()
    assert line in card and str(tmp_path.parent) not in card and "sd1.safetensors" in card
    page = html.unescape(Path("run/report.html").read_text())
    assert f"from_single_file({str(file)!r}, config={str(folder)!r}" in page
    assert main(["sample", "--model", "run", "--prompts", "a cat", "--seeds", "0", "--out", "drawn"]) == 0
    assert Path("drawn/00000.png").is_file()
    more = ["--baseline", str(file), "--model-config", str(folder), "--num-samples", "2", "--out", "scores.json"]
    assert main(["evaluate", "--model", "run", *more]) == 0, capsys.readouterr().err
    assert json.loads(Path("scores.json").read_text())["baseline"] == str(file)


def test_the_doctor_on_a_single_file(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A transformer alone, with the rest of its folder."""
    file, folder = saved("flux")
    chosen = ["--model", str(file), "--model-config", str(folder), *QUICK, "--sampling.sampler", "cps", "--sampling.eta", "0.7"]
    sizes = ["--sampling.height", "16", "--sampling.width", "16", "--sampling.call", "max_sequence_length=16"]
    main(["doctor", *chosen, *sizes, "--optimizer.learning-rate", "0.01"])
    said = capsys.readouterr().out
    assert "plain diffusers draws the same images" in said


def test_settings_of_a_file_without_a_configuration_are_those_that_diffusers_names(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """From the cache of the hub; a hub id that is given is looked for there too."""
    file, folder = saved("sd1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"taken for stable-diffusion-v1-5/.* where no model_config is given"):
        check_model(str(file))
    for repository in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "owner/tiny"):
        cache = tmp_path / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, cache / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40)
    expected = draw(load_pipeline(str(folder)), "sd1")
    assert torch.equal(draw(load_pipeline(str(file)), "sd1"), expected)
    assert torch.equal(draw(load_pipeline(str(file), config="owner/tiny"), "sd1"), expected)


def test_a_hub_that_nobody_reaches_is_said_at_once(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would ask six times, with waits of 23 seconds in between."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    for model in (str(saved("sd1")[0]), "owner/name"):
        with pytest.raises(UserError, match=r"http://127.0.0.1:\d+ cannot be reached .*: look at the network"):
            check_model(model)
    assert time.monotonic() - began < 4


def _without_weights(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("sd1", lambda w: w.pop("model.diffusion_model.out.2.bias"), r"lacks weights of the unet, .*: 1 \(conv_out.bias\)"),
        ("sd1", lambda w: w.update({"model.diffusion_model.x": torch.ones(1)}), r"the unet has no place for: 1 \(model.diff"),
        ("sdxl", lambda w: w.pop("first_stage_model.decoder.conv_in.bias"), r"lacks weights of the vae, .*decoder.conv_in"),
        ("sdxl", lambda w: w.pop("conditioner.embedders.1.model.ln_final.bias"), "lacks weights of the text_encoder_2"),
        ("sd3", lambda w: w.pop("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias"), r"makes no SD3.*KeyError: '"),
        ("flux", lambda w: w.update({"double_blocks.0.scale_weight": torch.ones(())}), "transformer has no place for: 1"),
        ("flux", lambda w: w.update({"img_in.bias": torch.ones(3)}), r"x_embedder.bias expected shape torch.Size\(\[32\]\)"),
        ("flux_whole", lambda w: w.pop("text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"), "text_encoder_2"),
    ],
)
def test_weights_that_a_file_lacks_or_has_too_many_of(saved: Any, tmp_path: Path, family: str, change: Any, said: str) -> None:
    file, folder = saved(family)
    torn = edit(file, change, tmp_path / "edited.safetensors")
    with pytest.raises(UserError, match=said):
        check_model(str(torn), str(folder))


def test_a_pickle_is_converted_by_the_script_that_its_refusal_names(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = saved("sd1")
    torch.save({"state_dict": load_file(file), "global_step": 1}, tmp_path / "model.ckpt")
    script = Path(__file__).parent.parent / "examples" / "convert_to_safetensors.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "model.ckpt"), str(tmp_path / "model.safetensors")])
    runpy.run_path(str(script), run_name="__main__")
    assert check_model(str(tmp_path / "model.safetensors"), str(folder)) == check_model(str(file), str(folder))


def test_files_that_are_no_model(saved: Any, tmp_path: Path) -> None:
    (sd1, sd1_folder), (flux, flux_folder) = saved("sd1"), saved("flux")

    def refused(said: str, model: Path | str, config: Path | str | None = None) -> None:
        with pytest.raises(UserError, match=said):
            load_pipeline(str(model), config=None if config is None else str(config))

    for ending in ("ckpt", "pt", "bin"):
        refused(r"is a pickle, .* python convert_to_safetensors.py .* model.safetensors", tmp_path / f"model.{ending}")
    refused("there is no such file", tmp_path / "nowhere.safetensors", sd1_folder)
    refused("nowhere' was not found", sd1, tmp_path / "nowhere")
    refused("no diffusers pipeline", sd1, tmp_path)
    refused("describes a single .safetensors file, and .* is none", sd1_folder, sd1_folder)
    refused(r"makes no FluxTransformer2DModel \(transformer\)", sd1, flux_folder)
    refused("holds no unet of a StableDiffusionPipeline; its weights are", flux, sd1_folder)
    bare = _without_weights(flux_folder, tmp_path / "bare")
    refused("holds no text_encoder, and .*bare has no weights for it", flux, bare)
    (tmp_path / "torn.safetensors").write_bytes(sd1.read_bytes()[:-100])
    refused("cannot be read as safetensors", tmp_path / "torn.safetensors", sd1_folder)
    (bare / "vae" / "config.json").unlink()
    refused("config.json", sd1, _without_vae_config(sd1_folder, tmp_path / "broken"))


def _without_vae_config(folder: Path, to: Path) -> Path:
    (_without_weights(folder, to) / "vae" / "config.json").unlink()
    return to


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--model", "model.ckpt"], "is a pickle"),
        (["train", "--model", "emoji", "--model-config", "."], "model 'emoji' is none"),
        (["sample", "--model", "emoji", "--model-config", "."], "model 'emoji' is none"),
        (["evaluate", "--model", "emoji", "--model-config", "."], "neither model nor baseline is one"),
    ],
)
def test_the_command_line_refuses_before_it_writes(
    command: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(command)
    except SystemExit as error:  # tyro's
        code = int(error.code or 0)
    assert code == 2 and said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


# Folders


_SAME_NETWORKS = {"sd2_v", "inpaint4", "sd1_img2img", "sdxl_dpm", "sd3_img2img", "flux_img2img", "flux_kontext"}


@pytest.mark.parametrize("name", [*(name for name in tiny.NAMES if name not in _SAME_NETWORKS), "emoji", "emoji-flow"])
def test_whole_pipelines_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    """Nothing is refused that is right: buffers, tied embeddings, parts that there are none of."""
    if name in tiny.NAMES:
        tiny.build(name).save_pretrained(tmp_path)
    pipeline = load_pipeline(str(tmp_path) if name in tiny.NAMES else name)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(networks) > 1 and not any(weight.is_meta for network in networks for weight in network.parameters())


def _attention_of_old(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "mid_block.attentions" in name]:
        renamed = name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn")
        weights[renamed] = weights.pop(name)


@pytest.mark.parametrize(
    ("family", "part", "change"),
    [
        ("sd1", "vae/diffusion_pytorch_model", _attention_of_old),
        ("sd1", "text_encoder/model", lambda w: w.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})),
        ("flux", "text_encoder_2/model", lambda w: w.update({"encoder.embed_tokens.weight": w["shared.weight"].clone()})),
        ("flux", "text_encoder_2/model", lambda w: w.update({"encoder.embed_tokens.weight": w.pop("shared.weight")})),
    ],
)
def test_names_of_old_are_no_surplus(saved: Any, tmp_path: Path, family: str, part: str, change: Any) -> None:
    _, folder = saved(family)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit(other / f"{part}.safetensors", change)
    assert torch.equal(draw(load_pipeline(str(other)), family), draw(load_pipeline(str(folder)), family))


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variants_and_shards(tmp_path: Path, variant: str | None, shards: dict[str, str]) -> None:
    pipeline = tiny.build("flux").to(torch.float16).to(torch.float32)
    pipeline.save_pretrained(tmp_path / "plain")
    pipeline.to(torch.float16 if variant else torch.float32).save_pretrained(tmp_path / "other", variant=variant, **shards)
    names = {file.name for file in (tmp_path / "other" / "transformer").glob("*.safetensors")}
    assert "diffusion_pytorch_model.safetensors" not in names or not (variant or shards)
    assert len(names) > 1 if shards else len(names) == 1
    plain, other = (load_pipeline(str(tmp_path / name)) for name in ("plain", "other"))
    assert other.transformer.dtype == torch.float32
    expected = draw(plain, "flux")
    torch.testing.assert_close(draw(other, "flux"), expected, rtol=0, atol=1e-5)
    sampling = SamplingConfig(num_steps=2, height=16, width=16, call=("max_sequence_length=16",))
    about = load_policy(str(tmp_path / "other"), sampling=sampling).about
    assert set(about["variants"].values()) == ({variant} if variant else set())
    torch.testing.assert_close(draw(as_said(about, tmp_path / "other"), "flux"), expected, rtol=0, atol=1e-5)


def test_what_a_file_has_not_comes_in_fp16_too(saved: Any, tmp_path: Path) -> None:
    file, folder = saved("flux")
    pipeline = load_pipeline(str(folder)).to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    sampling = SamplingConfig(num_steps=2, height=16, width=16, call=("max_sequence_length=16",))
    about = load_policy(str(file), model_config=str(tmp_path), sampling=sampling).about
    assert about["variants"] == {"text_encoder": "fp16", "text_encoder_2": "fp16", "vae": "fp16"}
    expected = draw(load_pipeline(str(file), config=str(tmp_path)), "flux")
    torch.testing.assert_close(draw(as_said(about, file, tmp_path), "flux"), expected, rtol=0, atol=1e-5)


def test_plain_weights_come_before_a_variant(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("sd1")
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    plain = both / "unet" / "diffusion_pytorch_model.safetensors"
    variant = edit(plain, lambda weights: weights["conv_in.bias"].add_(1), plain.with_suffix(".fp16.safetensors"))
    assert torch.equal(load_pipeline(str(both)).unet.conv_in.bias, load_file(plain)["conv_in.bias"])
    plain.unlink()
    assert torch.equal(load_pipeline(str(both)).unet.conv_in.bias, load_file(variant)["conv_in.bias"])


def test_a_repository_with_fp16_weights_alone_gives_these(tmp_path: Path) -> None:
    asked = []

    class Pipeline:
        @staticmethod
        def download(model: str, variant: str | None = None, **settings: Any) -> str:
            asked.append((model, variant, settings))
            if model == "owner/unreachable":
                raise ConnectionError("no way there")
            if variant is None or model == "owner/neither":
                raise OSError(f"no {variant} weights")
            return str(tmp_path)

    assert fetch(Pipeline, "owner/half", {"safety_checker": None}, False) == tmp_path
    assert [variant for _, variant, _ in asked] == [None, "fp16"]
    assert all(each["use_safetensors"] and each["safety_checker"] is None for *_, each in asked)
    with pytest.raises(OSError, match="no None weights"):
        fetch(Pipeline, "owner/neither", {}, False)
    with pytest.raises(ConnectionError):  # which does not say that there are no plain ones
        fetch(Pipeline, "owner/unreachable", {}, False)
    assert asked[-1][:2] == ("owner/unreachable", None)


def test_neither_safety_checker_nor_feature_extractor_is_needed(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("sd1")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    index = json.loads((other / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (other / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(draw(load_pipeline(str(other)), "sd1"), draw(load_pipeline(str(folder)), "sd1"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet/diffusion_pytorch_model", lambda w: [w.pop(key) for key in sorted(w)[:5]], r"lacks .*: 5 \(.* and 2 more\)"),
        ("unet/diffusion_pytorch_model", lambda w: w.update({"up_blocks.7": torch.ones(1)}), r"place for: 1 \(up_blocks.7\)"),
        ("text_encoder/model", lambda w: w.pop("final_layer_norm.bias"), r"lacks .*: 1 \(final_layer_norm.bias\)"),
        ("text_encoder/model", lambda w: w.update({"encoder.layers.7": torch.ones(1)}), r"place for: 1 \(encoder.layers.7"),
        ("text_encoder/model", lambda w: w.update({"final_layer_norm.bias": torch.ones(3)}), "size .*final_layer_norm"),
        ("vae/diffusion_pytorch_model", lambda w: w.update({"quant_conv.bias": torch.ones(3)}), "quant_conv.bias expected"),
    ],
)
def test_weights_that_a_folder_lacks_or_has_too_many_of(saved: Any, tmp_path: Path, part: str, change: Any, said: str) -> None:
    _, folder = saved("sd1")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit(other / f"{part}.safetensors", change)
    with pytest.raises(UserError, match=said):
        load_pipeline(str(other))


def test_a_shard_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    tiny.build("sd1").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
    edit(shard, lambda weights: weights.pop(sorted(weights)[0]))
    with pytest.raises(UserError, match=r"unet lacks weights, which would be random: 1 \("):
        load_pipeline(str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match="required according to the checkpoint index"):
        load_pipeline(str(tmp_path))
