"""Limit the memory of adapters and heads while they are built, because a file may name their sizes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynadapter.files import machine_memory

MARGIN = 2**26
"""Numbers that a network may have beyond those in its file, such as buffers that are not saved."""

_file: ContextVar[tuple[str, int] | None] = ContextVar("_file", default=None)


@contextmanager
def stored_in(where: str, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Inside this context, refuse adapters and heads with many more numbers than a file holds for them.

    Args:
        where: The file, for the message.
        tensors: The tensors of the file.
    """
    token = _file.set((where, sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, Tensor))))
    del tensors  # the caller may free them inside
    try:
        yield
    finally:
        _file.reset(token)


class LimitedMemory(TorchDispatchMode):
    """Inside this context, refuse new tensors beyond a limit, before any memory is taken for them.

    The limit is the memory of the machine, and inside :func:`stored_in` also the size of the file.

    Args:
        backbone: The backbone, which has its memory already.

    Raises:
        ValueError: In the context, if the new tensors exceed the limit.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.taken = sum(tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers()))
        self.numbers = 0
        self.machine, self.file = machine_memory(), _file.get()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator; count the numbers of a new tensor first."""
        given = dict(kwargs or {})
        size: Any = args[1] if func._schema.name.startswith("aten::new_") else args[0] if args else None
        new = isinstance(size, list | tuple) and all(isinstance(count, int) for count in size)
        if new and str(given.get("device")) != "meta":
            self._count(math.prod(size), given.get("dtype") or torch.get_default_dtype())
        return func(*args, **given)

    def _count(self, numbers: int, dtype: torch.dtype) -> None:
        self.numbers += numbers
        self.taken += numbers * dtype.itemsize
        if self.file is not None and self.numbers > self.file[1] + MARGIN:
            where, held = self.file
            raise ValueError(
                f"{where}: its adapters and heads would have more than {self.numbers:,} numbers, and the file holds "
                f"{held:,}; the file is damaged"
            )
        if self.taken > self.machine:
            raise ValueError(
                f"backbone, adapters and heads take more than {self.taken / 1e9:,.1f} GB, this machine has "
                f"{self.machine / 1e9:,.1f} GB; give smaller sizes"
            )
