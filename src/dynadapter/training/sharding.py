"""An :class:`~dynadapter.exits.net.ExitNet` spread over several processes, each of which keeps a part of every "
"tensor.
"""

from typing import TYPE_CHECKING

from torch import nn

from dynadapter import backbones as cut
from dynadapter.exits.net import ExitNet

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(net: ExitNet, mesh: "DeviceMesh") -> None:
    """Spreads a network over the processes of a mesh, block by block (FSDP2).

    A block is gathered when it runs and let go of afterwards; what belongs to no block (embedding, heads) is gathered
    for the whole pass. Only :meth:`ExitNet.forward` can then be called, by all processes at once.

    Args:
        net: With frozen and trained tensors; both are sharded.
        mesh: One dimension.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in cut.blocks(net.backbone):
        for module in unit:
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Says whether this process holds but a part of a module's tensors."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in module.parameters())
