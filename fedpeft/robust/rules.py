"""Rules that make one update out of n, some of which may be arbitrary.

Every rule takes ``updates``, ``[n, P]`` of any floating dtype, one row per client, in the order of
the clients' names: a row is the client's adapter less the one that it was sent, decoded. It gives
float64 ``[P]`` on the same device. Rows must be finite: the caller excludes others first
(``distances.usable``; the round loop does), and all rules raise FedpeftError otherwise. They raise
QuorumError for fewer rows than the rule's condition asks for (``settings.Robust.least``).

Clients count once each, whatever they claim to hold, unless weights are given. All rows must cover
the same coordinates: masked or unequal ranks are not for these rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.robust.distances import blocks, check, squared_distances, squared_norms
from fedpeft.robust.settings import BY_DISTANCE, Robust

TOLERANCE = 1e-6
"""Relative change of the objective at which the geometric median stops."""


def combine(
    settings: Robust,
    updates: Tensor,
    weights: Tensor | None = None,
    root: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """The update that ``settings`` make of ``updates`` ``[n, P]``: float64 ``[P]``.

    weights: ``[n]``, relative, not negative; all equal where None; read by ``none``, and by the
    other rules where ``settings.weighted`` says so. root: ``[P]``, for ``fltrust``. distances:
    squared, ``[n, n]``, for ``settings.space = "product"`` (``distances.product_distances``).

    Raises FedpeftError for a setting out of range, rows that are not finite or an argument that the
    rule needs and has not; QuorumError for too few rows.
    """
    settings.check(len(updates))
    if settings.rule in BY_DISTANCE:
        return _by_distance(settings, updates, distances)
    heard = weights if settings.weighted else None
    match settings.rule:
        case "norm_clip":
            return norm_clip(updates, settings.clip_norm, heard)
        case "median":
            return median(updates)
        case "trimmed_mean":
            return trimmed_mean(updates, settings.trim)
        case "geometric_median":
            start = median(updates)
            return geometric_median(updates, heard, settings.steps, settings.smoothing, start)
        case "fltrust":
            if root is None:
                raise FedpeftError(
                    "robust.rule=fltrust needs the root update, which the server trains on "
                    "examples of its own: give it, or take another rule."
                )
            return fltrust(updates, root)
        case _:
            check(updates)
            return _mean(updates, _shares(updates, weights))


def _by_distance(settings: Robust, updates: Tensor, distances: Tensor | None) -> Tensor:
    if settings.space == "product" and distances is None:
        raise FedpeftError(
            "robust.space=product needs the distances between the clients' products: give those of "
            "fedpeft.robust.distances.product_distances, or set robust.space=factors."
        )
    apart = distances if settings.space == "product" else None
    if settings.rule == "krum":
        return krum(updates, settings.attackers, apart)
    if settings.rule == "multi_krum":
        return multi_krum(updates, settings.attackers, settings.keep, apart)
    return bulyan(updates, settings.attackers, apart)


def norm_clip(updates: Tensor, clip_norm: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """The mean of u_i min(1, tau / ||u_i||); tau is ``clip_norm``, or at 0 the median of the norms.

    Sun et al., arXiv 1911.07963, without their noise. It bounds how far an attacker can
    pull and not where to: neither translations nor, with a fixed tau, scalings pass through it.
    """
    Robust("norm_clip", clip_norm=clip_norm).check(len(updates))
    check(updates)
    norms = squared_norms(updates).sqrt()
    tau = clip_norm or float(_middle(norms.sort().values))
    factor = torch.where(norms > tau, tau / norms, 1.0)
    return _mean(updates, _shares(updates, weights) * factor)


def median(updates: Tensor) -> Tensor:
    """The median of every coordinate; of an even number, the mean of the two in the middle.

    Yin et al., ICML 2018 (arXiv 1803.01498), definition 1. Bounded by the honest values as long as
    f < n / 2. O(n log n P).
    """
    Robust("median").check(len(updates))
    check(updates)
    found = _like(updates)
    for part, block in blocks(updates):
        found[part] = _middle(block.sort(dim=0).values)
    return found


def trimmed_mean(updates: Tensor, trim: float) -> Tensor:
    """The mean of every coordinate without its floor(trim n) smallest and as many largest values.

    Yin et al., ICML 2018 (arXiv 1803.01498), definition 2; 0 <= trim < 1/2, and robust to
    f <= floor(trim n). O(n log n P).
    """
    settings = Robust("trimmed_mean", trim=trim)
    settings.check(len(updates))
    check(updates)
    cut = settings.cut(len(updates))
    found = _like(updates)
    for part, block in blocks(updates):
        found[part] = block.sort(dim=0).values[cut : len(updates) - cut].mean(dim=0)
    return found


def krum_scores(distances: Tensor, attackers: int) -> Tensor:
    """Each row's sum of squared distances to its n - f - 2 nearest others: ``[n]``.

    distances: squared, ``[n, n]``. Blanchard et al., NeurIPS 2017 (arXiv 1703.02757).
    """
    Robust("krum", attackers=attackers).check(len(distances))
    nearest = len(distances) - attackers - 2
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(dim=1).values[:, :nearest].sum(dim=1)


def krum(updates: Tensor, attackers: int, distances: Tensor | None = None) -> Tensor:
    """The update with the lowest score (``krum_scores``), of equals the first; n >= 2f + 3.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757). distances: squared, ``[n, n]``, in place of
    those between the rows. O(n^2 P).
    """
    Robust("krum", attackers=attackers).check(len(updates))
    scores = krum_scores(_apart(updates, distances), attackers)
    return updates[int(scores.argmin())].double()


def multi_krum(
    updates: Tensor, attackers: int, keep: int = 0, distances: Tensor | None = None
) -> Tensor:
    """The mean of the ``keep`` updates of lowest scores, n - f where it is 0; n >= 2f + 3.

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757); all scores among all n. With
    ``keep`` 1 it is Krum, with f = 0 and ``keep`` n the mean.
    """
    Robust("multi_krum", attackers=attackers, keep=keep).check(len(updates))
    scores = krum_scores(_apart(updates, distances), attackers)
    chosen = scores.sort(stable=True).indices[: keep or len(updates) - attackers]
    shares = torch.zeros_like(scores).index_fill(0, chosen, 1 / len(chosen))
    return _mean(updates, shares)


def bulyan(updates: Tensor, attackers: int, distances: Tensor | None = None) -> Tensor:
    """Per coordinate the mean of the n - 4f values nearest the median of n - 2f chosen updates.

    El Mhamdi et al., ICML 2018 (arXiv 1802.07927); n >= 4f + 3. Of values equally near the smaller
    counts. O(n^2 P).

    Chosen are those of lowest ``krum_scores`` among all n. The paper chooses one after another by
    Krum among those that are left: its last scores are of f - 1 neighbours or one, which f
    attackers at one point win, and in which near pairs tie, so that the order of rows decides.
    """
    Robust("bulyan", attackers=attackers).check(len(updates))
    scores = krum_scores(_apart(updates, distances), attackers)
    chosen = scores.sort(stable=True).indices[: len(updates) - 2 * attackers]
    found = _like(updates)
    rows = chosen.to(updates.device)
    near = len(updates) - 4 * attackers
    for part, block in blocks(updates):
        values = block[rows].sort(dim=0).values
        nearest = (values - _middle(values)).abs().sort(dim=0, stable=True).indices[:near]
        found[part] = values.gather(0, nearest).mean(dim=0)
    return found


def geometric_median(
    updates: Tensor,
    weights: Tensor | None = None,
    steps: int = 100,
    smoothing: float = 1e-6,
    start: Tensor | None = None,
) -> Tensor:
    """What minimises sum_i a_i ||z - u_i||, by Weiszfeld's iteration: RFA.

    Pillutla et al., IEEE TSP 2022 (arXiv 1912.13445), smoothed Weiszfeld: z becomes the mean of the
    u_i by a_i / max(smoothing, ||z - u_i||). a: the normalised ``weights`` ``[n]``, equal where
    None. start: z at first, ``[P]``; their weighted mean where None, as in the paper. Stops after
    ``steps``, or where the objective changes by less than TOLERANCE of itself. Breakdown at half of
    the weight. O(n P) per step.

    The paper takes 3 or 4 steps, because each costs it a secure sum. From the mean so few leave an
    update at distance R a pull of about R (f / (n - f))^(steps + 1): ``combine`` starts from the
    coordinates' median, which no f < n / 2 updates move far, and iterates to the end.
    """
    Robust("geometric_median", steps=steps, smoothing=smoothing).check(len(updates))
    check(updates)
    shares = _shares(updates, weights)
    point = _mean(updates, shares) if start is None else start.double()
    before = torch.inf
    for _ in range(steps):
        away = _distances_to(updates, point)
        objective = float(shares @ away)
        if abs(before - objective) <= TOLERANCE * objective:
            break
        before = objective
        pull = shares / away.clamp_min(smoothing)
        point = _mean(updates, pull / pull.sum())
    return point


def fltrust(updates: Tensor, root: Tensor) -> Tensor:
    """The mean of the updates at the norm of ``root``, by trust max(0, cos(u_i, root)).

    Cao et al., NDSS 2021 (arXiv 2012.13995). root: ``[P]``, what training on the
    server's own examples gives from the same start. Where no client has any trust it is ``root``
    itself. Has no bound on f: it is as good as the server's examples are. Raises FedpeftError for a
    root that is zero or not finite.
    """
    Robust("fltrust").check(len(updates))
    check(updates)
    norm = float(root.double().norm())
    if root.shape != updates.shape[1:] or not 0 < norm < torch.inf:
        raise FedpeftError(
            f"root has shape {tuple(root.shape)} and norm {norm}: it must be an update like the "
            f"clients', of {updates.shape[1]} finite numbers that are not all zero."
        )
    reference = root.to(updates.device, torch.float64)
    inner = updates.new_zeros(len(updates), dtype=torch.float64)
    for part, block in blocks(updates):
        inner += block @ reference[part]
    norms = squared_norms(updates).sqrt()
    trust = torch.where(norms > 0, inner / (norms * norm), 0.0).clamp(0, 1)
    if not float(trust.sum()) > 0:
        return reference.clone()
    rescaled = torch.where(norms > 0, norm / norms, 0.0)
    return _mean(updates, trust / trust.sum() * rescaled)


def _apart(updates: Tensor, distances: Tensor | None) -> Tensor:
    """The squared distances that Krum reads. Raises FedpeftError where they cannot be these."""
    if distances is None:
        return squared_distances(updates)
    check(updates)
    n = len(updates)
    if distances.shape != (n, n) or not bool((distances >= 0).all()):
        raise FedpeftError(
            f"distances of shape {tuple(distances.shape)}: must be the squared distances between "
            f"all pairs of {n} updates, [{n}, {n}], none negative or NaN."
        )
    return distances.double()


def _shares(updates: Tensor, weights: Tensor | None) -> Tensor:
    """Weights that sum to 1, float64 ``[n]``. Raises FedpeftError where they cannot."""
    if weights is None:
        return updates.new_full((len(updates),), 1 / len(updates), dtype=torch.float64)
    own = weights.to(updates.device, torch.float64)
    total = float(own.sum())
    if own.shape != updates.shape[:1] or bool((own < 0).any()) or not 0 < total < torch.inf:
        raise FedpeftError(
            f"weights of shape {tuple(weights.shape)} that sum to {total}: give one finite weight "
            f">= 0 for each of the {len(updates)} updates, not all zero."
        )
    return own / total


def _mean(updates: Tensor, shares: Tensor) -> Tensor:
    """``sum_i shares_i u_i``, float64 ``[P]``."""
    found = _like(updates)
    for part, block in blocks(updates):
        found[part] = shares @ block
    return found


def _distances_to(updates: Tensor, point: Tensor) -> Tensor:
    """Euclidean distances of all rows to ``point`` ``[P]``: ``[n]``."""
    total = updates.new_zeros(len(updates), dtype=torch.float64)
    for part, block in blocks(updates):
        total += (block - point[part]).square().sum(dim=1)
    return total.sqrt()


def _middle(ordered: Tensor) -> Tensor:
    """The median along the first dimension of what ascends along it."""
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _like(updates: Tensor) -> Tensor:
    return updates.new_empty(updates.shape[1], dtype=torch.float64)
