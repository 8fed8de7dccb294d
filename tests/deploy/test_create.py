"""The folder of a federation: keys that fit, files that parse, nothing secret in a wrong place."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import ssl
import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.config import Output
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.deploy import layout
from fedpeft.deploy.commands import SUPERNODE
from fedpeft.deploy.create import init
from fedpeft.errors import FedpeftError
from fedpeft.flower.identity import own_keyring, read_identities, read_secret
from fedpeft.secagg.primitives import identity
from fedpeft.site.folder import read_config
from fedpeft.site.policy import read_policy
from fedpeft.site.rules import check_recipe, check_text, policy_for

SITES = ("client-000", "client-001", "client-002")
THREE = "partition.clients=3"
GUARDED = (
    THREE,
    "secure_aggregation.enabled=true",
    "privacy.unit=record",
    "privacy.noise_multiplier=1.0",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    init(folder, "quickstart", [THREE], 3, "fed.example.org:8443")
    return folder


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under secure aggregation, with record-level privacy."""
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    init(folder, "quickstart", GUARDED, SITES, "[::1]:8443")
    return folder


def handshake(folder: Path, host: str) -> None:
    """Client and server of TLS, in memory. Raises ssl.SSLError where the client refuses."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    trusting = ssl.create_default_context(cafile=folder / "sites" / SITES[0] / "ca.crt")
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(down, up, server_hostname=host)
    server = listening.wrap_bio(up, down, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() == "TLSv1.3"


@pytest.mark.parametrize("host", ["fed.example.org", "localhost", "127.0.0.1", "server"])
def test_the_certificate_is_good_for_the_server(made: Path, host: str) -> None:
    handshake(made, host)


def test_the_certificate_is_good_for_nobody_else_and_for_an_address(
    made: Path, guarded: Path
) -> None:
    handshake(guarded, "::1")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, "other.example.org")


def test_every_authority_is_a_new_one(made: Path, guarded: Path) -> None:
    assert (made / "ca/ca.crt").read_bytes() != (guarded / "ca/ca.crt").read_bytes()


def test_the_keys_of_nodes_are_what_flower_reads(made: Path) -> None:
    seen = set()
    for site in SITES:
        key = load_ssh_private_key((made / "sites" / site / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        wanted = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        assert try_load_public_key(made / "server" / "sites" / f"{site}.pub") == wanted
        assert try_load_public_key(made / "sites" / site / "node.pub") == wanted
        seen.add(wanted)
    assert len(seen) == 3


def test_identities_fit_the_list_that_everybody_has(made: Path) -> None:
    listed = read_identities(made / "server" / "all.json")
    assert tuple(listed) == SITES
    for site in SITES:
        assert read_identities(made / "sites" / site / "all.json") == listed
        assert identity(read_secret(made / "sites" / site / "identity.key")) == listed[site]
    assert len(set(listed.values())) == 3


def test_private_keys_are_for_their_owner_alone(made: Path) -> None:
    private = [
        path for path in made.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()
    ]
    assert {path.relative_to(made).as_posix() for path in private} == {
        "ca/ca.key",
        "server/server.key",
        *(f"sites/{site}/{name}.key" for site in SITES for name in ("node", "identity")),
    }
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (made, *(made / "sites" / site for site in SITES)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_secret_lies_in_two_places(made: Path) -> None:
    """The end of each private key is in its own file only."""
    every = {path: path.read_text() for path in made.rglob("*") if path.is_file()}
    for path in made.rglob("*.key"):
        end = "\n".join(path.read_text().splitlines()[1:-1][-2:])
        assert [other for other, text in every.items() if end in text] == [path]


def test_a_site_is_told_what_it_needs(made: Path) -> None:
    names = {path.name for path in (made / "sites" / SITES[0]).iterdir()}
    assert names == {
        *("all.json", "ca.crt", "fedpeft-site.service", "fedpeft-node.service"),
        *("identity.key", "node.key", "node.pub", "policy.yaml", "site.json"),
    }


def unit(path: Path) -> tuple[dict[str, str], list[str]]:
    """The service section of a unit, and its command."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]
    service = dict(parser["Service"])
    return service, shlex.split(service["ExecStart"])


