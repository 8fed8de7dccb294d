"""Client-level releases against the plain formula, and every place where the noise may be added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.message import Messages
from fedpeft.privacy.client_level import BELOW, BOUND, Adaptive, Bands, ClientLevel
from fedpeft.privacy.matrix import coefficients
from fedpeft.privacy.randomness import Randomness
from fedpeft.record.codec import pack, unpack
from fedpeft.tree import Tree
from tests.kept import Memory

S = 1.5
SHAPES = {"a": (2, 3), "b": (4,)}
P = 10
LIKE = {"adapter": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}


def level(
    z: float = 1.0, place: str = "server", expected: float = 4.0, **more: object
) -> ClientLevel:
    made = ClientLevel(S, z, expected, 2, place, Randomness.seeded(0))  # type: ignore[arg-type]
    return dataclasses.replace(made, **more) if more else made  # type: ignore[arg-type]


def tree(rows: torch.Tensor) -> dict[str, Tree]:
    return {
        "adapter": {
            "a": rows[:, :6].reshape(-1, 2, 3).float(),
            "b": rows[:, 6:].reshape(-1, 4).float(),
        }
    }


START = torch.arange(P, dtype=torch.float64) / 7


def sent_to(count: int) -> Messages:
    one = {name: value[0] for name, value in tree(START[None])["adapter"].items()}
    return Messages.broadcast([f"c{k}" for k in range(count)], {"adapter": one})


def replies(rows: torch.Tensor, bits: Sequence[float] | None = None) -> Messages:
    ones = torch.ones(len(rows), dtype=torch.float64)
    scalars = {"weight": ones} | (
        {} if bits is None else {BELOW: torch.tensor(bits, dtype=torch.float64)}
    )
    return Messages(tuple(f"c{k}" for k in range(len(rows))), tree(rows), scalars)


def released(
    own: ClientLevel, rows: torch.Tensor, bits: Sequence[float] | None = None
) -> np.ndarray:
    """The update that the strategy gets, from updates as they came from the clients."""
    stacks = [replies(rows, bits)] if len(rows) else []
    found = list(own.enter([sent_to(max(1, len(rows)))], LIKE, iter(stacks)))
    assert len(found) == 1 and float(found[0].scalars["weight"]) == 1.0
    got = found[0].trees["adapter"]
    whole = torch.cat([got["a"].flatten(), got["b"].flatten()]).double()
    return (whole - START.float()).numpy()


def rows_of(norms: Sequence[float], seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    raw = torch.randn(len(norms), P, generator=stream, dtype=torch.float64)
    return raw / raw.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=torch.float64)[:, None]


# -- one release


@pytest.mark.parametrize("came", [0, 1, 3, 6])
def test_a_release_is_the_clipped_sum_with_noise_over_the_expected_number(came: int) -> None:
    """The server clips again, and divides by n = 4, however many came: also by none at all."""
    rows = rows_of([0.3, 1.4, 9.0, 2.0, 1.0, 100.0][:came])
    noise = Randomness.seeded(0).normal(P).numpy()
    total = np.zeros(P)
    for row in rows.float().double().numpy():
        total += row * min(1.0, S / np.linalg.norm(row))
    wanted = (total + 2.0 * S * noise) / 4.0
    assert np.abs(released(level(2.0), rows) - wanted).max() < 1e-6


def test_the_noise_has_the_stated_deviation() -> None:
    """DP3, of a client: z S / n for each number."""
    own = level(2.0)
    found = np.concatenate([released(own, rows_of([1.0, 1.0])) for _ in range(400)])
    mean = released(level(1e-9), rows_of([1.0, 1.0]))
    noise = found.reshape(-1, P) - mean
    assert noise.std() == pytest.approx(2.0 * S / 4.0, rel=0.05)
    assert np.abs(np.corrcoef(noise.T) - np.eye(P)).max() < 5 / math.sqrt(400)


def test_one_client_moves_the_sum_by_at_most_the_bound_whoever_else_came() -> None:
    with_it = released(level(1e-9), rows_of([1.0, 7.0, 50.0]))
    without = released(level(1e-9), rows_of([1.0, 7.0, 50.0])[:2])
    assert np.linalg.norm(with_it - without) * 4 == pytest.approx(S, rel=1e-5)


def test_an_update_that_is_not_finite_adds_nothing() -> None:
    own, sent = level(), sent_to(2)
    bad = tree(START + rows_of([1.0, 1.0]))
    bad["adapter"]["a"][1, 0, 0] = math.nan
    left = own.leave(sent, sent.reply(bad, weight=torch.ones(2)), Memory())
    assert not left.trees["adapter"]["a"][1].any() and not left.trees["adapter"]["b"][1].any()
    assert bool(left.trees["adapter"]["a"][0].any())


def test_what_leaves_is_the_clipped_update_and_nothing_else() -> None:
    own, sent, rows = level(), sent_to(3), rows_of([0.4, 3.0, 0.0])
    reply = sent.reply(tree(START + rows), weight=torch.ones(3), loss=torch.ones(3))
    left = own.leave(sent, reply, Memory())
    assert left.scalars.keys() == {"weight"}
    got = torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], dim=1).double()
    wanted = rows * torch.tensor([1.0, S / 3.0, 1.0])[:, None]
    assert float((got - wanted).norm()) < 1e-5
    assert bool((got.norm(dim=1) <= S).all())


def test_all_clients_must_be_sent_the_same() -> None:
    own = level()
    other = Messages(("c0", "c1"), {"adapter": {n: torch.randn(2, *s) for n, s in SHAPES.items()}})
    for sent in ([other], [sent_to(1), sent_to(1)]):
        with pytest.raises(FedpeftError, match="sends all clients the same"):
            list(own.enter(sent, LIKE, iter([])))


# -- where the noise is added


def test_local_noise_is_twice_the_bound_for_each_client() -> None:
    """2 z S: an update is replaced by any other, not taken away."""
    own, sent = level(2.0, "client"), sent_to(2000)
    left = own.leave(
        sent, sent.reply(tree(START.expand(2000, P)), weight=torch.ones(2000)), Memory()
    )
    noise = torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], dim=1)
    assert float(noise.std()) == pytest.approx(2 * 2.0 * S, rel=0.02)
    off = np.corrcoef(noise.numpy()[:100]) - np.eye(100)
    assert np.abs(off).max() < 1 and not torch.equal(noise[0], noise[1])


def test_local_updates_are_averaged_over_who_came_and_not_clipped_again() -> None:
    rows = rows_of([30.0, 40.0, 1.0])
    found = released(level(2.0, "client"), rows)
    assert np.abs(found - rows.mean(0).numpy()).max() < 1e-5
    assert not list(level(2.0, "client").enter([sent_to(2)], LIKE, iter([])))


def test_shares_add_up_to_the_servers_noise() -> None:
    """The fewest clients that a round may have make z S together."""
    own = level(3.0, "shares", least=5)
    sent = sent_to(5)
    sums = []
    for _ in range(400):
        left = own.leave(sent, sent.reply(tree(START.expand(5, P)), weight=torch.ones(5)), Memory())
        sums.append(torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], 1).sum(0))
    assert float(torch.stack(sums).std()) == pytest.approx(3.0 * S, rel=0.05)


def test_too_few_shares_of_the_noise_are_no_release() -> None:
    own = level(3.0, "shares", least=3)
    with pytest.raises(QuorumError, match="2 clients' shares do not make up the noise"):
        list(own.enter([sent_to(2)], LIKE, iter([replies(rows_of([1.0, 1.0]))])))


def test_nothing_that_leaves_is_beyond_reach() -> None:
    """Of the fixed point of secure sums, whose range must hold what clients send."""
    for place in ("client", "shares", "server"):
        own, sent = level(3.0, place), sent_to(500)
        reply = sent.reply(tree(START + rows_of([20.0] * 500)), weight=torch.ones(500))
        left = own.leave(sent, reply, Memory())
        most = max(float(value.abs().max()) for value in left.trees["adapter"].values())
        assert most <= own.reach(sent)
        assert most > own.reach(sent) / 12


# -- the bound that adapts


def norms_of(seed: int, count: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).lognormal(0.0, 1.0, count))


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_the_bound_converges_to_the_median_through_the_real_class(first: float) -> None:
    """DP7: announce, leave, enter; log-normal norms of median 1."""
    own = level(0.5, expected=100.0, clip_norm=first, adaptive=Adaptive(0.5, 0.2, 100 / 20))
    sent, path = sent_to(100), []
    for round_ in range(60):
        told = own.announce(sent)
        assert told.scalars[BOUND].tolist() == [own.clip_norm] * 100
        rows = rows_of(norms_of(round_, 100).tolist(), round_)
        reply = told.reply(tree(START + rows), weight=torch.ones(100))
        left = own.leave(told, reply, Memory())
        assert set(left.scalars) == {"weight", BELOW}
        list(own.enter([told], LIKE, iter([left])))
        path.append(own.clip_norm)
    assert np.mean(path[-15:]) == pytest.approx(1.0, abs=0.12)
    assert path[0] > first if first < 1 else path[0] < first  # trap F1: the sign


def test_an_adaptive_round_is_the_formula() -> None:
    """Andrew et al.: the noise on the update is larger, as the bits take their share."""
    own = level(1.0, expected=40.0, adaptive=Adaptive(0.3, 0.2, 2.0))
    rows, bits = rows_of([1.0, 3.0, 0.2]), [1.0, 0.0, 1.0]
    stream = Randomness.seeded(0)
    noise, bit_noise = stream.normal(P).numpy(), float(stream.normal(1))
    clipped = rows.float().double().numpy()
    clipped = clipped * np.minimum(1, S / np.linalg.norm(clipped, axis=1))[:, None]
    z = (1.0**-2 - (2 * 2.0) ** -2) ** -0.5
    found = released(own, rows, bits)
    assert np.abs(found - (clipped.sum(0) + z * S * noise) / 40).max() < 1e-6
    share = (2 - 3 / 2 + 2.0 * bit_noise) / 40 + 0.5
    assert own.clip_norm == pytest.approx(S * math.exp(-0.2 * (share - 0.3)), rel=1e-12)


def test_the_bit_says_unclipped() -> None:
    own = level(adaptive=Adaptive(0.5, 0.2, 2.0))
    told = own.announce(sent_to(3))
    reply = told.reply(tree(START + rows_of([1.4, 1.6, 0.0])), weight=torch.ones(3))
    assert own.leave(told, reply, Memory()).scalars[BELOW].tolist() == [1.0, 0.0, 1.0]


# -- correlated noise


def test_the_noise_of_all_rounds_is_the_inverse_of_the_matrix() -> None:
    """DP8 through the real class: y = sens S z C^-1 xi, by a plain solve in numpy."""
    rounds, separation, bands, z = 12, 4, 4, 0.7
    own = level(z, expected=5.0, bands=Bands(bands, rounds, separation))
    found = np.stack([released(own, rows_of([])) * 5.0 for _ in range(rounds)])
    c = np.zeros((rounds, rounds))
    for i in range(rounds):
        for j in range(max(0, i - bands + 1), i + 1):
            c[i, j] = coefficients(bands)[i - j]
    stream = Randomness.seeded(0)
    xi = np.stack([stream.normal(P).numpy() for _ in range(rounds)])
    # brute force: a client in the rounds i, i + 4, ..., whichever i it begins with
    sens = max(np.linalg.norm(c[:, i::separation].sum(1)) for i in range(separation))
    wanted = z * S * sens * np.linalg.solve(c, xi)
    assert sens == pytest.approx(own.bands.sensitivity, rel=1e-12) if own.bands else False
    assert np.abs(found - wanted).max() < 1e-5
    prefix = np.abs(np.cumsum(found, 0) - np.cumsum(wanted, 0))
    assert prefix.max() < 1e-5


def test_rounds_of_another_layout_cannot_share_correlated_noise() -> None:
    """RoLoRA trains other tensors in every other round."""
    own = level(bands=Bands(3, 9, 3))
    released(own, rows_of([1.0]))
    other = {"adapter": {"a": torch.zeros(2, 3)}}
    sent = Messages.broadcast(["c0"], other)
    with pytest.raises(FedpeftError, match=r"release 10 and 6 numbers: set privacy\.bands=0"):
        list(own.enter([sent], other, iter([])))


@pytest.mark.parametrize("kind", ["bands", "adaptive"])
def test_memory_goes_on_bit_by_bit(kind: str) -> None:
    """Stopped after round 3 of 6 and restored through the checkpoint's codec."""

    def made(seed: int) -> ClientLevel:
        if kind == "bands":
            own = level(1.0, bands=Bands(3, 6, 3))
        else:
            own = level(1.0, expected=40.0, adaptive=Adaptive(0.5, 0.2, 2.0))
        own.randomness = Randomness.seeded(seed)
        return own

    def go(own: ClientLevel) -> list[np.ndarray]:
        bits = None if kind == "bands" else [1.0, 0.0]
        return [released(own, rows_of([1.0, 2.0]), bits) for _ in range(3)]

    whole = made(0)
    go(whole)
    tensors: dict[str, torch.Tensor] = {}
    kept = unpack(pack(whole.memory(), "post", tensors), tensors)
    again, fresh = made(1), made(1)
    whole.randomness = Randomness.seeded(1)
    again.restore(kept)
    assert again.clip_norm == whole.clip_norm and len(again.past) == len(whole.past)
    wanted, found, others = go(whole), go(again), go(fresh)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert not np.array_equal(wanted[0], others[0])
