"""Load the network of a command: a bundle, or a checkpoint as a bundle in memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynadapter.cli.errors import Mistake, mistakes, nearest_place
from dynadapter.cli.parser import Options

if TYPE_CHECKING:  # torch takes seconds to load, and invalid input is answered without it
    from torch import Tensor

    from dynadapter.data import ImageData
    from dynadapter.exits.policies import Policy
    from dynadapter.serve.bundle import Bundle


POLICY: Options = {
    "policy": (dict | str | None, None, "Exit policy instead of the stored one, such as Never or Patience."),
    "threshold": (float | list[float] | None, None, "Threshold instead of the policy's own: one, or a list."),
}
"""The options that replace the exit policy of a network."""
WEIGHTS: Options = {
    "weights": (str | None, None, "File of the backbone's weights, where the network needs one."),
    "pretrained": (bool | None, None, "Whether timm may fetch the backbone's weights; default: as in training."),
}
"""The options that name the weights of a backbone."""
DEVICE: Options = {
    "device": (Literal["auto", "cpu", "cuda"], "auto", "Where the network runs; auto takes a GPU if there is one."),
}
BACKEND: Options = {
    "backend": (
        Literal["torch", "onnx", "openvino", "auto"],
        "torch",
        "What computes: torch; onnx or openvino, by exported graphs on a CPU; or auto, the fastest as measured once "
        "here.",
    ),
    **DEVICE,
}
"""The options that name what computes, and where."""
BUNDLE = "a folder that calibrate wrote, or hf-hub:OWNER/NAME on the Hugging Face Hub (@REVISION if not the newest)"
"""What ``--bundle`` may be, for the help of the commands."""


def check_network(bundle: str | None, checkpoint: str | None = None) -> None:
    """Refuse a place without a network, before anything heavy is loaded."""
    if checkpoint is not None and not (path := Path(os.path.expanduser(checkpoint))).is_file():
        saved = next(iter(sorted(path.glob("checkpoints/*.ckpt"))), "last.ckpt")
        what = "is a folder" if path.is_dir() else "does not exist"
        way = nearest_place(checkpoint) or f"; give the file that fit wrote, such as {saved}"
        raise Mistake(f"--ckpt_path {checkpoint} {what}{way}")
    if bundle is not None:
        check_bundle(bundle)


def check_bundle(place: str) -> None:
    """Refuse an exported folder or a checkpoint that is given as a bundle."""
    folder = Path(os.path.expanduser(place))
    if (folder / "config.json").exists() or (not folder.exists() and not nearest_place(place)):
        return  # load reports what is wrong with it
    if not folder.exists():
        raise Mistake(f"there is no bundle {place}{nearest_place(place)}")
    if (folder / "bundle" / "config.json").exists():
        raise Mistake(f"{place} is not the bundle itself; give {folder / 'bundle'}")
    if saved := sorted(folder.glob("checkpoints/*.ckpt")):
        raise Mistake(
            f"{place} is a run, not a bundle; make one with dynadapter calibrate --ckpt_path {saved[0]} "
            "--goal.cost 0.5 --bundle FOLDER"
        )
    if (folder / "manifest.json").is_file():
        raise Mistake(f"{place} is an exported folder, not a bundle; run it with python {place}/predict.py IMAGES")
    if folder.is_file() and folder.suffix == ".ckpt":
        raise Mistake(
            f"{place} is a checkpoint, not a bundle; make one with dynadapter calibrate --ckpt_path {place} "
            "--goal.cost 0.5 --bundle FOLDER, or give predict --ckpt_path"
        )


def load_bundle(place: str, weights: str | None, pretrained: bool | None) -> "Bundle":
    """Load a bundle."""
    from dynadapter.serve.bundle import load

    with mistakes():
        return load(place, _weights(weights), pretrained)


def load_network(given: Any, number: int = 0, batch_size: int = 32) -> "Bundle":
    """Load the network of a command onto its device.

    Args:
        given: Settings ``bundle``, ``ckpt_path``, ``weights``, ``pretrained``, ``policy``, ``threshold``, ``device``,
            ``backend``, and perhaps ``policy_from``.
        number: Index of this process among several; each takes the next GPU.
        batch_size: Images at a time, for which ``backend: auto`` chooses.
    """
    from dynadapter.backbones import frames
    from dynadapter.backbones.layout import lay_out_for_cpu
    from dynadapter.cli.policies import policy_from
    from dynadapter.serve.backends import use_backend

    device = device_of(given.device, number)
    if given.bundle is not None:
        bundle, origin = load_bundle(given.bundle, given.weights, given.pretrained), "the bundle's"
    else:
        bundle, origin = load_checkpoint(given.ckpt_path, given.weights, given.pretrained)
    if bundle.preprocess is None:
        clip = frames(bundle.net.backbone)
        if clip is not None:
            raise Mistake(
                f"{given.bundle or given.ckpt_path} takes clips of {clip} frames, no image files; measure videos by "
                "dynadapter test, or predict in Python"
            )
        raise Mistake(f"{given.bundle} has no preprocessing and takes only tensors, no image files")
    with mistakes(kinds=(ValueError, TypeError)):
        if given.get("policy_from") is not None:
            found = policy_from(given.policy_from)
            found.require_twin(bundle.net.exit_depths, bundle.class_names, bundle.config.backbone.fingerprint)
            bundle.policy, origin = found.policy, found.where
        if given.policy is not None or given.threshold is not None:
            bundle.policy, origin = chosen_policy(bundle.policy, given.policy, given.threshold), "as given"
        bundle.policy.check(bundle.net.num_exits)
    if not number:
        print(f"exit policy {bundle.policy.name} ({origin})", flush=True)
    bundle.to(device)
    lay_out_for_cpu(bundle.net)
    with mistakes(kinds=(ValueError, ImportError)):
        words = use_backend(bundle, given.backend, batch_size)
    if not number and given.backend != "torch":
        print(words, flush=True)
    return bundle


def device_of(wanted: str, number: int = 0) -> str:
    """Return the device for ``--device``; of several processes, each takes the next GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise Mistake("--device cuda, but torch finds no GPU here; give --device cpu, or leave it out")
    return f"cuda:{number % count}" if count and wanted != "cpu" else "cpu"


