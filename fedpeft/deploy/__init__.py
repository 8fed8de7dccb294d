"""A federation on real machines: its keys, files and commands, and a trial of it on this one.

``create.init`` writes the folder of a federation, ``local.up`` runs it on loopback. Flower is
called through its command-line programs only (``commands``). docs/deployment.md.
"""
