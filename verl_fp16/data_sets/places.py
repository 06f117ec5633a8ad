"""The files of each split of a data set: from the names of files and folders, and from what ``datasets`` left there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from verl_fp16.data_sets.errors import DataSetError

SPLITS = ("train", "test")
DEFAULT = "default"
"""The name of the configuration whose files lie at the top, or in ``data``."""

_VALIDATION = "validation"
_WORDS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), _VALIDATION)}
_KINDS = {
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    **dict.fromkeys((".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"), "JSON"),
}
_ENDING = re.compile(r"(?:\.parquet|\.arrow|\.(?:jsonl|json|ndjson)(?:\.gz)?)$", re.IGNORECASE)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?$")
_STATE = "state.json"
_SAVED = {_STATE, "dataset_info.json"}
_DESCRIPTIONS = {*_SAVED, "dataset_infos.json", "dataset_dict.json"}
_SHOWN = 12


@dataclass(frozen=True)
class Found:
    """A data set's files.

    Args:
        splits: "train", "test" or both; of each the files whose rows are to be joined in this order.
        notes: a line for each thing that was there and is not taken.
    """

    splits: Mapping[str, tuple[Path, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _DataFile:
    path: Path
    kind: str
    config: str
    split: str | None  # as its name says; with _VALIDATION


def find_files(path: Path, split: str | None = None, configs: Sequence[str] = ()) -> Found:
    """The files of the data set at ``path``: one file, or a folder of them.

    Args:
        split: which one the data are, where no name says it; of a single file also against its name.
        configs: the configurations to take, joined in this order; none where there is only one.

    Raises:
        DataSetError: there are no data, or it is not clear which are meant.
    """
    if split is not None and split not in SPLITS:
        raise DataSetError(f"--split {split}: it has to be {' or '.join(SPLITS)}")
    if path.is_dir():
        return _in_folder(_snapshot(path), split, configs)
    if not path.exists():
        raise DataSetError(
            f"{path}: there is no such file or folder. Nothing is downloaded: name a data set that is on disk"
        )
    if configs:
        raise DataSetError("--config chooses in a folder, and PATH is a file: leave it out")
    split = split or _split_in(_stem(path))
    if split is None:
        raise DataSetError(
            f"{path}: its name does not say which split it is. Say so with --split train or --split test"
        )
    return Found({"train" if split == "train" else "test": (path,)})


def _in_folder(folder: Path, split: str | None, configs: Sequence[str]) -> Found:
    files = list(_data_files(folder))
    if not files:
        endings = ", ".join(ending for ending in _KINDS if not ending.endswith(".gz"))
        raise DataSetError(f"{folder}: there are no data in it. Looked for, at any depth, are {endings}")
    named = [file for file in files if file.split is not None]
    if named and split is not None:
        told = ", ".join(sorted({str(file.split) for file in named}))
        raise DataSetError(f"--split {split}: the names in {folder} say already what is what ({told}): leave it out")
    unnamed = [file for file in files if file.split is None]
    if named:
        notes = [f"not taken, since its name says no split: {file.path}" for file in unnamed]
    else:
        named, notes = _with_split(folder, unnamed, split or _said_of(folder)), []
    chosen = _of_configs(folder, named, configs)
    return _assigned(chosen, notes)


def _assigned(files: Sequence[_DataFile], notes: Sequence[str]) -> Found:
    by_split: dict[str, list[_DataFile]] = {}
    for file in files:
        by_split.setdefault(str(file.split), []).append(file)
    validation = by_split.pop(_VALIDATION, None)
    if validation and "test" in by_split:
        notes = [*notes, f"not taken, since there is a test split: {', '.join(str(file.path) for file in validation)}"]
    elif validation:
        by_split["test"] = validation
    for split, members in by_split.items():
        _require_one_kind(split, members)
        _require_all_shards(members)
    splits = {split: tuple(file.path for file in by_split[split]) for split in SPLITS if split in by_split}
    return Found(splits, tuple(notes))


def _of_configs(folder: Path, files: Sequence[_DataFile], wanted: Sequence[str]) -> list[_DataFile]:
    there = sorted({file.config for file in files})
    told = ", ".join(there[:_SHOWN]) + ", ..." * (len(there) > _SHOWN)
    if unknown := [config for config in wanted if config not in there]:
        raise DataSetError(f"--config {unknown[0]}: in {folder} there is no such configuration, but {told}")
    if not wanted and len(there) > 1:
        raise DataSetError(
            f"{folder}: there are several configurations: {told}. Choose with --config, as in --config {there[0]}; "
            "given several times, their rows are joined"
        )
    return [file for config in dict.fromkeys(wanted or there) for file in files if file.config == config]


def _with_split(folder: Path, files: Sequence[_DataFile], split: str | None) -> list[_DataFile]:
    """Files whose names say nothing: all of them are one split, and only folders tell configurations apart."""
    if split is None:
        told = ", ".join(file.path.name for file in files[:_SHOWN]) + ", ..." * (len(files) > _SHOWN)
        raise DataSetError(
            f"{folder}: no name says which split this is: {told}. Say so with --split train or --split test"
        )
    return [_DataFile(file.path, file.kind, _config(file.path.relative_to(folder).parts[:-1]), split) for file in files]


def _said_of(folder: Path) -> str | None:
    """The split that the folder's own name and its state, as ``datasets`` saves it, agree on."""
    state = _json(folder / _STATE).get("_split") if (folder / _STATE).is_file() else None
    said = {_split_in(folder.resolve().name), _split_in(state) if isinstance(state, str) else None} - {None}
    return said.pop() if len(said) == 1 else None


