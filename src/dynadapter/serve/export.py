"""Exports a network with exits as a folder of graphs, one for each stage, that runs without this package.

``export_onnx`` writes ONNX graphs for :mod:`dynadapter.serve.runtime`, ``export_programs`` programs of
:mod:`torch.export`. Stage 0 maps images to (x, logits), each later one x to (x, logits), the last to logits alone; a
batch may have any size. Where the class token's row is computed first, as in ``ExitNet.early``, a stage begins by
finishing the block that the one before has begun, and x is two tensors. ``manifest.json`` says everything else that is
needed: who leaves where, the classes, the preprocessing, and the hash of each file.

A folder takes its name only when it is whole and its graphs have been compared with the network.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

import dynadapter
from dynadapter.adapters import adapter_layers
from dynadapter.cost import ExitCosts
from dynadapter.exits import policies
from dynadapter.exits.net import ExitNet, Routed
from dynadapter.exits.policies import Policy, route
from dynadapter.exits.temperature import Scaled
from dynadapter.serve import runtime

LARGEST_ONNX = 2 * 1024**3 - 64 * 1024**2
"""Bytes of weights in one ONNX file: protobuf ends at 2 GiB, and the graph takes some room itself."""

LogitsOf = Callable[[Tensor], Tensor]
"""From images (batch, 3, size, size) to the logits of every exit (exits, batch, classes)."""


# ---- the two formats -------------------------------------------------------------------------------------------------


def export_onnx(
    net: ExitNet,
    folder: str | os.PathLike[str],
    *,
    policy: Policy,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    costs: ExitCosts | None = None,
    temperatures: Sequence[float] | None = None,
    check_images: Tensor | None = None,
    check_labels: Tensor | None = None,
    tolerance: float = 1e-4,
    merge: bool = True,
    class_first: bool = True,
    opset: int = 20,
    int8: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes an ONNX graph for each stage and the manifest: what :class:`dynadapter.serve.runtime.Runner` runs.

    Each graph holds its weights. They are run and compared with the network before the folder takes its name.

    Args:
        net: The network, on any device; it is left as it is.
        folder: The folder to make.
        policy: Who leaves where; a :class:`~dynadapter.exits.temperature.Scaled` one brings its temperatures along.
        class_names: One name for each class.
        preprocessing: ``image_size``, ``interpolation``, ``resize`` and ``normalization``: the fields of
            :class:`dynadapter.images.preprocess.Preprocess`, with its defaults for those left out.
        costs: What :func:`dynadapter.cost.exit_costs` counted, to be kept in the manifest.
        temperatures: (exits,), by which logits are divided before the policy sees them.
        check_images: (images, 3, size, size), preprocessed, to compare with the network; by default random ones.
        check_labels: (images,), their classes, for the accuracy of int8.
        tolerance: Largest difference of a logit; relative to the image's largest logit where that is above 1.
        merge: Whether to fold the adapters into the backbone where all of them can be; else they run as they are.
        class_first: Whether to compute the class token's row first where a head reads nothing else. The result is the
            same to rounding, and whoever leaves saves five sixths of a block; that block is then in two files.
        opset: Version of ONNX's operators, at least 18.
        int8: Whether to quantise the blocks' matrix products to 8 bits: weights once, activations batch by batch, so
            that an answer depends a little on the batch it came in. What it changes is measured on ``check_images`` and
            written to the manifest.
        overwrite: Whether an exported folder may be replaced.

    Returns:
        The content of ``manifest.json``; ``check`` says how close the graphs are, ``quantization`` what int8 changed.

    Raises:
        ValueError: If an argument does not fit, the folder exists, a stage is too large for one file, or the graphs do
            not do what the network does. Nothing is left behind.
        ImportError: If onnx, onnxscript or onnxruntime is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {', '.join(missing)}: pip install 'dynadapter[onnx]'")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < 18:
        raise ValueError(f"opset={opset!r} must be a whole number of at least 18")
    if int8 and check_images is None:
        raise ValueError("int8 changes what the network says; give check_images, real ones, to measure by how much")
    manifest = _manifest("onnx", net, policy, temperatures, class_names, preprocessing, costs)
    manifest["versions"] |= {"opset": opset} | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    images, labels = _images(manifest, check_images), _labels(check_labels, check_images)
    reference, network = _standalone(net, images, merge)
    with _new_folder(folder, overwrite) as draft:
        for k, program, stage in _stages(network, images, class_first):
            file = draft / f"stage{k}.onnx"
            _write_onnx(program, file, stage, opset)
            manifest["stages"].append(_identity(file) | stage)
        _write_manifest(draft, manifest)
        runner = runtime.Runner(draft)
        logits = _compare(manifest, reference, images, _on_tensors(runner.every_exit), _exits(runner), tolerance)
        if int8:
            products = sum(_quantise(draft / stage["file"]) for stage in manifest["stages"])
            if not products:
                raise ValueError("int8 finds no matrix product in this network's blocks; leave it out")
            for stage in manifest["stages"]:
                stage |= _identity(draft / stage["file"])
            _write_manifest(draft, manifest)
            changed = _difference(manifest, logits, runtime.Runner(draft), images, labels)
            manifest |= {"precision": "int8", "quantization": {"products": products} | changed}
        _write_manifest(draft, manifest)
    return manifest


def export_programs(
    net: ExitNet,
    folder: str | os.PathLike[str],
    *,
    policy: Policy,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    costs: ExitCosts | None = None,
    temperatures: Sequence[float] | None = None,
    check_images: Tensor | None = None,
    tolerance: float = 1e-4,
    merge: bool = True,
    class_first: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a ``torch.export`` program for each stage and the manifest: what :func:`load_programs` opens.

    Args:
        net: The network, on any device; it is left as it is.
        folder: The folder to make.
        policy: As in :func:`export_onnx`.
        class_names: As in :func:`export_onnx`.
        preprocessing: As in :func:`export_onnx`.
        costs: As in :func:`export_onnx`.
        temperatures: As in :func:`export_onnx`.
        check_images: As in :func:`export_onnx`.
        tolerance: As in :func:`export_onnx`.
        merge: As in :func:`export_onnx`.
        class_first: As in :func:`export_onnx`.
        overwrite: As in :func:`export_onnx`.

    Returns:
        The content of ``manifest.json``.

    Raises:
        ValueError: As in :func:`export_onnx`.
    """
    manifest = _manifest("torch.export", net, policy, temperatures, class_names, preprocessing, costs)
    images = _images(manifest, check_images)
    reference, network = _standalone(net, images, merge)
    with _new_folder(folder, overwrite) as draft:
        for k, program, stage in _stages(network, images, class_first):
            file = draft / f"stage{k}.pt2"
            _write_program(program, file)
            manifest["stages"].append(_identity(file) | stage)
        _write_manifest(draft, manifest)
        programs = load_programs(draft)
        _compare(manifest, reference, images, programs.every_exit, lambda x: programs.route(x).exit_index, tolerance)
        _write_manifest(draft, manifest)
    return manifest


