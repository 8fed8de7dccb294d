"""The command line: ``fedpeft run | resume | check | deploy | ...``.

Importing this package costs typer and rich only; torch and its like are imported by the commands.
"""

from fedpeft.cli.app import main

__all__ = ["main"]
