"""The arguments of the commands that take a whole configuration: model, data, callbacks by name, trainer."""

import argparse
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import dynadapter
from dynadapter.cli import calibrate
from dynadapter.cli.errors import Mistake
from dynadapter.cli.explain import explain
from dynadapter.cli.help import SHORT, TITLES
from dynadapter.cli.layers import LINKED, Trained
from dynadapter.data import ImageData
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights, FlopsReport
from dynadapter.training.checkpoints import RunCheckpoint
from dynadapter.training.module import ExitClassifier

CALLBACKS: dict[str, type[Callback]] = {
    "early_exit": EarlyExit,
    "exit_weights": ExitWeights,
    "sparsity": BidirectionalSparsity,
    "flops_report": FlopsReport,
    "checkpoint": RunCheckpoint,
}
"""Keys of a config that hold a callback's arguments; null switches one off."""
SECTIONS: dict[str, type] = {"model": ExitClassifier, "data": ImageData, **CALLBACKS, "trainer": Trainer}
DESCRIPTIONS = {
    "fit": "Train adapters and exits on a task.",
    "validate": "Measure a checkpoint on the validation images.",
    "test": "Measure a checkpoint on the test images, with every exit policy.",
    "flops": "Count the GMACs up to each exit.",
    "calibrate": "Find thresholds on validation images, measure them by cross-fitting, and write a bundle.",
}


class ConfigParser(LightningArgumentParser):
    """A parser of a whole configuration that explains a mistake in one line."""

    def __init__(self, command: str = "", **kwargs: Any) -> None:
        if command:
            kwargs |= {
                "usage": f"dynadapter {command} [--config FILE ...] [--KEY VALUE ...]",
                "description": DESCRIPTIONS[command],
                "dump_header": [f"dynadapter {dynadapter.__version__}, lightning {pl.__version__}"],
            }
        # An abbreviated key would be read as the long one, and a typing error would pass unnoticed.
        super().__init__(**kwargs, allow_abbrev=False)
        self.command = command
        self.trained: Trained | None = None  # of the checkpoint, if there is one

    def linked(self, name: str, data: ImageData) -> Any:
        """Return an argument of the model that comes from the data, after setting the classes of the checkpoint."""
        if self.trained is not None:
            data.take_classes(self.trained.class_names)
        if name != "image_size":
            return getattr(data, name)
        if self.trained is not None:
            return self.trained.image_size
        return None if data.wanted.image_size == "auto" else data.image_size

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; a section cannot be read from a separate file, which would not be checked."""
        return super().add_class_arguments(*args, **(kwargs | {"sub_configs": False}))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a :class:`Mistake`."""
        if not self.command:  # the parser of a class inside: the parser outside knows the key
            super().error(message, ex)
        keys = [action.dest for action in self._actions if action.dest not in ("help", argparse.SUPPRESS)]
        keys += [name for name, (_, commands) in SHORT.items() if self.command in commands]
        raise Mistake(explain(message, SECTIONS, keys)) from ex


def full_parser(command: str) -> ConfigParser:
    """Return the parser of a command with all its arguments, for uses without a command line."""
    parser = ConfigParser(command)
    add_command_arguments(parser, command)
    add_sections(parser)
    return parser


def add_command_arguments(parser: LightningArgumentParser, command: str) -> None:
    """Add the config files and the arguments of one command that are outside the sections."""
    what = "A config file, or the name of a packaged one; later files override earlier ones."
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=what)
    printing = next(action for action in parser._actions if "--print_config" in action.option_strings)
    printing.help = "Print the configuration that results, and exit."
    what = {
        "fit": "Checkpoint from which a training continues, with --config of that run; --resume is short for both.",
        "flops": "Checkpoint that gives the model's settings; its weights are not needed.",
    }.get(command, "Checkpoint that fit wrote; the settings of its model and data come with it.")
    parser.add_argument("--ckpt_path", type=str | None, help=what)
    if command == "fit":
        what = "Folder of an interrupted run: continue from its newest intact checkpoint, with its settings."
        parser.add_argument("--resume", type=str | None, help=what)
        what = "Checkpoint of another training to start from: its adapters, and its heads if it had the same classes."
        parser.add_argument("--init_from", type=str | None, help=what)
        what = "Also measure the final weights on the test images."
        parser.add_argument("--test_after", type=bool, default=False, help=what)
    elif command == "flops":
        parser.add_argument("--merged", type=bool, default=False, help="Merge the adapters into the backbone first.")
    elif command == "calibrate":
        calibrate.add_arguments(parser)
    else:
        what = "Use the policy of this calibration, calibrated checkpoint or run, or bundle."
        parser.add_argument("--policy_from", type=str | None, help=what)
        parser.add_argument("--verbose", type=bool, default=False, help="Print all logged values as well.")
    what = "Random seed; true takes that of the variable PL_GLOBAL_SEED, or else 0; false sets none."
    parser.add_argument("--seed_everything", type=bool | int, default=0, help=what)


def add_sections(parser: ConfigParser) -> None:
    """Add the sections in the order of their importance to a user."""
    parser.add_lightning_class_args(ExitClassifier, "model")
    parser.add_lightning_class_args(ImageData, "data", subclass_mode=True)
    for name in LINKED:
        parser.link_arguments("data", f"model.{name}", compute_fn=partial(parser.linked, name), apply_on="instantiate")
    for key, callback in CALLBACKS.items():
        parser.add_lightning_class_args(callback, key)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults(
        {
            "checkpoint.filename": "last",
            "trainer.default_root_dir": "runs",
            "trainer.max_epochs": 100,
            "trainer.log_every_n_steps": 10,
            "trainer.enable_model_summary": False,
        }
    )
    what = "The class of the images; its settings are --data.NAME VALUE, and --data.help CLASS lists them."
    next(action for action in parser._actions if action.dest == "data").help = what
    for key, group in (parser.groups or {}).items():
        group.title = f"{key}: {TITLES[key]}"
