"""Data modules: VTAB-1k, folders and tables of images, and drawn shapes that need no download."""

from dynadapter.data.augment import Augment
from dynadapter.data.base import ImageData, ImageDataset
from dynadapter.data.folder import ImageFolder
from dynadapter.data.predict import ImagesToPredict
from dynadapter.data.shapes import Shapes
from dynadapter.data.table import ImageTable
from dynadapter.data.vtab import VTAB_TASKS, VTAB1k, VTABTask, vtab_task
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage

__all__ = [
    "VTAB_TASKS",
    "Augment",
    "ImageData",
    "ImageDataset",
    "ImageFolder",
    "ImageTable",
    "ImagesToPredict",
    "Preprocess",
    "Shapes",
    "UnreadableImage",
    "VTAB1k",
    "VTABTask",
    "vtab_task",
]
