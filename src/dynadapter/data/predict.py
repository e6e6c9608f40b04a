"""Images to classify, with only the model's own classes known."""

from typing import Literal

from dynadapter.data.base import ImageData, Sample, Split
from dynadapter.data.preprocessing import Auto
from dynadapter.images.preprocess import Interpolation, Normalization, Resize
from dynadapter.images.values import Range


class ImagesToPredict(ImageData):
    """A folder of images to classify, preprocessed as in the model's training.

    Args:
        class_names: Names of the model's classes, in the order of their indices.
        predict_images: A folder (searched with its subfolders), or a list of files.
        batch_size: Images in a batch.
        num_workers: Worker processes that read images; 0 reads in the main process.
        image_size: Height and width in pixels; ``auto``, here and below, takes the model's.
        normalization: As for :class:`~dynadapter.data.base.ImageData`.
        interpolation: The same.
        resize: The same.
        value_range: The same.
        on_error: ``raise`` at the first unreadable image, or ``skip``, which leaves out and lists unreadable images.
        max_skipped: With ``skip``, more unreadable images than this are an error.
    """

    def __init__(
        self,
        class_names: list[str],
        predict_images: list[str] | str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | Auto = "auto",
        normalization: Normalization | Auto = "auto",
        interpolation: Interpolation | Auto = "auto",
        resize: Resize | Auto = "auto",
        value_range: Range | Auto | None = "auto",
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped: int = 10,
    ):
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=image_size,
            normalization=normalization,
            interpolation=interpolation,
            resize=resize,
            value_range=value_range,
            on_error=on_error,
            max_skipped=max_skipped,
            predict_images=predict_images,
        )
        self.class_names = list(class_names)

    def samples(self, split: Split) -> list[Sample]:
        """Return no samples: there are only images to classify."""
        return []
