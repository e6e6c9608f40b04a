"""A labelled set of small images as one uint8 tensor: from mosaics, a file a class, or from folders, one a class.

Mosaics: ``train/NAME.webp`` and ``val/NAME.webp`` are grids of square tiles without gaps, all of the class NAME; an
optional ``classes.txt`` gives the order: NAME, tab, words. Folders: ``train/NAME/*.jpg`` and ``val/NAME/*.jpg``.
Needs torch, numpy and Pillow only.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".webp", ".png", ".jpg", ".jpeg", ".bmp")


@dataclass
class Images:
    """A split: pixels (count, 3, size, size) uint8, and the class index of each (count,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """Return the split on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


def read(root: str | Path, size: int, limit: int = 0) -> tuple[Images, Images, list[str]]:
    """Decode a whole set.

    Args:
        root: The folder that holds ``train`` and ``val``.
        size: Height and width of the result in pixels: of a mosaic's tiles, or what other images are resized to (the
            shorter side, then the centre crop).
        limit: Use the first so many classes only; 0 uses all.

    Returns:
        The images to train on, those to validate on, and the names of the classes.

    Raises:
        ValueError: If there are no such images, or a mosaic is not a grid of such tiles.
    """
    root = Path(os.path.expanduser(root))
    names = class_names(root)
    names = names[:limit] if limit else names
    files = {split: [files_of(root / split, name) for name in names] for split in ("train", "val")}
    train, val = (decode(root / split, files[split], size) for split in ("train", "val"))
    return train, val, names


def class_names(root: Path) -> list[str]:
    """Return the classes in the order of ``classes.txt``, or by name where there is none."""
    train = root / "train"
    if not train.is_dir():
        raise ValueError(f"{str(root)!r} has no folder 'train'; give the folder that holds train/ and val/")
    parts = [path for path in train.iterdir() if path.is_dir() or path.suffix.lower() in SUFFIXES]
    found = sorted({path.name if path.is_dir() else path.stem for path in parts})
    if not found:
        raise ValueError(f"{str(train)!r} holds neither mosaics (NAME.webp) nor a folder for each class")
    table = root / "classes.txt"
    if not table.is_file():
        return found
    listed = [line.split("\t")[0].strip() for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if sorted(listed) != found:
        odd = sorted(set(listed) ^ set(found)) or ["a name twice"]
        raise ValueError(
            f"{str(table)!r} and {str(train)!r} do not name the same classes: {', '.join(odd[:3])}; make them agree"
        )
    return listed


def files_of(split: Path, name: str) -> list[Path]:
    """Return a class's files: its mosaic, or the images of its folder."""
    folder = split / name
    within = folder.iterdir() if folder.is_dir() else (split / (name + suffix) for suffix in SUFFIXES)
    found = sorted(path for path in within if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"class {name!r} has no images in {str(split)!r}; it needs {name}.webp or a folder {name}/")
    return found


def decode(split: Path, classes: list[list[Path]], size: int) -> Images:
    """Decode the files of all classes of a split into one tensor, in several threads."""

    def pixels_of(path: Path) -> np.ndarray:
        return tiles(path, size) if path.parent == split else square(path, size)  # a mosaic lies in the split itself

    paths = [path for files in classes for path in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(pixels_of, paths))
    owners = [index for index, files in enumerate(classes) for _ in files]
    labels = np.repeat(owners, [len(part) for part in parts])
    pixels = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.from_numpy(labels).long())


def tiles(path: Path, size: int) -> np.ndarray:
    """Cut a mosaic into its tiles, row by row: (count, size, size, 3)."""
    pixels = rgb(path)
    height, width, _ = pixels.shape
    if height % size or width % size:
        raise ValueError(f"mosaic {str(path)!r} of {width} x {height} pixels is not a grid of tiles of {size} x {size}")
    grid = pixels.reshape(height // size, size, width // size, size, 3)
    return grid.swapaxes(1, 2).reshape(-1, size, size, 3)


def square(path: Path, size: int) -> np.ndarray:
    """Resize an image by its shorter side and crop the centre: (1, size, size, 3)."""
    image = Image.fromarray(rgb(path))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))[None]


def rgb(path: Path) -> np.ndarray:
    """Decode a file: (height, width, 3) uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders fail in many ways on damaged bytes
        raise ValueError(f"cannot read image {str(path)!r} ({type(error).__name__}: {error}); delete it") from None