def test_the_units_are_commands_that_flower_takes(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, [program, *words] = unit(guarded / "server" / "fedpeft-server.service")
    assert service["WorkingDirectory"] == "/var/lib/fedpeft/server"
    assert program == "/var/lib/fedpeft/venv/bin/flower-superlink"
    args = _parse_args_run_superlink().parse_args(words)
    assert (args.port, args.enable_supernode_auth, args.insecure) == (8443, True, False)
    assert args.runtime_dependency_install is False
    for file in (args.ssl_ca_certfile, args.ssl_certfile, args.ssl_keyfile):
        assert (guarded / "server" / file).is_file()
    for site in SITES:
        own = guarded / "sites" / site
        _, words = unit(own / "fedpeft-site.service")
        assert words == ["/var/lib/fedpeft/venv/bin/fedpeft", "site", "."]
        _, [program, *words] = unit(own / "fedpeft-node.service")
        assert program == "/var/lib/fedpeft/venv/bin/python3"
        assert words[:3] == list(SUPERNODE[1:])
        args = _parse_args_run_supernode().parse_args(words[3:])
        assert (args.superlink, args.insecure) == ("[::1]:8443", False)
        assert (own / args.root_certificates).is_file()
        assert (own / args.auth_supernode_private_key).is_file()
        config = parse_config_args([args.node_config])
        assert (config["client"], config["privacy-ledger"]) == (site, "privacy.jsonl")
        assert config == read_config(own)
        monkeypatch.chdir(own)
        assert own_keyring(config).identities.keys() == set(SITES)


def test_without_protection_a_node_is_bound_by_its_policy_alone(made: Path) -> None:
    _, [_, *words] = unit(made / "sites" / SITES[1] / "fedpeft-node.service")
    args = _parse_args_run_supernode().parse_args(words[3:])
    assert parse_config_args([args.node_config]) == {
        "client": SITES[1],
        "socket": "resident/site.sock",
        "state": "state",
        "policy": "policy.yaml",
    }


@pytest.mark.parametrize("site", SITES)
def test_a_policy_allows_the_recipe_that_it_was_written_for(guarded: Path, site: str) -> None:
    recipe = load_recipe(str(guarded / "server" / "recipe.yaml"))
    policy = read_policy(guarded / "sites" / site / "policy.yaml")
    assert policy == policy_for(recipe)
    assert (policy.privacy_unit, policy.secure_aggregation) == ("record", "required")
    check_text(policy, dump_recipe(recipe))
    check_recipe(policy, recipe)
    with pytest.raises(FedpeftError, match="sources allows pydocs, and data.source is '/etc'"):
        check_recipe(policy, replace(recipe, data=replace(recipe.data, source="/etc")))


def test_the_app_is_the_one_of_the_repository_and_the_recipe_the_one_given(made: Path) -> None:
    app = (made / "server" / "app" / "pyproject.toml").read_text()
    assert app == (ROOT / "experiments" / "flower" / "pyproject.toml").read_text()
    wanted = load_recipe("quickstart", [THREE])
    found = load_recipe(str(made / "server" / "recipe.yaml"))
    assert found == replace(wanted, output=Output(folder="run"))
    connection = tomllib.loads((made / "server" / "flower" / "config.toml").read_text())
    assert connection["superlink"]["fedpeft"] == {
        "address": "127.0.0.1:8443",
        "root-certificates": "/var/lib/fedpeft/server/ca.crt",
    }


def test_a_container_sees_its_own_folder_only(guarded: Path) -> None:
    services = yaml.safe_load((guarded / "compose.yaml").read_text())["services"]
    own = (f"{kind}-{site}" for kind in ("site", "node") for site in SITES)
    assert services.keys() == {"server", *own}
    for name, service in services.items():
        [volume] = service["volumes"]
        own, inside = volume.split(":")
        assert own == ("./server" if name == "server" else f"./sites/{name[5:]}")
        assert (guarded / own).is_dir() and inside == service["working_dir"]
        program, *words = service["command"]
        if name.startswith("site"):
            assert (program, words) == ("fedpeft", ["site", "."])
        elif name != "server":
            assert (program, *words[:3]) == SUPERNODE
            assert _parse_args_run_supernode().parse_args(words[3:]).superlink == "server:8443"
    assert (guarded / ".dockerignore").read_text() == "*\n!*.whl\n"


def test_the_readme_names_files_that_exist(guarded: Path) -> None:
    text = (guarded / "README.md").read_text()
    assert "$" not in text.replace("$PATH", "")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    words = [word for block in blocks for word in shlex.split(block, comments=True)]
    registered = [word for word in words if word.endswith(".pub") and "/" in word]
    assert registered == 2 * [f"sites/{site}.pub" for site in SITES]
    for word in (*registered, "app", "recipe.yaml", "all.json"):
        assert (guarded / "server" / word).exists()
    assert """'recipe="recipe.yaml" identities="all.json"' --stream""" in text
    for name in re.findall(r"/var/lib/fedpeft/(server/\S+|site/\S+)", " ".join(words)):
        if "/" in name and not name.endswith("/flower"):
            own = guarded / name.replace("site/", f"sites/{SITES[0]}/", 1)
            assert own.exists() or (guarded / name).exists(), name
    for folder in re.findall(r"\| `(sites/\S+)` \|", text):
        assert (guarded / folder).is_dir()
    for file in re.findall(r"^- `(\S+)`", text, re.MULTILINE):
        assert (guarded / file).is_file()


def test_a_folder_that_is_not_empty_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("mine")
    for folder in (tmp_path / "own", tmp_path / "own" / "file"):
        with pytest.raises(FedpeftError, match="is not empty: name a new folder, or an empty one."):
            init(folder, "quickstart", [THREE], 3)
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "file"]


