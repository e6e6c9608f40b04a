"""From a decoded image to the tensor that a backbone takes."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

Interpolation = Literal["bicubic", "bilinear", "nearest"]
Resize = Literal["stretch", "crop"]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
Normalization = Literal["imagenet", "half", "none"] | Statistics

STATISTICS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Preprocess:
    """What happens to every image, in training and in use: resize, scale to [0, 1], normalise.

    Args:
        image_size: Height and width of the result in pixels.
        interpolation: How pixels are resampled; bicubic and bilinear are antialiased when an image shrinks.
        resize: ``stretch`` to the square (the VTAB-1k protocol), or ``crop`` its centre after the shorter side fits.
        normalization: ``imagenet`` and ``half`` subtract a mean and divide by a deviation, ``none`` leaves [0, 1];
            or a pair (mean, deviation), each with a value per colour.

    >>> Preprocess(image_size=32)(Image.new("L", (8, 8))).shape
    torch.Size([3, 32, 32])
    """

    image_size: int = 224
    interpolation: Interpolation = "bicubic"
    resize: Resize = "stretch"
    normalization: Normalization = "imagenet"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, not {self.image_size}")
        for name, kind in (("interpolation", Interpolation), ("resize", Resize)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(get_args(kind))}")
        if isinstance(self.normalization, str):
            if self.normalization not in STATISTICS:
                choices = ", ".join(STATISTICS) + ", or a pair (mean, deviation)"
                raise ValueError(f"unknown normalization {self.normalization!r}; choose from: {choices}")
        elif [len(part) for part in self.normalization] != [3, 3] or min(self.normalization[1]) <= 0:
            raise ValueError(
                f"normalization {self.normalization} is not ((mean of 3 colours), (deviation of 3 colours above 0))"
            )

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation of the three colours, for pixels in [0, 1]."""
        return STATISTICS[self.normalization] if isinstance(self.normalization, str) else self.normalization

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Resize an image and return its bytes, ``(3, size, size)`` uint8."""
        side = [self.image_size, self.image_size] if self.resize == "stretch" else [self.image_size]
        image = F.resize(image.convert("RGB"), side, InterpolationMode(self.interpolation), antialias=True)
        return F.pil_to_tensor(F.center_crop(image, [self.image_size, self.image_size]))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn bytes ``(..., 3, size, size)`` uint8 into float32 of the same shape."""
        mean, deviation = self.statistics
        return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(mean), list(deviation), inplace=True)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Turn a decoded image into ``(3, size, size)`` float32."""
        return self.normalize(self.pixels(image))
