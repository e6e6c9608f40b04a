"""Build model, data and trainer from a configuration in layers, and run one command on them."""

import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynadapter.calibrate.stored import Calibration
from dynadapter.cli import arguments, calibrate, imports
from dynadapter.cli.arguments import CALLBACKS, SECTIONS
from dynadapter.cli.configs import config_files, find_config, read_config, require_no_file
from dynadapter.cli.continuing import Continue
from dynadapter.cli.errors import Mistake, Stopped, Terminated, describe, mistakes, one_line, outage
from dynadapter.cli.help import short_help
from dynadapter.cli.layers import (
    assignments,
    checkpoint_path,
    checkpoint_settings,
    class_of_data,
    expand_home,
    expand_short,
    inline,
    overridden,
    switched_off,
    with_folders,
    with_fresh_classes,
    without_training,
)
from dynadapter.cli.policies import policy_from
from dynadapter.cli.record import Record
from dynadapter.cli.resume import Earlier, Resumed, earlier_run, expand_resume, resume_command
from dynadapter.cli.runs import RUN_FOLDERS, SaveConfig, create_run_folder, loggers, place_checkpoints, remove_if_empty
from dynadapter.cli.safety import check_config, check_run
from dynadapter.cli.signals import StopOnSignal
from dynadapter.cli.strategies import require_known, require_own_folders, require_own_processes
from dynadapter.cli.summary import costs_of, network_lines
from dynadapter.cli.train_checks import require_outside
from dynadapter.data import ImageData
from dynadapter.printing import print_tables
from dynadapter.spec import plain
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, FlopsReport, LearningCheck
from dynadapter.training.checkpoints import RunCheckpoint, newest, read
from dynadapter.training.contents import saved_contents
from dynadapter.training.entries import ADVICE
from dynadapter.training.matching import match
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import StoredPolicies, stored_policies
from dynadapter.training.starting import start_from

LOADED = frozenset(sys.modules)
"""The modules that a resume in another process has loaded, too: no class of the user's but those of ``--import``."""


