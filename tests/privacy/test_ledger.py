"""The privacy ledger: what is spent, what may be, and nothing of it lost."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.privacy import ledger as module
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.calibrate import affordable, affordable_of
from fedpeft.privacy.events import (
    Composed,
    Event,
    Gaussian,
    Nothing,
    Repeated,
    SampledGaussian,
    compose,
)
from fedpeft.privacy.ledger import Budget, BudgetError, Ledger

BUDGET = Budget(8.0, 1e-5)
FREE = Budget(math.inf, 1e-5)
ROUND = Gaussian(5.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "privacy.jsonl"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_client_has_spent_what_it_was_charged(path: Path) -> None:
    random_ = random.Random(0)
    events: list[Event] = [ROUND, SampledGaussian(0.1, 2.0), Repeated(ROUND, 3), Gaussian(50.0)]
    own: dict[str, list[Event]] = {}
    with Ledger.open(path, Budget(math.inf, 1e-5, "rdp")) as ledger:
        for round_ in range(20):
            drawn = random_.sample(["a", "b", "ä\ud800", "../d", ""], 3)
            charged = {client: random_.choice(events) for client in drawn}
            ledger.charge(round_, charged)
            for client, event in charged.items():
                own.setdefault(client, []).append(event)
        found = {client: ledger.spent(client) for client in ledger.clients()}
        assert found == {client: compose(own[client]) for client in sorted(own)}
        for client in own:
            assert ledger.epsilon(client) == epsilon(Composed(tuple(own[client])), 1e-5, "rdp")
        assert ledger.spent("nobody") == Nothing() and ledger.epsilon("nobody") == 0.0
    with Ledger.open(path, FREE) as again:
        assert {client: again.spent(client) for client in again.clients()} == found


def test_a_charge_of_ten_thousand_clients_is_one_short_line(path: Path) -> None:
    clients = [f"client-{k:05d}" for k in range(10_000)]
    with Ledger.open(path, FREE) as ledger:
        ledger.charge(1, {c: SampledGaussian(0.1, 1 + k % 3) for k, c in enumerate(clients)}, "x")
    header, line = lines(path)
    assert header == {
        "sha256": header["sha256"],
        "previous": "0" * 64,
        "kind": "fedpeft privacy ledger",
        "schema": 1,
    }
    assert (line["round"], line["note"], line["previous"]) == (1, "x", header["sha256"])
    assert isinstance(line["charges"], list) and len(line["charges"]) == 3
    assert path.stat().st_size < 20 * 10_000
    with Ledger.open(path, FREE) as again:
        assert again.clients() == clients
        assert again.spent("client-00004") == SampledGaussian(0.1, 2.0)


def test_one_clients_epsilon_does_not_depend_on_the_others(path: Path) -> None:
    with Ledger.open(path, FREE) as ledger:
        ledger.charge(0, {"a": ROUND, "b": Gaussian(0.5)})
        before = ledger.epsilon("a")
        for round_ in range(1, 5):
            ledger.charge(round_, {"b": Gaussian(0.5), "c": ROUND})
        assert ledger.epsilon("a") == before == epsilon(ROUND, 1e-5)


HISTORIES: list[Event] = [
    Nothing(),
    Gaussian(20.0),  # a noised start
    Repeated(ROUND, 5),
    Composed((Repeated(ROUND, 3), Gaussian(3.0))),
    SampledGaussian(0.5, 8.0),
]


@pytest.mark.parametrize(
    ("start", "accountant"),
    [(start, "rdp") for start in HISTORIES]
    + [(start, "prv") for start in HISTORIES[:-1]]
    + [pytest.param(HISTORIES[-1], "prv", marks=pytest.mark.slow)],
)
def test_may_is_whether_the_budget_would_hold_it(path: Path, start: Event, accountant: str) -> None:
    sampled = isinstance(start, SampledGaussian)
    budget = Budget(3.0 if sampled else 2.5, 1e-5, accountant)  # type: ignore[arg-type]
    with Ledger.open(path, budget) as ledger:
        ledger.charge(0, {"a": start}, "start")
        for event in (Composed((ROUND, Gaussian(9.0))), Repeated(Gaussian(12.0), 2), ROUND):
            for round_ in range(1, 60):
                after = epsilon(Composed((ledger.spent("a"), event)), 1e-5, budget.accountant)
                assert ledger.may("a", event) == (after <= budget.epsilon)
                if after > budget.epsilon:
                    break
                ledger.charge(round_, {"a": event})
            assert round_ < 59
        assert 2.0 < ledger.epsilon("a") <= budget.epsilon


def test_may_of_sampled_steps_is_exact_where_rdp_would_say_no(path: Path) -> None:
    steps = Repeated(SampledGaussian(0.1, 1.0), 10)
    with Ledger.open(path, Budget(4.0, 1e-5)) as ledger:
        ledger.charge(0, {"a": Gaussian(10.0)}, "start")
        while ledger.may("a", steps):
            ledger.charge(1, {"a": steps})
        spent = ledger.spent("a")
    assert epsilon(spent, 1e-5) <= 4.0 < epsilon(Composed((spent, steps)), 1e-5)
    assert epsilon(spent, 1e-5, "rdp") > 4.0


def test_may_asks_the_accountant_seldom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For clients with different counts of one event: RDP, then one search for all of them."""
    event, asked = Gaussian(9.0), []
    rdp, prv = (affordable(event, 3.0, 1e-5, by) for by in ("rdp", "prv"))  # type: ignore[arg-type]
    assert (rdp, prv) == (36, 41)

    def pricing(*args: object) -> float:
        asked.append(args[2])
        return original(*args)  # type: ignore[arg-type]

    original = module.epsilon_of
    with Ledger.open(path, Budget(3.0, 1e-5)) as ledger:
        for round_ in range(prv):  # client k will have had it k + 1 times
            ledger.charge(round_, {f"c{k}": event for k in range(prv) if k >= prv - 1 - round_})
        monkeypatch.setattr(module, "epsilon_of", pricing)
        affordable_of.cache_clear()
        assert all(ledger.may(f"c{k}", event) for k in range(rdp - 1))
        assert affordable_of.cache_info().misses == 0
        assert [ledger.may(f"c{k}", event) for k in range(prv)] == [True] * (prv - 1) + [False]
        assert affordable_of.cache_info().misses == 1
    assert set(asked) == {"rdp"}


