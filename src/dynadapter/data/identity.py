"""What a set of images is, as a hash: the same here and elsewhere, whatever its folder is called."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from dynadapter.images.reading import open_regular


def data_hash(samples: Sequence[tuple[Path | Image.Image, int | str]]) -> str:
    """Hash the images of a split and their labels, in their order; nothing is decoded.

    A file counts by its content and not by its path, an image in memory by its mode, size, palette and bytes. So the
    same lists on another machine give the same hash, and one changed pixel, label or place another.

    >>> data_hash([])[:12]
    'e3b0c44298fc'

    Args:
        samples: Pairs (file or image, label).

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: A file cannot be read, or is none: a pipe, a device, a folder.
    """
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # reading and hashing both leave the interpreter lock
        for content, (_, label) in zip(pool.map(_digest, [source for source, _ in samples]), samples, strict=True):
            whole.update(row(content, label))
    return whole.hexdigest()


def file_hash(path: str | Path) -> str:
    """Hash a file's content.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        OSError: The file cannot be read, or is none: a pipe, a device, a folder.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row(content: str, label: int | str) -> bytes:
    """Put one sample into the bytes that `data_hash` takes in, so that no two lists of samples share theirs.

    Args:
        content: Hash of the image.
        label: Its class index, or its name.
    """
    text = str(label).encode("utf-8", "surrogateescape")
    kind = "text" if isinstance(label, str) else "index"
    return f"{content} {kind} {len(text)} ".encode() + text + b"\n"


def _digest(source: Path | Image.Image) -> str:
    if not isinstance(source, Image.Image):
        return file_hash(source)
    width, height = source.size
    head = f"{source.mode} {width} {height} {source.getpalette() if source.mode in ('P', 'PA') else ''}"
    return hashlib.sha256(head.encode() + b"\n" + source.tobytes()).hexdigest()
