"""Check that a bundle rebuilds its network, before it is written."""

import copy
from typing import Any

import torch
from torch import Tensor

from dynadapter.backbones import built_for, fingerprint, input_shape
from dynadapter.exits.net import ExitNet
from dynadapter.serve.bundle.config import Config
from dynadapter.serve.bundle.tensors import frozen_names

PARTS = "backbone, adapter and heads as given do not rebuild this network"


@torch.no_grad()
def check_rebuilt(net: ExitNet, config: Config, tensors: dict[str, Tensor]) -> None:
    """Build the network again from what is to be written, and compare."""
    net = copy.deepcopy(net).cpu().eval()
    for tensor in net.parameters():  # the order in memory, which decides the last bits, is not written
        tensor.data = tensor.data.contiguous()
    backbone = config.backbone.create(net.num_classes)
    if not config.whole and config.backbone.origin == "seed" and fingerprint(backbone) != config.backbone.fingerprint:
        raise ValueError(
            f"the backbone is not the one that seed {config.backbone.seed} draws, so it cannot be drawn again where "
            "the bundle is used; write the bundle whole, or give the backbone's true origin"
        )
    bare = copy.deepcopy(backbone)
    own = backbone.state_dict(keep_vars=True)  # under the bare backbone's names; injection renames the same tensors
    twin = config.assemble(backbone, dict(tensors), "the network")
    state, frozen = net.state_dict(), frozen_names(twin)
    if wrong := set(state) ^ set(twin.state_dict()):
        raise ValueError(f"{PARTS}: {min(wrong)} differs")
    twin.load_state_dict(state)
    image = _noise(net, config)
    if not torch.equal(net(image).nan_to_num(), twin(image).nan_to_num()):
        raise ValueError(
            f"{PARTS}: the logits differ; give those that it was made with (a scale, a pooling or a timm argument "
            "differs)"
        )
    # Other types round the backbone's tensors, and tensors of the backbone that were trained are in the file.
    if not config.whole and config.dtype == "float32" and not any(name in frozen for name in tensors):
        bare.load_state_dict(own)
        found = fingerprint(bare)
        if found != config.backbone.fingerprint:
            raise ValueError(
                f"the network's backbone has the weights {found[:12]}, the bundle would name "
                f"{config.backbone.fingerprint[:12]}: its frozen tensors have changed, or that is another backbone's"
            )


def tensor_type(net: ExitNet) -> torch.dtype:
    """Return the type of the backbone's tensors."""
    return next(net.backbone.parameters()).dtype


def _noise(net: ExitNet, config: Config) -> Tensor:
    backbone: Any = net.backbone
    size = config.preprocessing.image_size if config.preprocessing else built_for(backbone)
    height, width = (size, size) if size else backbone.pretrained_cfg["input_size"][1:]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *input_shape(backbone, height, width), generator=generator).to(tensor_type(net))
