"""Named random streams: every random draw of a run comes from (seed, labels), never from order.

The stream of client c in round t is the same whichever engine trains the client, in whichever
chunk, before or after a resume. Labels are strings and integers; the digest is BLAKE2b, so streams
do not depend on Python's hash seed. These streams are for sampling, shuffling and initialisation;
noise for differential privacy never comes from here.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for the stream named by ``labels`` under ``seed``."""
    text = "\x1f".join([str(seed), *(f"{type(x).__name__}:{x}" for x in labels)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_stream(seed: int, *labels: str | int) -> np.random.Generator:
    """A NumPy generator for the stream named by ``labels``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *labels)))


def torch_stream(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU torch generator for the stream named by ``labels``."""
    return torch.Generator().manual_seed(derive(seed, *labels))
