"""Plain images exit early, cluttered ones late: `python examples/exits_by_difficulty.py CHECKPOINT`.

CHECKPOINT is the file that the quick start wrote, runs/quickstart/version_0/checkpoints/last.ckpt. The validation
images are drawn again, and each of them has a known difficulty from 0 (plain) to 1 (cluttered). The table shows, for
five ranges of difficulty, the accuracy of every exit, the share of images that each exit takes, and the accuracy of
early exits.
"""

import sys

import torch

from dynadapter import Confidence, ExitClassifier, Shapes, route

RANGES = 5


@torch.no_grad()
def main(checkpoint: str, threshold: float = 0.9) -> list[dict[str, list[float] | float]]:
    """Print the table and return its rows."""
    model = ExitClassifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data = Shapes()
    model.match_data(data)  # read the images as in the training
    logits = torch.cat([model(images) for images, _ in data.val_dataloader()], dim=1)  # (exits, images, classes)
    labels = torch.tensor([label for _, label in data.samples("val")])
    difficulty = torch.tensor(data.difficulties("val"))

    right = logits.argmax(-1) == labels  # (exits, images)
    exit_index = route(Confidence(threshold), logits)  # (images,)
    routed = right.gather(0, exit_index[None])[0]
    rows = []
    print(f"{'difficulty':12}{'accuracy of exit 1, 2, ...':32}{'share of exit 1, 2, ...':32}accuracy of early exits")
    for low in torch.arange(RANGES) / RANGES:
        here = (difficulty >= low) & (difficulty < low + 1 / RANGES)
        accuracy = right[:, here].float().mean(1).tolist()
        share = [(exit_index[here] == k).float().mean().item() for k in range(len(right))]
        rows.append({"accuracy": accuracy, "share": share, "routed": routed[here].float().mean().item()})
        columns = [" ".join(f"{value:6.1%}" for value in values) for values in (accuracy, share)]
        print(f"{low:.1f} to {low + 1 / RANGES:.1f}  {columns[0]:32}{columns[1]:32}{rows[-1]['routed']:6.1%}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1])
