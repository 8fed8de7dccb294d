"""What server and sites must have in common before a reply means anything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fedpeft.prepare import Prepared


@dataclass(frozen=True)
class Digests:
    """SHA-256 of each.

    base: the frozen base model. layout: names and shapes of the trainable tensors. words: the
    tokenizer's vocabulary and the class names, by which text and labels become numbers.
    """

    base: str = ""
    layout: str = ""
    words: str = ""


def digests_of(prepared: Prepared) -> Digests:
    """Those of a recipe as it was prepared here."""
    tokenizer, network = prepared.tokenizer, prepared.network
    known = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    text = json.dumps([*known, list(prepared.population.labels)])
    return Digests(network.digest, network.layout.digest, hashlib.sha256(text.encode()).hexdigest())
