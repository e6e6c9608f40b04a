"""Export a network with exits as a folder that runs without this package.

The folder holds an ONNX graph for each stage, ``manifest.json`` (exit policy, classes, preprocessing, hashes), and the
code that runs it: ``python exported/predict.py photos``.

Stage 0 maps images to (x, logits), each later stage x to (x, logits), and the last stage x to logits; a batch may have
any size. Where the class token's row is computed first, as in ``ExitNet.early``, a stage begins by finishing a block
that the stage before began, and x consists of two tensors.

A folder gets its name only when it is complete and its graphs have been compared with the network.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import dynadapter
from dynadapter.backbones import frames
from dynadapter.cost import ExitCosts
from dynadapter.exits import policies
from dynadapter.exits.combining import Combined
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.exits.temperature import Scaled
from dynadapter.files import checksum, files_of, replacing_folder, sha256
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.backends import version_of
from dynadapter.serve.comparison import compare, quantization_change
from dynadapter.serve.graphs import standalone, write_graphs
from dynadapter.serve.quantise import ACTIVATIONS, quantise_dynamic, quantise_static
from dynadapter.serve.runtime import Runner
from dynadapter.serve.runtime.manifest import CODE, FORMAT, MANIFEST, check_place
from dynadapter.serve.runtime.policies import FIELDS
from dynadapter.serve.runtime.policies import Policy as RuntimePolicy
from dynadapter.spec import plain

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Int8 = Literal["dynamic", "static"]


def export_onnx(
    net: ExitNet,
    folder: str | os.PathLike[str],
    *,
    policy: Policy,
    class_names: Sequence[str],
    preprocess: Preprocess,
    costs: ExitCosts | None = None,
    check_images: Tensor | None = None,
    check_labels: Tensor | None = None,
    tolerance: float = 1e-4,
    merge: bool = True,
    class_first: bool = True,
    opset: int = 20,
    int8: Int8 | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an exported folder and compare it with the network.

    Args:
        net: The network, on any device; it stays unchanged.
        folder: The folder to create.
        policy: Decides at which exit an image stops; it may be in `Scaled` (temperatures) and `Combined`.
        class_names: One name for each class.
        preprocess: Maps a decoded image to the network's input.
        costs: The result of :func:`dynadapter.cost.exit_costs`, stored in the manifest.
        check_images: Preprocessed images (images, 3, size, size), or clips, to compare on; noise by default.
        check_labels: Their class indices (images,), for the accuracy in int8.
        tolerance: Largest difference of a logit; relative to the image's largest logit if that is above 1.
        merge: Merge the adapters into the backbone if all of them can be merged.
        class_first: See :meth:`ExitNet.early`; such a block is stored in two files.
        opset: Version of ONNX's operators, at least 18.
        int8: Quantise the blocks' matrix products to 8 bits, and measure the change on `check_images`. ``dynamic``: for
            ONNX Runtime alone; each batch determines its ranges, so a prediction depends on its batch. ``static``: by
            NNCF, also for OpenVINO; every second image determines the ranges, the others measure the change.
        overwrite: Replace an exported folder.

    Returns:
        The content of ``manifest.json``.

    Raises:
        ValueError: An argument does not fit, the folder exists, or the graphs differ; nothing is written.
        ImportError: onnx, onnxscript, onnxruntime, or for ``static`` nncf, is missing.
    """
    manifest = _manifest(net, policy, class_names, preprocess, costs, opset)
    _check_int8(int8, check_images)
    images, labels = _check_images(check_images, check_labels, frames(net.backbone), preprocess.image_size)
    reference, network = standalone(net, images, merge)
    with replacing_folder(check_place(folder, overwrite), overwrite) as draft:
        stages = write_graphs(network, draft, images, class_first, opset)
        copy_runtime(draft)
        runner = _write_and_open(draft, manifest, stages, opset)
        expected, manifest["check"] = compare(runner, reference, policy, images, tolerance)
        if int8:
            manifest |= {"precision": "int8", "quantization": _quantise(draft, runner, int8, images)}
            quantised = _write_and_open(draft, manifest, stages, opset)
            manifest["quantization"] |= _change(quantised, int8, policy, expected, images, labels)
        _write_manifest(draft, manifest, stages)
        check_place(folder, overwrite)  # the user may have put a file there meanwhile
    return manifest


# ---- arguments


