"""The settings of a benchmark. This file imports nothing heavy, so that invalid settings are reported at once."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ARMS = (
    "static",
    "smaller static",
    "static token merging",
    "unmerged",
    "merged",
    "onnx static",
    "onnx staged",
    "openvino staged",
)
"""The ways to serve that can be timed; ``static``, the baseline of all others, always is."""


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Args:
        bundle: The network: a folder that calibrate wrote, or hf-hub:OWNER/NAME on the Hugging Face Hub (@REVISION if
            not the newest).
        batch_sizes: Images per call, such as [1,8,64].
        rounds: Counted rounds; every arm runs once in each.
        threads: Threads of torch and of ONNX Runtime.
        device: Where to run.
        precision: Type of the network's tensors.
        images: Folder of images of the task, for real exit shares; noise if not given.
        shares: Exit shares, as in [0.5,0.3,0.15,0.05]; thresholds on the confidence are set for them. By default those
            of the bundle's own policy.
        arms: What to time, of: static, smaller static, static token merging, unmerged, merged, onnx static, onnx
            staged, openvino staged.
        weights: File of the backbone's weights, for a bundle that needs one.
        pretrained: Whether timm may fetch the backbone's weights; by default as in training.
        out: File for all results.
        overwrite: Replace an existing file.

    Raises:
        ValueError: If a number is out of range, or the folder of images does not exist.
    """

    bundle: str
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    rounds: int = 20
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["32", "bf16"] = "32"
    images: str | None = None
    shares: list[float] | None = None
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    weights: str | None = None
    pretrained: bool | None = None
    out: str = "bench.json"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes} must be some whole numbers of at least 1, such as [1, 8]")
        if self.shares is not None and not (min(self.shares, default=-1) >= 0 and abs(sum(self.shares) - 1) <= 1e-3):
            raise ValueError(f"shares={self.shares} must be at least 0 and sum to 1, as in [0.5, 0.3, 0.15, 0.05]")
        if self.images is not None and not Path(os.path.expanduser(self.images)).is_dir():
            raise ValueError(f"images={self.images} is not a folder; give one with images of the task")

    @property
    def place(self) -> Path:
        """The file to write."""
        return Path(os.path.expanduser(self.out))