class Programs:
    """The stages of a folder that :func:`export_programs` wrote, routed with torch.

    Attributes:
        manifest: The content of ``manifest.json``.
        class_names: Names of the classes, in the order of their indices.
        preprocess: From a decoded image to a numpy array (3, size, size).
        policy: Who leaves where.
        num_exits: Number of exits, the last included.

    Args:
        folder: The exported folder.
        device: Where the stages run.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        checked = runtime.Manifest(folder, "torch.export")
        self.manifest = checked.content
        self.class_names = checked.class_names
        self.preprocess = checked.preprocess
        self.num_exits = checked.num_exits
        self.policy = _torch_policy(self.manifest)
        self.device = torch.device(device)
        self._image_shape = checked.image_shape
        self._modules = [_open_program(file, self.device) for file in checked.files]

    def stage(self, k: int, held: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """Runs one stage for everybody who is still in.

        Args:
            k: Zero-based stage.
            held: What the stage before gave, each (batch, ...); the images for stage 0.

        Returns:
            What the next stage takes (nothing from the last one), and the logits (batch, classes).
        """
        with torch.no_grad():
            *held, logits = self._modules[k](*held)
        return held, logits

    def route(self, images: Tensor) -> Routed:
        """Lets each image leave at the first exit where the policy is sure; the rest goes on as a smaller batch.

        Args:
            images: (batch, 3, size, size) float32, preprocessed; an empty batch gives an empty result.

        Returns:
            As :meth:`dynadapter.exits.net.ExitNet.early`.

        Raises:
            ValueError: If the images have another shape or type.
        """
        held: Sequence[Tensor] = [self._checked(images)]
        rows = torch.arange(len(images), device=self.device)  # where the images still in stand in the batch
        exits = torch.zeros_like(rows)
        out = torch.zeros(len(images), len(self.class_names), device=self.device)
        history = out.new_empty(0, *out.shape)  # (exits so far, still in, classes)
        for k in range(self.num_exits):
            if not len(rows):
                break
            held, logits = self.stage(k, held)
            out[rows], exits[rows] = logits, k
            if k == self.num_exits - 1:
                break
            history = torch.cat([history, logits[None]])
            stay = (~self.policy.leave(history)).nonzero()[:, 0]
            if len(stay) < len(rows):
                held, rows, history = [x[stay] for x in held], rows[stay], history[:, stay]
        return Routed(out, exits)

    def every_exit(self, images: Tensor) -> Tensor:
        """Runs all stages for all images: (batch, 3, size, size) to logits (exits, batch, classes)."""
        held: Sequence[Tensor] = [self._checked(images)]
        logits = torch.zeros(self.num_exits, len(images), len(self.class_names), device=self.device)
        for k in range(self.num_exits if len(images) else 0):
            held, logits[k] = self.stage(k, held)
        return logits

    def _checked(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self._image_shape or images.dtype != torch.float32:
            wanted = ", ".join(map(str, self._image_shape))
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give torch.float32 (batch, {wanted})")
        return images.to(self.device)


def load_programs(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Programs:
    """Opens a folder that :func:`export_programs` wrote.

    The files are checked against the hashes in the manifest, which finds damage, not malice. Files that hold pickles,
    compiled code, or calls of other functions than torch's operators are refused; what they compute is still theirs to
    say, so open only folders from those you trust.

    Args:
        folder: The exported folder.
        device: Where the stages are to run.

    Raises:
        ValueError: If a file is missing, damaged or another one than was exported, or the manifest cannot be used.
    """
    return Programs(folder, device)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _manifest(
    kind: str,
    net: ExitNet,
    policy: Policy,
    temperatures: Sequence[float] | None,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    costs: ExitCosts | None,
) -> dict[str, Any]:
    """Checks the arguments against the network; gives a manifest without stages."""
    settings, divisors = _plain_policy(policy, net.num_exits, temperatures)
    runtime.Policy(settings, net.num_exits, divisors)
    if len(class_names) != net.num_classes:
        raise ValueError(f"{len(class_names)} class names for {net.num_classes} classes; give one name a class")
    if costs is not None and len(costs.macs) != net.num_exits:
        raise ValueError(f"costs of {len(costs.macs)} exits for {net.num_exits}; count them on the network to export")
    known = [field.name for field in dataclasses.fields(runtime.Preprocess)]
    odd = [repr(name) for name in preprocessing if name not in known]
    if odd:
        raise ValueError(f"preprocessing has {', '.join(odd)}; it takes {', '.join(known)}")
    preprocess = runtime.Preprocess(**preprocessing)
    return {
        "format": runtime.FORMAT,
        "kind": kind,
        "precision": "float32",
        "stages": [],
        "policy": settings,
        "temperatures": divisors,
        "class_names": [str(name) for name in class_names],
        # The numbers rather than their name, for readers that do not know it
        "preprocessing": dataclasses.asdict(preprocess) | {"normalization": [list(s) for s in preprocess.statistics]},
        "costs": None if costs is None else dataclasses.asdict(costs),
        "versions": {"dynadapter": dynadapter.__version__, "torch": version("torch"), "timm": version("timm")},
    }


def _plain_policy(
    policy: Policy, exits: int, temperatures: Sequence[float] | None
) -> tuple[dict[str, Any], list[float] | None]:
    """Writes a policy as plain values: its kind and fields, and the temperatures that it is asked with."""
    if isinstance(policy, Scaled):
        if temperatures is not None:
            raise ValueError("the policy brings temperatures along; leave temperatures out, or give policy.policy")
        own, policy = policy.temperatures, policy.policy
        temperatures = own if isinstance(own, tuple) else (own,) * exits
    kind = type(policy).__name__
    if kind not in runtime.POLICIES or type(policy) is not getattr(policies, kind):
        raise ValueError(f"policy {kind} cannot be exported; choose {', '.join(runtime.POLICIES)}, or one in Scaled")
    divisors = None if temperatures is None else [float(t) for t in temperatures]
    return {"kind": kind, **dataclasses.asdict(policy)}, divisors


def _torch_policy(manifest: Mapping[str, Any]) -> Policy:
    """Makes the policy that a manifest describes."""
    settings = dict(manifest["policy"])
    policy: Policy = getattr(policies, settings.pop("kind"))(**settings)
    divisors = manifest["temperatures"]
    return policy if divisors is None else Scaled(policy, tuple(divisors))


def _images(manifest: Mapping[str, Any], images: Tensor | None) -> Tensor:
    """Gives the images to compare with, in float32 on the CPU: those given, or noise."""
    size = manifest["preprocessing"]["image_size"]
    if images is None:
        return torch.randn(12, 3, size, size, generator=torch.Generator().manual_seed(0))
    if images.shape[1:] != (3, size, size) or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"check_images are {images.dtype} {tuple(images.shape)}; give preprocessed ones, torch.float32 (images, 3, "
            f"{size}, {size}), at least one"
        )
    return images.detach().to("cpu", torch.float32)


def _labels(labels: Tensor | None, images: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    if images is None or labels.shape != images.shape[:1]:
        given = "no images" if images is None else f"{len(images)} images"
        raise ValueError(f"check_labels have shape {tuple(labels.shape)} for {given}; give one class for each image")
    return labels.detach().cpu()


# ---- the stages ------------------------------------------------------------------------------------------------------


class _Stage(nn.Module):
    """What runs from one exit to the next: what the stage before held, to what this one holds, and logits."""

    def __init__(self, net: ExitNet, k: int, class_first: bool) -> None:
        super().__init__()
        self.net = net
        self.k = k
        self.class_first = class_first

    def forward(self, *held: Tensor) -> tuple[Tensor, ...]:
        x = self.net.complete(self.k - 1, held) if self.k else self.net.embed(*held)
        seen, held = self.net.begin(self.k, x, self.class_first)
        logits = self.net.head(self.k, seen)
        return (logits,) if self.k == self.net.num_exits - 1 else (*held, logits)


def _standalone(net: ExitNet, images: Tensor, merge: bool) -> tuple[ExitNet, ExitNet]:
    """Copies the network to the CPU in float32, as it is and as it is to be exported."""
    reference = copy.deepcopy(net).to("cpu", torch.float32).eval()
    try:
        with torch.no_grad():
            reference(images[:1])
    except Exception as error:  # timm asserts its sizes, convolutions raise a RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shape = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"the network does not take images of {shape} ({reason}); see preprocessing") from error
    adapters = adapter_layers(reference.backbone).values()
    if merge and adapters and all(layer.mergeable for layer in adapters):
        return reference, copy.deepcopy(reference).merge()
    return reference, reference


def _stages(
    net: ExitNet, images: Tensor, class_first: bool
) -> Iterator[tuple[int, ExportedProgram, dict[str, list[dict[str, Any]]]]]:
    """Traces the stages one after the other, each with what the manifest says of its inputs and outputs."""
    held = {"images": images.new_zeros(2, *images.shape[1:])}  # a batch of one would be taken for a constant
    for k in range(net.num_exits):
        module, inputs = _Stage(net, k, class_first), tuple(held.values())
        with torch.no_grad():
            *rest, logits = module(*inputs)
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(module, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths on this machine, which concern nobody else
        inner = {f"x{k}" if i == 0 else f"keys_values{k}": x for i, x in enumerate(rest)}
        yield k, program, {"inputs": _described(held), "outputs": _described(inner | {f"logits{k}": logits})}
        held = inner


def _described(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    # None: the batch
    return [{"name": name, "shape": [None, *x.shape[1:]], "type": "float32"} for name, x in tensors.items()]


def _unread(program: ExportedProgram) -> set[str]:
    """Names the tensors that a program holds, being part of the network, but does not read."""
    nodes = {node.name: node for node in program.graph.nodes}
    specs = program.graph_signature.input_specs
    return {spec.target for spec in specs if spec.target is not None and not nodes[spec.arg.name].users}


def _write_onnx(program: ExportedProgram, file: Path, stage: Mapping[str, Any], opset: int) -> None:
    unread, held = _unread(program), {**program.state_dict, **program.constants}
    size = sum(tensor.nbytes for name, tensor in held.items() if name not in unread)
    if size > LARGEST_ONNX:
        raise ValueError(
            f"{file.stem} has {size / 1e9:.1f} GB of weights, one file holds {LARGEST_ONNX / 1e9:.1f}; set more exits "
            "for smaller stages, or use export_programs"
        )
    with _without("onnxscript.optimizer._constant_folding", "Skipping constant folding"):
        graph = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=({0: "batch"}, *({} for _ in stage["inputs"][1:])),  # it is dynamic already; this names it
            input_names=[tensor["name"] for tensor in stage["inputs"]],
            output_names=[tensor["name"] for tensor in stage["outputs"]],
            opset_version=opset,
            verbose=False,
        )
    assert graph is not None  # says the signature of the exporter's older form
    model = graph.model.graph
    parts: list[Any] = [model, *model.all_nodes(), *model.inputs, *model.initializers.values()]
    for part in parts:
        part.metadata_props.clear()  # where in the source each operator came from, a quarter of a small file
    graph.save(file, external_data=False)


@contextlib.contextmanager
def _without(logger: str, start: str) -> Iterator[None]:
    """Drops a logger's messages of one kind: remarks of a library that ask nothing of the user."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logging.getLogger(logger).addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(keep)


