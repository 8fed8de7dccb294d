"""Builds sdist and wheel, and checks the wheel as a user meets it: alone, in a clean environment.

Usage: python .ci/check_wheel.py FOLDER

The dependencies are borrowed from the environment that runs this script (by a path file, which
does not bring its editable installs along), so that torch is not installed twice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

REQUIRED = (
    "fedpeft/__init__.py",
    "fedpeft/py.typed",
    "fedpeft/strategies/fedavg.py",
    "fedpeft/recipes/quickstart.yaml",
    "fedpeft/models/*/model.safetensors",
    "fedpeft/models/*/config.json",
    "fedpeft/models/*/README.md",
    "fedpeft-*.dist-info/licenses/LICENSE",
)

AS_A_USER = """
import importlib, pkgutil, sys
import fedpeft, fedpeft.strategies
assert fedpeft.__file__.startswith(sys.prefix), f"not the wheel's: {fedpeft.__file__}"
modules = [m.name for m in pkgutil.walk_packages(fedpeft.__path__, "fedpeft.")]
for name in modules:
    importlib.import_module(name)
print(*(n for n in modules if n.startswith("fedpeft.strategies.")), sep="\\n")
try:
    import strategies
except ModuleNotFoundError:
    pass
else:
    sys.exit(f"import strategies works: {strategies.__file__}")
"""


def build(out: Path) -> Path:
    """The wheel, built through the sdist, and equal to one built straight from the tree."""
    command = [sys.executable, "-m", "build", "--no-isolation"]
    with tempfile.TemporaryDirectory() as direct:
        subprocess.run([*command, "--outdir", str(out), str(ROOT)], check=True)
        subprocess.run([*command, "--wheel", "--outdir", direct, str(ROOT)], check=True)
        (wheel,) = out.glob("*.whl")
        if contents(wheel) != contents(Path(direct) / wheel.name):
            sys.exit("the wheel built from the sdist differs from the one built from the tree")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """Name -> CRC-32 of every file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def tree() -> set[str]:
    """The files that the wheel must hold: all of fedpeft/, through its symlink."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "fedpeft", followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        found |= {(Path(folder) / f).relative_to(ROOT).as_posix() for f in files}
    return found


def check_names(names: set[str]) -> None:
    """Exits unless the wheel holds exactly the package and its metadata."""
    top = {name.split("/")[0] for name in names}
    if len(top) != 2 or "fedpeft" not in top:
        sys.exit(f"top level of the wheel: {sorted(top)}; wanted fedpeft and its dist-info")
    packed = {name for name in names if name.startswith("fedpeft/")}
    if packed != tree():
        sys.exit(f"wheel and fedpeft/ differ in {sorted(packed ^ tree())}")
    missing = [p for p in REQUIRED if not any(fnmatch(name, p) for name in names)]
    if missing:
        sys.exit(f"not in the wheel: {missing}")


def check_install(wheel: Path, strategies: int) -> None:
    """Exits unless the wheel works in an environment of its own, in an empty folder."""
    with tempfile.TemporaryDirectory() as scratch:
        home, empty = Path(scratch) / "venv", Path(scratch) / "empty"
        empty.mkdir()
        venv.create(home, with_pip=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        python, command = home / "bin" / "python", home / "bin" / "fedpeft"

        def run(*line: str | Path) -> str:
            done = subprocess.run(line, cwd=empty, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(map(str, line))[:200]} failed:\n{done.stdout}")
            return done.stdout

        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel.resolve())
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        found = run(python, "-c", AS_A_USER).split()
        print(*found, sep="\n")
        if len(found) != strategies:
            sys.exit(f"{strategies} strategies in the wheel, {len(found)} imported")
        print(run(command, "--help"))
        print(run(command, "list"))
        print(run(command, "check", "quickstart"))  # reads the built-in model and recipe


def main() -> None:
    """See the top of the file."""
    out = Path(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    wheel = build(out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        print(f"{sdist.name}: {len(archive.getnames())} files")
    names = set(contents(wheel))
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    print(*sorted(names), sep="\n")
    check_names(names)
    strategies = [n for n in names if fnmatch(n, "fedpeft/strategies/[!_]*.py")]
    check_install(wheel, len(strategies))
    print("wheel: ok")


if __name__ == "__main__":
    main()
