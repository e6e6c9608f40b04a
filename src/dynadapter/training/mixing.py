"""Mixup and CutMix of batches, by timm."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynadapter.spec import Spec

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mixing(Spec):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of the images in a batch.

    Args:
        mixup: Beta parameter of mixup; 0 switches it off.
        cutmix: Beta parameter of CutMix; 0 switches it off.
        prob: Fraction of the batches that are mixed, in [0, 1].
        switch: Fraction of CutMix among the mixed batches if both are on, in [0, 1].

    Raises:
        ValueError: A value is out of range, or both are off.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if not (self.mixup >= 0 and self.cutmix >= 0 and self.mixup + self.cutmix > 0):
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} must be at least 0 and one of them above; "
                "to train on unmixed images leave mixing out"
            )
        for name, share in (("prob", self.prob), ("switch", self.switch)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be in [0, 1]")

    def mixer(self, num_classes: int) -> Mixer:
        """Return timm's mixer: from images and class indices to mixed images and class probabilities.

        It does not smooth labels; the loss does, so that class weights do not depend on the smoothing.
        """
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.prob,
            switch_prob=self.switch,
            label_smoothing=0.0,  # timm has 0.1
            num_classes=num_classes,
        )


def mix(mixer: Mixer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mix a batch of any size without changing it.

    Args:
        mixer: From :meth:`Mixing.mixer`.
        images: ``(batch, channels, height, width)``, or clips, whose frames are mixed alike.
        targets: Class indices ``(batch,)``.

    Returns:
        Images of the same shape, and class probabilities ``(batch, classes)``.
    """
    batch = len(images)
    # timm mixes in place and in pairs: an odd batch gets its last image twice.
    rows = [*range(batch), *[batch - 1] * (batch % 2)]
    mixed, targets = mixer(images[rows].flatten(1, -3), targets[rows])
    return mixed[:batch].reshape(images.shape), targets[:batch]