def test_an_empty_folder_is_taken_and_nothing_else_is_written(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    init(tmp_path / "new", "quickstart", [THREE], 3)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert layout.read(tmp_path / "new").server == "localhost:8000"


@pytest.mark.parametrize(
    ("overrides", "sites", "server", "message"),
    [
        ([], 3, "h:1", "3 sites and partition.clients=20: .* Add partition.clients=3"),
        ([], 0, "h:1", "there are no sites"),
        ([THREE], ("a", "b", "c"), "h:1", "--site 'a' is no client of this recipe"),
        (["partition.kind=natural"], 20, "h:1", "Name each of them: --site NAME"),
        (["partition.kind=natural", THREE], ("a", "../b", "c"), "h:1", "--site '../b' must be 1"),
        (["partition.kind=natural", THREE], ("a", "b", "a"), "h:1", "--site 'a' is given twice"),
        ([THREE], 3, "host", "--server 'host' must be HOST:PORT"),
        ([THREE], 3, "host:0", "a port from 1 to 65535"),
        ([THREE], 3, "::1:80", "IPv6 in brackets"),
        ([THREE], 3, "https://h:80", "--server 'https://h:80' must be"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path,
    overrides: list[str],
    sites: int | tuple[str, ...],
    server: str,
    message: str,
) -> None:
    with pytest.raises(FedpeftError, match=message):
        init(tmp_path / "new", "quickstart", overrides, sites, server)
    assert list(tmp_path.iterdir()) == []


def test_sites_with_names_of_their_own(tmp_path: Path) -> None:
    recipe = ["partition.kind=natural", "partition.clients=0"]
    found = init(tmp_path / "new", "quickstart", recipe, ("ward-b", "Ward_A"))
    assert found.sites == ("Ward_A", "ward-b") == layout.read(tmp_path / "new").sites


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"sites": ["../a"]}, {"sites": 3}, {"port": 0}, {"host": "a b"}, {"more": 1}],
)
def test_a_note_that_somebody_changed_is_refused(
    made: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    note = json.loads((made / layout.NOTE).read_text())
    (tmp_path / layout.NOTE).write_text(json.dumps({**note, **change}))
    with pytest.raises(FedpeftError, match="cannot be used: .* Write the folder again"):
        layout.read(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match="has no deployment.json: name a folder that"):
        layout.read(tmp_path)


def test_the_command_says_where_to_begin(tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    words = ["deploy", "init", folder, THREE, "--recipe", "quickstart", "--sites", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"Begin with {folder}/README.md" in done.stdout
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "is not empty" in again.stderr


@pytest.mark.parametrize("sites", [[], ["--sites", "3", "--site", "a"]])
def test_the_command_wants_sites_said_in_one_way(tmp_path: Path, sites: list[str]) -> None:
    words = ["deploy", "init", str(tmp_path / "new"), "--recipe", "quickstart", *sites]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "give either --sites N, or --site" in done.stderr
