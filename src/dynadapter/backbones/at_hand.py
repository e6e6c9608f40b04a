"""Find out quickly whether the weights of a backbone can be loaded: packaged, cached, or on a hub that answers."""

import threading

import huggingface_hub
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from timm.models import get_pretrained_cfg

from dynadapter.backbones.packaged import find

SECONDS = 5.0
"""How long to wait for the hub."""


def is_at_hand(name: str, seconds: float = SECONDS) -> bool:
    """Check whether the pretrained weights of a backbone are packaged, in the hub's cache, or offered by the hub now.

    Args:
        name: As in :func:`~dynadapter.backbones.create_backbone`; a timm model with weights on the Hugging Face hub.
        seconds: How long to wait for an answer.
    """
    if find(name) is not None:
        return True
    config = get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return False
    place = str(config.hf_hub_id)
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
