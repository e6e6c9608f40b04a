"""Handwritten digits that ship with scikit-learn: real data without a download."""

from typing import Any

import numpy as np
from PIL import Image

from dynadapter.data.base import ImageData, Sample, Split
from dynadapter.data.splits import hold_out


class Digits(ImageData):
    """The 1797 handwritten digits of scikit-learn, 8 x 8 grey pixels, enlarged to `image_size`.

    60 % are for training, 20 % for validation, 20 % for testing, each class alike and always the same images.
    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.class_names = [str(digit) for digit in range(10)]

    def samples(self, split: Split) -> list[Sample]:
        from sklearn.datasets import load_digits  # here, because few configs need it and it takes its time

        digits = load_digits()
        labels = digits.target.tolist()
        rest, test = hold_out(labels, fraction=0.2, seed=0)
        train, val = hold_out([labels[i] for i in rest], fraction=0.25, seed=0)
        chosen = {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}[split]
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # pixels count from 0 to 16
        return [(Image.fromarray(grey[i]), labels[i]) for i in chosen]