class DynCLI(LightningCLI):
    """Build model, data and callbacks from a configuration in layers, and run a command on them."""

    model: ExitClassifier
    datamodule: ImageData
    parser: arguments.ConfigParser

    def __init__(self, args: list[str]) -> None:
        self.args = args
        self.command = args[0]
        self.run_folder: Path | None = None
        self.record: Record | None = None
        self.before: Earlier | None = None
        self.stored: StoredPolicies | None = None
        self.adopted: Calibration | None = None
        self.stopper = StopOnSignal()
        try:
            super().__init__(
                ExitClassifier,
                ImageData,
                subclass_mode_data=True,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                auto_configure_optimizers=False,
                args=args[1:],
                run=False,
            )
            self.run()
        except BaseException:
            if self.run_folder is not None and not self._has_saved():  # checkpoints may lie in another folder
                remove_if_empty(self.run_folder)
            raise

    # ---- the parser

    def init_parser(self, **kwargs: Any) -> arguments.ConfigParser:
        """Create the parser of the command."""
        parser = arguments.ConfigParser(self.command, **kwargs)
        arguments.add_command_arguments(parser, self.command)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add nothing: the seed is among the arguments of the command."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections."""
        assert isinstance(parser, arguments.ConfigParser)  # of init_parser
        arguments.add_sections(parser)

    # ---- layers of the configuration

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``defaults < checkpoint < config files < command line``; the position of the files does not matter."""
        if {"-h", "--help"} & {*args}:
            print(short_help(self.command, arguments.DESCRIPTIONS[self.command], parser))
            raise SystemExit(0)
        files, rest = config_files(["--help" if arg == "--help_all" else arg for arg in args])
        rest = expand_short(rest, self.command)
        require_no_file(dict(assignments(rest)), SECTIONS, "")
        fits = self.command == "fit"
        files, rest, log, resumed = expand_resume(files, rest) if fits else Resumed(files, rest)
        files = [str(find_config(file)) for file in files]
        contents: dict[str, Mapping[str, Any]] = {file: read_config(file, SECTIONS) for file in files}
        if not fits:
            files, contents = without_training(files, contents)
        trusted = contents if log is None else {file: contents[file] for file in files[1:]}
        given = overridden(trusted.values(), rest)
        if log is not None and not any(Path(file).samefile(files[0]) for file in trusted):
            check_run(Path(files[0]), contents[files[0]], trusted.values(), given)
        off, rest = switched_off(rest, CALLBACKS)
        path = checkpoint_path(contents.values(), rest)
        layers = [f"--config={file}" for file in files]
        if log is not None:  # above the config of the run, also where a user names it to trust it
            contents |= {inline(resumed): resumed}
            named = [number for number, file in enumerate(files) if Path(file).samefile(files[0])]
            layers.insert(named[-1] + 1, f"--config={inline(resumed)}")
        if path is not None:
            if self.command == "fit" and not files:
                raise Mistake(_needs_config(path))
            assert isinstance(parser, arguments.ConfigParser)  # of init_parser
            below, parser.trained = checkpoint_settings(path, given)
            if self.command in ("validate", "test"):
                self.stored = stored_policies(path)
                below["early_exit"] = {"policies": [plain(policy) for policy in self.stored.policies]}
            if self.command == "fit":
                self.before = earlier_run(Path(path), log, rest)
            contents |= {inline(below): below}
            layers = [f"--config={inline(below)}", *layers]
        if off:
            contents |= {inline(off): off}
            rest.append(f"--config={inline(off)}")
            rest.sort(key=lambda arg: arg.startswith("--print_config"))  # which prints a config that follows it
        defaults = parser.get_defaults().as_dict()
        below_line = [contents[layer.removeprefix("--config=")] for layer in layers]
        sections = [content["data"] for content in below_line if content.get("data")]
        args = [*(class_of_data(rest, sections) if files else []), *layers, *rest]
        self.config = parser.parse_args(with_fresh_classes(args, contents, defaults))
        self.config.pop("config")
        expand_home(self.config)
        check_config(self.config)
        self.off = {key for key in CALLBACKS if self.config[key] in (None, False)}

    def before_instantiate_classes(self) -> None:
        """Move short options to their sections, and require what a command needs."""
        config = self.config
        if self.command == "fit" and config.resume is not None:
            raise Mistake("resume is not a key of a config file; give --resume FOLDER on the command line")
        if self.command in ("validate", "test", "calibrate") and config.ckpt_path is None:
            raise Mistake(
                f"{self.command} needs a checkpoint, because a network without one is untrained; "
                "give --ckpt_path the file that fit wrote, such as runs/version_0/checkpoints/last.ckpt"
            )
        if config.get("policy_from") is not None and self.command != "calibrate":
            if "early_exit" in self.off:
                raise Mistake("policy_from names a policy to measure, and early_exit is off; leave one of them out")
            self.adopted = found = policy_from(config.policy_from)
            self.stored = StoredPolicies((found.policy,), found.where)
            config.early_exit.policies = [plain(found.policy)]
        if self.command == "calibrate":
            self.calibration = calibrate.Settings.read(config)
            if config.trainer.devices == "auto":  # several would each see a part of the images
                config.trainer.devices = 1
        if self.command == "flops":  # no number depends on the weights: do not fetch any
            config.model.pretrained, config.model.weights = False, None

    def instantiate_classes(self) -> None:
        """Build the parts. A part that is switched off is built with its defaults, and the trainer does not use it."""
        whole, self.config = self.config, self.config.clone()
        for key in self.off:
            self.config.pop(key)
        self.config_init = self.parser.instantiate_classes(self.config)
        self.config = whole  # saved with the run: what is switched off stays null
        self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
        if self.parser.trained is not None:
            self.model.preprocessing = self.parser.trained.preprocessing
        match(self.model, self.datamodule, self.command)
        if self.adopted is not None:
            with mistakes():
                saved = saved_contents(read(self.config.ckpt_path))
                depths, names = self.model.net.exit_depths, tuple(saved["class_names"])
                self.adopted.require_twin(depths, names, saved["backbone_hash"])
        self.trainer = self.instantiate_trainer()

    # ---- the trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a new run folder, with ``metrics.csv`` unless the config names loggers."""
        config = self.config_init["trainer"]
        kind = RUN_FOLDERS.get(self.command)
        if kind is None or config["fast_dev_run"] or config["barebones"]:
            self.save_config_callback = None
            named = config["logger"] if kind is not None and config["logger"] is not True else None
            return super().instantiate_trainer(**kwargs, logger=named or False)  # Lightning's default is TensorBoard
        require_outside(self.datamodule, Path(config["default_root_dir"]), "trainer.default_root_dir")
        self.run_folder = create_run_folder(Path(config["default_root_dir"]), kind)
        if config["logger"] in (None, True):
            kwargs["logger"] = loggers(self.run_folder, self.before.lines if self.before is not None else [])
        return super().instantiate_trainer(**kwargs, default_root_dir=str(self.run_folder))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        require_known(config["strategy"], config["precision"])
        dropped = self._unused_callbacks(config)
        if RunCheckpoint in dropped:
            config["enable_checkpointing"] = False  # Lightning would add one of its own
        callbacks = [callback for callback in callbacks if type(callback) not in dropped]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                self.config.checkpoint.dirpath = callback.dirpath  # absolute: a resume may start in another folder
                place_checkpoints(callback, self.run_folder)
        callbacks.append(self.stopper)
        if self.command == "fit":
            self.learning = LearningCheck()
            callbacks.append(self.learning)
            # before all others, which may read the progress
            own = config["callbacks"] or []
            config["callbacks"] = [Continue(self.before), *(own if isinstance(own, list) else [own])]
        if self.run_folder is not None:
            self.record = Record(self.run_folder, self.args, self.config.seed_everything, self.before)
            callbacks.append(self.record)
        trainer = super()._instantiate_trainer(config, callbacks)
        require_own_processes(trainer)
        if self.command == "fit":
            require_own_folders(trainer, self.before)
        return trainer

    def _unused_callbacks(self, config: dict[str, Any]) -> set[type[Callback]]:
        unused = {CALLBACKS[key] for key in self.off}
        if self.model.hparams.get("adapter") is None:
            unused.add(BidirectionalSparsity)  # nothing to sparsify
        if self.command == "calibrate":
            unused |= {EarlyExit, FlopsReport}  # their policies are not the one to be found
        if self.command != "fit" or config["enable_checkpointing"] is False or config["barebones"]:
            unused.add(RunCheckpoint)
        return unused

    # ---- the run

    def run(self) -> None:
        """Run the command, and record how it ended."""
        self._print_summary()
        try:
            self._run_command()
        except (SystemExit, KeyboardInterrupt, Terminated) as ending:  # Lightning has shut down where it was running
            by_hand = any(isinstance(one, KeyboardInterrupt) for one in (ending, ending.__context__))
            by_hand = by_hand or self.stopper.signal == signal.SIGINT
            if not by_hand and not isinstance(ending, SIGTERMException | Terminated):
                raise
            stop = ending if isinstance(ending, Terminated) else Terminated(self.stopper.signal or signal.SIGTERM)
            self._end_stopped(*(("interrupted", 130) if by_hand else (str(stop), stop.code)), ending)
        except Exception as error:
            if self.stopper.signal is not None and outage(error):  # the signal has ended other processes, too
                stop = Terminated(self.stopper.signal)
                self._end_stopped(str(stop), stop.code, error)
            if (outage(error) or isinstance(error, OSError)) and "continue with" in (way := self._how_to_continue()):
                error.add_note(way.lstrip("; "))
            kinds = Mistake | ValueError | OSError
            if not isinstance(error, kinds) and self.trainer._checkpoint_connector._loaded_checkpoint:
                error = Mistake(
                    f"{self.trainer.ckpt_path} cannot be restored ({type(error).__name__}: {one_line(error)}); {ADVICE}"
                )
            self._end_record("failed", describe(error)[0])
            raise error
        self._end_record("finished")

    def _end_stopped(self, what: str, code: int, cause: BaseException) -> NoReturn:
        self._end_record("stopped", what)
        if not self.trainer.is_global_zero:
            raise SystemExit(0) from cause  # with any other code Lightning kills the first process at once
        raise Stopped(f"{what}{self._how_to_continue()}", code) from cause

    def _run_command(self) -> None:
        config, trainer = self.config, self.trainer
        parts: dict[str, Any] = {"model": self.model, "datamodule": self.datamodule}
        if self.command == "fit":
            if config.test_after:  # look for the test images now, not after hours of training
                self.datamodule.setup("test")
                self.datamodule.further_tests()
            if config.init_from is not None and config.ckpt_path is None:  # a resumed training has all of it
                self._start_from(config.init_from)
            path, config.ckpt_path = config.ckpt_path, None  # else the config of the run would name an older checkpoint
            trainer.fit(**parts, ckpt_path=path)
            self.after_fit()
        elif self.command == "flops":
            print_tables(costs_of(self.model, self.datamodule.image_size, config.merged))
        elif self.command == "calibrate":
            calibrate.calibrate(trainer, self.model, self.datamodule, self.calibration)
        else:
            measure = trainer.test if self.command == "test" else trainer.validate
            measure(**parts, ckpt_path=config.ckpt_path, verbose=config.verbose)
            if self.command == "test":
                self._test_further(config.verbose)

    def _start_from(self, path: str) -> None:
        with mistakes():
            line = start_from(self.model, path)
        if self.trainer.is_global_zero:
            print(line)

    def after_fit(self) -> None:
        """Save the trained tensors without the optimiser, a third of the size, and test them on request."""
        checkpoint = self.trainer.checkpoint_callback
        if self.run_folder is not None and isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            path = Path(checkpoint.dirpath) / "weights.ckpt"
            self.trainer.save_checkpoint(path, weights_only=True)
            if self.trainer.is_global_zero:
                print(f"the trained part is in {path} ({path.stat().st_size / 1e6:.2f} MB)")
                print(f"pictures of the run: {shlex.join(['dynadapter', 'report', str(self.run_folder)])}")
        if self.config.test_after:
            if self.record is not None:
                self.record.keep(self.trainer)
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self._test_further()

    def _test_further(self, verbose: bool = False) -> None:
        for data in self.datamodule.further_tests():
            if self.record is not None:
                self.record.keep(self.trainer)
            match(self.model, data, "test")
            self.trainer.test(self.model, datamodule=data, verbose=verbose)

    def _end_record(self, how: str, message: str | None = None) -> None:
        if self.record is not None:
            self.record.end(self.trainer, how, message)

    def _has_saved(self) -> bool:
        if self.run_folder is None or not (self.run_folder / "config.yaml").is_file():  # nothing could continue it
            return False
        saver = self.trainer.checkpoint_callback if hasattr(self, "trainer") else None
        try:
            return isinstance(saver, ModelCheckpoint) and bool(saver.dirpath and newest(Path(saver.dirpath)))
        except ValueError:  # none of them can be read
            return False

    def _how_to_continue(self) -> str:
        if self.command != "fit" or self.run_folder is None:
            return ""
        if self._has_saved():
            return f"; continue with: {self._resume_command()}"
        if self.before is None:
            return " before anything was saved; start again"
        again = shlex.join(["dynadapter", *self.args, *imports.given()])  # the new folder is removed if it is empty
        return f" before anything new was saved; continue with: {again}"

    def _resume_command(self) -> str:
        assert self.run_folder is not None
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return resume_command(self.run_folder, settings, LOADED)

    @rank_zero_only
    def _print_summary(self) -> None:
        print(*network_lines(self.model), sep="\n")
        if self.stored is not None and "early_exit" not in self.off:
            policies = self.config_init["early_exit"].policies
            origin = self.stored.origin if tuple(policies) == self.stored.policies else "as given"
            print(f"exit policies {', '.join(policy.name for policy in policies)} ({origin})")
        if self.before is not None:
            print(f"continuing after step {self.before.step:,}, from {self.before.checkpoint}")
        if self.run_folder is not None:
            how = f"; if it is interrupted: {self._resume_command()}" if self.command == "fit" else ""
            print(f"results in {self.run_folder}{how}", flush=True)


def _needs_config(path: str) -> str:
    run = with_folders(Path(path)).parent.parent
    there = (run / "config.yaml").is_file()
    way = f"--resume {shlex.quote(str(run))} instead" if there else "--config with the config.yaml of that run, too"
    return f"a checkpoint holds the settings of model and data only, and fit needs those of the whole run; give {way}"
