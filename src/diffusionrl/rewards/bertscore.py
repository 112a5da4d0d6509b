"""BERTScore recall (Zhang et al., arXiv 1904.09675): how much of a reference's meaning a text holds.

    recall = mean over the tokens of the reference of max over the tokens of the text of cosine(h_reference, h_text)

with hidden states of one layer of a BERT-type model. As in the authors' package without idf weights: the tokens that begin and
end a text take no part in the mean, but may be a maximum; no rescaling by a baseline.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from diffusionrl.errors import UserError
from diffusionrl.hub import cached_first, locate


class BERTScore:
    """A text model and one of its layers.

    Args:
        model, revision: a folder, or a hub id with its commit; see ``locate``.
        layer: index into the hidden states, of which 0 is the embedding; -1 is the last.

    Raises:
        UserError: it is not there, has no safetensors, or no such layer.
    """

    def __init__(self, model: str, revision: str | None = None, layer: int = -1) -> None:
        source = locate(model, revision)
        try:
            self.model = cached_first(AutoModel.from_pretrained, *source, use_safetensors=True, dtype=torch.float32).eval()
            self.tokenizer = cached_first(AutoTokenizer.from_pretrained, *source)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"BERTScore's model {model!r} could not be loaded: {error}") from error
        count = self.model.config.num_hidden_layers
        if not -count - 1 <= layer <= count:
            raise UserError(f"BERTScore's model {model!r} has {count} layers: layer {layer} does not exist")
        self.model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
        self.layer = layer

    def recall(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Of each text against its reference, in [-1, 1]."""
        return [self._recall(text, reference) for text, reference in zip(texts, references, strict=True)]

    def _recall(self, text: str, reference: str) -> float:
        candidate, _ = self._embed(text)
        wanted, special = self._embed(reference)
        return (wanted[~special] @ candidate.T).amax(1).mean().clamp(-1, 1).item()  # 1 + rounding is 1

    @torch.no_grad()
    def _embed(self, text: str) -> tuple[Tensor, Tensor]:
        """Hidden states of length 1, (L, D), and which tokens begin or end the text, (L,)."""
        tokens = self.tokenizer(text.strip(), truncation=True, return_tensors="pt", return_special_tokens_mask=True)
        special = tokens.pop("special_tokens_mask")[0].bool()
        states = self.model(**tokens.to(self.model.device), output_hidden_states=True).hidden_states
        return normalize(states[self.layer][0], dim=-1).cpu(), special
