"""Images inside a data set of another library, each fetched when it is read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dynadapter.files import one_line


class LibraryImages(ABC):
    """The images of one split with their labels.

    Args:
        place: Name of the data set and the split, for messages.
        labels: Class index of each image.
    """

    def __init__(self, place: str, labels: list[int]) -> None:
        self.place = place
        self.labels = labels
        self.size = self._size_of_first()

    @abstractmethod
    def fetch(self, index: int) -> Path | bytes | Image.Image:
        """Return an image: its file, the bytes of its file, or its pixels."""

    def images(self) -> list["LibraryImage"]:
        """Return an object for each image."""
        return [LibraryImage(self, index) for index in range(len(self.labels))]

    def _size_of_first(self) -> int:
        """Return the size of the first image in bytes, as an estimate for all; 0 if it cannot be read."""
        try:
            first = self.fetch(0)
            return (
                first.stat().st_size
                if isinstance(first, Path)
                else len(first if isinstance(first, bytes) else first.tobytes())
            )
        except Exception:  # whoever reads it reports why
            return 0


@dataclass(frozen=True, slots=True)
class LibraryImage:
    """An image inside a data set.

    Args:
        images: The split that holds it.
        index: Its index in the split, from 0.
    """

    images: LibraryImages
    index: int

    @property
    def name(self) -> str:
        """Data set, split and index, for messages and lists."""
        return f"{self.images.place}[{self.index}]"

    def __str__(self) -> str:
        return self.name

    def fetch(self) -> Path | bytes | Image.Image:
        """Return its file, the bytes of its file, or its pixels.

        Raises:
            OSError: The data set cannot read it; without an errno if the image itself is at fault.
        """
        try:
            return self.images.fetch(self.index)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of any library
            raise OSError(one_line(error)) from error
