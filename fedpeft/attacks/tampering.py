"""Who is malicious, and what their updates become. For tests and studies only.

Updates are matrices ``[m, P]`` of the malicious clients' honest updates, one row each (adapter less
the one that was sent); results have their shape, dtype and device. The noise here comes from seeded
streams, as it protects nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from fedpeft.attacks.settings import Attack
from fedpeft.errors import FedpeftError
from fedpeft.names import Names, Roster
from fedpeft.streams import numpy_stream, torch_stream


def attackers(attack: Attack, names: Collection[str], seed: int) -> frozenset[str]:
    """The malicious among the clients: ``attack.share`` of them, at least one, drawn by the seed.

    None where ``attack.kind`` is ``none`` or the share 0. They depend on the set of names and not
    on their order. Raises FedpeftError for settings out of range.
    """
    attack.check()
    if attack.kind == "none" or not attack.share or not names:
        return frozenset()
    if isinstance(names, Roster):
        names = names.names
    ordered: Sequence[str] = names if isinstance(names, Names) else sorted(names)
    size = max(1, round(attack.share * len(ordered)))
    drawn = numpy_stream(seed, "attackers").choice(len(ordered), size=size, replace=False)
    return frozenset(ordered[i] for i in drawn.tolist())


def tamper(
    attack: Attack, updates: Tensor, names: Sequence[str], clients: int, seed: int, round: int
) -> Tensor:
    """What the malicious clients ``names`` of a round send for their honest ``updates``.

    ``little_is_enough`` needs all of the round's malicious clients in one call; the others give
    each row the same in any division of the clients. clients: how many the round has in all.
    """
    attack.check()
    match attack.kind:
        case "sign_flip":
            return sign_flip(updates, attack.factor)
        case "scaling" | "backdoor":
            return scaling(updates, attack.factor)
        case "gaussian":
            streams = [torch_stream(seed, "gaussian attack", round, name) for name in names]
            return gaussian(updates, attack.std, streams)
        case "little_is_enough":
            return little_is_enough(updates, attack.z or safe_z(clients, len(updates)))
        case _:
            return updates


def sign_flip(updates: Tensor, factor: float) -> Tensor:
    """``-factor u``: away from where the client's own examples lead."""
    return -factor * updates


def scaling(updates: Tensor, factor: float) -> Tensor:
    """``factor u``: with n / eta for a mean over n, the whole of it is the attacker's.

    Model replacement, Bagdasaryan et al., AISTATS 2020 (arXiv 1807.00459).
    """
    return factor * updates


def gaussian(updates: Tensor, std: float, streams: Sequence[torch.Generator]) -> Tensor:
    """N(0, std^2) in place of every number; row k from CPU stream k.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757). Raises ValueError unless there is one stream
    for each row.
    """
    rows = [
        torch.randn(row.shape, generator=stream, dtype=torch.float64)
        for row, stream in zip(updates, streams, strict=True)
    ]
    return (std * torch.stack(rows)).to(updates)


def little_is_enough(updates: Tensor, z: float) -> Tensor:
    """``mean - z std`` in every row, per coordinate over the attackers' own honest updates.

    Baruch et al., NeurIPS 2019 (arXiv 1902.06156), algorithm 3. They know no others' updates: their
    own stand for everybody's. One attacker alone has no deviation to hide in, and sends what an
    honest client would.
    """
    own = updates.double()
    sent = own.mean(dim=0) - z * own.std(dim=0, correction=0)
    return sent.to(updates.dtype).expand_as(updates).clone()


def safe_z(clients: int, malicious: int) -> float:
    """The largest z at which enough honest clients lie further out than the attackers.

    Baruch et al., equation 3: s = floor(n / 2 + 1) - m honest clients must; then z is the quantile
    (n - m - s) / (n - m) of the normal distribution. Raises FedpeftError where the attackers need
    no help (s < 1).
    """
    honest, needed = clients - malicious, clients // 2 + 1 - malicious
    if needed < 1:
        raise FedpeftError(
            f"attack.z=0: {malicious} malicious of {clients} clients are a majority by themselves, "
            "and no z is too large: give attack.z, or lower attack.share."
        )
    return NormalDist().inv_cdf((honest - needed) / honest) if honest > needed else 0.0
