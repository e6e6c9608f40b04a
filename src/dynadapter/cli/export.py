"""``dynadapter export``: from a bundle to a folder of ONNX graphs, or to an adapter folder of peft."""

import copy
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynadapter import peft_place
from dynadapter.cli.errors import Mistake, Stopped, Terminated, mistakes, stoppable
from dynadapter.cli.networks import BUNDLE, WEIGHTS, check_bundle, load_bundle
from dynadapter.cli.parser import CommandParser
from dynadapter.files import listed

if TYPE_CHECKING:  # torch takes seconds to load, and invalid settings are reported without it
    from torch import Tensor

    from dynadapter.cost import ExitCosts
    from dynadapter.serve.bundle import Bundle

ONNX_ALONE = ("int8", "images", "max_images", "merge", "class_first", "opset", "tolerance")
"""Settings without a meaning for ``--format peft``."""


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("export", "Write a bundle as ONNX graphs that run without this package, one per stage.")
    add = parser.add_argument
    add("--bundle", type=str, required=True, help=f"The bundle: {BUNDLE}.")
    add("--out", type=str, required=True, help="The folder to create.")
    add("--overwrite", type=bool, default=False, help="Replace an exported folder.")
    words = "onnx; or peft: only the LoRA adapters and the last head, for peft.PeftModel.from_pretrained."
    add("--format", type=Literal["onnx", "peft"], default="onnx", help=words)
    parser.add_options(WEIGHTS)
    add("--merge", type=bool, default=True, help="Merge the adapters into the backbone if all of them can be merged.")
    words = "Compute the class token's row first where a head reads only that row; images that stop there save more."
    add("--class_first", type=bool, default=True, help=words)
    add("--opset", type=int, default=20, help="Version of ONNX's operators, at least 18.")
    words = "Run the blocks' products in 8 bits, measured on --images: dynamic (ONNX Runtime), static (OpenVINO too)."
    add("--int8", type=Literal["dynamic", "static"] | None, help=words)
    words = "Folder of images to compare on, with a subfolder for each class to measure the accuracy in int8."
    add("--images", type=str | None, help=words)
    add("--max_images", type=int, default=512, help="Use at most this many images, evenly spread.")
    words = "Largest difference of a logit, relative to the image's largest logit if that is above 1."
    add("--tolerance", type=float, default=1e-4, help=words)
    return parser


def run(args: list[str]) -> None:
    """Run the command."""
    if any(arg.partition("=")[0] == "--ckpt_path" for arg in args):
        raise Mistake(
            "export takes a bundle, not a checkpoint; make one first: dynadapter calibrate --ckpt_path FILE "
            "--goal.cost 0.5 --bundle DIR, then dynadapter export --bundle DIR --out FOLDER"
        )
    given = parser().parse_args(args)
    check(given)
    try:
        with stoppable():
            export(given)
    except Terminated as stop:
        raise Stopped(f"{stop}; nothing was written", stop.code) from None


def check(given: Any) -> None:
    """Refuse invalid settings before anything heavy is loaded."""
    from dynadapter.serve.runtime import manifest

    if given.format == "peft":
        defaults = parser().get_defaults()
        if foreign := [name for name in ONNX_ALONE if given[name] != defaults[name]]:
            raise Mistake(f"--{foreign[0]} belongs to --format onnx; leave it out for peft")
    if given.int8 and given.images is None:
        raise Mistake("int8 changes predictions; give --images, a folder of real ones, to measure by how much")
    if given.int8 == "static" and find_spec("nncf") is None:
        raise Mistake("--int8 static needs nncf; install it with: pip install 'dynadapter[int8]'")
    if given.opset < 18:
        raise Mistake(f"opset={given.opset} must be at least 18")
    if not 0 < given.tolerance < math.inf:  # refuses NaN as well
        raise Mistake(f"tolerance={given.tolerance} must be above 0, such as 1e-4")
    if given.max_images < 1:
        raise Mistake(f"max_images={given.max_images} must be at least 1")
    check_bundle(given.bundle)
    with mistakes():
        (peft_place if given.format == "peft" else manifest).check_place(given.out, given.overwrite)


def export(given: Any) -> None:
    """Export the bundle and print what was written."""
    from dynadapter.adapters import adapter_layers
    from dynadapter.serve.export import export_onnx

    files = _files(given.images, given.max_images) if given.images is not None else []
    if given.int8 == "static" and len(files) < 2:
        raise Mistake("--int8 static needs at least 2 images; give more --images, or a larger --max_images")
    bundle = load_bundle(given.bundle, given.weights, given.pretrained)
    if given.format == "peft":
        _write_for_peft(given, bundle)
        return
    if bundle.preprocess is None:
        raise Mistake(f"{given.bundle} has no preprocessing, which an exported folder needs; write the bundle with it")
    layers = adapter_layers(bundle.net.backbone).values()
    fixed = sorted({layer.kind for layer in layers if not layer.mergeable})
    if fixed and given.merge:
        print(f"note: the adapters are not merged, {', '.join(fixed)} cannot be merged into the backbone")
    labels, note = _labels(files, given.images, bundle.class_names)
    if note and given.int8:
        print(f"note: {note}, so no accuracy is measured")
    with mistakes():
        manifest = export_onnx(
            bundle.net,
            given.out,
            policy=bundle.policy,
            class_names=bundle.class_names,
            preprocess=bundle.preprocess,
            costs=_costs(bundle, given.merge and not fixed, given.class_first),
            check_images=_read(files, bundle) if files else None,
            check_labels=labels,
            **{name: given[name] for name in ("tolerance", "merge", "class_first", "opset", "int8", "overwrite")},
        )
    _print(manifest, bundle, given)


