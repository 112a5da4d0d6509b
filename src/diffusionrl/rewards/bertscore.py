"""BERTScore recall (Zhang et al., arXiv 1904.09675): how much of a reference's meaning a text holds.

    recall = mean over the tokens of the reference of max over the tokens of the text of cosine(h_reference, h_text)

with hidden states of one layer of a BERT-type model. As in the authors' package without idf weights: the tokens that begin and
end a text take no part in the mean, but may be a maximum; no rescaling by a baseline.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusionrl.errors import UserError
from diffusionrl.rewards.pretrained import load_network, load_tokenizer
from diffusionrl.runs.hub import locate


class BERTScore:
    """A text model and one of its layers.

    Args:
        model, revision: a folder, or a hub id with its commit; see ``locate``.
        layer: index into the hidden states, of which 0 is the embedding; -1 is the last.

    Raises:
        UserError: it is not there, has no safetensors, not all of its weights, or no such layer.
    """

    def __init__(self, model: str, revision: str | None = None, layer: int = -1) -> None:
        source, what = locate(model, revision), f"BERTScore's model {model!r}"
        self.model = load_network(what, "AutoModel", source, optional=("pooler.",))  # which acts on top of the hidden states
        self.tokenizer = load_tokenizer(what, source)
        count = self.model.config.num_hidden_layers
        if not -count - 1 <= layer <= count:
            raise UserError(f"{what} has {count} layers: layer {layer} does not exist")
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
