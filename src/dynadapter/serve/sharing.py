"""Share the frozen tensors of a backbone among the bundles that use it."""

from collections import defaultdict
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from dynadapter.serve.bundle import Bundle
from dynadapter.serve.bundle.tensors import frozen_names


def share_backbones(bundles: Iterable[Bundle]) -> int:
    """Replace the frozen tensors of bundles by equal ones of any earlier bundle with the same backbone.

    Two backbones are the same if their fingerprints are. A tensor that still differs, such as in a merged network, is
    not shared, so no answer changes. Call this after the bundles are on their device.

    Args:
        bundles: They are changed in place.

    Returns:
        The bytes that are no longer needed.
    """
    kept = defaultdict[Hashable, list[Tensor]](list)
    saved = 0
    for bundle in bundles:
        state = bundle.net.state_dict(keep_vars=True)
        for name in frozen_names(bundle.net):
            own = state[name]
            plain = name.replace(".base_layer.", ".")  # as without adapters
            equals = kept[bundle.config.backbone.fingerprint, plain, own.shape, own.dtype, own.device]
            first = next((tensor for tensor in equals if tensor is own or torch.equal(tensor, own)), None)
            if first is None:
                equals.append(own)
            elif first is not own:
                own.data = first.data
                saved += own.nbytes
    return saved
