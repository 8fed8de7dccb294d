"""How many clients train at once: by tokens in flight, bounded by memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from fedpeft.config import Local
from fedpeft.model import Network

TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per fused step beyond which a larger chunk gains nothing (measured, benchmarks/)."""

MOST = {"cpu": 64, "cuda": 512}
"""Largest chunk chosen by itself."""

SHARE = 0.5
"""Share of the free memory that the estimate may fill."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one client in a chunk, and bytes free on the device.

    per_client: activations kept for backward, adapter and optimizer state. An upper estimate: a
    frozen base keeps less.
    """

    per_client: int
    free: int


def estimate(network: Network, local: Local, tokens_per_row: int) -> MemoryEstimate:
    """Memory of one more client whose rows have ``tokens_per_row`` tokens.

    Activations of a transformer block in float32: ``tokens * (68 hidden + 10 heads * T)`` bytes
    (Korthikanti et al., arXiv 2205.05198, eq. 2, twice for float32); language-model logits thrice;
    adapter, gradient, two moments, two copies.
    """
    config = network.model.config
    tokens = local.batch_size * tokens_per_row
    heads = int(getattr(config, "num_attention_heads", 8))
    block = 68 * int(getattr(config, "hidden_size", 768)) + 10 * heads * tokens_per_row
    activations = tokens * int(getattr(config, "num_hidden_layers", 12)) * block
    logits = (
        12 * tokens * int(getattr(config, "vocab_size", 0)) if network.task == "causal_lm" else 0
    )
    state = 4 * 6 * network.layout.size
    return MemoryEstimate(activations + logits + state, free_memory(network.device))


def free_memory(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def choose(network: Network, local: Local, tokens_per_row: int) -> int:
    """Clients per chunk: enough tokens to keep the device busy, within half the free memory."""
    need = estimate(network, local, tokens_per_row)
    tokens = max(1, local.batch_size * tokens_per_row)
    kind = "cuda" if network.device.type == "cuda" else "cpu"
    by_tokens = max(1, min(MOST[kind], round(TOKENS[kind] / tokens)))
    by_memory = max(1, int(SHARE * need.free / max(1, need.per_client)))
    return min(by_tokens, by_memory)
