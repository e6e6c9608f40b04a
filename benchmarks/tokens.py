"""What token merging does to a backbone's accuracy at its own classes, without any training.

    python benchmarks/tokens.py --data IMAGES

``IMAGES`` is the set that the backbone was pre-trained on, as ``pretrain.py`` takes it; its validation images are read.
The backbone is run with every token, and with like tokens merged at several places, where a merged token counts as
often as it stands for tokens (as ToMe has it) and where it counts once. A line is one merging; what is in the log is
not done again.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mosaics
import timm
import torch
from common import Log, arguments
from learning import BackboneFile
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from dynadapter import ExitNet, LinearHeads, TokenMerging, exit_costs
from dynadapter.data.normalize import normalize

MERGINGS = (
    ((0,), 0.25),
    ((0,), 0.5),
    ((1,), 0.5),
    ((2,), 0.5),
    ((3,), 0.5),
    ((1, 4), 0.4),
    ((1, 4), 0.3),
    ((1, 2, 3), 0.25),
    ((1, 2, 3, 4), 0.23),
    ((1, 2, 3, 4, 5, 6), 0.18),
    ((1, 3, 5), 0.4),
)
"""After how many blocks, and the share that each place takes away."""

PACKAGED = Path(__file__).parents[1] / "src" / "dynadapter" / "backbones" / "weights" / "micro.json"


def pretrained(path: Path) -> tuple[nn.Module, BackboneFile]:
    """Makes a backbone with the classifier that it was pre-trained with.

    Raises:
        ValueError: The file describes no backbone, or its weights have no classifier.
    """
    file, about = BackboneFile.read(path), json.loads(path.read_text())
    tensors = {} if file.weights is None else {name: t.float() for name, t in load_file(file.weights).items()}
    if "head.weight" not in tensors:
        raise ValueError(f"the weights of {path} have no classifier; give a backbone that pretrain.py kept it of")
    model = timm.create_model(about["architecture"], num_classes=len(tensors["head.weight"]), **about["timm_args"])
    model.load_state_dict(tensors)
    return model.eval(), file


@torch.inference_mode()
def right(net: ExitNet, images: Tensor, labels: Tensor) -> float:
    """Gives the share of right answers at the last exit."""
    answers = [net(part)[-1].argmax(-1) for part in images.split(250)]
    return (torch.cat(answers) == labels).double().mean().item()


def main() -> None:
    """Runs what is not done yet and prints the table."""
    parser = arguments(__doc__ or "", "tokens.jsonl")
    parser.add_argument("--data", required=True, help="the images that the backbone was pre-trained on")
    parser.add_argument("--backbone", type=Path, default=PACKAGED, help="NAME.json of the backbone")
    args = parser.parse_args()
    model, file = pretrained(args.backbone)
    log, size = Log(args.out), file.preprocess.image_size

    @cache
    def validation() -> tuple[Tensor, Tensor]:
        _, images, names = mosaics.read(args.data, size)
        if len(names) != model.num_classes:
            raise SystemExit(
                f"{args.data} has {len(names)} classes, the backbone {model.num_classes}; give its own images"
            )
        return normalize(images.pixels, file.preprocess), images.labels

    def line(token_merging: TokenMerging | None) -> dict[str, Any]:
        key = {"backbone": file.label, "token_merging": str(token_merging)}
        found = log.find(key)
        if found is None:
            net = ExitNet(model, LinearHeads(), exit_depths=[], token_merging=token_merging).eval()
            costs = exit_costs(net)
            images, labels = validation()
            found = log.add(
                key, accuracy=right(net, images, labels), images=len(labels), cost=costs.macs[-1] / costs.backbone
            )
        return found

    every = line(None)
    table = Table("merged after", "share", "cost", "each counts as it stands for", "once", title=file.label)
    table.add_row("never", "", "100 %", f"{every['accuracy']:.2%}", "")
    for after, share in MERGINGS:
        counted, once = (line(TokenMerging(after, share, proportional)) for proportional in (True, False))
        cells = (f"{counted['cost']:.1%}", f"{counted['accuracy']:.2%}", f"{once['accuracy']:.2%}")
        table.add_row(", ".join(map(str, after)), f"{share:g}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
