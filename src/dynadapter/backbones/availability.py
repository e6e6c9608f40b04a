"""Find where the pretrained weights of a backbone come from, and check quickly whether they can be loaded."""

import threading
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from timm.models import get_pretrained_cfg

from dynadapter.backbones.packaged import find

SECONDS = 5.0
"""How long to wait for the hub."""


class Published(NamedTuple):
    """Published pretrained weights.

    Args:
        repo: Repository on the Hugging Face Hub; None if there is none.
        license: Short name of the license, such as ``apache-2.0``; None if it is not known.
    """

    repo: str | None
    license: str | None


def published(name: str) -> Published:
    """Return the repository and license of the pretrained weights of a backbone.

    >>> published("vit_tiny_patch16_224.augreg_in21k")
    Published(repo='timm/vit_tiny_patch16_224.augreg_in21k', license='apache-2.0')
    """
    if find(name) is not None:
        return Published(None, "apache-2.0")  # as this package
    config = get_pretrained_cfg(name)
    if config is None:
        return Published(None, None)
    return Published(config.hf_hub_id or None, config.license or None)


def is_available(name: str, seconds: float = SECONDS) -> bool:
    """Check whether pretrained weights of a backbone are packaged, in the hub's cache, or offered by the hub now."""
    if find(name) is not None:
        return True
    place, config = published(name).repo, get_pretrained_cfg(name)
    if place is None or config is None:
        return False
    file = config.hf_hub_filename or SAFETENSORS_SINGLE_FILE
    if isinstance(huggingface_hub.try_to_load_from_cache(place, file), str):
        return True
    answered: list[bool] = []

    def ask() -> None:
        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(place, file), timeout=seconds)
        except Exception:  # of many libraries: no network, no such file, offline mode
            return
        answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # the name may not be resolved for longer than any timeout
    thread.start()
    thread.join(seconds)
    return bool(answered)
