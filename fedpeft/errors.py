"""Errors that a user can act on.

Every message names the argument, the value, the rule and the way out (DESIGN §7.6). Anything else
that escapes is a defect of fedpeft, and is left with its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FedpeftError(ValueError):
    """A fault in what the user gave: recipe, data, model, run folder. Shown without traceback."""


class ReplyError(FedpeftError):
    """A client's reply that may not touch the aggregate. Excludes that client from that round."""


class PayloadError(ReplyError):
    """A compressed message that its receiver refuses: damaged, foreign, or not what was agreed."""


class QuorumError(FedpeftError):
    """Too few valid replies in a round to go on."""


class CheckpointError(FedpeftError):
    """A checkpoint that cannot be read whole (truncated, corrupt, of another run)."""


_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}"  # of the Hugging Face hub
    r"|(?i:\b\w*(?:token|password|secret|api_?key)=)[^\s'\"]+"
    r"|(?<=://)[^/\s@]+(?=@)"  # who asks, in an address
)


def redacted(text: str) -> str:
    """The text without what looks like a secret: access tokens, passwords, users in addresses.

    >>> redacted("cannot read https://me:pass@example.org?token=abc as hf_abcdefgh123")
    'cannot read https://[redacted]@example.org?[redacted] as [redacted]'
    """
    return _SECRETS.sub("[redacted]", text)


def suggest(value: str, known: Iterable[str]) -> str:
    """The near names of ``value`` among ``known`` as the tail of an error message.

    >>> suggest("fedvag", ["fedavg", "fedprox"])
    "Did you mean 'fedavg'? Known: fedavg, fedprox."
    """
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    near.sort(key=lambda name: sorted(name) != sorted(value))  # swapped letters first
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}."
