"""Worker processes of loaders: check the shared memory for their batches, and report a timeout."""

import os

SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps the tensors that worker processes hand over; other systems have no limit that we know."""
TIMEOUT = 600
"""Seconds to wait for a batch of a worker process."""
PREFETCHED = 2
"""Batches that a worker process keeps ready; torch's default."""


def check_shared_memory(workers: int, images: int, batch_size: int, image_size: int, processes: int = 1) -> None:
    """Check that the batches that worker processes keep ready fit into shared memory.

    Without free shared memory a worker is killed or waits forever, and so does the training.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    disk = os.statvfs(SHARED_MEMORY)
    free = disk.f_bavail * disk.f_frsize
    needed = 4 * 3 * image_size**2 * processes * min(images, batch_size * (PREFETCHED * workers + 1))
    if needed > free:
        raise ValueError(
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and the batches of num_workers={workers} with "
            f"batch_size={batch_size} need {needed / 1e6:,.0f} MB; give num_workers=0, fewer workers, a smaller "
            "batch_size, or more shared memory (docker run --shm-size 8g)"
        )


def too_late(error: RuntimeError) -> TimeoutError | None:
    """Return the error of a loader that waited for `TIMEOUT` seconds as one line; None for any other error."""
    if "DataLoader timed out" not in str(error):
        return None
    return TimeoutError(
        f"no batch came from the worker processes within {TIMEOUT} seconds; give num_workers=0, or check the disk of "
        "the images and the shared memory"
    )
