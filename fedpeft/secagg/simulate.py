"""What secure aggregation would return, without keys and masks, for clients in one process.

Masks cancel bit by bit, so that the sum of the encoded vectors is the protocol's result, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedpeft.errors import FedpeftError
from fedpeft.secagg.fixed import FixedPoint, Floats
from fedpeft.secagg.messages import MIN_CLIENTS


def masked_sum(vectors: Iterable[Floats], fixed: FixedPoint) -> Floats:
    """The decoded sum ``[size]`` of clients' vectors, ``[size]`` each or ``[K, size]`` in stacks.

    Memory is one stack and one sum. Raises FedpeftError for what a client would refuse to send (see
    ``FixedPoint.encode``), and for fewer clients than the protocol takes or more than ``fixed`` is
    set up for.
    """
    total = np.zeros(fixed.size, fixed.dtype)
    count = 0
    for stack in vectors:
        words = np.atleast_2d(fixed.encode(stack))
        total += words.sum(axis=0, dtype=fixed.dtype)
        count += len(words)
    if count < MIN_CLIENTS:
        raise FedpeftError(
            f"{count} clients cannot be summed securely: with fewer than {MIN_CLIENTS} the sum "
            f"tells each what the other sent; let more clients take part in a round"
        )
    return fixed.decode(total, count)
