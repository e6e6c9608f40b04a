"""``dynadapter calibrate``: from a checkpoint and its validation images to thresholds, what they give, and a bundle."""

import copy
import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

import dynadapter
from dynadapter.adapters import adapter_layers
from dynadapter.calibrate import (
    KINDS,
    Calibrated,
    Curve,
    Outcome,
    Search,
    curve,
    evaluate,
    fit_temperatures,
    losses,
    split_halves,
    to_accuracy_drop,
    to_cost,
    with_guarantee,
)
from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cli.runs import claim_folder
from dynadapter.cli.safety import data_class
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.data import ImageData
from dynadapter.data.dataset import ImageDataset, collate
from dynadapter.exits.policies import Never, Patience, Policy, Thresholded
from dynadapter.exits.temperature import Scaled
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.serve.bundle.config import FILES
from dynadapter.serve.bundle.place import check_place
from dynadapter.serve.bundle.reading import read as read_bundle
from dynadapter.spec import plain
from dynadapter.training.module import ExitClassifier

Kind = Literal["confidence", "entropy", "margin", "patience"]
Split = Literal["val", "test", "train"]

GOALS = ("cost", "accuracy_drop", "risk")
COMPARED = 64
"""Images on which a merged network is compared with the trained one."""

FEW = 20
"""Below so many images in a half, a share of them says next to nothing; the user is told."""

RESULTS = ("calibration.json", "curve.csv", "curve.png")
WORDS = {"val": "validation", "test": "test", "train": "training"}
WHY_NOT = {
    "test": "thresholds that are fitted to the test images leave none to say how good they are",
    "train": "on images that it has learned the network is surer and more often right than on new ones",
}


@dataclass(frozen=True)
class Settings:
    """What the command line says, checked.

    Args:
        goal: One of cost, accuracy_drop and risk.
        amount: The fraction of the full backbone, the percentage points, or the share of images.
        confidence: Of the guarantee, for a risk.
        policy: Kind of policy.
        temperatures: Whether to fit one to each exit.
        search: One threshold for all exits, or one for each.
        seed: Decides the halves.
        data_split: The images.
        ckpt_path: The checkpoint.
        bundle: Where to write the deployable folder, or None.
        out: Where to write the results; None takes a new folder beside the training's.
        merge: Whether to fold the adapters into the backbone of the bundle; what is counted is then the merged network.
        overwrite: Whether a bundle that is there may be replaced.
    """

    goal: str
    amount: float
    confidence: float
    policy: Kind
    temperatures: bool
    search: Search
    seed: int
    data_split: Split
    ckpt_path: str
    bundle: str | None
    out: str | None
    merge: bool = False
    overwrite: bool = False

    @classmethod
    def read(cls, config: Any) -> "Settings":
        """Takes the settings from a configuration.

        Raises:
            Mistake: If there is not exactly one goal, settings do not go together, or a place is taken.
        """
        given = {name: config.goal[name] for name in GOALS if config.goal[name] is not None}
        if len(given) != 1:
            what = (
                f"{' and '.join(f'goal.{name}' for name in given)} are {len(given)} goals"
                if given
                else "there is no goal"
            )
            raise Mistake(
                f"{what}; give one of --goal.cost 0.5 (of the full backbone), --goal.accuracy_drop 0.5 (percentage "
                "points), --goal.risk 0.02 (with --goal.confidence 0.9)"
            )
        [(goal, amount)] = given.items()
        _check_goal(goal, amount, config.goal.confidence)
        if config.search == "refined" and (goal == "risk" or config.policy == "patience"):
            why = "a guarantee tests settings that are fixed beforehand" if goal == "risk" else "patience has none"
            raise Mistake(f"search=refined looks for one threshold per exit, but {why}; give --search shared")
        if not 0 <= config.seed < 2**63:
            raise Mistake(f"seed={config.seed} must be at least 0 and below 2^63")
        if config.data_split != "val" and not config.accept_optimistic_numbers:
            raise Mistake(
                f"data_split={config.data_split} is refused: {WHY_NOT[config.data_split]}; leave it out to calibrate "
                "on the validation images, or give --accept_optimistic_numbers true"
            )
        _check_bundle(config.bundle, config.merge, config.overwrite)
        if config.out is not None:
            _check_out(Path(config.out))
        same = {name: config[name] for name in _SAME}
        return cls(goal=goal, amount=amount, confidence=config.goal.confidence or 0.9, **same)