def _write_program(program: ExportedProgram, file: Path) -> None:
    """Saves a program without the weights of the other stages, which it holds but does not read."""
    for name in _unread(program):
        held = program.state_dict if name in program.state_dict else program.constants
        empty = held[name].new_empty(0)
        held[name] = nn.Parameter(empty, False) if isinstance(held[name], nn.Parameter) else empty
    program.example_inputs = None
    torch.export.save(program, file)


def _open_program(file: Path, device: torch.device) -> nn.Module:
    try:
        if foreign := _foreign_parts(file):
            raise ValueError(f"it holds {foreign}")
        program = torch.export.load(file)
    except Exception as error:  # another version of torch fails in its own ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"torch {torch.__version__} cannot open {file} ({reason}); export with this version"
        ) from error
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


_CALLED = re.compile(r"__|\.\s*[A-Za-z_]|\b[a-z_]\w*\s*\(")
"""In an expression of sizes: attributes, and calls of what is no class of sympy's, whose parser would run them."""


def _foreign_parts(file: Path) -> str:
    """Finds what no program that was written here holds, and what torch would run when it opens or calls it."""
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename.partition("/")[2]: part for part in archive.infolist()}
        if len(parts) < len(archive.infolist()) or "archive_format" not in parts:
            return "other parts than a program of torch.export"
        for name, part in parts.items():
            if name.startswith("data/aotinductor/"):
                return "compiled code"
            if name.endswith(".pt") and part.file_size:
                return "a pickle"
            if name.endswith(".json") and (called := next(_foreign_calls(json.loads(archive.read(part))), None)):
                return called
    return ""


