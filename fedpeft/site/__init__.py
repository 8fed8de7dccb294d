"""A site that stays: its process, what it keeps on disk, and what its operator allows.

``server`` is the resident process (``fedpeft site``), which hands one message at a time to a worker
that has model and data loaded (``worker``); ``frames`` is what is spoken on its socket, ``state``
what a client keeps between rounds, ``policy`` and ``rules`` what a recipe may ask of the site.
docs/deployment.md.
"""
