"""Why clients are excluded, in a few classes: reasons hold names and numbers, a label must not."""

from __future__ import annotations

import re

_CLASSES = (
    ("not connected", r"its node is not connected"),
    ("no reply", r"no reply within"),
    ("not finite", r"NaN or Inf"),
    ("privacy budget", r"BudgetError: |.*privacy budget"),
    ("secure sum", r"no secure sum|.*secure aggregation"),
    ("wrong tensors", r"(FedpeftError: |ReplyError: )?(tree|tensor) "),
    ("wrong weight", r"weight |the scalar 'weight'"),
    ("wrong header", r"the reply is of |header |the sender's fedpeft |.*the server asks for "),
    ("unreadable", r"PayloadError: |record |scalar |blob |no score|.*(\.npy|bytes of data|dtype)"),
    ("client failed", r"[A-Za-z_.]{1,60}(: | \()"),
)
"""Class and how the reason begins, the first that fits; see ``flower`` and ``validate``."""

OTHER = "other"

CLASSES = (*(name for name, _ in _CLASSES), OTHER)


def reason_class(reason: str) -> str:
    """One of ``CLASSES``.

    >>> reason_class("no reply within 60 seconds")
    'no reply'
    >>> reason_class("RuntimeError (the traceback is in the node's log)")
    'client failed'
    """
    fits = (name for name, pattern in _CLASSES if re.match(pattern, reason))
    return next(fits, OTHER)
