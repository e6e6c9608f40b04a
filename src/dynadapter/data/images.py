"""Image files and their pixels; they live in :mod:`dynadapter.images`, without Lightning."""

from dynadapter.images import (
    FORMATS,
    SUFFIXES,
    UnreadableImage,
    find_images,
    image_files,
    load_image,
    to_rgb,
    upright,
    why_unreadable,
)

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "UnreadableImage",
    "find_images",
    "image_files",
    "load_image",
    "to_rgb",
    "upright",
    "why_unreadable",
]
