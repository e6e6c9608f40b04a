"""LightningCLI for an :class:`ExitClassifier`: one key for each part, runs that are kept apart, layered settings."""

import contextlib
import logging
import shlex
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import ActionConfigFile
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

import dynadapter
from dynadapter.adapters import adapter_layers
from dynadapter.cli import calibrate
from dynadapter.cli.errors import Mistake, Stopped, Terminated, describe, sigterm
from dynadapter.cli.explain import explain
from dynadapter.cli.layers import (
    LINKED,
    checkpoint_path,
    checkpoint_settings,
    config_files,
    read_config,
    switched_off,
    with_fresh_adapters,
)
from dynadapter.cli.record import SKIPPED, Record, list_skipped
from dynadapter.cli.resume import Earlier, GoOn, earlier, to_resume
from dynadapter.cli.runs import RUN_FOLDERS, SaveConfig, claim_folder, forget, loggers, settle
from dynadapter.cli.safety import check_config
from dynadapter.cli.signals import StopOnSignal
from dynadapter.cli.strategies import require_known, require_own_processes
from dynadapter.cost import cost_table, exit_costs, exit_parameters
from dynadapter.data import ImageData
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights, FlopsReport, PredictionWriter
from dynadapter.training.checkpoints import AtomicCheckpointIO, RunCheckpoint, newest
from dynadapter.training.module import ExitClassifier

CALLBACKS: dict[str, type[Callback]] = {
    "early_exit": EarlyExit,
    "exit_weights": ExitWeights,
    "sparsity": BidirectionalSparsity,
    "flops_report": FlopsReport,
    "predictions": PredictionWriter,
    "checkpoint": RunCheckpoint,
}
SECTIONS: dict[str, type] = {"model": ExitClassifier, "data": ImageData, **CALLBACKS, "trainer": Trainer}
TITLES = {
    "model": "the network and how it is trained",
    "data": "the images",
    "early_exit": "who may leave where, in validation, test and predict",
    "exit_weights": "weights of the exits in the loss, in fit",
    "sparsity": "dropout that falls with depth and masked adapter gradients, in fit",
    "flops_report": "the tables at the end",
    "predictions": "the file that predict writes",
    "checkpoint": "what fit saves (Lightning's ModelCheckpoint)",
    "trainer": "hardware, length and precision (Lightning's Trainer)",
}
DESCRIPTIONS = {
    "fit": "Trains adapters and exits on a task.",
    "validate": "Measures a checkpoint on the validation images.",
    "test": "Measures a checkpoint on the test images; each policy really lets samples leave early.",
    "predict": "Classifies a folder of images and writes a CSV file: file, class, confidence, exit.",
    "flops": "Counts the multiply-adds up to each exit.",
    "calibrate": "Finds thresholds on validation images, says what they give on others, and writes a bundle.",
}


class DynTrainer(Trainer):
    """Lightning's Trainer with two more things to do."""

    def flops(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, merged: bool = False
    ) -> None:
        """Counts the multiply-adds up to each exit and prints the table."""
        assert isinstance(model, ExitClassifier)
        parameters = [f"{n:,}" for n in exit_parameters(model.net)]  # those that were trained, merged or not
        if merged:
            model.merge()
        costs = exit_costs(model.net, getattr(datamodule, "image_size", None))
        table = cost_table(costs, parameters=parameters)
        table.title = f"{model.backbone_name}, one image{', adapters merged' if merged else ''}"
        console = Console()
        console.width = max(console.width, 100)  # a narrow pipe would fold the names
        console.print(table)

    def calibrate(self, model: ExitClassifier, datamodule: ImageData, settings: calibrate.Settings) -> None:
        """Finds thresholds on validation images, prints what they give, and writes them."""
        calibrate.calibrate(self, model, datamodule, settings)


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with a configuration."""

    keys: ClassVar[list[str]] = []

    def __init__(self, **kwargs: Any) -> None:
        # A key cut short would be taken for the long one, and a slip of the pen go unnoticed.
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a :class:`Mistake`."""
        if not self.exit_on_error:  # the parser of a class inside: the one outside knows the key
            super().error(message, ex)
        raise Mistake(explain(message, SECTIONS, self.keys)) from ex


