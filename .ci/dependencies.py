"""What fedpeft depends on, from what is installed: an audit of the pins, and a bill of materials.

Usage: python .ci/dependencies.py audit
       python .ci/dependencies.py sbom FOLDER

``audit`` needs no network: everything that fedpeft, its tests and its tools bring along is pinned
in constraints.txt, installed as pinned, not from a link, and fits what asks for it.
Whether a pinned version has a known vulnerability only an advisory database knows:
``make vulnerabilities`` asks one, where there is a network.

``sbom`` writes FOLDER/fedpeft-VERSION.cdx.json (CycloneDX 1.6): what a user's installation has,
without the extras for tests and development. The same environment gives the same bytes.
"""

import json
import re
import sys
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OURS = "fedpeft"
DEVELOPMENT = {"test", "dev"}
TOOLS = {"pip", "setuptools", "wheel"}
"""What an environment has before anything is asked for."""


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a distribution asks for, on this machine; nothing where it is not installed."""
    try:
        listed = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for text in listed:
        found = Requirement(text)
        if found.marker is None or any(
            found.marker.evaluate({"extra": extra}) for extra in (extras or {""})
        ):
            yield found


def closure(extras: frozenset[str]) -> dict[str, set[str]]:
    """Distribution -> what it needs, from fedpeft on; canonical names."""
    found: dict[str, set[str]] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [(OURS, extras)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        needs = found.setdefault(name, set())
        for needed in requirements(name, wanted):
            below = canonicalize_name(needed.name)
            needs.add(below)
            waiting.append((below, frozenset(needed.extras)))
    return found


def pins() -> dict[str, str]:
    """constraints.txt: canonical name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([^\s;#]+).*", line) for line in lines]
    return {canonicalize_name(m[1]): m[2] for m in found if m}


def faults() -> Iterator[str]:
    """What is wrong with the dependencies."""
    pinned, needed = pins(), closure(frozenset(DEVELOPMENT))
    for name in sorted(needed):
        if name == OURS:
            continue
        try:
            one = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            yield f"{name} is needed by {[n for n, own in needed.items() if name in own]}, missing"
            continue
        if name not in pinned:
            yield f"{name} {one.version} has no pin in constraints.txt"
        elif not SpecifierSet(f"=={pinned[name]}").contains(one.version, prereleases=True):
            yield f"{name} {one.version} is installed, and constraints.txt pins {pinned[name]}"
        if one.read_text("direct_url.json") is not None:
            yield f"{name} is installed from a link or a folder, not from an index"
        yield from unfit(name)
    for name in sorted(pinned.keys() - needed.keys() - TOOLS):
        yield f"{name} is pinned in constraints.txt, and nothing needs it"


def unfit(name: str) -> Iterator[str]:
    """Requirements of a distribution that what is installed does not meet."""
    for needed in requirements(name, frozenset()):
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield f"{name} needs {needed}, which is missing"
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield f"{name} needs {needed}, and {needed.name} {version} is installed"


def licence(one: metadata.Distribution) -> list[dict[str, object]]:
    """What a distribution says of its licence, in CycloneDX's words."""
    expression = one.metadata.get("License-Expression")
    if expression:
        return [{"expression": expression}]
    classified = [
        line.rpartition(" :: ")[2]
        for line in one.metadata.get_all("Classifier") or []
        if line.startswith("License :: ")
    ]
    text = (one.metadata.get("License") or "").strip().split("\n")[0]
    names = classified or ([text] if 0 < len(text) < 100 else [])
    return [{"license": {"name": name}} for name in names]


def component(name: str) -> dict[str, object]:
    one = metadata.distribution(name)
    found: dict[str, object] = {
        "type": "application" if name == OURS else "library",
        "bom-ref": purl(name),
        "name": name,
        "version": one.version,
        "purl": purl(name),
    }
    if one.metadata.get("Summary"):
        found["description"] = one.metadata["Summary"]
    licences = licence(one)
    return {**found, "licenses": licences} if licences else found


def purl(name: str) -> str:
    return f"pkg:pypi/{name}@{metadata.version(name)}"


def bill() -> dict[str, object]:
    """The bill of materials, CycloneDX 1.6."""
    needed = closure(frozenset())
    content: dict[str, object] = {
        "metadata": {"component": component(OURS)},
        "components": [component(name) for name in sorted(needed) if name != OURS],
        "dependencies": [
            {"ref": purl(name), "dependsOn": sorted(purl(below) for below in own)}
            for name, own in sorted(needed.items())
        ],
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
    }
    return {**head, **content}


def main() -> None:
    match sys.argv[1:]:
        case ["audit"]:
            found = list(faults())
            print(*found, sep="\n")
            needed = closure(frozenset(DEVELOPMENT))
            print(f"{len(needed) - 1} dependencies, {len(found)} faults")
            sys.exit(bool(found))
        case ["sbom", folder]:
            path = Path(folder) / f"{OURS}-{metadata.version(OURS)}.cdx.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found_bill = bill()
            path.write_text(json.dumps(found_bill, indent=2) + "\n", encoding="utf-8")
            print(f"{path}: {len(closure(frozenset()))} components")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
