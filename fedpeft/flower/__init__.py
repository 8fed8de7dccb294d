"""Flower at the edge: the only folder that imports flwr; thin, tested against the pinned version.

``records`` writes messages as Flower's records, ``client_app`` is a client, ``shim`` one that hands
its messages to a site's ``resident`` process, ``federation`` drives clients over any ``Grid``,
``simulate`` does so on Flower's simulation runtime, ``server_app`` on real SuperNodes; ``grid``
goes the other way and lets Flower's own strategies drive a cohort.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported
