"""Hash a set of images, to check whether two runs used the same data."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from dynadapter.data.clips import Clip
from dynadapter.data.library_images import LibraryImage
from dynadapter.data.splits import path_in
from dynadapter.files import sha256

Source = Path | Image.Image | LibraryImage | Clip
"""Where the pixels of an image are."""
HASHED_BYTES = 4 * 2**30
"""Larger sets of images are not read only to be hashed: a run would wait too long."""


def data_hash(samples: Sequence[tuple[Source, int | str]]) -> str:
    """Hash the images of a split and their labels, in their order, without decoding them.

    A file is hashed by its content, not its path; an image in memory by its mode, size, palette and bytes. The same
    lists have the same hash on every machine. One changed pixel, label or position changes the hash.

    >>> data_hash([])[:12]
    'e3b0c44298fc'

    Args:
        samples: Pairs (file or image, label).

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: A file cannot be read, or is a pipe, a device or a folder.
    """
    with ThreadPoolExecutor() as pool:  # reading and hashing both release the interpreter lock
        hashes = pool.map(image_hash, [source for source, _ in samples])
        return combine_hashes((content, label) for content, (_, label) in zip(hashes, samples, strict=True))


def image_keys(
    sources: Sequence[Source], by: Literal["content", "path"] | None = None, folder: Path | None = None
) -> tuple[Literal["content", "path"], Tensor]:
    """Return a key for each image, to check later whether a network was trained on it.

    Args:
        sources: Files or images.
        by: ``content`` hashes the bytes, ``path`` the path in `folder`, for sets that take too long to read; None
            chooses by their size.
        folder: The folder of all images.

    Returns:
        ``content`` or ``path``, and int64 ``(images,)``, the first 8 bytes of a SHA-256; 0 for a missing file.
    """
    with ThreadPoolExecutor() as pool:
        if by is None:
            by = "content" if sum(pool.map(size_of, sources)) <= HASHED_BYTES else "path"
        keys = list(pool.map(partial(_key, by=by, folder=folder), sources))
    return by, torch.tensor(keys, dtype=torch.int64)


def list_hash(samples: Sequence[tuple[Source, int | str]], folder: Path | None) -> str:
    """Hash the labels of a split and the names of its files in `folder`, in their order, without reading a file."""
    whole = hashlib.sha256()
    for source, label in samples:
        name = "" if isinstance(source, Image.Image) else _inside(source)
        if isinstance(source, os.PathLike):
            name = path_in(source, folder)
        whole.update(f"{label} {name}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:16]


def _inside(source: Source) -> str:
    """Return the name of an image: of a library's data set its own name, split and index, without the folders above."""
    return "/".join(source.name.split("/")[-2:]) if isinstance(source, LibraryImage) else str(source)


def size_of(source: Source) -> int:
    """Return the approximate number of bytes to read for an image; 0 if it is in memory or missing."""
    try:
        if isinstance(source, LibraryImage):
            return source.images.size
        return 0 if isinstance(source, Image.Image) else os.stat(source).st_size
    except OSError:
        return 0


def _key(source: Source, by: str, folder: Path | None) -> int:
    if by == "content" or isinstance(source, Image.Image):
        try:
            digest = bytes.fromhex(image_hash(source))
        except OSError:
            return 0
    else:
        place = (
            _inside(source) if isinstance(source, LibraryImage) or folder is None else os.path.relpath(source, folder)
        )
        digest = hashlib.sha256(Path(place).as_posix().encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], signed=True)


def combine_hashes(images: Iterable[tuple[str, int | str]]) -> str:
    """Return the `data_hash` of images whose own hashes are known.

    Args:
        images: Pairs (`image_hash`, label). Text and numbers are encoded differently, and lengths are included, so that
            different lists have different encodings.
    """
    whole = hashlib.sha256()
    for content, label in images:
        text = str(label).encode("utf-8", "surrogateescape")
        kind = "text" if isinstance(label, str) else "index"
        whole.update(f"{content} {kind} {len(text)} ".encode() + text + b"\n")
    return whole.hexdigest()


def image_hash(source: Source) -> str:
    """Hash the bytes of a file, or the pixels of an image in memory; a data set may hold either.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: The file cannot be read, or is a pipe, a device or a folder.
    """
    content = source.fetch() if isinstance(source, LibraryImage) else source
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if isinstance(content, Path | Clip):
        return sha256(content)
    source = content
    width, height = source.size
    head = f"{source.mode} {width} {height} {source.getpalette() if source.mode in ('P', 'PA') else ''}"
    return hashlib.sha256(head.encode() + b"\n" + source.tobytes()).hexdigest()
