"""Programs that stand in for Flower's: they start at once, and end as they are told.

Called as ``fakes.py PROGRAM ARGUMENTS``; what they do is in the environment, by program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def superlink(arguments: list[str]) -> None:
    if os.environ.get("FAKE_SERVER") == "ends":
        sys.exit(9)
    with socket.create_server(("127.0.0.1", int(arguments[arguments.index("--port") + 1]))):
        signal.pause()


def supernode() -> None:
    if os.environ.get("FAKE_SITE") == "ends":
        sys.exit(4)
    signal.pause()


def flwr(arguments: list[str]) -> None:
    if arguments[0] == "log":
        print("\x1b[92mINFO \x1b[0m: round 1\n\n", flush=True)
    elif arguments[0] == "list":
        status = os.environ.get("FAKE_STATUS", "finished:completed")
        traffic = {"inbound-bytes": 5, "outbound-bytes": 7}
        run = {"run-id": "17", "status": status, "status-details": "why", "elapsed": 1.5}
        print(json.dumps({"success": True, "runs": [{**run, "network-traffic": traffic}]}))
    elif arguments[0] == os.environ.get("FAKE_REFUSED"):
        sys.exit("no such thing")
    else:
        print(json.dumps({"success": True, "run-id": "17"}))


def nodes() -> None:
    """FAKE_NODES: the answer, as JSON; without it the server is silent."""
    if "FAKE_NODES" not in os.environ:
        sys.exit("nobody is there")
    print(json.dumps({"success": True, "nodes": json.loads(os.environ["FAKE_NODES"])}))


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    if program == "flwr":
        flwr(rest)
    elif program == "flower-superlink":
        superlink(rest)
    elif program == "fedpeft.flower.nodes":
        nodes()
    else:
        supernode()