def _manifest(
    net: ExitNet,
    policy: Policy,
    class_names: Sequence[str],
    preprocess: Preprocess,
    costs: ExitCosts | None,
    opset: int,
) -> dict[str, Any]:
    """Check the arguments against the network, and return a manifest without stages."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}: pip install 'dynadapter[onnx]'")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < 18:
        raise ValueError(f"opset={opset!r} must be a whole number of at least 18")
    settings, temperatures = policy_settings(policy, net.num_exits)
    RuntimePolicy(settings, net.num_exits, temperatures)
    if len(class_names) != net.num_classes:
        raise ValueError(f"{len(class_names)} class names for {net.num_classes} classes; give one name for each class")
    if costs is not None and len(costs.macs) != net.num_exits:
        raise ValueError(f"costs of {len(costs.macs)} exits for {net.num_exits}; count them on the network to export")
    packages = ("torch", "timm", *PACKAGES)
    return {
        "format": FORMAT,
        "precision": "float32",
        "stages": [],
        "policy": settings,
        "temperatures": temperatures,
        "class_names": [str(name) for name in class_names],
        # Numbers instead of a name, for readers that do not know it
        "preprocessing": plain(dataclasses.replace(preprocess, normalization=preprocess.statistics)),
        "costs": plain(costs),
        "versions": {
            "dynadapter": dynadapter.__version__,
            "opset": opset,
            **{name: version_of(name) for name in packages},
        },
    }


def policy_settings(policy: Policy, num_exits: int) -> tuple[dict[str, Any], list[float] | None]:
    """Return a policy as plain values: its kind and field, and one temperature for each exit."""
    temperatures, combined = None, {}
    if isinstance(policy, Scaled):
        own, policy = policy.temperatures, policy.policy
        temperatures = list(own) if isinstance(own, tuple) else [own] * num_exits
    if isinstance(policy, Combined):
        combined, policy = {"combine": policy.by}, policy.policy
    kind = type(policy).__name__
    if kind not in FIELDS or type(policy) is not getattr(policies, kind):
        raise ValueError(
            f"policy {kind} cannot be exported; choose {', '.join(FIELDS)}, alone, in Combined, or in Scaled outside"
        )
    return plain({"kind": kind, **dataclasses.asdict(policy), **combined}), temperatures


def _check_images(
    images: Tensor | None, labels: Tensor | None, clip: int | None, size: int
) -> tuple[Tensor, Tensor | None]:
    """Return the images to compare on, in float32 on the CPU, and their labels: the given ones, or noise."""
    labels = _check_labels(labels, images)
    shape = (3, size, size) if clip is None else (clip, 3, size, size)
    if images is None:
        return torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)), labels
    if images.shape[1:] != shape or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"check_images are {images.dtype} {tuple(images.shape)}; give preprocessed ones, torch.float32 "
            f"(images, {', '.join(map(str, shape))}), at least one"
        )
    return images.detach().to("cpu", torch.float32), labels


def _check_int8(int8: Int8 | None, images: Tensor | None) -> None:
    if int8 is None:
        return
    if int8 not in ACTIVATIONS:
        raise ValueError(f"int8={int8!r} must be one of {', '.join(ACTIVATIONS)}, or None for float32")
    if images is None:
        raise ValueError("int8 changes predictions; give check_images, real ones, to measure by how much")
    if int8 == "static":
        if len(images) < 2:
            raise ValueError("int8='static' needs at least 2 check_images: for the ranges, and to measure the change")
        if find_spec("nncf") is None:
            raise ImportError("int8='static' needs nncf: pip install 'dynadapter[int8]'")


def _check_labels(labels: Tensor | None, images: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    if images is None or labels.shape != images.shape[:1]:
        given = "no images" if images is None else f"{len(images)} images"
        raise ValueError(f"check_labels have shape {tuple(labels.shape)} for {given}; give one class for each image")
    return labels.detach().cpu()


# ---- the folder


def copy_runtime(folder: Path) -> None:
    """Copy the code that runs an exported folder: ``predict.py``, and what it imports below ``dynadapter``."""
    source, target = Path(dynadapter.__file__).parent, folder / "dynadapter"
    target.mkdir()
    text = f'"""The part of dynadapter {dynadapter.__version__} that runs this folder."""\n'
    (target / "__init__.py").write_text(text, encoding="utf-8")
    for name in CODE:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(source / "serve/runtime/predict.py", folder / "predict.py")


def _write_manifest(folder: Path, manifest: dict[str, Any], stages: Sequence[Mapping[str, Any]]) -> None:
    """Add the present sizes and hashes of all files to the manifest, and write it."""
    manifest["stages"] = [
        {**stage, "bytes": (folder / stage["file"]).stat().st_size, "sha256": sha256(folder / stage["file"])}
        for stage in stages
    ]
    others = {MANIFEST, *(stage["file"] for stage in stages)}
    manifest["files"] = {name: sha256(folder / name) for name in files_of(folder) if name not in others}
    text = json.dumps({**manifest, "checksum": checksum(manifest)}, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _write_and_open(folder: Path, manifest: dict[str, Any], stages: Sequence[Mapping[str, Any]], opset: int) -> Runner:
    """Write the manifest and open the graphs."""
    _write_manifest(folder, manifest, stages)
    try:
        return Runner(folder).load()
    except ValueError as error:
        raise ValueError(f"graphs of opset={opset} do not run here ({error}); give a smaller opset, or none") from error


def _quantise(folder: Path, runner: Runner, way: Int8, images: Tensor) -> dict[str, Any]:
    """Quantise the graphs.

    Args:
        folder: Where they are.
        runner: The graphs in float32, opened.
        way: How to quantise.
        images: (images, 3, size, size) float32; every second one determines the ranges of ``static``.

    Returns:
        The beginning of the manifest's entry ``quantization``.
    """
    products, inputs = 0, [[part.numpy()] for part in images[::2].split(32)]
    for k, stage in enumerate(runner.manifest.stages):
        if way == "dynamic":
            products += quantise_dynamic(stage.file)
            continue
        products += quantise_static(stage.file, [dict(zip(stage.inputs, part, strict=True)) for part in inputs])
        inputs = [runner.stage(k, part)[0] for part in inputs]
    if not products:
        raise ValueError("int8 finds no matrix product in this network's blocks; leave it out")
    return {"way": way, "products": products, "weights": "7 of 8 bits, per channel", "activations": ACTIVATIONS[way]}


def _change(
    runner: Runner, way: Int8, policy: Policy, expected: Tensor, images: Tensor, labels: Tensor | None
) -> dict[str, Any]:
    """Measure the change by int8 on the images that determined no range."""
    rest = slice(1, None, 2) if way == "static" else slice(None)
    return quantization_change(
        runner, expected[:, rest], policy, images[rest], None if labels is None else labels[rest]
    )
