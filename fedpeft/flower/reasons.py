"""Of an error on a node, what may leave it; light, for the process of each message imports it."""

from __future__ import annotations

from fedpeft import errors
from fedpeft.errors import FedpeftError

_OWN_ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


class ClientError(Exception):
    """A client's training or evaluation failed; the text is what may leave the node."""


def public_reason(text: str) -> str:
    """Of ``Type: message``, what may leave the node: the message only of fedpeft's own errors."""
    kind = text.partition(": ")[0]
    return text if kind in _OWN_ERRORS else f"{kind} (the traceback is in the node's log)"


def reason(error: Exception) -> str:
    """Of an error, what may leave the node."""
    if isinstance(error, ClientError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    return text if isinstance(error, FedpeftError) else public_reason(text)