def test_over_the_budget_nobody_is_charged(path: Path) -> None:
    with Ledger.open(path, Budget(1.0, 1e-5)) as ledger:
        ledger.charge(1, {"a": Gaussian(4.0)})
        before, head = path.read_bytes(), ledger.head
        with pytest.raises(BudgetError, match=r"client 'a' has spent epsilon=0.9263; .* over its"):
            ledger.charge(2, {"b": Gaussian(4.0), "a": Gaussian(4.0)})
        assert (path.read_bytes(), ledger.head) == (before, head)
        assert ledger.clients() == ["a"] and ledger.spent("a") == Gaussian(4.0)
        assert ledger.may("b", Gaussian(4.0)) and not ledger.may("a", Gaussian(4.0))
        ledger.charge(2, {"b": Gaussian(4.0)})  # it goes on
    with Ledger.open(path, Budget(0.5, 1e-5)) as ledger:  # what was spent is spent
        assert ledger.epsilon("a") > 0.5
        assert ledger.may("a", Nothing()) and not ledger.may("a", Gaussian(1e6))


def test_without_a_limit_everything_may_be_and_is_recorded(path: Path) -> None:
    with Ledger.open(path, FREE) as ledger:
        ledger.charge(1, {"a": Gaussian(1e-200)})
        assert ledger.epsilon("a") == math.inf
        assert ledger.may("a", Gaussian(1e-200))


def test_nothing_is_written_for_nobody(path: Path) -> None:
    with Ledger.open(path, BUDGET) as ledger:
        head = ledger.head
        ledger.charge(3, {})
        assert ledger.head == head and len(lines(path)) == 1


def test_epsilons_price_each_past_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    priced = []
    with Ledger.open(path, FREE) as ledger:
        assert ledger.epsilons() == [] and ledger.worst() == 0.0
        for k in range(1, 31):
            ledger.charge(k, {f"c{j:03d}": ROUND for j in range(k)})
        ledger.charge(31, {f"d{j}": Gaussian(1.0) for j in range(50)})

        def pricing(*args: object) -> float:
            priced.append(args)
            return original(*args)  # type: ignore[arg-type]

        original = module.epsilon_of
        monkeypatch.setattr(module, "epsilon_of", pricing)
        found = ledger.epsilons()
        assert len(priced) == 31
        priced.clear()
        assert ledger.worst() == found[0][0]
        assert len(priced) == 2  # the longest of the one kind, and the other kind
    each = sorted((ledger.epsilon(c) for c in ledger.clients()), reverse=True)
    assert [e for e, count in found for _ in range(count)] == each
    assert len(each) == 80 and found[0][0] == epsilon(Repeated(ROUND, 30), 1e-5)


def test_worst_is_the_largest_whatever_the_pasts(path: Path) -> None:
    random_ = random.Random(5)
    kinds = [Gaussian(2.0), Gaussian(7.0), SampledGaussian(1.0, 3.0)]
    with Ledger.open(path, FREE) as ledger:
        for round_ in range(40):
            ledger.charge(round_, {f"c{k}": random_.choice(kinds) for k in range(12) if k % 3})
            ledger.charge(round_, {random_.choice("xyz"): random_.choice(kinds)})
            assert ledger.worst() == max(ledger.epsilon(c) for c in ledger.clients())


@pytest.mark.parametrize("round_", [-1, 1.0, True, None])
def test_a_round_is_a_number_from_0(path: Path, round_: int) -> None:
    with Ledger.open(path, BUDGET) as ledger, pytest.raises(FedpeftError, match="round="):
        ledger.charge(round_, {"a": ROUND})


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1e-5), (math.nan, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, 1e-5, "gdp")],
)
def test_a_budget_must_mean_something(arguments: tuple[float, float]) -> None:
    with pytest.raises(FedpeftError, match=r"epsilon=|delta=|accountant="):
        Budget(*arguments)


CHILD = """
import sys
from pathlib import Path
from fedpeft.privacy.events import Gaussian
from fedpeft.privacy.ledger import Budget, Ledger

with Ledger.open(Path(sys.argv[1]), Budget(float("inf"), 1e-5)) as ledger:
    for round in range(1, 1_000_000):
        ledger.charge(round, {f"c{k}": Gaussian(5.0) for k in range(200)})
        print(round, ledger.head, flush=True)
"""


def test_a_charge_survives_sigkill_and_the_file_is_locked_until_then(path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline().split() for _ in range(5)]
        with pytest.raises(FedpeftError, match="another process has it open"):
            Ledger.open(path, FREE)
        child.send_signal(signal.SIGKILL)
        said += [line.split() for line in child.stdout if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL
    promised, head = int(said[-1][0]), said[-1][1]
    with Ledger.open(path, FREE, head) as ledger:
        event = ledger.spent("c7")
        assert isinstance(event, Repeated)
        assert promised <= event.times <= promised + 1
        assert len({ledger.spent(client) for client in ledger.clients()}) == 1
        ledger.charge(event.times + 1, {"c7": ROUND})
        assert ledger.spent("c7") == Repeated(ROUND, event.times + 1)