_SAME = ("policy", "temperatures", "search", "seed", "data_split", "ckpt_path", "bundle", "out", "merge", "overwrite")


def _check_goal(goal: str, amount: float, confidence: float | None) -> None:
    """Refuses numbers that no network could reach, before the images are read."""
    fits = {"cost": 0 < amount < torch.inf, "accuracy_drop": -100 <= amount <= 100, "risk": 0 < amount < 1}[goal]
    if not fits:  # nor does NaN
        range = {
            "cost": "above 0: a fraction of the full backbone's multiply-adds, e.g. 0.5",
            "accuracy_drop": "percentage points between -100 and 100, e.g. 0.5",
            "risk": "between 0 and 1, both excluded, e.g. 0.02",
        }[goal]
        raise Mistake(f"goal.{goal}={amount} must be {range}")
    if confidence is None:
        return
    if goal != "risk":
        raise Mistake(f"goal.confidence belongs to goal.risk, and a goal.{goal} promises nothing; leave it out")
    if not 0 < confidence < 1:
        raise Mistake(f"goal.confidence={confidence} must be between 0 and 1, both excluded, e.g. 0.9")


def _check_bundle(bundle: str | None, merge: bool, overwrite: bool) -> None:
    """Refuses a place that is taken, before the images are read."""
    if bundle is None:
        if merge or overwrite:
            what = "merge" if merge else "overwrite"
            raise Mistake(f"{what} belongs to the bundle, and none is to be written; give --bundle FOLDER")
        return
    place = Path(bundle).expanduser()
    if os.path.lexists(place) and not overwrite:
        raise Mistake(f"bundle={bundle} exists; give a folder that does not, or --overwrite true to replace a bundle")
    try:
        check_place(place, FILES, overwrite)
    except ValueError as error:
        raise Mistake(str(error).replace("overwrite=True", "--overwrite true")) from error


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise Mistake(f"out={out} exists and is no folder; give a folder")
    if there := [name for name in RESULTS if (out / name).exists()]:
        raise Mistake(f"out={out} holds {there[0]} already; give another folder")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Adds what the command takes beside the parts."""
    goal = parser.add_argument_group("goal: what to calibrate for; give one of cost, accuracy_drop and risk")
    helps = {
        "cost": "Greatest average cost, as a fraction of the full backbone's multiply-adds, such as 0.5.",
        "accuracy_drop": "Percentage points that the accuracy may be below the last exit's, such as 0.5.",
        "risk": "Share of all images, such as 0.02, that routing may get wrong and the last exit right, with a "
        "finite-sample guarantee for images to come.",
    }
    for name, help in helps.items():
        goal.add_argument(f"--goal.{name}", type=float | None, help=help)
    words = "Probability that the guarantee of goal.risk holds; 0.9 if not given."
    goal.add_argument("--goal.confidence", "--confidence", type=float | None, help=words)
    parser.add_argument("--policy", type=Kind, default="confidence", help="Kind of policy.")
    parser.add_argument("--temperatures", type=bool, default=True, help="Fit a temperature to each exit first.")
    words = "One threshold for all exits, or one for each, for goal.cost and goal.accuracy_drop."
    parser.add_argument("--search", type=Search, default="shared", help=words)
    words = "Decides which images calibrate and which are held out."
    parser.add_argument("--seed", type=int, default=0, help=words)
    parser.add_argument("--bundle", type=str | None, help="Write the deployable folder here.")
    words = (
        "Fold the adapters into the backbone of the bundle, proved on validation images; needs no backbone file then."
    )
    parser.add_argument("--merge", type=bool, default=False, help=words)
    words = "Whether a bundle that is there may be replaced."
    parser.add_argument("--overwrite", type=bool, default=False, help=words)
    words = "Folder of calibration.json and curve.csv; by default a new one beside that of the training."
    parser.add_argument("--out", type=str | None, help=words)
    words = "Images to calibrate on; others than val only with accept_optimistic_numbers."
    parser.add_argument("--data_split", type=Split, default="val", help=words)
    words = "Calibrate on test or training images all the same."
    parser.add_argument("--accept_optimistic_numbers", type=bool, default=False, help=words)


@dataclass(frozen=True)
class Half:
    """What a policy gives on one half of the images.

    Args:
        outcome: Cost, accuracy and shares.
        last: Accuracy of the last exit.
        lost: Share of the images that routing gets wrong and the last exit right.
    """

    outcome: Outcome
    last: float
    lost: float

    def plain(self) -> dict[str, Any]:
        """Gives all numbers as plain data."""
        return {**plain(self.outcome), "accuracy_last_exit": self.last, "lost": self.lost}


@dataclass(frozen=True)
class Result:
    """All that was found.

    Args:
        found: The policy and how it was found.
        calibration: On the half that it was found on.
        held_out: On the other half.
        curve: On the held-out half.
        notes: What the user should know.
        nonfinite: Images with logits that are not finite at some exit.
        protocol: What was done with which half, in words.
    """

    found: Calibrated
    calibration: Half
    held_out: Half
    curve: Curve
    notes: tuple[str, ...]
    nonfinite: int
    protocol: str


def calibrate(trainer: Trainer, model: ExitClassifier, data: ImageData, settings: Settings) -> Result:
    """Runs the images through the network once, calibrates, prints a table, and writes the files.

    Raises:
        Mistake: If the images are not there or were learned, or the goal cannot be reached.
    """
    if trainer.world_size > 1:
        raise Mistake(f"calibrate runs on one device, not on {trainer.world_size}; give --trainer.devices 1")
    if settings.merge:
        _check_mergeable(model)
    doubt = _check_images(data, settings)
    logits, targets = collect(trainer, model, data, settings)
    counted = copy.deepcopy(model.net).merge(1e-4) if settings.merge else model.net
    costs = exit_costs(counted, data.image_size, class_first=True)
    result = solve(logits, targets, costs, settings, doubt)
    _print(result, model, settings)
    folder = Path(settings.out) if settings.out else claim_folder(Path(trainer.default_root_dir), "calibrate")
    folder.mkdir(parents=True, exist_ok=True)
    _write_curve(folder / "curve.csv", result.curve)
    drawn = _draw_curve(folder / "curve.png", result, model.backbone_name)
    _write_json(folder / "calibration.json", result, costs, model, settings)
    missing = "" if drawn else " (no curve.png: matplotlib is not installed)"
    print(f"calibration.json and the curve are in {folder}{missing}")
    if settings.bundle:
        place = bundle_from_classifier(
            model,
            settings.bundle,
            policy=result.found.policy,
            merge=settings.merge,
            check_images=_some_images(data, settings.data_split) if settings.merge else None,
            costs=costs,
            measured=_measured(result, settings),
            overwrite=settings.overwrite,
        )
        if settings.merge:
            _print_proof(place, settings)
        print(f"the bundle is in {place}")
    return result


def _check_mergeable(model: ExitClassifier) -> None:
    """Refuses to merge what cannot be, before the images are read."""
    stuck = {layer.kind for layer in adapter_layers(model.net.backbone).values() if not layer.mergeable}
    if stuck:
        raise Mistake(f"{', '.join(sorted(stuck))} cannot be folded into the backbone; leave --merge out")


def _some_images(data: ImageData, split: Split) -> Tensor:
    """Gives images to compare the merged network on, spread evenly, (images, 3, size, size)."""
    images = ImageDataset(data.dataset(split).samples, data.preprocess)
    count = min(COMPARED, len(images))
    return collate([images[k * len(images) // count] for k in range(count)])[0]


def _print_proof(bundle: Path, settings: Settings) -> None:
    """Says how close the merged network is to the one that was trained."""
    proof = read_bundle(bundle)[0].proof
    assert proof is not None
    print(
        f"merged: on {proof.images} {WORDS[settings.data_split]} images the logits differ by at most "
        f"{proof.difference:.1e} of the largest ({proof.tolerance:.0e} allowed), exits and classes are the same"
    )


# ---- the images


def _check_images(data: ImageData, settings: Settings) -> tuple[str, ...]:
    """Makes sure that there are images, and that the network was not trained on those to validate on.

    Returns:
        A note where that could not be found out.
    """
    split = settings.data_split
    images = data.dataset(split)
    if not len(images):
        switch = f" with {data.validation_switch}" if data.validation_switch else ""
        raise Mistake(
            f"{type(data).__name__} has no {WORDS[split]} images; calibrate a checkpoint that was trained{switch}, and "
            "use its policy for this network too"
        )
    if split != "val":
        return ()
    try:
        learned = _trained_on(settings.ckpt_path, data)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return (f"whether the network was trained on these images could not be found out: {one_line(error)}",)
    both = sum(source in learned for source, _ in images.samples if isinstance(source, Path))
    if both:
        raise Mistake(
            f"the network was trained on {both} of these {len(images)} validation images; leave out the settings of "
            "data that differ from the training's, or calibrate a checkpoint that was trained without them"
        )
    return ()


def _trained_on(ckpt_path: str, data: ImageData) -> set[Path]:
    """Lists the files that the network was trained on, as far as its checkpoint tells."""
    saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)["dynadapter"]["data"]
    if saved is None:
        return set()
    cls, arguments = data_class(saved["class_path"]), dict(saved["init_args"])
    if cls is None:
        raise ValueError(f"its data were read by {saved['class_path']!r:.200}, which is not known here")
    if isinstance(data, cls) and "root" in arguments:
        arguments["root"] = data.hparams["root"]  # the images may have moved since
    return {source for source, _ in cls(**arguments).samples("train") if isinstance(source, Path)}


class Collector(Callback):
    """Keeps the logits of all exits and the targets of an evaluation.

    Attributes:
        logits: One tensor (exits, batch, classes) a batch.
        targets: One tensor (batch,) a batch.
    """

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Takes what the step returned."""
        self.logits.append(outputs["logits"].float().cpu())
        self.targets.append(outputs["targets"].cpu())

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Takes what the step returned."""
        self.on_validation_batch_end(*args, **kwargs)


def collect(trainer: Trainer, model: ExitClassifier, data: ImageData, settings: Settings) -> tuple[Tensor, Tensor]:
    """Runs the images through the network once.

    Returns:
        Logits (exits, samples, classes) float32 and targets (samples,), on the CPU.
    """
    collector = Collector()
    trainer.callbacks.append(collector)  # type: ignore[attr-defined]
    evaluated = partial(trainer.validate, model, ckpt_path=settings.ckpt_path, verbose=False)
    if settings.data_split == "val":
        evaluated(datamodule=data)
    elif settings.data_split == "test":
        trainer.test(model, datamodule=data, ckpt_path=settings.ckpt_path, verbose=False)
    else:  # the training's own loader shuffles, augments and drops images
        images = ImageDataset(data.dataset("train").samples, data.preprocess)
        evaluated(DataLoader(images, data.batch_size, num_workers=data.num_workers, collate_fn=collate))
    trainer.callbacks.remove(collector)  # type: ignore[attr-defined]
    if sum(map(len, collector.targets)) < 2:
        raise Mistake("one image cannot calibrate and be held out too; raise trainer.limit_val_batches or add images")
    return torch.cat(collector.logits, 1), torch.cat(collector.targets)


# ---- calibration


def solve(logits: Tensor, targets: Tensor, costs: ExitCosts, settings: Settings, notes: tuple[str, ...] = ()) -> Result:
    """Calibrates on one half and measures on both.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: Of the network.
        settings: What the user wants.
        notes: What is known to be doubtful already.

    Raises:
        Mistake: If the goal cannot be reached; the message says what can.
    """
    guaranteed = settings.goal == "risk"
    # Independent samples are what a guarantee wants, and halves with equal classes are not quite that.
    first, second = split_halves(len(targets), settings.seed, None if guaranteed else targets)
    fit = second if guaranteed else first
    temperatures = fit_temperatures(logits[:, fit], targets[fit]) if settings.temperatures else None
    kind = KINDS[settings.policy]
    common: dict[str, Any] = {"kind": kind, "temperatures": temperatures, "full": costs.backbone}
    data = logits[:, first], targets[first], costs.macs
    try:
        if settings.goal == "cost":
            found = to_cost(*data, settings.amount, search=settings.search, **common)
        elif settings.goal == "accuracy_drop":
            found = to_accuracy_drop(*data, settings.amount, search=settings.search, **common)
        else:
            found = with_guarantee(*data, settings.amount, settings.confidence, **common)
    except ValueError as error:
        line = str(error).replace("budget=", "goal.cost=", 1).replace("points=", "goal.accuracy_drop=", 1)
        raise Mistake(line) from error

    nonfinite = int((~logits.isfinite().all(-1)).any(0).sum())
    return Result(
        found=found,
        calibration=_half(found.policy, logits[:, first], targets[first], costs),
        held_out=_half(found.policy, logits[:, second], targets[second], costs),
        curve=curve(logits[:, second], targets[second], costs.macs, **common),
        notes=(*found.notes, *notes, *_doubts(len(second), nonfinite, len(targets), settings)),
        nonfinite=nonfinite,
        protocol=_protocol(settings, len(first), len(second)),
    )


def _half(policy: Policy, logits: Tensor, targets: Tensor, costs: ExitCosts) -> Half:
    return Half(
        outcome=evaluate(policy, logits, targets, costs.macs, full=costs.backbone),
        last=evaluate(Never(), logits, targets, costs.macs, full=costs.backbone).accuracy,
        lost=losses(policy, logits, targets).mean().item(),
    )


def _doubts(half: int, nonfinite: int, samples: int, settings: Settings) -> tuple[str, ...]:
    """Says why the numbers may be worse than they look."""
    notes = []
    if half < FEW:
        notes.append(f"a half of {half} images says little; calibrate on {2 * FEW} images at least, better thousands")
    if nonfinite:
        notes.append(f"{nonfinite} of all {samples} images have logits that are not finite at some exit")
    if settings.policy == "patience" and settings.temperatures:
        notes.append("patience compares classes only, which temperatures do not change")
    if settings.data_split != "val":
        notes.append(f"calibrated on {WORDS[settings.data_split]} images: {WHY_NOT[settings.data_split]}")
    return tuple(notes)


def _protocol(settings: Settings, first: int, second: int) -> str:
    how = "at random" if settings.goal == "risk" else "at random, each class alike"
    words = f"the {WORDS[settings.data_split]} images were halved {how} (seed {settings.seed}): on {first} "
    words += "the policy was certified" if settings.goal == "risk" else "the policy was chosen"
    if settings.temperatures:
        other = settings.goal == "risk"
        words += f"; the temperatures were fitted on the {'other half' if other else 'same half'}"
    return (
        f"{words}; the other {second} are held out. Costs are multiply-adds as routing runs them in batches, relative "
        "to the backbone without early heads"
    )


# ---- what is said of it


def thresholds(policy: Policy, exits: int) -> list[float | None]:
    """Gives what a policy asks for at each exit: a threshold, or how many exits must agree; None at the last one."""
    if isinstance(policy, Scaled):
        policy = policy.policy
    if isinstance(policy, Thresholded):
        return [*(policy.at(k) for k in range(exits - 1)), None]
    if isinstance(policy, Patience):
        return [*[float(policy.patience)] * (exits - 1), None]
    return [None] * exits


def _goal(settings: Settings) -> str:
    if settings.goal == "cost":
        return f"cost at most {settings.amount:g} of the full backbone"
    if settings.goal == "accuracy_drop":
        return f"accuracy at most {settings.amount:g} points below the last exit"
    return f"risk at most {settings.amount:g} against the last exit, with confidence {settings.confidence:g}"


def _print(result: Result, model: ExitClassifier, settings: Settings) -> None:
    halves = result.calibration, result.held_out
    outcomes = [half.outcome for half in halves]
    table = Table(title=f"{model.backbone_name}, {settings.policy}: {_goal(settings)}")
    table.add_column("")
    for name in ("calibration half", "held-out half", "threshold", "temperature"):
        table.add_column(name, justify="right")
    table.add_row("images", *(str(outcome.samples) for outcome in outcomes))
    table.add_row("cost, of the full backbone", *(f"{outcome.cost:.4f}" for outcome in outcomes))
    table.add_row("accuracy", *(f"{outcome.accuracy:.2%}" for outcome in outcomes))
    table.add_row("accuracy of the last exit", *(f"{half.last:.2%}" for half in halves))
    table.add_row("lost against the last exit", *(f"{half.lost:.2%}" for half in halves), end_section=True)
    asked = thresholds(result.found.policy, model.net.num_exits)
    for k, (block, threshold) in enumerate(zip(model.net.exit_depths, asked, strict=True)):
        shares = [f"{outcome.shares[k]:.1%}" for outcome in outcomes]
        shown = "" if threshold is None else f"{threshold:.4g}"
        table.add_row(
            f"leave at exit {k + 1}, after block {block}", *shares, shown, f"{result.found.temperatures[k]:.3f}"
        )
    console = Console()
    console.width = max(console.width, 100)  # a narrow pipe would fold the names
    console.print(table)
    print(f"{result.found.method}; {result.protocol}")
    for note in result.notes:
        print(f"note: {note}")


def _measured(result: Result, settings: Settings) -> dict[str, Any]:
    """What the card of the bundle says."""
    measured = {
        "data": f"held-out half of the {WORDS[settings.data_split]} images",
        **result.held_out.plain(),
        "goal": _goal(settings),
        "protocol": result.protocol,
    }
    return measured | ({"notes": "; ".join(result.notes)} if result.notes else {})


def _write_json(path: Path, result: Result, costs: ExitCosts, model: ExitClassifier, settings: Settings) -> None:
    goal = {settings.goal: settings.amount} | ({"confidence": settings.confidence} if settings.goal == "risk" else {})
    content: Mapping[str, Any] = {
        "goal": goal,
        "policy": result.found.policy,
        "thresholds": thresholds(result.found.policy, model.net.num_exits),
        "temperatures": result.found.temperatures,
        "method": result.found.method,
        "notes": result.notes,
        "calibration_half": result.calibration.plain(),
        "held_out_half": result.held_out.plain(),
        "samples": result.calibration.outcome.samples + result.held_out.outcome.samples,
        "nonfinite": result.nonfinite,
        "kind": settings.policy,
        "search": settings.search,
        "seed": settings.seed,
        "data_split": settings.data_split,
        "protocol": result.protocol,
        "costs": costs,
        "checkpoint": settings.ckpt_path,
        "backbone": model.backbone_name,
        "backbone_hash": model.backbone_hash,
        "dynadapter": dynadapter.__version__,
    }
    path.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_curve(path: Path, found: Curve) -> None:
    """Writes a row for each point: those of the policy, and those where everybody leaves at one exit."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        exits = len(found.anytime)
        writer.writerow(["policy", "threshold", "cost", "accuracy", *(f"share_exit{k + 1}" for k in range(exits))])
        for point in (*found.routed, *found.anytime):
            threshold = "" if point.threshold is None else point.threshold
            writer.writerow([point.label, threshold, point.cost, point.accuracy, *point.shares])


def _draw_curve(path: Path, result: Result, title: str) -> bool:
    """Draws the curve, and says whether that could be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    routed, anytime, reached = result.curve.routed, result.curve.anytime, result.held_out.outcome
    axes.plot([p.cost for p in routed], [100 * p.accuracy for p in routed], label="routed")
    axes.plot([p.cost for p in anytime], [100 * p.accuracy for p in anytime], "o--", label="all at one exit")
    axes.plot([reached.cost], [100 * reached.accuracy], "*", markersize=14, label="calibrated")
    axes.set(xlabel="multiply-adds, of the full backbone", ylabel="accuracy in %, held-out half", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True
