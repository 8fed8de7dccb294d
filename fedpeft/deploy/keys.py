"""The keys and certificates of a deployment.

- TLS: an authority of the deployment's own, a certificate of the server (X.509, ECDSA on P-256).
- Node authentication: a P-384 key per site in OpenSSH's format, which is what Flower 1.41 reads;
  the server registers the public half.
- Secure aggregation: an Ed25519 identity per site (PKCS#8 PEM), and all public ones by name
  (``flower.identity``).

Private keys are not encrypted, and readable by their owner only: services start without a person.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.deploy.layout import is_address

CA_DAYS, SERVER_DAYS = 3650, 825
EARLY = timedelta(hours=1)
"""How long before its making a certificate is valid, for clocks that are behind."""


def write_secret(path: Path, data: bytes) -> None:
    """Writes a new file that its owner alone can read. Raises OSError, also where it exists."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as file:
        file.write(data)


class Authority:
    """A certificate authority that signs server certificates, and nothing further down.

    now: the time that validity counts from, aware of its zone. Made by ``new`` or ``read``.
    """

    def __init__(
        self, now: datetime, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> None:
        self._now, self._key, self.certificate = now, key, certificate

    @staticmethod
    def new(now: datetime) -> Authority:
        """One that nobody knows yet."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("fedpeft deployment authority")
        certificate = (
            _begun(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, SHA256())
        )
        return Authority(now, key, certificate)

    @staticmethod
    def read(folder: Path, now: datetime) -> Authority:
        """That of ``write``. Raises OSError, and ValueError where the files are not a pair."""
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        if not isinstance(key, ec.EllipticCurvePrivateKey) or (
            key.public_key() != certificate.public_key()
        ):
            raise ValueError("ca.key is not the key of ca.crt")
        return Authority(now, key, certificate)

    def write(self, folder: Path) -> None:
        """Writes ``ca.key`` and ``ca.crt``."""
        write_secret(folder / "ca.key", _pem(self._key))
        (folder / "ca.crt").write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def write_server(self, folder: Path, hosts: list[str]) -> None:
        """Writes ``server.key`` and ``server.crt``, valid for ``hosts`` (names and addresses)."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_subject_name(host) for host in dict.fromkeys(hosts)])
        write_secret(folder / "server.key", _pem(key))
        certificate = self.sign(key.public_key(), names)
        (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))

    def sign(
        self, key: ec.EllipticCurvePublicKey, names: x509.SubjectAlternativeName
    ) -> x509.Certificate:
        """A server's certificate; it ends after ``SERVER_DAYS``, or with the authority's own."""
        ends = self._now + timedelta(days=SERVER_DAYS)
        last = min(ends, self.certificate.not_valid_after_utc)
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return (
            _begun(_name("fedpeft server"), self.certificate.subject, key, self._now, last)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer.value),
                critical=False,
            )
            .sign(self._key, SHA256())
        )


def write_node_key(folder: Path) -> bytes:
    """Writes a site's ``node.key`` and ``node.pub`` (OpenSSH); returns the public half."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(
        folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    )
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
    (folder / "node.pub").write_bytes(public)
    return public


def write_identity(folder: Path) -> str:
    """Writes a site's ``identity.key``; returns the public key, 64 hexadecimal digits."""
    key = Ed25519PrivateKey.generate()
    write_secret(folder / "identity.key", _pem(key))
    return key.public_key().public_bytes_raw().hex()


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _subject_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
