"""``python -m fedpeft.flower.nodes ADDRESS CERTIFICATE``: a server's nodes and their keys, as JSON.

``flwr supernode list`` (1.41) shows node ids, which change; who a node is, its public key says,
which the server sends all the same. Prints ``{"success": true, "nodes": [{"key", "status",
"online", "offline"}]}``: the key as PEM, ``status`` as Flower calls it (``registered``, ``online``,
``offline``), times in ISO 8601 or empty. Nodes that were unregistered are left out. Where the
server does not answer, it ends with 1 and says why on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.cli.utils import flwr_cli_exc_handler
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient


def main(address: str, certificate: str) -> None:
    """address: ``host:port`` of the control interface. certificate: the authority's file."""
    client = ControlHttpClient.from_server_address(
        address, False, Path(certificate).read_bytes(), [CliClientHttpInterceptor()]
    )
    try:
        with flwr_cli_exc_handler():
            found = client.ListNodes(ListNodesRequest())
    except click.ClickException as error:
        sys.exit(error.message)
    finally:
        client.close()
    nodes = [
        {
            "key": node.public_key.decode(),
            "status": node.status,
            "online": node.last_activated_at,
            "offline": node.last_deactivated_at,
        }
        for node in found.nodes_info
        if node.status != "unregistered"
    ]
    print(json.dumps({"success": True, "nodes": nodes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
