"""From a decoded image to the tensor that a trunk takes; see :mod:`dynadapter.preprocess`, free of Lightning."""

from dynadapter.preprocess import STATISTICS, Interpolation, Normalization, Preprocess, Resize, Statistics

__all__ = ["STATISTICS", "Interpolation", "Normalization", "Preprocess", "Resize", "Statistics"]