def _foreign_calls(content: Any) -> Iterator[str]:
    """Yields what the description of a graph or of its tensors would have torch run."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "use_pickle" and value:
                yield "a pickle"
            elif key == "path_name" and not str(value).startswith(("weight_", "tensor_")):
                yield f"an object {value!r}"
            elif key == "target" and not str(value).startswith(("torch.ops.", "torch.sym_", "_operator.")):
                yield f"a call of {value!r}"
            elif key == "expr_str" and _CALLED.search(str(value)):
                yield f"an expression {value!r}"
            yield from _foreign_calls(value)
    elif isinstance(content, list):
        for part in content:
            yield from _foreign_calls(part)


def _quantise(file: Path) -> int:
    """Has a graph's token-wise products with weights run in 8 bits, and counts them; the heads keep their 32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(file)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    if not products:  # an empty list would stand for all
        return 0
    del graph.value_info[:]  # onnxruntime transposes weights of the heads and trips over their old shapes
    add_pre_process_metadata(model)  # torch's exporter has optimised it; without this onnxruntime asks for that
    quantize_dynamic(
        model,
        file,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=products,
        per_channel=True,
        reduce_range=True,  # 7 bits: CPUs without VNNI add up products in 16 bits, which 8 would overflow
        weight_type=QuantType.QInt8,
    )
    return len(products)


