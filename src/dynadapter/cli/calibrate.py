"""``dynadapter calibrate``: choose exits on validation images, measure the choice by cross-fitting, write a bundle."""

import contextlib
import copy
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

import dynadapter
from dynadapter.adapters import adapter_layers
from dynadapter.calibrate import AUTO, COMBINES, KINDS, Goal, Solution, curve_rows, solve
from dynadapter.calibrate.goal import Metric
from dynadapter.calibrate.report import draw_curve, measured_data, solution_data, solution_table
from dynadapter.calibrate.stored import RESULT, calibration_path
from dynadapter.cli.calibration_images import (
    WORDS,
    Split,
    check_images,
    load_reference,
    reference_classes,
    some_images,
    stack_logits,
)
from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.policies import policy_from
from dynadapter.cli.runs import create_run_folder
from dynadapter.cli.train_checks import require_outside
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.data import ImageData
from dynadapter.exits.policies import Policy
from dynadapter.files import READ_ONLY, locked, replacing, sha256, write
from dynadapter.printing import print_tables
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.serve.bundle.place import check_place
from dynadapter.serve.bundle.reading import read as read_bundle
from dynadapter.spec import plain
from dynadapter.training.checkpoints import read as read_checkpoint
from dynadapter.training.module import ExitClassifier

Kind = Literal["confidence", "entropy", "margin", "patience"]
Search = Literal["auto", "one_exit", "one_threshold", "thresholds"]
Combine = Literal["auto", "own", "mean", "geometric"]

RESULTS = (RESULT, "curve.csv", "curve.png")
OPTIMISTIC = {
    "test": "thresholds fitted to the test images leave none to measure them on",
    "train": "a network is more confident and more accurate on its training images than on new ones",
}


@dataclass(frozen=True)
class Settings:
    """The checked settings of the command.

    Args:
        goal: What to calibrate for; None with ``policy_from``.
        ckpt_path: The checkpoint.
        policy: What thresholds are compared with; patience is a number of exits that agree.
        temperatures: Fit a temperature to each exit first; by default not for goal.risk, which then certifies on all
            images.
        search: Choose one exit for all images, one threshold for all exits, or thresholds by exit; auto: one exit or
            thresholds by exit, whichever is best. goal.risk has one threshold.
        combine: Exits predict by their own logits, or by the mean or the geometric mean of the exits so far; auto:
            whichever is best.
        seed: Random seed of the folds of the cross-fitting.
        bundle: Write the bundle, the folder to deploy, here.
        merge: Merge the adapters into the backbone of the bundle; it then needs no backbone file.
        overwrite: Replace an existing bundle.
        out: Folder of calibration.json and the curve; by default a new one next to the run.
        data_split: Images to calibrate on; test and train need accept_optimistic_numbers.
        policy_from: Instead of a goal: use the policy of this calibration, calibrated checkpoint or run, or bundle. For
            a network trained on the validation images, give a run with the same settings that was not trained on them.
        accept_optimistic_numbers: Calibrate on test or training images, with too optimistic numbers.
    """

    goal: Goal | None
    ckpt_path: str
    policy: Kind = "confidence"
    temperatures: bool | None = None
    search: Search = "auto"
    combine: Combine = "auto"
    seed: int = 0
    bundle: str | None = None
    merge: bool = False
    overwrite: bool = False
    out: str | None = None
    data_split: Split = "val"
    policy_from: str | None = None
    accept_optimistic_numbers: bool = False

    @classmethod
    def read(cls, config: Any) -> "Settings":
        """Return the settings of a parsed configuration."""
        goal = _goal(config)
        settings = cls(goal, **{field.name: config[field.name] for field in fields(cls) if field.name != "goal"})
        if goal is not None and goal.name == "risk" and settings.search not in ("auto", "one_threshold"):
            raise Mistake(
                f"search={settings.search} does not fit goal.risk: a guarantee tests policies that are fixed "
                "beforehand, here those with one threshold; leave it out"
            )
        if settings.search == "thresholds" and settings.policy == "patience":
            raise Mistake("search=thresholds does not fit policy=patience, which has none; leave one of them out")
        if not 0 <= settings.seed < 2**63:
            raise Mistake(f"seed={settings.seed} must be at least 0 and below 2^63")
        if settings.data_split != "val" and not settings.accept_optimistic_numbers:
            raise Mistake(
                f"data_split={settings.data_split} is refused: {OPTIMISTIC[settings.data_split]}; leave it out to "
                "calibrate on the validation images, or give --accept_optimistic_numbers true"
            )
        _check_bundle(settings)
        if settings.out is not None:
            _check_out(Path(settings.out))
        return settings


