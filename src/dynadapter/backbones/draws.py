"""Draw the random numbers of new tensors from a separate generator; the global random state is not used or changed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OVERLOADS = {"default": "generator", "low": "low_generator"}
"""torch's functions that take a generator only in another overload: ``randn``, ``rand``, ``randperm``, ``randint``."""

VALUES = frozenset({torch.Tag.pointwise, torch.Tag.nondeterministic_seeded})
"""Marks of the operators that, in place, change a tensor's values alone: ``uniform_``, ``mul_``, ``clamp_``."""


class DrawFrom(TorchDispatchMode):
    """Inside this context, draw random tensors on the CPU from a new generator, in this thread alone.

    The values equal those that follow ``torch.manual_seed(seed)``. Other threads, which may build networks or draw
    random numbers at the same time, are not affected. (``torch.random.fork_rng`` would set the state of all threads.)

    >>> with DrawFrom(0):
    ...     first = torch.rand(2)
    >>> bool(torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(0))))
    True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, with the generator if it draws random numbers.

        On the meta device there are no values: operators that only change values are skipped, which halves the time to
        build a network there.
        """
        if VALUES.intersection(func.tags) and func._schema.name.endswith("_") and args[0].device.type == "meta":
            return args[0]
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and _on_cpu(args, given):
            if any(argument.name == "generator" for argument in func._schema.arguments):
                given.setdefault("generator", self.generator)
            elif overload := getattr(func.overloadpacket, OVERLOADS.get(func._overloadname, ""), None):
                func, given["generator"] = overload, self.generator
        return func(*args, **given)


def _on_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device") or (args[0].device if args and isinstance(args[0], torch.Tensor) else "cpu")
    return torch.device(device).type == "cpu"
