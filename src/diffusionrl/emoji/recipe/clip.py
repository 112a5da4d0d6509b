"""A small CLIP (Radford et al., arXiv 2103.00020) for the world's images and captions, and an aesthetic head on it.

The CLIP is a ``CLIPModel`` in transformers' folder format, so rewards load it as they load a real one. It sees what the
diffusion model never saw, every animal with every activity: it has to judge what the model is to learn. A third of the captions
also say how the scene looks ("a cat large top left on pale bright pink"), and a third say nothing else: without them the
embedding would forget it, and the head could not rate it. Captions repeat within a batch, so all images of a caption count as
its own (targets shared equally among them).

The head is affine on the normalised embedding, as LAION's is in effect: ridge regression on ratings by the gold rule
(``emoji/aesthetics.py``) with a rater's noise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusionrl import seeds
from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.recipe.tokenizer import MAX_LENGTH, train_tokenizer
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED, to_tensor
from diffusionrl.emoji.scenes import IMAGE_SIZE, PITCH, Scene, draw_images
from diffusionrl.emoji.vocabulary import DDPO_ANIMALS, SUBJECTS, caption_sets, with_article

KINDS = {"subject": 0.45, "activity": 0.25, "pair": 0.15, "person": 0.15}
RATER_NOISE = 0.5
NUM_EVALUATION_SCENES = 1000  # of each kind, for the CLIP


@dataclass(frozen=True)
class CLIPTrainingConfig(TrainingConfig):
    """Train the CLIP and fit the aesthetic head."""

    out: Path = Path("runs/emoji/clip")
    num_steps: int = 1000
    batch_size: int = 192
    learning_rate: float = 4e-3
    num_scenes: int = 40_000
    """Scenes drawn once and passed over several times."""
    projection: int = 96
    ridge: float = 1e-4


def build_clip(tokenizer: CLIPTokenizer, projection: int) -> CLIPModel:
    """About 350,000 parameters; a patch is one latent's share of the image."""
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PITCH,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text | tokens, vision_config=vision, projection_dim=projection))


def _scenes(seed: int, count: int) -> tuple[Tensor, list[Scene]]:
    """Images, uint8 (N, 64, 64, 3), and their scenes, by the shares of ``KINDS``."""
    images: list[Tensor] = []
    found: list[Scene] = []
    for kind, share in KINDS.items():
        indices = range(len(found), len(found) + round(share * count))
        drawn, scenes = draw_images(seed, indices, kind, tuple(DDPO_ANIMALS))
        images.append(torch.from_numpy(drawn))
        found += scenes
    return torch.cat(images), found


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _normalised(embedding: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embedding, dim=-1)


def train_clip(config: CLIPTrainingConfig) -> None:
    torch.manual_seed(config.seed)
    images, scenes = _scenes(config.seed, config.num_scenes)
    captions, looks = [scene.caption for scene in scenes], [scene.look for scene in scenes]
    detailed = [f"{caption} {look}" for caption, look in zip(captions, looks, strict=True)]
    tokenizer = train_tokenizer(config.out / "tokenizer", detailed[:2000])
    clip = build_clip(tokenizer, config.projection).to(config.device)
    names = {caption: index for index, caption in enumerate(dict.fromkeys(captions + detailed + looks))}
    caption_of = torch.tensor([[names[caption] for caption in each] for each in (captions, detailed, looks)])
    tokens = _tokens(tokenizer, list(names))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "clip", step)
        chosen = torch.randint(len(images), (config.batch_size,), generator=draw)
        caption = caption_of[torch.randint(3, (config.batch_size,), generator=draw), chosen]
        pixels = to_tensor(images[chosen], config.device)
        found = clip(input_ids=tokens[caption].to(config.device), pixel_values=pixels)
        logits, same = found.logits_per_image, (caption[:, None] == caption).float().to(config.device)
        target = same / same.sum(1, keepdim=True)
        cross_entropy = torch.nn.functional.cross_entropy
        value = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return value, {"loss": value.item(), "accuracy": right}

    train_stage(clip, loss, config)
    clip.save_pretrained(config.out / "clip")
    tokenizer.save_pretrained(config.out / "clip")
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (config.out / "clip" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    head = fit_head(clip, images, config)
    save_file(head, config.out / "aesthetic_head.safetensors")
    figures = measure_clip(clip, tokenizer, config.device) | measure_head(clip, head, config.device)
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


@torch.no_grad()
def _embed_images(clip: CLIPModel, images: Tensor, device: str) -> Tensor:
    """Normalised embeddings of uint8 (N, 64, 64, 3), on the CPU."""
    parts = [clip.get_image_features(to_tensor(part, device)).pooler_output.cpu() for part in torch.split(images, 500)]
    return _normalised(torch.cat(parts))


@torch.no_grad()
def _embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], device: str) -> Tensor:
    return _normalised(clip.get_text_features(_tokens(tokenizer, captions).to(device)).pooler_output.cpu())


def _gold(images: Tensor) -> Tensor:
    return torch.cat([gold_rating(part.permute(0, 3, 1, 2).float() / 255) for part in torch.split(images, 2000)])


def fit_head(clip: CLIPModel, images: Tensor, config: CLIPTrainingConfig) -> dict[str, Tensor]:
    """An affine map from normalised embeddings to ratings, as the last layer of a head like LAION's."""
    noise = torch.randn(len(images), generator=seeds.torch_generator(config.seed, "rater"))
    ratings = (_gold(images) + RATER_NOISE * noise).double()
    features = _embed_images(clip, images, config.device).double()
    centre = features.mean(0)
    centred = features - centre
    gram = centred.T @ centred / len(images) + config.ridge * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (ratings - ratings.mean()) / len(images))
    bias = ratings.mean() - weight @ centre
    return {"layers.0.weight": weight[None].float(), "layers.0.bias": bias[None].float()}


def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, device: str) -> dict[str, float]:
    """On scenes never trained on: how often the right caption is the most similar of all captions of its kind."""
    figures = {}
    candidates = {"subject": [with_article(name) for name in SUBJECTS], "activity": caption_sets()["activities"]}
    for kind, captions in candidates.items():
        images, scenes = draw_images(EVALUATION_SEED, range(NUM_EVALUATION_SCENES), kind, tuple(DDPO_ANIMALS))
        similarity = _embed_images(clip, torch.from_numpy(images), device) @ _embed_texts(clip, tokenizer, captions, device).T
        named = [captions[i] for i in similarity.argmax(1).tolist()]
        right = sum(name == scene.caption for name, scene in zip(named, scenes, strict=True))
        figures[f"clip_{kind}_accuracy"] = round(right / len(scenes), 4)
    return figures


def measure_head(clip: CLIPModel, head: dict[str, Tensor], device: str) -> dict[str, float]:
    """On scenes never trained on: correlation with the gold rule, and the root mean squared error."""
    images, _ = _scenes(EVALUATION_SEED, 2000)
    gold = _gold(images)
    rated = _embed_images(clip, images, device) @ head["layers.0.weight"][0] + head["layers.0.bias"]
    correlation = torch.corrcoef(torch.stack([gold, rated]))[0, 1].item()
    return {
        "aesthetic_correlation": round(correlation, 4),
        "aesthetic_rmse": round((gold - rated).square().mean().sqrt().item(), 4),
    }