def _goal(config: Any) -> Goal | None:
    """Return the goal; None if a policy is given instead."""
    given = {name: config.goal[name] for name in Goal.__dataclass_fields__}
    if config.policy_from is not None:
        if named := [name for name, value in given.items() if value is not None]:
            raise Mistake(f"policy_from takes a policy and goal.{named[0]} searches for one; give only one of them")
        return None
    with mistakes():
        return Goal(**given)


def _check_bundle(settings: Settings) -> None:
    """Raise a :class:`Mistake` if the bundle's folder exists, before the images are read."""
    if settings.bundle is None:
        if settings.merge or settings.overwrite:
            what = "merge" if settings.merge else "overwrite"
            raise Mistake(f"{what} is a setting of the bundle, and no bundle is written; give --bundle FOLDER")
        return
    with mistakes("bundle="):
        check_place(settings.bundle, settings.overwrite)
    if settings.out is not None and Path(settings.out).resolve().is_relative_to(Path(settings.bundle).resolve()):
        raise Mistake(f"out={settings.out} lies in bundle={settings.bundle}, which is written as a whole; give another")


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise Mistake(f"out={out} exists and is not a folder; give a folder")
    if there := [name for name in RESULTS if (out / name).exists()]:
        raise Mistake(f"out={out} holds {there[0]} already; give another folder")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add the settings of the command."""
    goal = parser.add_argument_group("goal: what to calibrate for; give one of cost, accuracy_drop and risk")
    helps = {
        "cost": "Greatest average cost, as a fraction of the static network's, such as 0.5.",
        "accuracy_drop": "Percentage points that the accuracy may be below the last exit's, or the reference's, such "
        "as 0.5.",
        "risk": "Fraction of all images, such as 0.02, where routing may be wrong and the last exit right, with a "
        "finite-sample guarantee for future images.",
    }
    for name, words in helps.items():
        goal.add_argument(f"--goal.{name}", type=float | None, help=words)
    words = "Probability that the guarantee of goal.risk holds; 0.9 if not given."
    goal.add_argument("--goal.confidence", type=float | None, help=words)
    words = "Compare with another network on the same images: its checkpoint or bundle, such as the static network's."
    goal.add_argument("--goal.reference", type=str | None, help=words)
    words = "What counts as accuracy; balanced_accuracy is the mean over classes, and suits classes of unequal size."
    goal.add_argument("--goal.metric", type=Metric | None, help=words)
    parser.add_class_arguments(Settings, as_group=False, skip={"goal", "ckpt_path"}, instantiate=False)


def calibrate(trainer: Trainer, model: ExitClassifier, data: ImageData, settings: Settings) -> Solution | None:
    """Run the images through the network once, solve the goal, print a table, and write the files.

    With ``policy_from`` the network does not run: the policy is checked and written, and there is no solution.
    """
    if trainer.world_size > 1:
        raise Mistake(f"calibrate runs on one device, not on {trainer.world_size}; give --trainer.devices 1")
    if settings.merge:
        _check_mergeable(model)
    for setting, place in (
        ("out", settings.out),
        ("trainer.default_root_dir", None if settings.out else trainer.default_root_dir),
        ("bundle", settings.bundle),
    ):
        if place is not None:
            require_outside(data, Path(place), setting)
    _require_writable(Path(trainer.default_root_dir if settings.out is None else settings.out))
    with _held(settings.out):
        if settings.policy_from is None:
            return _calibrate(trainer, model, data, settings)
        _adopt(trainer, model, data, settings)
    return None


def _require_writable(folder: Path) -> None:
    """Raise a :class:`Mistake` if the results cannot be written, before the images are read."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise Mistake(f"the results cannot be written into {folder}; give another folder by --out FOLDER")


