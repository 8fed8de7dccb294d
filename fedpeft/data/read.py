"""Reads a recipe's source into raw splits: pydocs, local files, data sets by path or hub id.

Reading is the ``datasets`` library's, except for pydocs. No code that comes with a data set is
ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from fedpeft.config import Data
from fedpeft.data.pydocs import read_pydocs
from fedpeft.errors import FedpeftError, suggest

PYDOCS = "pydocs"
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""File suffixes that are read, and the ``datasets`` builder of each."""

_METADATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
_FAULTS = (DatasetsError, OSError, ValueError, RuntimeError, StopIteration)


def read_splits(data: Data) -> tuple[Dataset, Dataset | None]:
    """The training split and, where ``data.test`` names one, the test split, columns as they are.

    ``data.source`` is tried as ``pydocs``, a file, a folder that holds the named files, a data set
    folder (as on the hub, or written by ``save_to_disk``) and a hub id, in this order. Raises
    FedpeftError that says what was tried when there is no such source or split.
    """
    path = Path(data.source).expanduser()
    if data.source == PYDOCS:
        return _pydocs(data), None
    if path.is_file():
        train, folder = _alone(path, data), path.parent
    elif path.is_dir() and _readable(path):
        train, folder = _member(path, data.train, "data.train"), path
    elif path.is_dir() or not _looks_local(data.source):
        return _splits(data, str(path) if path.is_dir() else data.source)
    else:
        raise _no_such_path(path, data.source)
    test = None if data.test is None else _member(folder, data.test, "data.test")
    return _file(train, data), None if test is None else _file(test, data)


def _pydocs(data: Data) -> Dataset:
    """The built-in source: columns text, package, file."""
    if data.test is not None:
        raise FedpeftError(
            f"data.test={data.test!r}: data.source=pydocs has no test split. Leave data.test out; "
            "the clients' hold-outs are then the test set."
        )
    if data.train != "train":
        raise FedpeftError(
            f"data.train={data.train!r}: data.source=pydocs has only the split 'train'. Leave "
            "data.train out."
        )
    try:
        return Dataset.from_list(read_pydocs())
    except ValueError as error:
        raise FedpeftError(f"data.source=pydocs: {error}") from None


def _alone(path: Path, data: Data) -> Path:
    """A source that is one file: ``data.train`` has nothing to choose from."""
    if data.train not in ("train", path.name, path.stem):
        raise FedpeftError(
            f"data.train={data.train!r}: data.source={data.source!r} is one file, all of it is the "
            f"training split. Leave data.train out, or give the folder as data.source."
        )
    return path


def _readable(folder: Path) -> list[str]:
    """Names of the data files that lie in ``folder`` itself."""
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix in FORMATS and p.name not in _METADATA and p.is_file()
    )


def _looks_local(source: str) -> bool:
    """Whether ``source`` can only be meant as a path, so that no hub is asked for it."""
    return (
        Path(source).suffix in FORMATS
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
    )


def _no_such_path(path: Path, source: str) -> FedpeftError:
    near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    here = suggest(path.name, near) if near else f"There is no folder {str(path.parent)!r} either."
    return FedpeftError(f"data.source={source!r}: no such file or folder. {here}")


def _member(folder: Path, name: str, argument: str) -> Path:
    """The file of ``folder`` called ``name``, with or without its suffix."""
    known = _readable(folder)
    found = [n for n in known if n == name] or [n for n in known if Path(n).stem == name]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise FedpeftError(
            f"{argument}={name!r} is ambiguous in {str(folder)!r}: {', '.join(found)}. Give the "
            "name with its suffix."
        )
    names = known if Path(name).suffix in FORMATS else {Path(n).stem for n in known}
    raise FedpeftError(
        f"{argument}={name!r}: the folder {str(folder)!r} has no such file (.csv, .json, .jsonl or "
        f".parquet, named with or without the suffix). {suggest(name, names)}"
    )


def _file(path: Path, data: Data) -> Dataset:
    """One file as a data set. Text and client columns of a csv stay text: ``007``, ``NA``."""
    kind = FORMATS.get(path.suffix)
    if kind is None:
        raise FedpeftError(
            f"data.source={str(path)!r}: files are read by suffix, {path.suffix!r} is not one of "
            f"{', '.join(FORMATS)}. Convert or rename the file."
        )
    options: dict[str, Any] = {}
    if kind == "csv":
        as_text = [c for c in (data.text, data.pair, data.client) if c is not None]
        options = {"keep_default_na": False, "converters": dict.fromkeys(as_text, str)}
    try:
        with _no_progress():
            return load_dataset(kind, data_files={"train": str(path)}, split="train", **options)
    except _FAULTS as error:
        raise FedpeftError(
            f"data.source: cannot read {str(path)!r} as {kind}: {_reason(error)}. The file must "
            "hold at least one row, and every row the same columns."
        ) from error


def _splits(data: Data, source: str) -> tuple[Dataset, Dataset | None]:
    """Splits of a data set folder or hub id."""
    named = [("data.train", data.train)]
    if data.test is not None:
        named.append(("data.test", data.test))
    saved = _saved(Path(source))
    loaded = []
    for argument, split in named:
        if saved is None:
            loaded.append(_load(data, source, argument, split))
        elif split in saved:
            loaded.append(saved[split])
        else:
            raise FedpeftError(
                f"{argument}={split!r}: the data set in {source!r} has no such split. "
                f"{suggest(split, map(str, saved))}"
            )
    return loaded[0], loaded[1] if data.test is not None else None


def _saved(folder: Path) -> DatasetDict | None:
    """What ``save_to_disk`` wrote to ``folder``; a lone data set counts as the split ``train``."""
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(str(folder))
    if (folder / "state.json").is_file():
        return DatasetDict({"train": load_from_disk(str(folder))})
    return None


def _load(data: Data, source: str, argument: str, split: str) -> Dataset:
    """One split of a data set folder or hub id, by the ``datasets`` library."""
    try:
        return load_dataset(source, name=data.subset, split=split)
    except _FAULTS as error:
        subset = "" if data.subset is None else f", data.subset={data.subset!r}"
        fault = f"data.source={source!r}{subset}, {argument}={split!r}: {_reason(error)}. "
        if Path(source).is_dir() or not isinstance(error, OSError):
            raise FedpeftError(
                f"{fault}{argument} names a split and data.subset a configuration that the data "
                "set has; it must be readable without code of its own, which is never run."
            ) from error
        raise FedpeftError(
            f"{fault}Tried: the built-in sources, a local file or folder of that name, and the "
            "Hugging Face hub. Without a network, use a data set that is already in the Hugging "
            "Face cache (HF_HUB_OFFLINE=1 skips the retries), a local .csv, .jsonl or .parquet "
            f"file, or a built-in source. {suggest(source, [PYDOCS])}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what went wrong underneath."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    return (str(cause) or type(cause).__name__).split("\n")[0].rstrip(".")


@contextmanager
def _no_progress() -> Iterator[None]:
    """Local files are read in a moment: no bar for them."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