def load_checkpoint(path: str, weights: str | None, pretrained: bool | None) -> "tuple[Bundle, str]":
    """Load a checkpoint as a bundle in memory, with its calibrated policy or its training's first, and the origin."""
    from dynadapter.serve.bundle import in_memory
    from dynadapter.training.restoring import load_classifier, stored_policies

    place, file = Path(os.path.expanduser(path)), _weights(weights)
    with mistakes(kinds=(ValueError, TypeError, OSError)):
        classifier, stored = load_classifier(place, file, pretrained), stored_policies(place)
        return in_memory(classifier, stored.policies[0]), stored.origin


def chosen_policy(stored: "Policy", policy: dict[str, Any] | str | None, threshold: Any) -> "Policy":
    """Return the stored policy, or one of another kind or threshold with the same temperatures and combination.

    A given policy that has temperatures or a combination of its own is taken as it is.
    """
    from dynadapter.exits.combining import decision, with_decision, with_threshold
    from dynadapter.exits.policies import Policy, Thresholded
    from dynadapter.spec import restore

    value = tuple(threshold) if isinstance(threshold, list) else threshold
    if policy is not None:
        settings = {} if value is None else {"threshold": value}
        spec: dict[str, Any] = policy if isinstance(policy, dict) else {"class_path": policy}
        given = restore({**spec, "init_args": {**spec.get("init_args", {}), **settings}}, Policy, "--policy")
        return with_decision(stored, given) if decision(given) is given else given
    if value is None:
        return stored
    if not isinstance(decision(stored), Thresholded):
        raise ValueError(f"--threshold {threshold}: the policy {stored.name} has none; give --policy Confidence, too")
    return with_threshold(stored, value)


def _weights(given: str | None) -> Path | None:
    if given is None:
        return None
    if not Path(os.path.expanduser(given)).is_file():
        raise Mistake(f"--weights {given} does not exist; give a file of weights")
    return Path(os.path.expanduser(given))


def stacked(bundle: "Bundle", data: "ImageData", split: Any) -> "Iterator[tuple[Tensor, Tensor]]":
    """Yield the logits of all exits (exits, batch, classes) and the targets (batch,), batch by batch, on the CPU."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from dynadapter.backbones import set_image_size

    if bundle.preprocess is None:
        raise Mistake("it takes clips of videos, no image files; measure it by dynadapter test --ckpt_path FILE")
    data.take_preprocessing(vars(bundle.preprocess), trained=True)
    if bundle.graphs is not None and data.image_size != bundle.preprocess.image_size:
        raise Mistake(
            f"--data.image_size {data.image_size}: the exported graphs take images of {bundle.preprocess.image_size} "
            "pixels; give --backend torch, or leave out --data.image_size"
        )
    set_image_size(bundle.net.backbone, data.image_size)
    data.take_classes(bundle.class_names)
    data.setup("test" if split == "test" else "validate")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    like = next(bundle.net.backbone.parameters())
    with torch.inference_mode():
        for batch, targets in track(loader, "images", console=Console(stderr=True), transient=True):
            yield bundle.runs(batch.to(like.device, like.dtype)).float().cpu(), targets.cpu()
