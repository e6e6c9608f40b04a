"""Data modules: VTAB-1k, folders of images, and digits that need no download."""

from dynadapter.data.base import ImageData, ImageDataset
from dynadapter.data.digits import Digits
from dynadapter.data.folder import ImageFolder
from dynadapter.data.predict import ImagesToPredict
from dynadapter.data.vtab import VTAB_TASKS, VTAB1k, VTABTask, vtab_task
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage

__all__ = [
    "VTAB_TASKS",
    "Digits",
    "ImageData",
    "ImageDataset",
    "ImageFolder",
    "ImagesToPredict",
    "Preprocess",
    "UnreadableImage",
    "VTAB1k",
    "VTABTask",
    "vtab_task",
]
