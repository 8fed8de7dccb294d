"""Of an error on a node, what may leave it; light, for the process of each message imports it."""

from __future__ import annotations

from fedpeft.redact import public


class ClientError(Exception):
    """A client's training or evaluation failed; the text is what may leave the node."""


def reason(error: Exception) -> str:
    """Of an error, what may leave the node."""
    return str(error) if isinstance(error, ClientError) else public(error)
