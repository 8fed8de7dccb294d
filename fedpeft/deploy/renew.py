"""A new certificate for the server, from the authority that all machines trust already."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.deploy import keys
from fedpeft.deploy.layout import CA, SERVER, read
from fedpeft.errors import FedpeftError
from fedpeft.record.files import replace

WARNED_DAYS = 30
"""So long before its end ``fedpeft deploy status`` warns of a certificate."""


def renew(folder: Path, now: datetime) -> datetime:
    """Replaces ``server/server.crt``, whole or not at all; returns when the new one ends.

    It is of the same key and for the same names, so nothing else changes, on no machine. folder: of
    ``create.init``, with ``ca/ca.key``. Raises FedpeftError where that is not there, or the
    authority itself is at its end.
    """
    read(folder)
    authority = _authority(folder, now)
    path = folder / SERVER / "server.crt"
    before = certificate(path)
    key = before.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # as keys.Authority makes them
    names = before.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    try:
        before.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FedpeftError(
            f"{path} was not signed by {folder / CA / 'ca.crt'}, which the sites trust: put the "
            f"two of one `fedpeft deploy init` together."
        ) from error
    signed = authority.sign(key, names.value)
    replace(path, signed.public_bytes(Encoding.PEM))
    return signed.not_valid_after_utc


def certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM. Raises FedpeftError where it is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FedpeftError(
            f"{path} cannot be used as a certificate: {error}. Restore it, or write the folder "
            f"again with `fedpeft deploy init`."
        ) from error


def _authority(folder: Path, now: datetime) -> keys.Authority:
    try:
        found = keys.Authority.read(folder / CA, now)
    except (OSError, ValueError) as error:
        raise FedpeftError(
            f"{folder / CA / 'ca.key'} cannot be used: {error}. Put the authority's key and "
            f"certificate back there; where the key is gone, no certificate can be signed for the "
            f"sites as they are: write a new folder with `fedpeft deploy init`."
        ) from error
    if found.certificate.not_valid_after_utc <= now:
        raise FedpeftError(
            f"{folder / CA / 'ca.crt'} ended on {found.certificate.not_valid_after_utc:%Y-%m-%d}: "
            f"write a new folder with `fedpeft deploy init`, and exchange ca.crt everywhere."
        )
    return found
