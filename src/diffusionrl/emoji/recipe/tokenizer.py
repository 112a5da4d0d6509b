"""A CLIP tokenizer with a small vocabulary, trained on the world's captions."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffusionrl.emoji.vocabulary import caption_sets

MAX_LENGTH = 16
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY_SIZE = 1200


def train_tokenizer(folder: Path, more_captions: Sequence[str] = ()) -> CLIPTokenizer:
    """Byte-pair encoding as CLIP does it: lower case, "</w>" ends a word, every byte is a token, so any text encodes.

    Args:
        more_captions: beside those of ``caption_sets``.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in alphabet]
    # Merges that are equally frequent go by their tokens' ids, which the trainer hands out in the order of a hash map, but for
    # the initial alphabet and the special tokens.
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=endings,
        show_progress=False,
    )
    captions = [prompt for prompts in caption_sets().values() for prompt in prompts] + ["and"] * 20 + list(more_captions)
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + endings + ["".join(merge) for merge in merges] + [BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    result = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=BEGIN,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    result.save_pretrained(folder)
    return result