# ---- proof -----------------------------------------------------------------------------------------------------------


def _chunks(images: Tensor) -> list[Tensor]:
    """Cuts images into batches of 1, 3 and then 32, so that the graphs are run at several sizes."""
    return [part for part in (images[:1], images[1:4], *images[4:].split(32)) if len(part)]


def _in_chunks(logits: LogitsOf, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits(part).cpu() for part in _chunks(images)], dim=1)


def _on_tensors(call: Callable[[Any], Any]) -> LogitsOf:
    return lambda images: torch.from_numpy(call(images.numpy()))


def _exits(runner: runtime.Runner) -> LogitsOf:
    return _on_tensors(lambda images: runner.route(images)[1])


def _compare(
    manifest: dict[str, Any],
    reference: ExitNet,
    images: Tensor,
    every_exit: LogitsOf,
    exits: Callable[[Tensor], Tensor],
    tolerance: float,
) -> Tensor:
    """Makes sure that the stages do what the network does, and says in the manifest how closely.

    Returns:
        The network's own logits (exits, images, classes).
    """
    expected = _in_chunks(reference, images)
    difference = (_in_chunks(every_exit, images) - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1)
    largest = difference.max().item()
    if not largest <= tolerance:  # NaN is above any tolerance
        exit = int(difference.amax(1).argmax())
        raise ValueError(
            f"the exported graphs' logits differ from the network's by {largest:.1e} at exit {exit + 1}, more than "
            f"tolerance={tolerance:.0e}; nothing was written: allow more, or try another opset or merge=False"
        )
    taken = torch.cat([exits(part).cpu() for part in _chunks(images)])
    others = int((taken != route(_torch_policy(manifest), expected)).sum())
    if others:
        raise ValueError(
            f"{others} of {len(images)} images leave the exported graphs at another exit than the network, though "
            f"logits differ by {largest:.1e} at most: a score lies on its threshold; nothing was written: move the "
            "threshold a little, or give other check_images"
        )
    manifest["check"] = {"images": len(images), "largest_difference": largest, "tolerance": tolerance}
    return expected