def _data_files(folder: Path) -> Iterator[_DataFile]:
    """In the order of their names; hidden ones, and those that a saved data set does not name as its own, are none."""
    for place, folders, names in os.walk(folder, onerror=_not_passed_over):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        own = _saved_files(Path(place)) if set(names) >= _SAVED else names
        for name in sorted(own):
            path = Path(place, name)
            if _kind(path) is None or name in _DESCRIPTIONS or name.startswith((".", "cache-")):
                continue
            yield _placed(path, path.relative_to(folder).parts[:-1])


def _not_passed_over(error: OSError) -> NoReturn:
    raise DataSetError(f"{error.filename}: it cannot be read ({error.strerror})") from None


def _placed(path: Path, folders: Sequence[str]) -> _DataFile:
    words = _words(_stem(path))
    split = _split_in(_stem(path))
    if split is not None:
        words = [word for word in words if word.lower() not in _WORDS]
    else:
        of_folders = [_split_in(folder) for folder in folders]
        split = next((found for found in reversed(of_folders) if found), None)
        folders = [name for name, found in zip(folders, of_folders, strict=True) if not found]
    return _DataFile(path, str(_kind(path)), _config([*folders, *_remainder(words)]), split)


def _remainder(words: Sequence[str]) -> list[str]:
    """What a name says beside its split and the number of its part."""
    kept = [word for word in words if not word.isdigit() and word.lower() != "part"]
    return ["-".join(kept)] if kept else []


def _config(parts: Collection[str]) -> str:
    return "/".join(part for part in parts if part.lower() != "data") or DEFAULT


def _saved_files(folder: Path) -> list[str]:
    """What ``save_to_disk`` wrote there; a cached map may lie beside it."""
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataSetError(
            f"{folder}: this was saved as a selection of rows by an old version of datasets. Load it with "
            "datasets.load_from_disk, and save its flatten_indices()"
        )
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise DataSetError(f"{folder / _STATE}: it does not name the files of a data set that datasets saved")
    return names


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataSetError(f"{file}: this is no JSON ({error}). Copy it again") from None
    except OSError as error:
        raise DataSetError(f"{file}: it cannot be read ({error.strerror})") from None
    return content if isinstance(content, dict) else {}


def _snapshot(folder: Path) -> Path:
    """Of a repository in the Hugging Face cache the revision that main is; any other folder as it is."""
    revisions, main = folder / "snapshots", folder / "refs" / "main"
    if not revisions.is_dir():
        return folder
    there = sorted(path for path in revisions.iterdir() if path.is_dir())
    if main.is_file() and (revision := revisions / main.read_text().strip()) in there:
        return revision
    if len(there) != 1:
        raise DataSetError(f"{folder}: there are {len(there)} revisions in it. Name one of the folders in {revisions}")
    return there[0]


def _require_one_kind(split: str, files: Sequence[_DataFile]) -> None:
    kinds = {file.kind: file.path for file in files}
    if len(kinds) > 1:
        told = " and ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise DataSetError(f"{split} is there as {told}: name one file, or leave one kind in the folder")


def _require_all_shards(files: Sequence[_DataFile]) -> None:
    there = {file.path for file in files}
    for file in files:
        found = _SHARD.search(_stem(file.path))
        if found is None or found[3]:  # with a hash in them, the others' names are not known
            continue
        for number in range(int(found[2])):
            part = file.path.with_name(file.path.name.replace(found[0], f"-{number:05d}-of-{found[2]}"))
            if part not in there:
                raise DataSetError(f"{part}: this part of the data set is missing. Copy it there too")


def _kind(path: Path) -> str | None:
    ending = _ENDING.search(path.name)
    return _KINDS[ending[0].lower()] if ending else None


def _stem(path: Path) -> str:
    return _ENDING.sub("", path.name)


def _words(stem: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", _SHARD.sub("", stem)) if word]


def _split_in(name: str) -> str | None:
    """The one split that a word of ``name`` says; None where none or more than one does."""
    said = {_WORDS[word.lower()] for word in _words(name) if word.lower() in _WORDS}
    return said.pop() if len(said) == 1 else None
