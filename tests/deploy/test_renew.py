"""A renewed certificate: the same names and key, trusted by sites as they are, longer."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.deploy.create import init
from fedpeft.deploy.renew import certificate, renew
from fedpeft.errors import FedpeftError
from tests.deploy.test_create import handshake

SERVER = "fed.example.org"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    init(tmp_path / "a", "quickstart", ["partition.clients=3"], 3, f"{SERVER}:8443")
    return tmp_path / "a"


def test_the_same_names_and_key_for_longer(made: Path) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    files = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    before = certificate(made / "server" / "server.crt")
    ends = renew(made, now + timedelta(days=700))
    after = certificate(made / "server" / "server.crt")
    assert ends == after.not_valid_after_utc == now + timedelta(days=700 + 825)
    assert after.serial_number != before.serial_number
    assert after.public_key() == before.public_key()
    assert list(after.extensions) == list(before.extensions)
    changed = {p for p in made.rglob("*") if p.is_file() and files.get(p) != p.read_bytes()}
    assert changed == {made / "server" / "server.crt"}


@pytest.mark.parametrize("host", [SERVER, "127.0.0.1"])
def test_sites_trust_it_as_they_are(made: Path, host: str) -> None:
    renew(made, datetime.now(UTC))
    handshake(made, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, "other.example.org")


def test_the_end_of_the_authority_is_the_last(made: Path) -> None:
    last = certificate(made / "ca" / "ca.crt").not_valid_after_utc
    assert renew(made, last - timedelta(days=10)) == last
    with pytest.raises(FedpeftError, match=r"ca.crt ended on .* write a new folder"):
        renew(made, last)


def test_without_the_authoritys_key(made: Path) -> None:
    (made / "ca" / "ca.key").unlink()
    before = (made / "server" / "server.crt").read_bytes()
    with pytest.raises(FedpeftError, match=r"ca.key cannot be used: .* Put the authority's key"):
        renew(made, datetime.now(UTC))
    assert (made / "server" / "server.crt").read_bytes() == before


def test_an_authority_that_is_another(made: Path, tmp_path: Path) -> None:
    init(tmp_path / "b", "quickstart", ["partition.clients=3"], 3)
    (made / "ca" / "ca.key").write_bytes((tmp_path / "b" / "ca" / "ca.key").read_bytes())
    with pytest.raises(FedpeftError, match=r"ca.key is not the key of ca.crt"):
        renew(made, datetime.now(UTC))
    (made / "ca" / "ca.crt").write_bytes((tmp_path / "b" / "ca" / "ca.crt").read_bytes())
    with pytest.raises(FedpeftError, match=r"server.crt was not signed by .*ca.crt"):
        renew(made, datetime.now(UTC))


def test_the_command_says_what_to_restart(made: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", "renew", str(made)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "systemctl restart fedpeft-server" in done.stdout
    assert (
        f"good until {certificate(made / 'server' / 'server.crt').not_valid_after_utc:%Y-%m-%d}"
        in (done.stdout)
    )