@contextlib.contextmanager
def _held(out: str | None) -> Iterator[None]:
    """Lock the folder of the results against other processes."""
    if out is None:  # a new folder
        yield
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(out)):
        _check_out(Path(out))
        yield


def _calibrate(trainer: Trainer, model: ExitClassifier, data: ImageData, settings: Settings) -> Solution:
    risk = settings.goal is not None and settings.goal.name == "risk"
    split, place = settings.data_split, None if settings.goal is None else settings.goal.reference
    notes = _check_precision(str(trainer.precision), settings)
    notes += check_images(data, split, settings.ckpt_path, risk)
    network, more = load_reference(place, data, split, model.class_names) if place is not None else (None, ())
    logits, targets = stack_logits(trainer, model, data, split, settings.ckpt_path)
    costs, notes = _costs(model, data, settings), (*notes, *more)
    reference = reference_classes(network, data, split, model.class_names, targets) if network is not None else None
    solution = solved(logits, targets, costs, settings, notes, reference)
    _print(solution, model, settings)
    folder = _folder(trainer, settings)
    table = io.StringIO(newline="")
    csv.writer(table).writerows(curve_rows(solution.curve))
    write(folder / "curve.csv", table.getvalue().encode())
    with replacing(folder / "curve.png") as file:
        draw_curve(file, solution, model.backbone_name)
    content: dict[str, Any] = {"kind": settings.policy, "search": settings.search, "combine": settings.combine}
    content |= {"seed": settings.seed, "data_split": split, "costs": plain(costs)}
    _write(folder, solution_data(solution) | content, model, settings)
    if settings.bundle:
        measured = measured_data(solution, split, f"{WORDS[split]} images, cross-fitted")
        _write_bundle(solution.found.policy, measured, costs, model, data, settings)
    return solution


