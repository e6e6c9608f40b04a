"""The command line: ``dynadapter fit | validate | test | predict | flops``, on LightningCLI."""

import difflib
import inspect
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

import dynadapter
from dynadapter.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights, FlopsReport, PredictionWriter
from dynadapter.cost import cost_table, exit_costs, exit_parameters
from dynadapter.data import ImageData
from dynadapter.module import ExitClassifier
from dynadapter.spec import Spec

LINKED = {"num_classes": "num_classes", "class_names": "class_names", "image_size": "image_size"}
"""What the model takes from the data."""

CALLBACKS: dict[str, type[Callback]] = {
    "exit_weights": ExitWeights,
    "sparsity": BidirectionalSparsity,
    "early_exit": EarlyExit,
    "flops_report": FlopsReport,
    "checkpoint": ModelCheckpoint,
}
SECTIONS: dict[str, type] = {"model": ExitClassifier, "predictions": PredictionWriter, **CALLBACKS}


class DynTrainer(Trainer):
    """Lightning's Trainer with one more thing to do."""

    def flops(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Count the multiply-adds up to each exit and print the table."""
        assert isinstance(model, ExitClassifier)
        costs = exit_costs(model.net, getattr(datamodule, "image_size", None))
        table = cost_table(costs, parameters=[f"{n:,}" for n in exit_parameters(model.net)])
        table.title = f"{model.trunk_name}, one image"
        console = Console()
        console.width = max(console.width, 100)
        console.print(table)


class OneLineParser(LightningArgumentParser):
    """Says what is wrong with a configuration in one line, with the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key cut short would be taken for the long one, and a slip of the pen go unnoticed.
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with exit code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(explain(message, parser))


class DynCLI(LightningCLI):
    """Model and data from a config; a checkpoint's own settings are the lowest layer, the command line the highest."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            ExitClassifier,
            ImageData,
            subclass_mode_data=True,
            trainer_class=DynTrainer,
            trainer_defaults={"default_root_dir": "runs", "max_epochs": 100, "log_every_n_steps": 10},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=OneLineParser,
            parser_kwargs={"version": dynadapter.__version__, "description": dynadapter.__doc__, "prog": "dynadapter"},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Adds ``flops`` to Lightning's own."""
        return {**LightningCLI.subcommands(), "flops": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives each of our callbacks a key of its own, and the model what the data knows."""
        for source, target in LINKED.items():
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.filename": "last", "checkpoint.enable_version_counter": False})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_lightning_class_args(PredictionWriter, "predictions")
            parser.add_argument("--images", type=str | None, help="Folder of images; short for data.predict_images.")
            parser.add_argument("--output", type=str | None, help="The CSV file; short for predictions.output.")
        return parser

    # ---- layers of the configuration

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses ``defaults < checkpoint < config files < command line``."""
        args = list(sys.argv[1:] if args is None else args)  # type: ignore[arg-type]
        saved = checkpoint_config(args)
        if saved is None:
            self.config = parser.parse_args(args)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.yaml"
            path.write_text(yaml.safe_dump(saved), encoding="utf-8")
            self.config = parser.parse_args([args[0], "--config", str(path), *args[1:]])

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let a checkpoint's settings beat the command line (Lightning #20801)."""

    def before_instantiate_classes(self) -> None:
        """Hands the short options of ``predict`` to where they belong."""
        config = self.config[self.subcommand]
        if self.subcommand == "predict":
            if config.images is not None:
                config.data.init_args.predict_images = config.images
            if config.output is not None:
                config.predictions.output = config.output

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs to CSV and TensorBoard in one folder a run, unless the config names loggers."""
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "flops":
            kwargs |= {"logger": False}
        elif config["logger"] in (None, True) and not config["fast_dev_run"]:
            root = config["default_root_dir"]
            run = next_run(Path(root))
            kwargs["logger"] = [CSVLogger(root, name="", version=run), TensorBoardLogger(root, name="", version=run)]
        self.model.data_config = self._data_config()
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if self.model.hparams.get("adapter") is None:
            callbacks = [c for c in callbacks if not isinstance(c, BidirectionalSparsity)]  # nothing to sparsify
        if not config.get("enable_checkpointing", True):
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        if self.subcommand != "fit":
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
            config["enable_checkpointing"] = False
        return super()._instantiate_trainer(config, callbacks)

    def _data_config(self) -> dict[str, Any]:
        self._dump_config()
        return dict(self.config_dump["data"])


def next_run(root: Path) -> str:
    """Names the next free run folder below ``root``: ``version_0``, ``version_1`` ..."""
    taken = [int(p.name[8:]) for p in root.glob("version_*") if p.name[8:].isdigit()]
    return f"version_{max(taken, default=-1) + 1}"


def checkpoint_config(args: list[str]) -> dict[str, Any] | None:
    """Reads the settings of the model and its data from the checkpoint that ``--ckpt_path`` names, if one is named.

    Raises:
        ValueError: If there is no such file, or it is no checkpoint.
    """
    path = None
    for i, arg in enumerate(args):
        if arg == "--ckpt_path" and i + 1 < len(args):
            path = args[i + 1]
        elif arg.startswith("--ckpt_path="):
            path = arg.partition("=")[2]
    if path is None or path in ("best", "last", "hpc", "null", "None"):
        return None
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path!r}; give --ckpt_path the file that fit wrote (.../last.ckpt)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        hparams = dict(checkpoint.get("hyper_parameters", {}))
    except Exception as error:  # whatever the reader trips over, the file is what is wrong
        raise ValueError(f"{path} is no readable checkpoint: {one_line(error)}") from error
    config: dict[str, Any] = {
        "model": {k: plain(v) for k, v in hparams.items() if not k.startswith("_") and k not in LINKED.values()}
    }
    ours = checkpoint.get("dynadapter") or {}
    if args[0] == "predict":
        config["data"] = {
            "class_path": "dynadapter.data.ImagesToPredict",
            "init_args": {**ours.get("preprocessing", {}), "class_names": ours.get("class_names")},
        }
    elif ours.get("data"):
        config["data"] = ours["data"]
    return config


def plain(value: Any) -> Any:
    """Turns a configuration object into what a config file would say."""
    if isinstance(value, Spec) and is_dataclass(value):
        cls = type(value)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {f.name: plain(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


# ---- errors


def one_line(error: BaseException | str) -> str:
    """Gives an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def subclasses(cls: type) -> Iterable[type]:
    """Yields all classes below a class that a config can name."""
    for child in cls.__subclasses__():
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child
        yield from subclasses(child)


def valid_names(parser: LightningArgumentParser) -> Iterable[str]:
    """Yields the names that a config may hold: keys, their parts, and the settings of our classes."""
    for action in parser._actions:
        if action.dest:
            yield action.dest
            yield from action.dest.split(".")
    for cls in (*subclasses(Spec), *subclasses(ImageData)):
        yield from inspect.signature(cls).parameters


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Puts a parser's message in one line and adds the valid name nearest to the one that it complains about."""
    line = one_line(message)
    key = next(iter(re.findall(r'Parser key "([\w.]+)"', line)), None)
    wrong_class = re.search(r"Expected a dot import path string: (\S+)|Import path (\S+) does not correspond", line)
    if key and wrong_class:
        given = wrong_class[1] or wrong_class[2]
        choices = sorted(c.__name__ for base in accepted(key) for c in subclasses(base))
        return f"{key}: there is no class {given!r}{nearest(given, choices)}; choose from {', '.join(choices)}"
    names = set(valid_names(parser))
    for given in re.findall(r"(?:--|['\"`])([\w.]+)", line):
        last = given.rpartition(".")[2]
        if given not in names and last not in names:
            hint = nearest(given, names) or nearest(last, names)
            if hint:
                return line + hint
    return line


def accepted(key: str) -> Iterable[type]:
    """Yields the base classes whose subclasses a key may name."""
    section, _, name = key.partition(".")
    hints = get_type_hints(SECTIONS[section].__init__) if section in SECTIONS else {"": ImageData}
    stack = [hints.get(name, object)]
    while stack:
        hint = stack.pop()
        stack += get_args(hint)
        if isinstance(hint, type) and not get_args(hint) and issubclass(hint, Spec | ImageData):
            yield hint


def nearest(given: str, names: Iterable[str]) -> str:
    """Asks whether the name nearest to a wrong one was meant; empty where none is near."""
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), folded, n=1, cutoff=0.7)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def fail(line: str) -> NoReturn:
    """Prints one line and ends with exit code 2."""
    sys.stderr.write(f"dynadapter: error: {line}\n")
    raise SystemExit(2)


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    A mistake of the user's ends with one line and exit code 2; ``--debug`` shows the traceback.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    # The trunk is in evaluation mode because it is frozen, and small sets load fastest in the main process.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning's own use of torch's trees; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Advertisements of a logger and of a checkpoint store.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
    try:
        DynCLI(args)
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        if debug:
            raise
        fail(f"{one_line(error)} (--debug shows where)")
