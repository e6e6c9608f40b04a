"""An :class:`~dynadapter.exits.net.ExitNet` whose tensors are split over several processes (FSDP2)."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dynadapter import backbones
from dynadapter.adapters import adapter_layers
from dynadapter.exits.net import ExitNet

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(net: ExitNet, mesh: "DeviceMesh") -> None:
    """Split a network's tensors, frozen and trained, over the processes of a mesh.

    Each block is gathered while it runs and released afterwards. Parameters outside of blocks (embedding, heads) are
    gathered for the whole pass. Afterwards only :meth:`ExitNet.forward` can be called, by all processes at once.

    Raises:
        ValueError: If the network has exit tokens, which call the layers of a block separately, or adapters that use
            tensors of another layer.
    """
    if net.beside is not None:
        raise ValueError("ExitTokens cannot be trained sharded; use Attentive, or strategy: ddp")
    sharing = next((one for one in adapter_layers(net).values() if any(used is not one for used in one.uses)), None)
    if sharing is not None:
        raise ValueError(
            f"{sharing.kind} cannot be trained sharded, because its layers share tensors; use another kind, such as "
            "LoRA, or strategy: ddp"
        )
    from torch.distributed.fsdp import fully_shard

    for unit in backbones.blocks(net.backbone):
        for module in unit:
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Check whether this process holds only parts of a module's tensors."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in module.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; the whole tensor if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
