"""Coverage-guided fuzzing of what a receiver reads: ``python -m tests.codecs.fuzz_wire [CORPUS]``.

Needs atheris (``pip install atheris``), which the tests do not. The first bytes of an input choose
settings, and whether length and checksum are made right, so that the fuzzer gets past them. Ends
by itself with ``-max_total_time=60``; a crash is an error other than PayloadError, or numbers that
the codec cannot make.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedpeft.codecs"]):
    from fedpeft.errors import PayloadError
    from tests.codecs.vandal import payloads, receive, sealed


def one_input(data: bytes) -> None:
    if len(data) < 3:
        return
    settings, _ = payloads()[int.from_bytes(data[:2], "little") % len(payloads())]
    try:
        receive(settings, data[3:] if data[2] == 0 else sealed(data[3:]))
    except PayloadError:
        return


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (_, data) in enumerate(payloads()):
            (folder / f"seed-{number}").write_bytes(number.to_bytes(2, "little") + b"\x01" + data)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
