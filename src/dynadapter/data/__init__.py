"""Data modules: VTAB-1k, folders, tables and lists of images, videos, data sets of other libraries, drawn shapes."""

from dynadapter.data.augment import Augment
from dynadapter.data.base import ImageData, ImageDataset
from dynadapter.data.folder import ImageFolder
from dynadapter.data.hub import HubDataset
from dynadapter.data.image_lists import ImageLists
from dynadapter.data.shapes import Shapes
from dynadapter.data.table import ImageTable
from dynadapter.data.torchvision_sets import TorchVisionDataset
from dynadapter.data.video_lists import VideoLists
from dynadapter.data.vtab import VTAB_TASKS, VTAB1k, VTABTask, vtab_task
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage

__all__ = [
    "VTAB_TASKS",
    "Augment",
    "HubDataset",
    "ImageData",
    "ImageDataset",
    "ImageFolder",
    "ImageLists",
    "ImageTable",
    "Preprocess",
    "Shapes",
    "TorchVisionDataset",
    "UnreadableImage",
    "VTAB1k",
    "VTABTask",
    "VideoLists",
    "vtab_task",
]
