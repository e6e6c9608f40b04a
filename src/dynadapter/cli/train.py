"""``dynadapter train FOLDER``: from images to a bundle and a report, by the commands fit, calibrate and report."""

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from dynadapter.cli import imports
from dynadapter.cli.configs import config_files, read_config, require_no_file
from dynadapter.cli.errors import Mistake, Stopped, nearest, nearest_place
from dynadapter.cli.train_checks import (
    Layers,
    check_goal,
    device_arguments,
    mappings,
    require_checkpoints,
    require_outside,
    require_reachable,
    require_steps,
    require_trained,
    values_of,
)

if TYPE_CHECKING:  # Lightning takes seconds to import
    from dynadapter.data import ImageData

USAGE = """\
usage: dynadapter train FOLDER [--out OUT] [--cost X] [--epochs N] [--lr X] [--batch_size N] [--KEY VALUE ...]

Train on your own images, choose exits on held-out ones, and write the bundle to deploy and a report.

  FOLDER                FOLDER/CLASS/*.jpg, FOLDER/train/CLASS/*.jpg with val and test beside it, or a CSV or Parquet
                        file with the columns path and label. Without val, a fifth of the images is held out.
  --out                 The folder of the results. [runs/NAME, NAME as of FOLDER]
  --cost                Greatest average cost, as a fraction of the static network's; or another goal of dynadapter
                        calibrate, such as --goal.accuracy_drop 1. [0.5]
  --backbone            A timm model or a packaged one. [on a GPU ViT-B/16, else ViT-Ti/16; without access to the
                        hub micro, which comes with the package]
  --epochs              Passes through the training images. [10 to 40: more for fewer images]
  --lr, --batch_size    Learning rate and images in a step. [those of configs/own_images.yaml]
  --KEY VALUE, -c FILE  Any other setting of dynadapter fit, such as -c repadapter or --data.augment none.

The same command continues an interrupted training. dynadapter fit has every setting.
"""
GPU, CPU, OFFLINE = "vit_base_patch16_224.orig_in21k", "vit_tiny_patch16_224.augreg_in21k", "micro"
STEPS, FEWEST, MOST = 600, 10, 40
"""Without ``--epochs``: optimiser steps to aim at, and the least and the greatest number of epochs."""
BACKBONE, LENGTH = "model.backbone", "trainer.max_epochs"
"""The settings that this command chooses if the user does not."""
TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Wanted:
    """The parsed command line.

    Args:
        place: The folder of images, or the table.
        out: The folder of the results.
        goal: Arguments for calibrate.
        settings: Arguments for fit.
        line: The command line.
    """

    place: Path
    out: Path
    goal: tuple[str, ...]
    settings: tuple[str, ...]
    line: str


