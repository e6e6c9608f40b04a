"""``dynadapter export``: from a bundle to a graph or program for each stage, compared with the network on images."""

import copy
import dataclasses
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynadapter.cli.errors import Mistake, Stopped, Terminated, one_line, sigterm
from dynadapter.cli.networks import check_bundle, load_bundle
from dynadapter.cli.parser import CommandParser

if TYPE_CHECKING:  # torch takes seconds to load, and a slip of the pen is answered without it
    from torch import Tensor

    from dynadapter.cost import ExitCosts
    from dynadapter.serve.bundle import Bundle


def parser() -> CommandParser:
    """Makes the command's parser."""
    parser = CommandParser("export", "Makes a graph for each stage of a bundle, which runs without this package.")
    parser.add_argument("--bundle", type=str, required=True, help="The bundle: what calibrate wrote.")
    parser.add_argument("--out", type=str, required=True, help="The folder to make.")
    words = "ONNX graphs for dynadapter.serve.runtime, or torch.export programs."
    parser.add_argument("--format", type=Literal["onnx", "programs"], default="onnx", help=words)
    words = "Run the blocks' matrix products in 8 bits, and measure on the images what that changes."
    parser.add_argument("--int8", type=bool, default=False, help=words)
    words = "Folder of images to compare on; with a subfolder for each class int8's accuracy is measured, too."
    parser.add_argument("--images", type=str | None, help=words)
    words = "Take at most so many of the images, evenly spread over the folder."
    parser.add_argument("--max_images", type=int, default=512, help=words)
    parser.add_argument(
        "--weights", type=str | None, help="File of the backbone's weights, where the bundle needs one."
    )
    words = "Whether timm may fetch the backbone's weights; by default as the training did."
    parser.add_argument("--pretrained", type=bool | None, help=words)
    words = "Fold the adapters into the backbone where all of them can be."
    parser.add_argument("--merge", type=bool, default=True, help=words)
    words = "Compute the class token's row first where a head reads nothing else, so that whoever leaves saves more."
    parser.add_argument("--class_first", type=bool, default=True, help=words)
    parser.add_argument("--opset", type=int | None, help="Version of ONNX's operators, at least 18; 20 by default.")
    words = "Largest difference of a logit, relative to the image's largest where that is above 1."
    parser.add_argument("--tolerance", type=float, default=1e-4, help=words)
    parser.add_argument("--overwrite", type=bool, default=False, help="Whether an exported folder may be replaced.")
    return parser


def run(args: list[str]) -> None:
    """Runs the command."""
    if any(arg.partition("=")[0] == "--ckpt_path" for arg in args):
        raise Mistake(
            "export takes a bundle, not a checkpoint; make one first: dynadapter calibrate --ckpt_path FILE "
            "--goal.cost 0.5 --bundle DIR, then dynadapter export --bundle DIR --out FOLDER"
        )
    given = parser().parse_args(args)
    check(given)
    try:
        with sigterm():
            export(given)
    except Terminated:
        raise Stopped("stopped by SIGTERM; nothing was written", 143) from None


def check(given: Any) -> None:
    """Refuses what cannot be, before anything heavy is loaded.

    Raises:
        Mistake: If settings do not go together, or places are taken or empty.
    """
    if given.int8 and given.format != "onnx":
        raise Mistake("int8 is made of ONNX graphs; leave it out, or give --format onnx")
    if given.int8 and given.images is None:
        raise Mistake(
            "int8 changes what the network says; give --images, a folder of real ones, to measure by how much"
        )
    if given.opset is not None and given.format != "onnx":
        raise Mistake("opset belongs to ONNX; leave it out, or give --format onnx")
    if given.opset is not None and given.opset < 18:
        raise Mistake(f"opset={given.opset} must be at least 18")
    if not 0 < given.tolerance < math.inf:  # nor does NaN
        raise Mistake(f"tolerance={given.tolerance} must be above 0, such as 1e-4")
    if given.max_images < 1:
        raise Mistake(f"max_images={given.max_images} must be at least 1")
    check_bundle(given.bundle)
    out = Path(given.out).expanduser()
    if os.path.lexists(out):
        if not out.is_dir():
            raise Mistake(f"{given.out} exists and is no folder; give another --out")
        if not given.overwrite:
            raise Mistake(f"{given.out} exists; give another --out, or --overwrite true to replace an exported folder")
        if not (out / "manifest.json").is_file():
            raise Mistake(f"{given.out} holds no manifest.json, so it is no exported folder to replace; give another")


def export(given: Any) -> None:
    """Exports the bundle and says what came out.

    Raises:
        Mistake: If the bundle, the images or the result cannot be used.
    """
    from dynadapter.serve.export import export_onnx, export_programs

    files = _files(given.images, given.max_images) if given.images is not None else []
    bundle = load_bundle(given.bundle, given.weights, given.pretrained)
    if bundle.preprocess is None:
        raise Mistake(f"{given.bundle} has no preprocessing, which an exported folder needs; write the bundle with it")
    if (stuck := _stuck(bundle)) and given.merge:
        print(f"note: the adapters stay as they are, {stuck} cannot be folded into the backbone")
    labels, note = _labels(files, given.images, bundle.class_names)
    if note and given.int8:
        print(f"note: {note}, so no accuracy is measured")
    options: dict[str, Any] = {
        "policy": bundle.policy,
        "class_names": bundle.class_names,
        "preprocessing": dataclasses.asdict(bundle.preprocess),
        "costs": _costs(bundle, given.merge and not stuck, given.class_first),
        "check_images": _read(files, bundle) if files else None,
        "tolerance": given.tolerance,
        "merge": given.merge,
        "class_first": given.class_first,
        "overwrite": given.overwrite,
    }
    try:
        if given.format == "onnx":
            opset = {} if given.opset is None else {"opset": given.opset}
            with _quiet("onnxscript.version_converter"):
                manifest = export_onnx(bundle.net, given.out, check_labels=labels, int8=given.int8, **opset, **options)
        else:
            manifest = export_programs(bundle.net, given.out, **options)
    except ValueError as error:
        if given.opset is not None and str(error).startswith("ONNX Runtime cannot open"):
            raise Mistake(f"graphs of opset={given.opset} do not run here; give a smaller --opset, or none") from error
        # in the command's words
        line = one_line(error).replace("merge=False", "--merge false").replace("other check_images", "other --images")
        raise Mistake(line) from error
    _print(manifest, bundle, given)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Silences a library that logs a traceback where a version cannot be written; that the graphs run is tried."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        found.setLevel(before)