def _write_for_peft(given: Any, bundle: "Bundle") -> None:
    """Write the adapters for peft and print what was written."""
    from dynadapter.adapters import save_peft

    if bundle.net.token_merging is not None:
        raise Mistake(f"{given.bundle} merges tokens, which peft does not; export it as onnx")
    source, names = bundle.config.backbone, bundle.class_names
    if source.depth is not None:
        raise Mistake(
            f"{given.bundle} has only the first {source.depth} blocks of its backbone (model.depth), and peft would "
            "load the adapters into the backbone with all blocks; export it as onnx"
        )
    with mistakes(f"{given.bundle}: "):
        save_peft(bundle.net.backbone, given.out, source.name, given.overwrite)
    print(f"{given.out} has the adapters and the last head of {source.name}, without early exits")
    print(f"load it with: peft.PeftModel.from_pretrained(MODEL, {given.out!r})")
    print(f"MODEL is {_backbone_call(bundle, given)}")
    print(f"its {len(names)} classes: {listed(names, 8)}")


def _backbone_call(bundle: "Bundle", given: Any) -> str:
    """Return the call that creates the bundle's bare backbone."""
    source = bundle.config.backbone
    settings: dict[str, Any] = {"num_classes": len(bundle.class_names)}
    if given.weights is not None or (source.origin == "file" and not given.pretrained):
        settings["weights"] = given.weights or source.file or "FILE"
    elif given.pretrained or source.origin == "pretrained":
        settings["pretrained"] = True
    if "weights" not in settings and (source.seed or "pretrained" not in settings):  # which can lack drawn tensors
        settings["seed"] = source.seed
    if source.image_size is not None:
        settings["image_size"] = source.image_size
    words = ", ".join(f"{name}={value!r}" for name, value in (settings | source.timm_args).items())
    return f"dynadapter.create_backbone({source.name!r}, {words})"


def _costs(bundle: "Bundle", merge: bool, class_first: bool) -> "ExitCosts":
    """Count the cost of the exported network."""
    import torch

    from dynadapter.cost import exit_costs

    assert bundle.preprocess is not None
    net = copy.deepcopy(bundle.net).to("cpu", torch.float32).merge() if merge else bundle.net
    return exit_costs(net, bundle.preprocess.image_size, class_first=class_first)


def _files(place: str, most: int) -> list[Path]:
    """List at most a given number of images of a folder, evenly spread."""
    from dynadapter.images.reading import find_images

    folder = Path(os.path.expanduser(place))
    if not folder.is_dir():
        raise Mistake(f"--images {place} is not a folder; give a folder of images")
    with mistakes():
        found = find_images(folder)
    count = min(most, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _labels(files: Sequence[Path], place: str, names: Sequence[str]) -> "tuple[Tensor | None, str]":
    """Return the class indices from the names of the subfolders, or None and the reason."""
    import torch

    if not files:
        return None, ""
    tops = [path.relative_to(Path(os.path.expanduser(place))).parts[:-1][:1] for path in files]
    odd = next((top for top in tops if not top or top[0] not in names), None)
    if odd is not None:
        where = f"no class has the name of the subfolder {odd[0]!r}" if odd else "images are in no subfolder"
        return None, f"{where} in {place}"
    return torch.tensor([names.index(top[0]) for top in tops]), ""


def _read(files: Sequence[Path], bundle: "Bundle") -> "Tensor":
    """Read and preprocess images, (images, 3, size, size)."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    from dynadapter.images.reading import UnreadableImage

    assert bundle.preprocess is not None
    try:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            read = list(pool.map(bundle.preprocess.read, files))
    except UnreadableImage as error:
        raise Mistake(f"{str(error).rpartition(';')[0]}; repair it or remove it") from error
    return torch.from_numpy(bundle.preprocess.normalize(np.stack(read)))


def _print(manifest: Mapping[str, Any], bundle: "Bundle", given: Any) -> None:
    from rich.table import Table

    from dynadapter.printing import print_tables

    check, before = manifest["check"], " before int8" if manifest["precision"] == "int8" else ""
    table = Table(title=f"{bundle.config.backbone.name} in {manifest['precision']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    sizes = {stage["file"]: stage["bytes"] for stage in manifest["stages"]}
    for name, size in [*sizes.items(), ("together", sum(sizes.values()))]:
        table.add_row(name, f"{size / 1e6:.2f} MB")
    table.add_section()
    table.add_row("compared on", f"{check['images']} images of {'noise' if given.images is None else given.images}")
    limit = f"{check['largest_difference']:.1e}, {check['tolerance']:.0e} allowed"
    table.add_row(f"largest difference of a logit{before}", limit)
    table.add_row(f"exits{before}", "all the same")
    if ties := check.get("ties"):
        table.add_row("ties in token merging", f"{ties} images, judged by exit and class: the same")
    if before:
        table.add_section()
        for row in _int8_rows(manifest["quantization"]):
            table.add_row(*row)
    print_tables(table)
    print(f"run it with: python {shlex.quote(os.path.join(given.out, 'predict.py'))} IMAGES")


def _int8_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("products in 8 bits", str(found["products"])),
        ("change measured on", f"{found['images']} images"),
        ("same class as float32", f"{found['same_class']:.2%}"),
        ("same exit as float32", f"{found['same_exit']:.2%}"),
    ]
    for name in ("float32", "int8"):
        rows.append((f"exit shares, {name}", " / ".join(f"{share:.1%}" for share in found[f"exit_shares_{name}"])))
    if "accuracy_int8" in found:
        rows += [(f"accuracy, {name}", f"{found[f'accuracy_{name}']:.2%}") for name in ("float32", "int8")]
    return rows