def _difference(
    manifest: Mapping[str, Any], before: Tensor, runner: runtime.Runner, images: Tensor, labels: Tensor | None
) -> dict[str, Any]:
    """Says what quantisation changed, from the logits (exits, images, classes) before and from real routing after."""
    every = torch.arange(len(images))
    taken = route(_torch_policy(manifest), before)
    routed = [runner.route(part.numpy()) for part in _chunks(images)]
    logits, exits = (torch.cat([torch.from_numpy(part[i]) for part in routed]) for i in range(2))
    classes = {"float32": before[taken, every].argmax(-1), "int8": logits.argmax(-1)}
    measured = {
        "weights": "7 of 8 bits, per channel",
        "activations": "8 bits, per batch",
        "images": len(images),
        "same_exit": (taken == exits).double().mean().item(),
        "same_class": (classes["float32"] == classes["int8"]).double().mean().item(),
        "mean_logit_difference": (logits - before[exits, every]).abs().mean().item(),
        "exit_shares_float32": _shares(taken, len(before)),
        "exit_shares_int8": _shares(exits, len(before)),
    }
    if labels is not None:
        measured |= {f"accuracy_{name}": (c == labels).double().mean().item() for name, c in classes.items()}
    return measured


def _shares(taken: Tensor, exits: int) -> list[float]:
    return (torch.bincount(taken, minlength=exits).double() / len(taken)).tolist()


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Gives a folder beside the one that is wanted, which takes its name when all went well and is gone otherwise."""
    target = Path(folder).expanduser().absolute()
    if target.exists():
        if not overwrite:
            raise ValueError(f"{folder} exists; name another folder, or set overwrite=True")
        if not (target / "manifest.json").is_file():
            raise ValueError(f"{folder} holds no manifest.json, so it is no exported folder to replace; name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            old = draft.with_suffix(".old")
            target.rename(old)
            draft.rename(target)
            shutil.rmtree(old)
        else:
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _identity(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": runtime.sha256(file)}


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    manifest = {**manifest, "checksum": runtime.checksum(manifest)}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
