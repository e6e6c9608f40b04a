"""Images to predict for, with nothing known about them but the model's own classes."""

from typing import Literal

from dynadapter.data.base import ImageData, Sample, Split
from dynadapter.images.preprocess import Interpolation, Normalization, Resize


class ImagesToPredict(ImageData):
    """A folder of images, read as the model's training data was; ``dynadapter predict`` takes these from a checkpoint.

    Args:
        class_names: Names of the model's classes, in the order of their indices.
        predict_images: A folder (searched with its subfolders), or a list of files.
        batch_size: Images in a batch.
        num_workers: Processes that read images beside the predicting one; 0 reads in the same process.
        image_size: Height and width that the backbone takes, in pixels.
        normalization: As in training.
        interpolation: As in training.
        resize: As in training.
        on_error: ``raise`` at the first image that cannot be read, or ``skip``, which lists what it leaves out.
        max_skipped: With ``skip``, more unreadable images than this are an error.
    """

    def __init__(
        self,
        class_names: list[str],
        predict_images: list[str] | str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int = 224,
        normalization: Normalization = "imagenet",
        interpolation: Interpolation = "bicubic",
        resize: Resize = "stretch",
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
            on_error=on_error,
            max_skipped=max_skipped,
            predict_images=predict_images,
        )
        self.class_names = list(class_names)

    def samples(self, split: Split) -> list[Sample]:
        """There are none but those to predict for."""
        return []
