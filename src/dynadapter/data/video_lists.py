"""Read clips of videos from text lists with their paths and labels, such as those of HMDB51 and Something-Something."""

from pathlib import Path
from typing import Any

from dynadapter.data.base import Split
from dynadapter.data.clips import Clip, Sampling, require_av
from dynadapter.data.dataset import Sample
from dynadapter.data.image_lists import ImageLists


class VideoLists(ImageLists):
    """Clips of videos that text lists name, one a line: ``PATH LABEL`` or ``PATH,LABEL``, with labels from 0.

    The lists of VideoMAE's release have this form. Batches are (clips ``(batch, frames, 3, size, size)`` float32, class
    indices ``(batch,)`` int64), for a backbone of videos such as ``videomae_base_patch16_224``. The package av decodes
    them (extra ``video``). In training the frames are drawn anew in each epoch; all frames of a clip are mirrored and
    augmented alike. A video with fewer frames than a clip is unreadable.

    Args:
        root: Folder that holds all videos, and to which paths are relative.
        train: List of the videos for training; None without any.
        val: The same for validation.
        test: The same for the test.
        classes: File with a class name a line, in the order of the labels; None for numbers up to the highest label.
        frames: Frames of a clip, as many as the backbone takes.
        sampling: ``uniform`` for a frame of each of so many equal parts of the video, as for Something-Something;
            ``dense`` for every `stride`-th frame of one stretch, as for HMDB51.
        stride: Distance of two frames in ``dense``.
        kwargs: As for :class:`~dynadapter.data.base.ImageData`, without ``cache``.
    """

    validation_switch = "val, the list of its videos"

    def __init__(
        self,
        root: str | Path,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        classes: str | Path | None = None,
        frames: int = 16,
        sampling: Sampling = "uniform",
        stride: int = 4,
        **kwargs: Any,
    ):
        require_av()
        super().__init__(root, train, val, test, classes, **kwargs)
        if self.cache:
            raise ValueError("cache keeps images in memory, and videos are drawn anew in each epoch; set cache: false")
        Clip(self.folder, frames, sampling, stride)  # says at once what is wrong
        self.frames, self.sampling, self.stride = frames, sampling, stride

    def samples(self, split: Split) -> list[Sample]:
        found: list[Any] = super().samples(split)
        return [(Clip(file, self.frames, self.sampling, self.stride), label) for file, label in found]
