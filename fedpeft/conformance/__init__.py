"""The conformance kit: what holds for every strategy, whatever its rule.

``fedpeft check-strategy my_module`` runs it from the command line; from Python, without pytest::

    from fedpeft.conformance import PROPERTIES, check

    for line in check(MyStrategy(), PROPERTIES):
        print(line.verdict, line.property, line.found)

A property is a function of a strategy: of the four verbs (``contract``), of clients among
themselves (``clients``), of the aggregate (``rule``), all on a toy federation in which every number
is known (``toy``); and of the real engine on tiny models (``deep``), which is imported apart, as
it loads transformers. Whether a rule is the paper's the kit cannot know: ``agrees_with`` makes a
property of an oracle.
"""

from fedpeft.conformance import clients, contract, rule
from fedpeft.conformance.finding import Finding, NotApplicable, Property, Verdict, check, name_of
from fedpeft.conformance.rule import Oracle, agrees_with

PROPERTIES: tuple[Property, ...] = contract.PROPERTIES + clients.PROPERTIES + rule.PROPERTIES
"""The properties on the toy federation; about a second for all."""

__all__ = [
    "PROPERTIES",
    "Finding",
    "NotApplicable",
    "Oracle",
    "Property",
    "Verdict",
    "agrees_with",
    "check",
    "name_of",
]
