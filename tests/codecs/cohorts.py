"""Cohorts, and every codec with every way of writing, for the tests of codecs and payloads."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import torch
from torch import Tensor

from fedpeft.codecs.settings import Codec, Kind, Name, Way, check_codec
from fedpeft.errors import FedpeftError

SHAPES = ((8, 40), (33,), (20, 16), (3, 2, 5))
SIZE = sum(math.prod(shape) for shape in SHAPES)


def allowed(settings: Codec) -> bool:
    try:
        check_codec(settings, "comms.up")
    except FedpeftError:
        return False
    return True


def every() -> list[Codec]:
    """Every codec with all values, positions and scopes that it takes, at some densities."""
    found = []
    for name, values, positions, scope, density in itertools.product(
        get_args(Name), get_args(Kind), get_args(Way), ("all", "tensor"), (0.01, 0.1, 0.5, 0.95, 1)
    ):
        if density != 0.1 and name not in ("topk", "randk", "dare", "compeft"):
            continue
        if density not in (0.1, 0.5) and (positions != "auto" or scope == "tensor"):
            continue
        block = 256 if values in ("fp32", "fp16", "bf16") else 64
        levels = 4 if values == "qsgd" and density == 0.5 else 127
        settings = Codec(
            codec=name,
            values=values,
            positions=positions,
            scope=scope,
            density=density,
            block=block,
            levels=levels,
        )
        if name != "none" and allowed(settings):
            found.append(settings)
    more = [
        Codec(codec="dense", values="qsgd", levels=1),
        Codec(codec="dare", rescale=0.7),
        Codec(codec="randk", feedback="always"),
        Codec(codec="compeft", alpha=2.0, density=0.3),
        Codec(codec="powersgd", values="fp16", rank=1),
        Codec(codec="powersgd", rank=1000),
    ]
    assert all(allowed(settings) for settings in more)
    return found + more


def cohort() -> tuple[Tensor, Tensor]:
    """Five clients, ``[5, SIZE]``, and their seeds: plain, zero, half zero, tiny, nearly empty."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, SIZE, generator=draw)
    matrix[1] = 0
    matrix[2, : SIZE // 2] = 0
    matrix[3] *= 1e-6
    matrix[4, 7:] = 0
    return matrix, torch.arange(-2, 3) * 1234567890123456789


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def label(settings: Codec) -> str:
    default = Codec()
    own = [str(v) for n, v in vars(settings).items() if v != getattr(default, n)]
    return "-".join(own)
