"""Read the files of a bundle and check that they belong together."""

from pathlib import Path

from torch import Tensor

from dynadapter.files import left_over, read_bytes, read_whole
from dynadapter.limits import MAX_JSON
from dynadapter.serve.bundle.config import CONFIG, MODEL, Config
from dynadapter.serve.bundle.tensors import check_finite as refuse_nonfinite
from dynadapter.serve.bundle.tensors import from_bytes

COPIES = 3
"""How often the tensors are in memory while they are read: the file, what safetensors takes out of it, and a copy."""


def read(folder: Path, *, check_finite: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """Read the configuration and the tensors of a bundle.

    Raises:
        ValueError: There is no bundle, or it is damaged.
    """
    if not folder.is_dir():
        old = left_over(folder)
        hint = f"; an interrupted overwriting has left the bundle that was there as {old}: rename it" if old else ""
        raise ValueError(
            f"{folder} is not a folder{' but a file' if folder.is_file() else ''}; give a bundle's folder, or "
            f"hf-hub:OWNER/NAME for one on the Hugging Face Hub{hint}"
        )
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}: it is not a bundle, or only a part of one; fetch or write it again"
            )
    config = read_config(folder)
    where = str(folder / MODEL)
    try:
        tensors = from_bytes(read_whole(folder / MODEL, COPIES), config.sha256, where)
    except ValueError:
        before, config = config.sha256, read_config(folder)
        if config.sha256 == before:
            raise
        tensors = from_bytes(read_whole(folder / MODEL, COPIES), config.sha256, where)  # overwritten meanwhile
    if check_finite:
        refuse_nonfinite(tensors, where)
    return config, tensors


def read_config(folder: Path) -> Config:
    """Read the configuration of a bundle.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is damaged.
    """
    try:
        text = read_bytes(folder / CONFIG, MAX_JSON).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({error}); the bundle is damaged: fetch it again") from error
    return Config.loads(text, str(folder / CONFIG))