def _stuck(bundle: "Bundle") -> str:
    """Names the kinds of adapters that keep the network from being merged."""
    from dynadapter.adapters import adapter_layers

    layers = adapter_layers(bundle.net.backbone).values()
    return ", ".join(sorted({layer.kind for layer in layers if not layer.mergeable}))


def _costs(bundle: "Bundle", merge: bool, class_first: bool) -> "ExitCosts":
    """Counts the multiply-adds of what is exported."""
    import torch

    from dynadapter.cost import exit_costs

    assert bundle.preprocess is not None
    net = bundle.net
    if merge:
        net = copy.deepcopy(net).to("cpu", torch.float32).merge()
    return exit_costs(net, bundle.preprocess.image_size, class_first=class_first)


# ---- the images


def _files(place: str, most: int) -> list[Path]:
    """Lists images, evenly spread where there are too many."""
    from dynadapter.images.reading import find_images

    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise Mistake(f"--images {place} is no folder; give a folder of images")
    try:
        found = find_images(folder)
    except ValueError as error:
        raise Mistake(str(error)) from error
    count = min(most, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _labels(files: Sequence[Path], place: str, names: Sequence[str]) -> "tuple[Tensor | None, str]":
    """Takes the classes from the names of the subfolders; gives None and why where they do not say."""
    import torch

    if not files:
        return None, ""
    tops = [path.relative_to(Path(place).expanduser()).parts[:-1][:1] for path in files]
    odd = next((top for top in tops if not top or top[0] not in names), None)
    if odd is not None:
        where = f"the subfolder {odd[0]!r} is named after none of the classes" if odd else "images lie in no subfolder"
        return None, f"{where} in {place}"
    return torch.tensor([names.index(top[0]) for top in tops]), ""


def _read(files: Sequence[Path], bundle: "Bundle") -> "Tensor":
    """Reads images as the network takes them, (images, 3, size, size)."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from dynadapter.images.reading import UnreadableImage, load_image, why_unreadable

    preprocess = bundle.preprocess
    assert preprocess is not None

    def read(path: Path) -> "Tensor":
        try:
            return preprocess.pixels(load_image(path))
        except UnreadableImage as error:
            reason = why_unreadable(path) or "it changed while it was read"
            raise Mistake(f"cannot read image {path}: {reason}; repair it, or take it out") from error

    with ThreadPoolExecutor() as pool:
        return preprocess.normalize(torch.stack(list(pool.map(read, files))))


# ---- what is said of it


def _print(manifest: Mapping[str, Any], bundle: "Bundle", given: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    check, kind = manifest["check"], manifest["kind"]
    table = Table(title=f"{bundle.config.backbone.name} as {kind}, {manifest['precision']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    sizes = [stage["bytes"] for stage in manifest["stages"]]
    for stage, size in zip(manifest["stages"], sizes, strict=True):
        table.add_row(stage["file"], f"{size / 1e6:.2f} MB")
    table.add_row("together", f"{sum(sizes) / 1e6:.2f} MB", end_section=True)
    table.add_row("compared on", f"{check['images']} images of {'noise' if given.images is None else given.images}")
    which = "a logit" if manifest["precision"] == "float32" else "a logit before int8"
    table.add_row(
        f"largest difference of {which}", f"{check['largest_difference']:.1e}, {check['tolerance']:.0e} allowed"
    )
    table.add_row(f"exits{'' if manifest['precision'] == 'float32' else ' before int8'}", "all the same")
    if "quantization" in manifest:
        table.add_section()
        for name, value in _quantised(manifest["quantization"]):
            table.add_row(name, value)
    console = Console()
    console.width = max(console.width, 100)  # a narrow pipe would fold the names
    console.print(table)
    if kind == "onnx":
        print(f"run it with: python -m dynadapter.serve.runtime {shlex.quote(given.out)} IMAGES")
    else:
        print(f"run it with: dynadapter.serve.export.load_programs({given.out!r}).route(images)")


def _quantised(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Says what int8 changed."""

    def shares(name: str) -> str:
        return " / ".join(f"{share:.1%}" for share in found[f"exit_shares_{name}"])

    rows = [
        ("products in 8 bits", str(found["products"])),
        ("same class as float32", f"{found['same_class']:.2%}"),
        ("same exit as float32", f"{found['same_exit']:.2%}"),
        ("leave at each exit, float32", shares("float32")),
        ("leave at each exit, int8", shares("int8")),
    ]
    if "accuracy_int8" in found:
        rows.append(("accuracy, float32", f"{found['accuracy_float32']:.2%}"))
        rows.append(("accuracy, int8", f"{found['accuracy_int8']:.2%}"))
    return rows
