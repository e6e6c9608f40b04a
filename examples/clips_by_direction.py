"""Learn from videos with early exits: `python examples/clips_by_direction.py`, about a minute on a CPU.

A square moves to the left, to the right, up or down. Its start is random, so no single frame tells the direction. The
package av (`pip install 'dynadapter[video]'`) writes the clips and reads them again. A tiny VideoMAE with random frozen
weights learns the direction through its adapters and three exits; nothing is downloaded.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random

import av
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from dynadapter import Confidence, EarlyExit, ExitClassifier, FlopsReport, LoRA, VideoLists

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE, FRAMES, SIDE, SPEED = 32, 8, 8, 3  # of a video in pixels and frames, and of the square
CLIPS = {"train": 400, "val": 80, "test": 200}


def draw(direction: str, rng: Random) -> np.ndarray:
    """Draw a video (frames, height, width, 3) of a square that leaves at one side and comes back at the other."""
    video = np.full((FRAMES, SIZE, SIZE, 3), rng.randrange(60), np.uint8)
    colour = [rng.randrange(120, 256) for _ in range(3)]
    column, row = rng.randrange(SIZE), rng.randrange(SIZE)
    for k, frame in enumerate(video):
        x, y = (start + k * SPEED * step for start, step in zip((column, row), DIRECTIONS[direction], strict=True))
        frame[np.ix_(np.arange(y, y + SIDE) % SIZE, np.arange(x, x + SIDE) % SIZE)] = colour
    return video


def write_clips(folder: Path, counts: Mapping[str, int], seed: int = 0) -> None:
    """Write the videos, a list of each split, and the names of the classes."""
    (folder / "classes.txt").write_text("\n".join(DIRECTIONS))
    for split, count in counts.items():
        lines = []
        for index in range(count):
            label = index % len(DIRECTIONS)
            name = f"{split}_{index}.mp4"
            with av.open(str(folder / name), "w") as container:
                stream = container.add_stream("mpeg4", rate=8)
                stream.width = stream.height = SIZE
                for frame in draw(list(DIRECTIONS)[label], Random(f"{seed} {split} {index}")):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            lines.append(f"{name} {label}\n")
        (folder / f"{split}.csv").write_text("".join(lines))


def main(folder: str | None = None, max_epochs: int = 12, counts: Mapping[str, int] = CLIPS) -> dict[str, float]:
    """Write the videos, train, test with early exits, and return the metrics of the test."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return main(place, max_epochs, counts)
    seed_everything(0)
    write_clips(Path(folder), counts)
    lists = {split: Path(folder, f"{split}.csv") for split in counts}
    data = VideoLists(
        folder, **lists, classes=Path(folder, "classes.txt"), frames=FRAMES, image_size=SIZE, batch_size=40
    )
    model = ExitClassifier(
        data.num_classes,
        backbone="videomae_small_patch16_224",
        backbone_args={"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4, "frames": FRAMES},
        pretrained=False,
        image_size=SIZE,
        adapter=LoRA(rank=16),
        every=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    )
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[EarlyExit([Confidence(0.9)]), FlopsReport()],
    )
    trainer.fit(model, datamodule=data)
    (measured,) = trainer.test(model, datamodule=data, verbose=False)
    return measured


if __name__ == "__main__":
    main(*sys.argv[1:])
