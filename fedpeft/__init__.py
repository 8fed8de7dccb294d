"""Federated parameter-efficient fine-tuning.

Clients train adapters on a frozen pretrained model; a strategy aggregates them. What a strategy
needs is in ``fedpeft.strategy``; ``fedpeft.run`` runs a recipe. Importing this package loads
nothing else, so that the command line answers at once.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
