"""The privacy statement of a run: what is promised, to whom, on which assumptions, and what is not.

Made from the terms and the ledger; printed at the end, kept in the run folder as ``privacy.json``,
and its terms compared on resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fedpeft.config import Recipe
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.terms import Terms
from fedpeft.strategy import load

_RELATION = {
    "record": "one example of one client more or less",
    "client": "one client's update replaced by zero",
    "local": "one client's update replaced by any other",
}
_SAMPLED = {
    "poisson": "each client takes part in a round by an independent secret draw; the guarantee is "
    "for readers of the released adapters, who do not learn who took part",
    "cap": "nobody takes part in more than {rounds} rounds, which sampler and ledger see to; no "
    "amplification is claimed from sampling clients",
    "each": "nothing is assumed of who takes part; every round that a client took part in counts",
}
_TRUSTED = {
    "record": "nobody but the client itself: noise is added before anything leaves it",
    "server": "the server, which sees single updates before it adds the noise",
    "client": "nobody but the client itself: noise is added before its update leaves it",
    "shares": "secure aggregation: fewer than its threshold of clients and the server together",
}
_SEEDED = (
    "the noise follows from the recipe's seed (privacy.randomness=seeded), so whoever knows the "
    "seed can take it away"
)
_PAST_NOISE = (
    "whoever reads the run's checkpoints: they hold the noise of past rounds, which the next ones "
    "take back"
)
NOT_COVERED = (
    "who takes part in which round, unless by secret draws",
    "how many examples or clients there are",
    "figures measured on clients' own data, such as hold-out scores, and test scores where the "
    "test set is made of the clients' hold-outs",
    "the baselines of the last table, which are trained without protection",
    "the search for hyper-parameters: every further run on the same data adds to what is spent",
    "the pretrained model, taken to be public",
    "what the finite precision of float64 noise may give away (Mironov, CCS 2012)",
)


@dataclass(frozen=True)
class Statement:
    """See the module. epsilon: largest, median and least over those charged; inf: no promise.

    second: the largest epsilon by RDP, an independent and looser accountant. terms: what a resume
    must not change. void: why the figures promise nothing; empty if they do.
    """

    unit: str
    relation: str
    epsilon: tuple[float, float, float]
    second: float
    delta: float
    accountant: str
    charged: int
    sampled: str
    trusted: str
    mechanism: str
    initialisation: str
    terms: Mapping[str, object]
    void: str
    not_covered: tuple[str, ...] = NOT_COVERED

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text, line by line."""
        highest, middle, lowest = self.epsilon
        figures = f"epsilon {highest:.2f} at delta {self.delta:g}"
        if self.charged > 1:
            figures += f" for the worst of {self.charged} clients"
            figures += f" (median {middle:.2f}, least {lowest:.2f})"
        void = [f"VOID: {self.void}"] if self.void else []
        return [
            *void,
            f"protects: {self.unit}s ({self.relation})",
            f"promise: {figures}; accountant {self.accountant}, by RDP {self.second:.2f}",
            f"mechanism: {self.mechanism}",
            f"participation: {self.sampled}",
            f"trusted: {self.trusted}",
            f"start: {self.initialisation}",
            *(f"not covered: {text}" for text in self.not_covered),
        ]


def terms_as_dict(terms: Terms, recipe: Recipe) -> dict[str, object]:
    """What must not change within a run, as plain values for JSON."""
    return {
        "privacy": asdict(recipe.privacy),
        "rounds": asdict(recipe.rounds),
        "seed": recipe.seed,
        "participation": {"statement": terms.sampled, "most": terms.rounds},
    }


def statement(terms: Terms, recipe: Recipe, ledger: Ledger) -> Statement:
    """The statement about what the ledger has been charged so far."""
    privacy = recipe.privacy
    events = {ledger.spent(client) for client in ledger.clients()}
    second = max((epsilon(event, terms.delta, "rdp") for event in events), default=0.0)
    by_client = isinstance(terms.mechanism, ClientLevel)
    return Statement(
        unit=terms.unit,
        relation=_RELATION["local" if by_client and privacy.noise == "client" else terms.unit],
        epsilon=ledger.spread(),
        second=second,
        delta=terms.delta,
        accountant=privacy.accountant,
        charged=1 if terms.everyone else len(ledger.clients()),
        sampled=_SAMPLED[terms.sampled].format(rounds=terms.rounds),
        trusted=_TRUSTED[privacy.noise if by_client else "record"],
        mechanism=_mechanism(terms, recipe),
        initialisation="nothing of the clients' data is in the start; nothing is charged for it",
        terms=terms_as_dict(terms, recipe),
        void=_SEEDED if privacy.randomness == "seeded" else "",
        not_covered=(*NOT_COVERED, _PAST_NOISE) if terms.whole_run else NOT_COVERED,
    )


def _mechanism(terms: Terms, recipe: Recipe) -> str:
    privacy, mechanism = recipe.privacy, terms.mechanism
    if not isinstance(mechanism, ClientLevel):
        how, what = (
            "DP-SGD",
            f"gradients clipped to {privacy.clip_norm:g} over all trainable tensors",
        )
        if load(str(recipe.strategy["name"])).walks:
            how, what = "DP-ZO", f"slopes along public directions clipped to {privacy.clip_norm:g}"
        return (
            f"{how} in each client: Poisson batches, {what}, noise by ChaCha20, expected batch "
            f"size below"
        )
    how = f"multiplier {mechanism.noise_multiplier:.4g}, updates clipped to {privacy.clip_norm:g}"
    if mechanism.adaptive is not None:
        how += f" at first, then to their {mechanism.adaptive.quantile:g}-quantile (noised)"
    if mechanism.bands is not None:
        return f"noise correlated over {mechanism.bands.bands} rounds (banded matrix), {how}"
    where = {"server": "by the server", "client": "by each client", "shares": "in shares"}
    below = "clients that replied" if privacy.noise == "client" else "expected number of clients"
    return f"Gaussian noise {where[privacy.noise]}, {how}, {below} below"