class DynCLI(LightningCLI):
    """Model, data and callbacks from a configuration in layers, and a command to run on them.

    Args:
        args: The command line; the command comes first.
    """

    def __init__(self, args: list[str]) -> None:
        self.args = args
        self.run_folder: Path | None = None
        self.record: Record | None = None
        self.before: Earlier | None = None
        self.log: Path | None = None
        self.stopper = StopOnSignal()
        _quiet_lightning()
        try:
            with sigterm():
                super().__init__(
                    ExitClassifier,
                    ImageData,
                    subclass_mode_data=True,
                    trainer_class=DynTrainer,
                    trainer_defaults={
                        "default_root_dir": "runs",
                        "max_epochs": 100,
                        "log_every_n_steps": 10,
                        "enable_model_summary": False,
                    },
                    save_config_callback=SaveConfig,
                    save_config_kwargs={"save_to_log_dir": False},
                    auto_configure_optimizers=False,
                    args=args,
                )
        except BaseException as error:
            if self.run_folder is not None:
                forget(self.run_folder)
            if isinstance(error, Terminated):
                raise Stopped("stopped by SIGTERM before anything was saved", 143) from error
            raise

    # ---- the parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        command = self.args[0]
        self._subcommand_method_arguments: dict[str, list[str]] = {}
        subparser = self._prepare_subcommand_parser(DynTrainer, command)
        self._subcommand_parsers = {command: subparser}  # the others would only cost time
        parser.add_subcommands().add_subcommand(command, subparser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        usage = f"dynadapter {subcommand} [--config FILE ...] [--KEY VALUE ...]"
        parser = self.init_parser(usage=usage, description=DESCRIPTIONS[subcommand])
        self._add_own_arguments(parser, subcommand)
        self._add_arguments(parser)
        Parser.keys = [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that reads config files."""
        parser = Parser(**kwargs, dump_header=[f"dynadapter {dynadapter.__version__}, lightning {pl.__version__}"])
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="A config file (YAML); several are laid over each other, and the command line over all of them.",
        )
        return parser

    def _add_own_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Adds what a command takes beside the parts: here, because Lightning's wording is that of its methods."""
        own = self._subcommand_method_arguments[command] = ["merged"] if command == "flops" else ["ckpt_path"]
        what = {
            "fit": "Checkpoint from which an interrupted training goes on; give the config.yaml of that run, too, or "
            "--resume instead of both.",
            "flops": "Checkpoint whose model settings are taken; its weights are not needed.",
        }
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help=what.get(command, "Checkpoint that fit wrote; the settings of its model and data come with it."),
        )
        if command == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                help="Folder of an interrupted run: goes on from its newest whole checkpoint, with its settings.",
            )
            parser.add_argument(
                "--seeds",
                type=list[int] | None,
                help="One training for each of these seeds, and a table of mean and deviation: [0, 1, 2].",
            )
            parser.add_argument(
                "--test_after", type=bool, default=False, help="Measure the final weights on the test images, too."
            )
        if command == "flops":
            parser.add_argument("--merged", type=bool, default=False, help="Fold the adapters into the backbone first.")
        if command == "predict":
            parser.add_argument("--images", type=str | None, help="Folder of images; short for data.predict_images.")
            parser.add_argument(
                "--out", "--output", type=str | None, help="The CSV file; short for predictions.output."
            )
        if command == "calibrate":
            own.clear()  # they come as one object
            calibrate.add_arguments(parser)
        if command in ("validate", "test"):
            own.append("verbose")
            parser.add_argument("--verbose", type=bool, default=False, help="Print all logged values as well.")

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=0,
            help="Seed of all that is drawn by chance; true draws the seed itself, false sets none.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the parts in the order of what a user cares for; Lightning's own come last."""
        parser.add_lightning_class_args(ExitClassifier, "model")
        parser.add_lightning_class_args(ImageData, "data", subclass_mode=True)
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.filename": "last"})
        parser.add_lightning_class_args(DynTrainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        help = "Where the images come from; its settings are --data.NAME VALUE, and --data.help CLASS lists them."
        next(action for action in parser._actions if action.dest == "data").help = help
        for key, group in (parser.groups or {}).items():
            group.title = f"{key}: {TITLES[key]}"

    # ---- layers of the configuration

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``defaults < checkpoint < config files < command line``, in whatever order the files stand."""
        command, *others = args
        files, rest = config_files(others)
        if command == "fit":
            files, rest, self.log = _resumed(files, rest)
        contents = {file: read_config(file, SECTIONS) for file in files}
        off, rest = switched_off(rest, CALLBACKS)
        path = checkpoint_path(contents.values(), rest)
        if command == "fit" and path is not None and not files:
            raise Mistake(_how_to_go_on(path))
        with tempfile.TemporaryDirectory() as folder:
            if path is not None:
                below, above = checkpoint_settings(path, command)
                if command == "fit":
                    self.before = earlier(Path(path), self.log)
                files = [_written(below, folder, "below"), *files, _written(above, folder, "above")]
                contents |= {files[0]: below, files[-1]: above}
            args = with_fresh_adapters([*(f"--config={file}" for file in files), *rest], contents)
            self.config = parser.parse_args([command, *args])
        config = self.config[command]
        check_config({key: value for key, value in vars(config).items() if key != "config"})  # the files' own paths
        for key in off:
            config[key] = None
        self.off = {key for key in CALLBACKS if config[key] in (None, False)}

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let a checkpoint's settings beat the command line (Lightning #20801)."""

    def before_instantiate_classes(self) -> None:
        """Hands short options to where they belong, and says what a command cannot do without."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.resume is not None:
            raise Mistake("resume is no key of a config file; give --resume FOLDER on the command line")
        if self.subcommand == "fit" and config.seeds:
            raise Mistake(f"give all seeds at once, as in --seeds {[0, *config.seeds]}")
        if self.subcommand in ("validate", "test", "predict", "calibrate") and config.ckpt_path is None:
            raise Mistake(
                f"{self.subcommand} needs a checkpoint, a network without one is untrained; "
                "give --ckpt_path the file that fit wrote, such as runs/version_0/checkpoints/last.ckpt"
            )
        if self.subcommand == "predict":
            if config.images is not None:
                config.data.init_args.predict_images = config.images
            if config.data.init_args.get("predict_images") is None:
                raise Mistake("predict needs images; give --images a folder")
            if config.out is not None:
                config.predictions.output = config.out
        if self.subcommand == "calibrate":
            self.calibration = calibrate.Settings.read(config)
            if config.trainer.devices == "auto":  # several would each see a part of the images
                config.trainer.devices = 1
        if self.subcommand == "flops":  # no number depends on the weights: do not fetch any
            config.model.pretrained, config.model.weights = False, None

    def instantiate_classes(self) -> None:
        """Builds the parts; what is switched off is built with its defaults, and dropped later."""
        self.whole_config, self.config = self.config, self.config.clone()
        for key in self.off:
            self.config[self.subcommand].pop(key)
        super().instantiate_classes()

    # ---- the run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives a run a folder of its own, with CSV and TensorBoard logs unless the config names loggers."""
        self.config = self.whole_config  # the one to be saved: there, what is off stays off
        config = self._get(self.config_init, "trainer")
        kind = RUN_FOLDERS.get(self.subcommand or "")
        if kind is None or config["fast_dev_run"] or config["barebones"]:
            self.save_config_callback = None
            return super().instantiate_trainer(**kwargs, logger=kind is not None and config["logger"])
        self.run_folder = folder = claim_folder(Path(config["default_root_dir"]), kind)
        if config["logger"] in (None, True):
            kwargs["logger"] = loggers(folder, self.before.lines if self.before is not None else [])
        return super().instantiate_trainer(**kwargs, default_root_dir=str(folder))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        require_known(config["strategy"], config["precision"])
        dropped: set[type] = {CALLBACKS[key] for key in self.off}
        if self.subcommand != "predict":
            dropped.add(PredictionWriter)
        if self.model.hparams.get("adapter") is None:
            dropped.add(BidirectionalSparsity)  # nothing to sparsify
        if self.subcommand == "calibrate":
            dropped |= {EarlyExit, FlopsReport}  # their policies are not the one that is sought
        if self.subcommand != "fit" or config["enable_checkpointing"] is False or config["barebones"]:
            dropped.add(RunCheckpoint)
        if RunCheckpoint in dropped:
            config["enable_checkpointing"] = False  # Lightning would add one of its own
        callbacks = [callback for callback in callbacks if type(callback) not in dropped]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                settle(callback, self.run_folder)
        callbacks.append(self.stopper)
        if self.subcommand == "fit":  # before all others, which may ask how far the training is
            own = config["callbacks"] or []
            config["callbacks"] = [GoOn(self.before), *(own if isinstance(own, list) else [own])]
        if self.run_folder is not None:
            self.record = self._new_record(self.run_folder)
            callbacks.append(self.record)
        trainer = super()._instantiate_trainer(config, callbacks)
        require_own_processes(trainer)
        _write_in_one_step(trainer)
        return trainer

    def _new_record(self, folder: Path) -> Record:
        seed = self._get(self.config, "seed_everything")
        lines = self.before.lines if self.before is not None else []
        return Record(
            folder,
            self.args,
            None if seed is False else seed,
            None if self.before is None else self.before.checkpoint,
            {name: float(value) for line in lines for name, value in line.items()},
        )

    def _run_subcommand(self, subcommand: str) -> None:
        self._introduce()
        try:
            super()._run_subcommand(subcommand)
        except (SystemExit, KeyboardInterrupt, Terminated) as ending:  # Lightning has shut down where it was running
            by_hand = any(isinstance(one, KeyboardInterrupt) for one in (ending, ending.__context__))
            by_hand = by_hand or self.stopper.signal == signal.SIGINT
            if not by_hand and not isinstance(ending, SIGTERMException | Terminated):
                raise
            what = "interrupted" if by_hand else "stopped by SIGTERM"
            self._end("stopped", what)
            if not self.trainer.is_global_zero:
                raise SystemExit(0) from ending  # any other code, and Lightning kills the first process at once
            raise Stopped(f"{what}{self._way_on()}", 130 if by_hand else 143) from ending
        except Exception as error:
            self._end("failed", describe(error)[0])
            raise
        self._end("finished")

    def _end(self, how: str, message: str | None = None) -> None:
        if self.record is not None:
            self.record.end(self.trainer, how, message)

    def before_fit(self) -> None:
        """Looks for the test images now, not after hours of training."""
        if self.config[self.subcommand].test_after:
            self.datamodule.setup("test")

    def after_predict(self) -> None:
        """Lists beside the predictions the images that are not among them."""
        output = self.config[self.subcommand].predictions.output if "predictions" not in self.off else None
        if output is not None and self.trainer.is_global_zero:
            list_skipped(Path(f"{output}.{SKIPPED}"), self.datamodule)

    def after_fit(self) -> None:
        """Saves what was trained once more without the optimiser, and measures it where that is asked for."""
        self._save_weights()
        if self.config[self.subcommand].test_after:
            if self.record is not None:
                self.record.keep(self.trainer)
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)

    def _save_weights(self) -> None:
        """Saves a third of a checkpoint's size: enough for all but going on."""
        checkpoint = self.trainer.checkpoint_callback
        if self.run_folder is not None and isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            path = Path(checkpoint.dirpath) / "weights.ckpt"
            self.trainer.save_checkpoint(path, weights_only=True)
            if self.trainer.is_global_zero:
                print(f"the trained part is in {path} ({path.stat().st_size / 1e6:.2f} MB)")

    def _way_on(self) -> str:
        if self.subcommand != "fit" or self.run_folder is None:
            return ""
        saver = self.trainer.checkpoint_callback
        with contextlib.suppress(ValueError):
            if isinstance(saver, ModelCheckpoint) and saver.dirpath and newest(Path(saver.dirpath)):
                return f"; go on with: {_resume(self.run_folder)}"
        if self.before is not None:
            return f" before anything new was saved; go on with: {_resume(self.run_folder)}"
        return " before anything was saved; start again"

    @rank_zero_only
    def _introduce(self) -> None:
        """Says what runs and where its results go."""
        net = self.model.net
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
        adapters = Counter(layer.kind for layer in adapter_layers(net.backbone).values())
        parts = [*(f"{count} x {kind}" for kind, count in adapters.items()), "the heads"]
        where = " and ".join(parts)
        print(f"{self.model.backbone_name}: {frozen:,} frozen parameters and {trained:,} trained ones in {where}")
        print(f"exits after blocks {', '.join(map(str, net.exit_depths))} of {net.depth}")
        if self.before is not None:
            print(f"going on after step {self.before.step:,}, from {self.before.checkpoint}")
        if self.run_folder is not None:
            how = f"; if it is interrupted: {_resume(self.run_folder)}" if self.subcommand == "fit" else ""
            print(f"results in {self.run_folder}{how}", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "calibrate":
            kwargs["settings"] = self.calibration
        return kwargs | {"return_predictions": False} if subcommand == "predict" else kwargs


class Settings(DynCLI):
    """Reads a command line, and builds and runs nothing.

    Attributes:
        whole: All settings, as a config file would say them.
    """

    def _set_seed(self) -> None:
        """Draws nothing."""

    def instantiate_classes(self) -> None:
        """Keeps the settings."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        self.whole: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False))

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def _written(config: dict[str, Any], folder: str, name: str) -> str:
    path = Path(folder) / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def _how_to_go_on(path: str) -> str:
    run = Path(path).parent.parent
    there = (run / "config.yaml").is_file()
    way = f"--resume {shlex.quote(str(run))} instead" if there else "--config with the config.yaml of that run, too"
    return f"a checkpoint holds the settings of model and data only, and fit needs all of its run; give {way}"


def _resume(run: Path) -> str:
    return shlex.join(["dynadapter", "fit", "--resume", str(run)])


def _resumed(files: list[str], rest: list[str]) -> tuple[list[str], list[str], Path | None]:
    """Puts what ``--resume FOLDER`` stands for below all other settings.

    Returns:
        The config files, the other arguments, and the folder with the log to go on with.
    """
    given = [arg for arg in rest if arg.partition("=")[0] == "--resume"]
    if not given:
        return files, rest, None
    place = rest.index(given[-1])
    folder, left = given[-1].partition("=")[2], rest[:place] + rest[place + 1 :]
    if "=" not in given[-1] and left[place:]:
        folder = left.pop(place)
    if not folder:
        raise Mistake("--resume needs a folder, such as runs/version_0")
    if len(given) > 1 or any(arg.partition("=")[0] == "--ckpt_path" for arg in left):
        raise Mistake("--resume names the run and the checkpoint to go on from; give it once, and no --ckpt_path")
    found = to_resume(folder, nothing_new=not files and not left)
    run = Path(folder)
    root = (run if run.name not in ("", "..") else run.resolve()).parent
    own = [f"--ckpt_path={found.checkpoint}", f"--trainer.default_root_dir={root}"]
    return [str(found.config), *files], [*own, *left], found.log


def _write_in_one_step(trainer: Trainer) -> None:
    """Has checkpoints written by :class:`AtomicCheckpointIO` where the user chose no way of their own."""
    try:
        plain = type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    except NotImplementedError:  # a strategy that shards its checkpoints
        return
    if plain:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _not_an_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _quiet_lightning() -> None:
    """Silences advertisements, of a logger and of a checkpoint store."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_not_an_advertisement)
