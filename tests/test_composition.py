"""The compositional reward: what a prompt names, the embedded detector, OWLv2 and Grounding DINO."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from diffusionrl.config.judges import CompositionConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.images import to_pil
from diffusionrl.emoji.classifier import CLASSES, detect_subjects, load_detector
from diffusionrl.emoji.recipe.detector import average_precision, present, quality
from diffusionrl.emoji.recipe.tokenizer import train_tokenizer
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.emoji.vocabulary import ACTIVITIES, SUBJECTS, subject_of, with_article
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward, score, try_reward
from diffusionrl.rewards.base import Scores
from diffusionrl.rewards.composition import RELATIONS, CompositionReward, objects_of, split_prompt
from diffusionrl.rewards.detection import Detector

subjects = st.sampled_from(sorted(SUBJECTS))
FIGURES = Path(__file__).parent.parent / "src" / "diffusionrl" / "emoji" / "weights" / "figures.json"


@given(first=subjects, second=subjects, relation=st.sampled_from(RELATIONS))
def test_any_pair_of_the_vocabulary_gives_both_names(first: str, second: str, relation: str) -> None:
    prompt = f"{with_article(first)} {relation} {with_article(second)}"
    assert objects_of(prompt, {}, subject_of) == list(dict.fromkeys([first, second]))
    assert objects_of(prompt, {}) == list(dict.fromkeys([first, second]))


@given(first=subjects, activity=st.sampled_from(sorted(ACTIVITIES)))
def test_an_animal_with_an_activity_is_that_animal(first: str, activity: str) -> None:
    assert objects_of(f"{with_article(first)} {activity}", {}, subject_of) == [first]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", ["cat"]),
        ("A Cat beside the old tree.", ["Cat", "old tree"]),
        ("an anteater near a sandcastle", ["anteater", "sandcastle"]),
        ("a dog on the side of a road and a bus next to an ant", ["dog", "road", "bus", "ant"]),
        ("theatre and anchor", ["theatre", "anchor"]),
        ("a cat and", ["cat"]),
        ("  ", []),
    ],
)
def test_a_prompt_is_split_at_the_papers_relations(prompt: str, parts: list[str]) -> None:
    assert split_prompt(prompt) == parts


def test_the_metadata_says_what_counts() -> None:
    assert objects_of("a busy street", {"objects": ["car", "bus", "car"]}) == ["car", "bus"]
    assert objects_of("a picture", {"objects": ["a cat", "dog"]}, subject_of) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("prompt", "metadata", "said"),
    [
        ("", {}, "'' names no object"),
        ("a cat", {"objects": []}, "'a cat' names no object"),
        ("a cat", {"objects": ["."]}, "'a cat' names no object"),
        ("a cat", {"objects": "cat"}, "\"objects\" of 'a cat' is 'cat': give a list of texts"),
        ("a cat", {"objects": [1]}, "give a list of texts"),
        ("a doctor", {}, "does not know 'doctor' of 'a doctor'"),
        ("a cat and a unicorn", {}, "does not know 'unicorn'"),
    ],
)
def test_a_prompt_that_names_nothing_is_invalid_and_never_zero(prompt: str, metadata: dict[str, Any], said: str) -> None:
    found = score(load_reward("composition"), torch.rand(2, 3, 64, 64), ["a cat", prompt], [{}, metadata])
    assert found.valid.tolist() == [True, False]
    assert found.error is not None and said in found.error


def test_a_run_on_prompts_without_objects_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="does not know 'doctor'"):
        try_reward(load_reward("composition"), (3, 64, 64), ["a doctor"], [{}])
    with pytest.raises(UserError, match="sees images of 64 x 64 pixels"):
        try_reward(load_reward("composition"), (3, 128, 128), ["a cat"], [{}])


def test_the_score_is_the_mean_of_the_sigmoids() -> None:
    drawn, scenes = draw_images(5, range(4), "pair")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = load_detector()(images)
    by_hand = [
        torch.stack([logits[i, CLASSES.index(n)].sigmoid() for n in set(s.subjects)]).mean() for i, s in enumerate(scenes)
    ]
    reward = load_reward("composition")
    found = reward(images, [scene.caption for scene in scenes], [{}] * 4)
    torch.testing.assert_close(found.values, torch.stack(by_hand))
    alone = torch.cat([reward(images[i : i + 1], [scene.caption], [{}]).values for i, scene in enumerate(scenes)])
    torch.testing.assert_close(found.values, alone)


@pytest.mark.parametrize("name", ["composition", "composition-judge"])
def test_scores_tell_what_is_there_and_lie_in_their_range(name: str) -> None:
    drawn, scenes = draw_images(6, range(40), "pair")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    reward = load_reward(name)
    right = reward(images, [scene.caption for scene in scenes], [{}] * 40).values
    wrong = reward(images, [scene.caption for scene in scenes[1:] + scenes[:1]], [{}] * 40).values
    people = torch.from_numpy(draw_images(6, range(20), "person")[0]).permute(0, 3, 1, 2).float() / 255
    nobody = reward(people, ["a cat and a dog"] * 20, [{}] * 20).values
    assert right.mean() > 0.85 and wrong.mean() < 0.1 and nobody.mean() < 0.05
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert score(reward, noise, ["a cat and a dog"] * 8, [{}] * 8).valid.all()
    assert reward.range == (0.0, 1.0)  # type: ignore[attr-defined]


def test_one_of_two_objects_is_worth_about_a_half() -> None:
    drawn, scenes = draw_images(7, range(30), "subject")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    others = [next(name for name in SUBJECTS if name not in scene.subjects) for scene in scenes]
    prompts = [f"{scene.caption} and {with_article(other)}" for scene, other in zip(scenes, others, strict=True)]
    assert load_reward("composition")(images, prompts, [{}] * 30).values.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["detector", "detector_judge"])
def test_the_shipped_detectors_are_as_good_as_published(name: str) -> None:
    published = json.loads(FIGURES.read_text())
    drawn, scenes = draw_images(8, range(300), "pair")
    confidence = detect_subjects(load_detector(name), torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255)
    found = quality(confidence, present(scenes))
    for what in ("precision", "recall"):
        assert found[what] == pytest.approx(published[f"{name}_pairs_{what}"], abs=0.03)
        assert found[what] > 0.9


def test_average_precision_and_calibration_by_hand() -> None:
    confidence, there = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert average_precision(confidence.numpy(), there.bool().numpy()) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(confidence.numpy(), torch.zeros(4).bool().numpy()) is None
    found = quality(confidence[:, None], there[:, None])
    assert found["precision"] == pytest.approx(2 / 3, abs=1e-4) and found["recall"] == 1
    assert found["calibration"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.1) / 4, abs=1e-4)


def tame(head: nn.Module) -> None:
    """So that confidences are not all 0 or 1."""
    for parameter in head.parameters():
        parameter.data *= 0.1


@pytest.fixture(scope="module")
def tiny_owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OWLv2 of 32 x 32 pixels and 16 boxes."""
    folder = tmp_path_factory.mktemp("owl")
    tokenizer = train_tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = shared | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = shared | {"image_size": 32, "patch_size": 8}
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    tame(model.class_head.logit_shift)
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Grounding DINO of 7 boxes; its special tokens have BERT's ids, which the model knows them by."""
    folder = tmp_path_factory.mktemp("dino")
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words |= dict(enumerate(("cat", "dog", "##s", "ant", "office", "worker"), 1030))
    (folder / "vocab.txt").write_text("\n".join(words.get(i, f"[unused{i}]") for i in range(1040)))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4, image_size=64, out_features=["stage1", "stage2"]
    )
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=BertConfig(vocab_size=1040, max_position_embeddings=64, **text),
        d_model=32,
        num_queries=7,
        num_feature_levels=2,
        max_text_len=32,
        **{f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "n_points")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GroundingDinoForObjectDetection(config)
    tame(model.model.decoder.layers[-1].final_layer_norm)
    tame(model.model.decoder.layer_norm)
    model.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ASKED = [["cat", "dog"], ["ant"], ["dogs", "cat", "office worker"]]