def run(args: list[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & {*args}:
        print(USAGE, end="")
        return
    wanted = read(args)
    from dynadapter.cli import quiet

    with quiet():
        train(wanted)


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's own options; the other options belong to fit and calibrate."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--out", "--cost", "--backbone"):
        made.add_argument(name)
    return made


def read(args: Sequence[str]) -> Wanted:
    """Read the command line."""
    if not args or args[0].startswith("-"):
        raise Mistake("train needs the images first, as in: dynadapter train FOLDER --epochs 20")
    try:
        given, rest = parser().parse_known_args(args[1:])
    except argparse.ArgumentError as error:
        raise Mistake(f"{error.argument_name} needs a value") from error
    place = Path(os.path.expanduser(args[0]))
    if not place.is_dir() and not (place.is_file() and place.suffix.lower() in TABLES):
        what = "is neither a folder nor a .csv or .parquet file" if place.exists() else "does not exist"
        way = nearest_place(args[0]) or "; give the folder of your images, with a folder for each class"
        raise Mistake(f"{args[0]} {what}{way}")
    goal, settings = ([f"--goal.cost={given.cost}"] if given.cost is not None else []), []
    arguments = iter(rest)
    for name in (arg.partition("=")[0] for arg in config_files(rest)[1]):  # each with its value
        if "." not in name and (hint := nearest(name, ("--out", "--cost", "--backbone"), 0.75)):
            raise Mistake(f"there is no option {name!r}{hint}")
    for arg in arguments:
        if arg.startswith("--goal."):
            goal.append(arg if "=" in arg else f"{arg}={next(arguments, '')}")
        else:
            settings.append(arg)
    if given.backbone is not None:
        settings.append(f"--model.backbone={given.backbone}")
    if all(arg.startswith(("--goal.metric", "--goal.reference")) for arg in goal):
        goal.append("--goal.cost=0.5")
    check_goal(goal)
    name = place.resolve().name if place.is_dir() else place.resolve().stem
    out = Path("runs", name) if given.out is None else Path(os.path.expanduser(given.out))
    line = shlex.join(["dynadapter", "train", *args, *imports.given()])
    return Wanted(place, out, tuple(goal), tuple(settings), line)


def train(wanted: Wanted) -> None:
    """Run fit; calibrate and report in the first process alone; and print the next command."""
    from torch import distributed

    from dynadapter.cli import report
    from dynadapter.cli.app import DynCLI
    from dynadapter.cli.runs import is_first_process
    from dynadapter.training.processes import is_distributed

    bundle = wanted.out / "bundle"
    if bundle.exists() and not _lacks_report(wanted.out):
        raise Mistake(f"{bundle} exists: {_next(bundle, wanted)}; to train again, give another --out")
    run_folder = _trained(wanted, _fit_arguments(wanted))
    if is_distributed():  # the other processes end here, so calibrate must not wait for them
        distributed.destroy_process_group()
    if not is_first_process():
        return
    checkpoint = report.find_run(str(run_folder)).checkpoint
    if checkpoint is None:
        raise Mistake(f"the training in {run_folder} saved no checkpoint; give another --out, and let it save some")
    require_trained(checkpoint)
    where = device_arguments(*_layers(wanted.settings)[1:])
    if not bundle.exists():
        with _naming_what_is_kept(run_folder):
            DynCLI(["calibrate", f"--ckpt_path={checkpoint}", *wanted.goal, f"--bundle={bundle}", *where])
    report.run([str(run_folder), *(["--device=cpu"] if "--trainer.accelerator=cpu" in where else [])])
    print(f"\nthe network is in {bundle}; {_next(bundle, wanted)}")


def _lacks_report(out: Path) -> bool:
    """Check whether the newest run is finished but has no report, because the command was interrupted there."""
    from dynadapter.cli.report import PAGE
    from dynadapter.cli.resume import read_record
    from dynadapter.cli.runs import list_runs

    newest = next(reversed(list_runs(out)), None)
    return (
        newest is not None and read_record(newest).get("how") == "finished" and not (newest / "report" / PAGE).exists()
    )


def _next(bundle: Path, wanted: Wanted) -> str:
    return "classify images with: " + shlex.join(
        ["dynadapter", "predict", "--bundle", str(bundle), "--images", "FOLDER", "--out", "labels.csv"]
    )


@contextmanager
def _naming_what_is_kept(run: Path | None) -> Iterator[None]:
    """Add to an error about the goal that another one needs no new training, if there is a run."""
    try:
        yield
    except Mistake as error:
        if run is None or not str(error).startswith("goal."):
            raise
        raise Mistake(f"{error}; the training in {run} is kept: give the same command with another goal") from error


def _trained(wanted: Wanted, arguments: list[str]) -> Path:
    """Return the folder of the finished training: continue an existing one, or train."""
    from dynadapter.cli.app import DynCLI
    from dynadapter.cli.resume import read_record
    from dynadapter.cli.runs import list_runs

    runs, begun = list_runs(wanted.out), _begun(wanted.out)
    if begun and begun != ["dynadapter", *arguments, *imports.given()]:
        raise Mistake(f"{wanted.out} holds a training with other settings: {shlex.join(begun)}; give another --out")
    finished = {run for run in runs if read_record(run).get("how") == "finished"}
    # A run that saved nothing adds nothing to the run before it.
    useful = [run for run in runs if run in finished or any((run / "checkpoints").glob("*.ckpt"))] if begun else []
    if useful and useful[-1] in finished:
        print(f"the training in {useful[-1]} is finished")
        return useful[-1]

    class Training(DynCLI):
        def run(self) -> None:
            require_reachable(self.model, self.datamodule.image_size, wanted.goal)
            super().run()

    try:
        with _naming_what_is_kept(useful[-1] if useful else None):
            cli = Training(_continuing(useful[-1], arguments) if useful else arguments)
    except Stopped as stop:
        raise Stopped(f"{str(stop).partition(';')[0]}; continue with: {wanted.line}", stop.code) from stop
    assert cli.run_folder is not None
    return cli.run_folder


def _continuing(run: Path, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that continue a run: the user's own, which need no trust, if the run has no others."""
    from dynadapter.cli.resume import read_record, to_resume

    line = shlex.split(str(read_record(run).get("command_line", "")))
    if any(arg.partition("=")[0] == "--resume" for arg in line):  # by hand, perhaps with more epochs
        return ["fit", "--resume", str(run)]
    return [*arguments, f"--ckpt_path={to_resume(str(run), nothing_new=False).checkpoint}", "--init_from=null"]


def _begun(out: Path) -> list[str]:
    """Return the newest command line that began a training in a folder; empty without one."""
    from dynadapter.cli.resume import read_record
    from dynadapter.cli.runs import list_runs

    def continues(line: Sequence[str]) -> bool:
        given = [arg.partition("=") for arg in line]
        return any(
            name == "--resume" or (name == "--ckpt_path" and Path(value).absolute().is_relative_to(out.absolute()))
            for name, _, value in given
        )

    lines = [shlex.split(str(read_record(run).get("command_line", ""))) for run in list_runs(out)]
    return next((line for line in reversed(lines) if line and not continues(line)), [])


def _chosen_before(out: Path) -> dict[str, str]:
    """Return the backbone and the epochs that this command chose for the training in a folder.

    They stand before the images. A repeated command keeps them, although the machine or the images may have changed.
    """
    from dynadapter.cli.layers import assignments

    chosen = takewhile(lambda arg: not arg.startswith("--data"), _begun(out))
    found = {key: value for key, value in assignments(list(chosen)) if key in (BACKBONE, LENGTH)}
    if found:
        print(f"as the training in {out}: " + ", ".join(f"{key}={value}" for key, value in found.items()), flush=True)
    return found


def _fit_arguments(wanted: Wanted) -> list[str]:
    """Return the arguments of fit, including those that depend on the images and the machine."""
    files, layers, rest = _layers(wanted.settings)
    require_checkpoints(layers, rest)
    require_steps(layers, rest)
    names_backbone = _names_backbone(layers, rest)
    place = ["--data=ImageTable", f"--data.file={wanted.place}"] if wanted.place.is_file() else []
    place = place or [f"--data.root={wanted.place}"]
    data = _data([file for file, one in zip(files, layers, strict=False) if one.get("data")], [*place, *rest])
    require_outside(data, wanted.out, "--out")
    train, held_out = len(data.used("train")), len(data.samples("val"))
    if held_out < 2:
        raise Mistake(
            f"{wanted.place} has {held_out} images to choose exits on; {data.validation_switch}, or add images"
        )
    before = _chosen_before(wanted.out)
    chosen = [] if names_backbone else [f"--model.backbone={before.get(BACKBONE) or choose_backbone()}"]
    if length := _length(train, data, layers, rest):
        chosen.append(f"--{LENGTH}={before.get(LENGTH) or length}")
    by_class = Counter(label for _, label in data.samples("val"))
    each = [by_class[label] for label in range(data.num_classes)]
    print(
        f"{train:,} images of {data.num_classes} classes to train on, {held_out:,} held out "
        f"({min(each)} to {max(each)} of a class)",
        flush=True,
    )
    root = f"--trainer.default_root_dir={wanted.out}"
    configs = [f"--config={file}" for file in ("own_images", *files)]
    return ["fit", *configs, *chosen, *place, root, *_devices(layers, rest), *rest]


def _layers(settings: Sequence[str]) -> tuple[list[str], Layers, list[str]]:
    """Return the config files of the user, what they and the sections of the command line hold, and its arguments."""
    from dynadapter.cli.arguments import SECTIONS

    files, rest = config_files(settings)
    return files, [*(read_config(file, SECTIONS) for file in files), mappings(rest)], rest


def _names_backbone(contents: Layers, line: Sequence[str]) -> bool:
    """Check whether the user names the backbone; refuse weights without one, which would fit no chosen backbone."""
    from dynadapter.cli.layers import OFF, assignments

    models = [one["model"] for one in contents if isinstance(one.get("model"), dict)]
    given = {key: value for one in models for key, value in one.items()}
    given |= {key.removeprefix("model."): value for key, value in assignments(line) if key.startswith("model.")}
    if "backbone" not in given and given.get("weights") not in (None, *OFF):
        raise Mistake("model.weights needs the backbone of the file; give --backbone NAME --model.weights FILE")
    return "backbone" in given


def _data(files: Sequence[str], line: Sequence[str]) -> "ImageData":
    """Return the images as fit will read them, to count them before it begins.

    Args:
        files: Config files with a data section.
        line: The other arguments, of which those of the data count.
    """
    from dynadapter.cli.layers import assignments, expand_short
    from dynadapter.cli.parser import CommandParser
    from dynadapter.cli.safety import check_config
    from dynadapter.cli.verify import data_sections
    from dynadapter.data import ImageData

    own = [arg for arg in expand_short(line, "fit") if arg.startswith(("--data=", "--data."))]
    require_no_file(dict(assignments(own)), ("data",), "")
    made = CommandParser("train", sections={"data": ImageData})
    made.add_subclass_arguments(ImageData, "data", required=True)
    given = made.parse_args([*data_sections(("own_images", *files), ()), *own])
    check_config(given)
    return made.instantiate(given).data


def _length(images: int, data: "ImageData", layers: Layers, line: Sequence[str]) -> int | None:
    """Return the number of epochs: None if it is given, -1 for no limit if steps are given."""
    if values_of(LENGTH, layers, line):
        return None
    if values_of("trainer.max_steps", layers, line)[-1:] not in ([], ["-1"]):
        return -1  # the epochs of own_images would end it first
    return epochs(images, _images_of_a_step(data, layers, line))


def _images_of_a_step(data: "ImageData", layers: Layers, line: Sequence[str]) -> int:
    """Return the training images of an optimiser step, over all devices and accumulated batches."""
    if data.global_batch_size is not None:
        return data.global_batch_size
    images = data.batch_size
    for name in ("accumulate_grad_batches", "devices"):
        values = values_of(f"trainer.{name}", layers, line)
        if values and values[-1].isdecimal():  # fit explains other values
            images *= max(1, int(values[-1]))
    return images


def _devices(layers: Layers, line: Sequence[str]) -> list[str]:
    """Return the argument for one device, unless devices are given; otherwise further processes would train."""
    return [] if values_of("trainer.devices", layers, line) else ["--trainer.devices=1"]


def epochs(images: int, batch_size: int = 32) -> int:
    """Return the number of epochs for a number of training images; an epoch leaves out an incomplete last batch.

    >>> epochs(80), epochs(1000), epochs(10_000), epochs(80, batch_size=4)
    (40, 19, 10, 30)
    """
    return min(max(round(STEPS / max(1, images // batch_size)), FEWEST), MOST)


def choose_backbone() -> str:
    """Return the backbone for this machine; print a message if only the packaged one is possible."""
    import torch

    from dynadapter.backbones.availability import is_available

    name = GPU if torch.cuda.is_available() else CPU
    if is_available(name):
        return name
    print(
        f"the hub does not answer, and {name} is not in its cache: training {OFFLINE}, a small research backbone of "
        "the package; better ones are --backbone NAME with network access, or --backbone NAME --model.weights FILE",
        flush=True,
    )
    return OFFLINE
