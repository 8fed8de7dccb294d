"""No reply touches an aggregate before it has been checked against what was sent.

What fails excludes that client from that round, with a reason; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fedpeft import tree
from fedpeft.errors import ReplyError
from fedpeft.strategy import Messages
from fedpeft.tree import Tree

LOSS = "loss"
"""The one scalar of a reply that only tells: where it is not finite, the update stays."""


def check_names(stack: Messages, like: Mapping[str, Tree]) -> None:
    """Raises ReplyError unless exactly the tensors of ``like`` (unstacked) are there.

    The message names the first missing, unknown, misshapen or mistyped tensor.
    """
    for part in sorted({*like, *stack.trees}):
        if part not in stack.trees:
            raise ReplyError(f"tree {part!r} is missing from the reply")
        if part not in like:
            raise ReplyError(f"tree {part!r} was not asked for")
        own = stack.trees[part]
        for name in sorted({*like[part], *own}):
            if name not in own:
                raise ReplyError(f"tensor {name!r} is missing from tree {part!r}")
            if name not in like[part]:
                raise ReplyError(f"tensor {name!r} of tree {part!r} was not asked for")
            want, got = like[part][name], own[name]
            if got.shape[1:] != want.shape:
                raise ReplyError(
                    f"tensor {name!r} has shape {tuple(got.shape[1:])}, not {tuple(want.shape)}"
                )
            if got.dtype != want.dtype:
                raise ReplyError(f"tensor {name!r} has dtype {got.dtype}, not {want.dtype}")


def _first_bad_tensor(stack: Messages, k: int) -> str:
    for own in stack.trees.values():
        for name, value in own.items():
            if not bool(torch.isfinite(value[k]).all()):
                return name
    return "?"


def check_stack(
    stack: Messages,
    like: Mapping[str, Tree],
    weights: Mapping[str, float],
    tells: Sequence[str] = ("weight",),
) -> tuple[Messages, dict[str, str]]:
    """The valid rows of a stack of replies, and why the others were excluded.

    like: the trees that a reply must hold, unstacked. weights: the aggregation weight that each
    client is registered with; a reply that claims another is refused. So is one with a scalar that
    is not finite, but for the loss, which no aggregate reads. tells: scalars that must be there.
    """
    try:
        check_names(stack, like)
    except ReplyError as error:
        return stack.rows([]), dict.fromkeys(stack.clients, str(error))
    reasons: dict[str, str] = {}
    finite = torch.ones(len(stack), dtype=torch.bool)
    for own in stack.trees.values():
        if own:
            finite &= tree.finite_rows(own).cpu()
    claimed = stack.scalars.get("weight")
    lacking = [name for name in tells if name not in stack.scalars]
    for k, client in enumerate(stack.clients):
        if not finite[k]:
            reasons[client] = f"NaN or Inf in tensor {_first_bad_tensor(stack, k)!r}"
        elif claimed is None or lacking:
            reasons[client] = f"the scalar {lacking[0]!r} is missing from the reply"
        elif client not in weights:
            reasons[client] = "it did not take part in this round"
        elif float(claimed[k]) != weights[client]:
            reasons[client] = (
                f"weight {float(claimed[k])} claimed, but it is registered with {weights[client]}"
            )
        elif bad := [n for n, v in stack.scalars.items() if n != LOSS and not math.isfinite(v[k])]:
            reasons[client] = f"NaN or Inf in the scalar {bad[0]!r}"
    good = [k for k, client in enumerate(stack.clients) if client not in reasons]
    return (stack if len(good) == len(stack) else stack.rows(good)), reasons