def _adopt(trainer: Trainer, model: ExitClassifier, data: ImageData, settings: Settings) -> None:
    """Write the policy of another calibration for this network."""
    found = policy_from(str(settings.policy_from))
    checkpoint = read_checkpoint(settings.ckpt_path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    with mistakes():
        found.require_twin(model.net.exit_depths, tuple(model.class_names), model.backbone_hash)
    model.eval()
    costs = _costs(model, data, settings)
    print(f"exit policy {found.policy.name} ({found.where}); nothing was measured for this network")
    content = {"policy": plain(found.policy), "policy_from": found.where, "costs": plain(costs)}
    _write(_folder(trainer, settings), content, model, settings)
    if settings.bundle:
        measured = {
            "notes": f"the policy was calibrated for another network ({found.where}); this one was not measured"
        }
        _write_bundle(found.policy, measured, costs, model, data, settings)


def _costs(model: ExitClassifier, data: ImageData, settings: Settings) -> ExitCosts:
    return exit_costs(copy.deepcopy(model.net).merge(1e-4) if settings.merge else model.net, data.image_size)


def _folder(trainer: Trainer, settings: Settings) -> Path:
    """Create the folder of the results."""
    if settings.out is None:
        return create_run_folder(Path(trainer.default_root_dir), "calibrate")
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_precision(precision: str, settings: Settings) -> tuple[str, ...]:
    """Return a note if the images run in another precision than that of `predict`; raise if that cannot be."""
    if precision == "32-true":
        return ()
    given, advice = f"trainer.precision={precision}", "give --trainer.precision 32-true"
    if settings.goal is not None and settings.goal.name == "risk":
        raise Mistake(f"goal.risk is guaranteed for the network of predict, in 32-true, not for {given}; {advice}")
    if settings.merge and precision.endswith("16-true"):
        raise Mistake(f"with {given} adapters cannot be merged; {advice}")
    return (f"measured with {given}; predict, serve and graphs run in 32-true, where some images differ: {advice}",)


def _check_mergeable(model: ExitClassifier) -> None:
    """Raise a :class:`Mistake` if the adapters cannot be merged, before the images are read."""
    fixed = {layer.kind for layer in adapter_layers(model.net.backbone).values() if not layer.mergeable}
    if fixed:
        raise Mistake(f"{', '.join(sorted(fixed))} cannot be merged into the backbone; leave --merge out")


def solved(
    logits: Tensor,
    targets: Tensor,
    costs: ExitCosts,
    settings: Settings,
    notes: tuple[str, ...] = (),
    reference: Tensor | None = None,
) -> Solution:
    """Solve the goal of the settings, and add notes."""
    split, goal = settings.data_split, settings.goal
    assert goal is not None
    with mistakes():
        solution = solve(
            logits,
            targets,
            costs.macs,
            goal,
            kind=KINDS[settings.policy],
            searches=AUTO if settings.search == "auto" else (settings.search,),
            combines=COMBINES if settings.combine == "auto" else (settings.combine,),
            with_temperatures=settings.temperatures,
            seed=settings.seed,
            static=costs.static,
            reference=reference,
            samples=f"{WORDS[split]} images",
        )
    doubt = () if split == "val" else (f"calibrated on {WORDS[split]} images: {OPTIMISTIC[split]}",)
    return replace(solution, notes=(*solution.notes, *notes, *doubt))


def _print(solution: Solution, model: ExitClassifier, settings: Settings) -> None:
    title = f"{model.backbone_name}, {settings.policy}: {solution.goal}"
    print_tables(solution_table(solution, model.net.exit_depths, title))
    print(f"{solution.found.method}; {solution.protocol}")
    for note in solution.notes:
        print(f"note: {note}")


def _write(folder: Path, content: dict[str, Any], model: ExitClassifier, settings: Settings) -> None:
    """Write ``calibration.json``, and a copy next to the checkpoint, where predict and test find it."""
    content |= {
        "checkpoint": settings.ckpt_path,
        "checkpoint_sha256": sha256(Path(settings.ckpt_path)),
        "class_names": list(model.class_names),
        "backbone": model.backbone_name,
        "backbone_hash": model.backbone_hash,
        "dynadapter": dynadapter.__version__,
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    near = calibration_path(Path(settings.ckpt_path))
    for path in (folder / RESULT, near):
        try:
            write(path, text.encode())
        except OSError as error:
            if path != near or error.errno not in READ_ONLY:  # checkpoints may lie where nobody writes
                raise
            print(f"note: {near} cannot be written; give predict and test --policy_from {folder}")
            return
    print(f"{RESULT} is in {folder}, and beside the checkpoint for predict and test: {near}")


def _write_bundle(
    policy: Policy,
    measured: dict[str, Any],
    costs: ExitCosts,
    model: ExitClassifier,
    data: ImageData,
    settings: Settings,
) -> None:
    """Write the bundle, and print how close a merged network is to the trained one."""
    split = settings.data_split if len(data.dataset(settings.data_split)) else "train"  # the latter with policy_from
    with mistakes():
        place = bundle_from_classifier(
            model,
            str(settings.bundle),
            policy=policy,
            preprocessing=data.preprocessing,
            merge=settings.merge,
            check_images=some_images(data, split) if settings.merge else None,
            costs=costs,
            measured=measured,
            overwrite=settings.overwrite,
        )
    if (proof := read_bundle(place)[0].proof) is not None:
        print(
            f"merged: on {proof.images} {WORDS[split]} images the logits differ by at most {proof.difference:.1e} of "
            f"the largest ({proof.tolerance:.0e} allowed), exits and classes are the same"
        )
    print(f"the bundle is in {place}")
