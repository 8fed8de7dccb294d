"""Federated algorithms, one self-contained file each; imported as ``fedpeft.strategies.NAME``.

A file holds both halves of an algorithm (server and client) and nothing of the mechanics. Files
never import one another.
"""

if __name__ != "fedpeft.strategies":
    raise ImportError(
        "import fedpeft.strategies, not strategies: the top-level folder is the same code under "
        "another name, and two copies of one class would not be equal"
    )