def test_owl_is_what_transformers_makes_of_it(tiny_owl: Path) -> None:
    detector = Detector(str(tiny_owl), query="a {object}")
    processor = Owlv2Processor(Owlv2ImageProcessorPil.from_pretrained(tiny_owl), detector.tokenizer)
    found = detector.confidences(IMAGES, ASKED)
    for image, names, ours in zip(IMAGES, ASKED, found, strict=True):
        texts = [f"a {name}" for name in names]
        text = processor(text=[texts], return_tensors="pt")
        with torch.no_grad():
            outputs = detector.model(pixel_values=detector.preprocess(image[None]), **text)
        (boxes,) = processor.post_process_grounded_object_detection(outputs, threshold=0.0, text_labels=[texts])
        theirs = best_by_label(boxes["scores"], boxes["text_labels"], texts)
        torch.testing.assert_close(ours, theirs)
        assert (ours < 0.999).all() and ours.max() > 0.01


def best_by_label(scores: Tensor, labels: list[str], texts: list[str]) -> Tensor:
    return torch.tensor(
        [max([float(s) for s, label in zip(scores, labels, strict=True) if label == text], default=0.0) for text in texts]
    )


def test_dino_is_what_transformers_makes_of_it(tiny_dino: Path) -> None:
    """Its own score of a box is the largest over all tokens of the caption, and its label the tokens above a threshold."""
    detector = Detector(str(tiny_dino))
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil.from_pretrained(tiny_dino), detector.tokenizer)
    found = detector.confidences(IMAGES, ASKED)
    for image, names, ours in zip(IMAGES, ASKED, found, strict=True):
        text = processor(text=[names], return_tensors="pt")
        with torch.no_grad():
            outputs = detector.model(pixel_values=detector.preprocess(image[None]), **text)
        special = torch.isin(text.input_ids[0], torch.tensor([101, 102, 1012]))
        outputs.logits[0, :, : len(special)][:, special] = -torch.inf  # the dots are no objects
        scores = outputs.logits.sigmoid().amax(-1)[0]
        labels = []
        for box, value in enumerate(scores):  # a label of the best token alone
            (boxes,) = processor.post_process_grounded_object_detection(
                outputs, text.input_ids, threshold=0.0, text_threshold=value.item() * (1 - 1e-6)
            )
            assert torch.equal(boxes["scores"], scores)
            labels.append(next(name for name in names if boxes["text_labels"][box].removeprefix("##") in name.replace(" ", "")))
        torch.testing.assert_close(ours, best_by_label(scores, labels, names))
        assert (ours < 0.999).all() and ours.max() > 0.01


