"""Image files and their pixels; they live in :mod:`dynadapter.images`, without Lightning."""

from dynadapter.images import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    SUFFIXES,
    UnreadableImage,
    find_images,
    image_files,
    load_image,
    open_image,
    open_regular,
    reason,
    shown,
    to_rgb,
    upright,
    why_unreadable,
)

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "UnreadableImage",
    "find_images",
    "image_files",
    "load_image",
    "open_image",
    "open_regular",
    "reason",
    "shown",
    "to_rgb",
    "upright",
    "why_unreadable",
]
