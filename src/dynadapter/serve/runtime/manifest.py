"""Read the manifest of an exported folder and check the files of the folder."""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dynadapter.files import (
    checksum,
    files_of,
    open_regular,
    read_bytes,
    require_replaceable,
    require_room,
    sha256,
    shown,
)
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.runtime.policies import Policy

FORMAT = 3
"""Version of the folder's layout; readers accept only this version."""
MANIFEST = "manifest.json"
MAX_BYTES = 2**26
"""Largest size of a manifest."""
COPIES = 2
"""How often the graphs are in memory while they are opened: the files, and what the sessions hold."""
CODE = (
    "files.py",
    "images/__init__.py",
    "images/memory.py",
    "images/preprocess.py",
    "images/reading.py",
    "images/values.py",
    "serve/__init__.py",
    "serve/formats.py",
    "serve/runtime/__init__.py",
    "serve/runtime/manifest.py",
    "serve/runtime/policies.py",
    "serve/runtime/runner.py",
    "serve/runtime/sessions.py",
)
"""Files of this package that an export copies, below the folder ``dynadapter``."""


@dataclass(frozen=True)
class Stage:
    """One graph: its file and that file's hash, and the names of its inputs and outputs, the logits last."""

    file: Path
    sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``, checked.

    Args:
        content: The JSON object.
        stages: The graphs in order.
        class_names: Names of the classes in the order of their indices.
        preprocess: Maps a decoded image to an array.
        policy: Decides at which exit an image stops.
        image_shape: (channels, height, width); for video (frames, channels, height, width).
    """

    content: dict[str, Any]
    stages: tuple[Stage, ...]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    policy: Policy
    image_shape: tuple[int, ...]


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an exported folder and check every file that it names.

    Raises:
        ValueError: A file is missing, damaged or changed, or the manifest is not valid.
    """
    path = Path(os.path.expanduser(folder)).absolute() / MANIFEST  # the process may change its folder
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format={content.get('format')!r}, this version of dynadapter reads format {FORMAT}; export "
            "the model again to another folder"
        )
    try:
        changed = content.pop("checksum", None) not in (None, checksum(content))
    except RecursionError:
        changed = True
    if changed:
        raise ValueError(
            f"{path} has changed since it was written: copy the exported folder again; if you changed it on purpose, "
            "remove the entry 'checksum'"
        )
    try:
        manifest = _parse(content, path.parent)
        files = {str(name): str(digest) for name, digest in content["files"].items()}
        files |= {stage.file.name: stage.sha256 for stage in manifest.stages}
        if outside := [name for name in files if not _is_inside(name)]:
            raise ValueError(f"the file {outside[0]!r} is not inside the folder")
    except KeyError as error:
        why = f"has no {error}"
    except (AttributeError, IndexError, TypeError) as error:
        why = f"has a value of a wrong type ({error})"
    except ValueError as error:
        why = f"cannot be used: {error}"
    else:
        try:
            _check_files(path.parent, files)
        except ValueError:
            again = _read_json(path)
            again.pop("checksum", None)
            if again == content:
                raise
            return read_manifest(folder)  # overwritten meanwhile
        for stage in manifest.stages:
            _refuse_external(stage.file)
        require_room(path.parent, sum(stage.file.stat().st_size for stage in manifest.stages), COPIES)
        return manifest
    raise ValueError(f"{path} {why}; export the model again, or correct the file")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, MAX_BYTES).decode())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a folder that dynadapter export wrote") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{path} is not JSON ({error}); copy the exported folder again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a manifest; copy the exported folder again")
    return content


def _parse(content: dict[str, Any], folder: Path) -> Manifest:
    entries = content["stages"]
    if not entries:
        raise ValueError("it names no stage")
    stages = []
    for entry in entries:
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError(f"the stage file {entry['file']!r} is not a plain name")
        inputs, outputs = (tuple(tensor["name"] for tensor in entry[side]) for side in ("inputs", "outputs"))
        stages.append(Stage(folder / entry["file"], str(entry["sha256"]), inputs, outputs))
    for before, after in pairwise(stages):
        if len(before.outputs) != len(after.inputs) + 1:
            raise ValueError(f"the outputs of {before.file.name} do not fit the inputs of {after.file.name}")
    names, classes = tuple(map(str, content["class_names"])), entries[-1]["outputs"][-1]["shape"][-1]
    if len(names) != classes:
        raise ValueError(f"it names {len(names)} classes, the graphs have {classes}")
    preprocess, shape = Preprocess(**content["preprocessing"]), tuple(entries[0]["inputs"][0]["shape"][1:])
    if len(shape) not in (3, 4) or shape[-3:] != (3, preprocess.image_size, preprocess.image_size):
        raise ValueError(f"images of {preprocess.image_size} pixels do not fit the input {shape}")
    policy = Policy(content["policy"], len(stages), content["temperatures"])
    return Manifest(content, tuple(stages), names, preprocess, policy, shape)


def check_place(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the absolute path of a folder to export to, behind symbolic links.

    Raises:
        ValueError: It is in use by something else than an exported folder, or must not be replaced.
    """
    place = Path(os.path.realpath(os.path.expanduser(folder)))
    require_replaceable(place, overwrite, "an exported folder", _exported_files(place))
    return place


def _exported_files(folder: Path) -> set[str]:
    """Return the names of the files of an exported folder by its manifest; none for any other folder."""
    try:
        content = _read_json(folder / MANIFEST)
        names = {MANIFEST, *content["files"].keys(), *(str(stage["file"]) for stage in content["stages"])}
        return names if "format" in content else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is_inside(name: str) -> bool:
    """Check that a name can only be of a file below the folder; also one of Windows."""
    return not any(path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name)))


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise a ValueError unless a folder holds exactly the exported files."""
    for name, digest in expected.items():
        path = folder / name
        try:
            found = sha256(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing; copy the whole exported folder again") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if found != digest:
            raise ValueError(
                f"{path} is not the file that was exported: it has {path.stat().st_size} bytes, and its SHA-256 starts "
                f"with {found[:12]}, the manifest's with {digest[:12]}; copy the exported folder again"
            )
    if extra := [name for name in files_of(folder) if name not in expected and name != MANIFEST]:
        raise ValueError(
            f"{folder} holds {shown(extra[0])}, which was not exported ({len(extra)} such files); move it away, or "
            "copy the exported folder again"
        )


def _refuse_external(graph: Path) -> None:
    """Raise a ValueError if a graph reads weights from another file, which could be any file of this machine.

    ONNX names that file in an entry with the key "location", which can be in any part of the graph.
    """
    with open_regular(graph) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") >= 0:
            raise ValueError(
                f"{graph} takes weights from another file, as no exported graph does; export the model again"
            )