@pytest.mark.parametrize("family", ["owl", "dino"])
def test_a_confidence_does_not_depend_on_the_batch(family: str, request: pytest.FixtureRequest) -> None:
    detector = Detector(str(request.getfixturevalue(f"tiny_{family}")))
    together = detector.confidences(IMAGES, ASKED)
    for image, names, found in zip(IMAGES, ASKED, together, strict=True):
        torch.testing.assert_close(detector.confidences(image[None], [names])[0], found)
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("family", ["owl", "dino"])
def test_boxes_below_the_threshold_do_not_count(family: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(f"tiny_{family}"))
    (all_boxes,) = Detector(folder).confidences(IMAGES[:1], [["cat"]])
    threshold = all_boxes.item()
    assert Detector(folder, threshold=threshold - 1e-4).confidences(IMAGES[:1], [["cat"]])[0].item() == threshold
    assert Detector(folder, threshold=threshold + 1e-4).confidences(IMAGES[:1], [["cat"]])[0].item() == 0


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (20, 24), (200, 100)])
def test_images_are_prepared_for_dino_as_its_processor_prepares_them(tiny_dino: Path, size: tuple[int, int]) -> None:
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (nn.functional.interpolate(noise, size, mode="bilinear") * 255).round() / 255
    ours = Detector(str(tiny_dino)).preprocess(images)
    processor = GroundingDinoImageProcessorPil.from_pretrained(tiny_dino)
    theirs = processor([to_pil(image) for image in images], return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2.5 / 255 / 0.22  # theirs is rounded to 8 bits after resizing


def test_images_are_prepared_for_owl_as_its_processor_prepares_them(tiny_owl: Path) -> None:
    """Padded below and at the right; without scipy its own processor resizes nothing, so the size is right already."""
    images = (IMAGES[:2, :, :, :20] * 255).round() / 255
    processor = Owlv2ImageProcessorPil.from_pretrained(tiny_owl, do_resize=False)
    theirs = processor([to_pil(image) for image in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(Detector(str(tiny_owl)).preprocess(images), theirs.float(), atol=1e-5, rtol=1e-5)
    enlarged = Detector(str(tiny_owl)).preprocess(IMAGES[:, :, :16, :8])
    assert enlarged.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("family", ["owl", "dino"])
def test_the_reward_is_the_mean_over_the_objects_of_the_prompt(family: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(f"tiny_{family}"))
    reward = load_reward("composition", RewardsConfig(composition=CompositionConfig(model=folder)))
    found = score(reward, IMAGES, ["a cat next to a dog", "", "an ant"], [{}, {}, {"objects": ["cat"]}])
    by_hand = Detector(folder).confidences(IMAGES[[0, 2]], [["cat", "dog"], ["cat"]])
    assert found.valid.tolist() == [True, False, True]
    torch.testing.assert_close(found.values[[0, 2]], torch.stack([each.mean() for each in by_hand]).double())


def test_models_that_do_not_fit_are_refused(tiny_owl: Path, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_owl.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    (tmp_path / "empty").mkdir()
    part, unsaid = (Path(shutil.copytree(tiny_owl, tmp_path / name)) for name in ("part", "unsaid"))
    weights = load_file(part / "model.safetensors")
    del weights["class_head.dense0.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    settings = json.loads((unsaid / "preprocessor_config.json").read_text())
    del settings["image_mean"]
    (unsaid / "preprocessor_config.json").write_text(json.dumps(settings))
    for model, said in [
        ("./nowhere", "was not found"),
        ("some/detector", "give the revision of 'some/detector'"),
        (str(tmp_path / "empty"), "could not be loaded"),
        (str(tiny_folder / "text_encoder"), "could not be loaded"),
        (str(broken), "could not be loaded"),
        (str(part), r"its weights lack class_head\.dense0\.weight, which would be random"),
        (str(unsaid), r"preprocessor_config\.json of .* has None for image_mean"),
    ]:
        with pytest.raises(UserError, match=said):
            load_reward("composition", RewardsConfig(composition=CompositionConfig(model=model)))
    for settings, said in [({"threshold": 1.0}, r"must lie in \[0, 1\)"), ({"query": "a cat"}, "must hold {object}")]:
        with pytest.raises(UserError, match=said):
            CompositionConfig(**settings)  # type: ignore[arg-type]


def test_a_detector_that_fails_makes_its_samples_invalid() -> None:
    def broken(images: Tensor, objects: list[list[str]]) -> list[Tensor]:
        raise RuntimeError("out of memory")

    found = score(CompositionReward(broken), IMAGES, ["a cat"] * 3, [{}] * 3)
    assert not found.valid.any() and found.error == "RuntimeError: out of memory"
    nothing = score(CompositionReward(broken), IMAGES, [""] * 3, [{}] * 3)
    assert isinstance(nothing, Scores) and not nothing.valid.any() and "names no object" in (nothing.error or "")
