"""Gradient inversion: the words of a client, read out of what LoRA sends.

The gradient of ``lora_A`` is a sum of outer products with the layer's inputs, so its rows, and
those of any number of SGD steps, lie in the span of these inputs. For a layer that reads the
embeddings these are finitely many vectors, one for each token at each position, and everybody has
the frozen model: whoever sees the update tests them all (Petrov et al. 2024, DAGER, arXiv
2405.15586, section 4; there for full fine-tuning).

Aggregation, noise, adaptive optimizers and texts of more tokens than the update has rows are in the
way of this plain test, and a better attack may get around them: a share of 0 is no protection.
Without A in the update, as with FFA-LoRA, the attack does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings

from fedpeft.cohort.lanes import DTYPES
from fedpeft.errors import FedpeftError
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree

FOUND = 0.02
"""A vector lies in a span when the part outside it is at most this share of the vector."""


def entry_layers(network: Network) -> list[str]:
    """The LoRA layers whose input is the output of the embeddings, found by running the model.

    Raises FedpeftError where the model has none, or is no BERT.
    """
    embeddings = _embeddings(network)
    seen: dict[str, Tensor] = {}
    own = dict(network.model.named_modules())
    tokens = torch.arange(4, device=network.device)[None]

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()

        return hook

    handles = [own[name].register_forward_pre_hook(keep(name)) for name in network.scaling]
    set_mode(network.model, training=False, base_dropout=False)
    try:
        with torch.no_grad(), _as_it_trains(network):
            network.model(input_ids=tokens)
            first = embeddings(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, value in seen.items() if torch.equal(value, first)]
    if not found:
        raise FedpeftError(
            "gradient inversion does not apply: no LoRA layer reads the output of the embeddings "
            "(adapter.target_modules leaves the first layer's attention out)."
        )
    return found


def _as_it_trains(network: Network) -> torch.autocast:
    """Autocast to the 16 bits in which the base holds its linear weights, if it does."""
    held = {value.dtype for value in network.model.parameters()} & set(DTYPES.values())
    dtype = held.pop() if held else torch.float32
    return torch.autocast(network.device.type, dtype, enabled=dtype != torch.float32)


def _embeddings(network: Network) -> BertEmbeddings:
    for module in network.model.modules():
        if isinstance(module, BertEmbeddings):
            return module
    raise FedpeftError(
        "gradient inversion does not apply: it is written for encoders with BERT's embeddings "
        "(fedpeft-tiny, and Hugging Face's BERT models)."
    )


def recover(
    network: Network, update: Tree, length: int, texts: int = 1, rank: int = 0
) -> list[set[int]]:
    """The tokens that an update gives away, by position: a set for each of ``length`` positions.

    update: what a client's training changed, ``after - before``, unstacked. texts: how many texts
    the client is thought to have. Where more tokens than that lie in the span, or half of all, it
    is too large to tell them apart, and the position's set is empty. rank: how many directions of
    the update are not noise, if that is known; else those that float32's rounding leaves.

    Raises FedpeftError where the attack does not apply: no BERT, no adapted first layer, or an
    update without ``lora_A``.
    """
    rows = update_rows(network, update)
    basis = _basis(rows, _noise(network, update), rank)
    if not len(basis):
        return [set() for _ in range(length)]
    found = []
    for vectors in _candidates(network, length):
        outside = vectors - (vectors @ basis.T) @ basis
        share = outside.norm(dim=1) / vectors.norm(dim=1)
        inside = torch.nonzero(share <= FOUND).flatten().tolist()
        told = len(inside) <= min(texts, len(share) // 2)
        found.append(set(inside) if told else set())
    return found


def recovered_share(found: Sequence[set[int]], texts: Sequence[Sequence[int]]) -> float:
    """Of the distinct (token, position) pairs of ``texts``, the share that is in ``found``."""
    true = {(p, token) for text in texts for p, token in enumerate(text)}
    hit = sum(p < len(found) and token in found[p] for p, token in true)
    return hit / len(true)


def update_rows(network: Network, update: Mapping[str, Tensor]) -> Tensor:
    """The rows of the update of ``lora_A`` in all entry layers, float64 ``[n, d_in]``."""
    names = [_name(layer) for layer in entry_layers(network)]
    missing = [name for name in names if name not in update]
    if missing:
        raise FedpeftError(
            f"gradient inversion does not apply: the update has no {missing[0]!r}. Strategies that "
            f"never send lora_A (ffa_lora) do not give their clients' texts away so."
        )
    return torch.cat([update[name].detach().double().cpu() for name in names])


def _name(layer: str) -> str:
    return f"{layer}.lora_A.default.weight"


def _noise(network: Network, update: Tree) -> float:
    """A generous guess at the largest singular value of what rounding A to float32 adds."""
    used = [network.initial[name] for name in update if name in network.initial]
    own = [value for value in used if value.ndim == 2 and bool(value.any())]
    size = max((float(value.abs().max()) for value in own), default=0.0)
    rows, columns = max((tuple(value.shape) for value in own), default=(1, 1))
    return float(torch.finfo(torch.float32).eps * size * (math.sqrt(rows) + math.sqrt(columns)))


def _basis(rows: Tensor, noise: float, rank: int) -> Tensor:
    """Orthonormal rows that span what is not noise in ``rows``, ``[k, d]``."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = values > noise
    if rank:
        kept = (values > 0) & (torch.arange(len(values)) < rank)
    found: Tensor = right[kept]
    return found


def _candidates(network: Network, length: int) -> Iterator[Tensor]:
    """For each position, the embeddings of all tokens there, float64 ``[V, d]``."""
    embeddings = _embeddings(network)
    set_mode(network.model, training=False, base_dropout=False)
    words = int(embeddings.word_embeddings.num_embeddings)
    tokens = torch.arange(words, device=network.device)[:, None]
    for p in range(length):
        with torch.no_grad():
            at = torch.full_like(tokens, p)
            found: Tensor = embeddings(input_ids=tokens, position_ids=at)[:, 0]
        yield found.double().cpu()
