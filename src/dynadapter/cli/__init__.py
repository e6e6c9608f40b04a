"""The command line: ``dynadapter COMMAND``."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import dynadapter

USAGE = """\
usage: dynadapter COMMAND [--config FILE ...] [--KEY VALUE ...]

Early exits and small adapters on a frozen timm backbone.

commands:
  train       from a folder of your images to a bundle and a report, in one command
  fit         train adapters and exits on a task
  validate    measure a checkpoint on the validation images
  test        measure a checkpoint on the test images
  predict     classify a folder of images, by a checkpoint or a bundle
  flops       count the GMACs up to each exit
  report      draw a run as one HTML page: accuracy over cost, exits, confusion, images; or compare runs
  calibrate   find thresholds for a cost, an accuracy or a guarantee, and write the bundle: the folder to deploy
  sweep       train tasks, adapters, recipes, scales and seeds from one YAML file to one table
  export      write ONNX graphs of a bundle, one per stage, or its adapters for peft
  bench       time a bundle against its static backbone and other ways to serve it
  serve       classify images over HTTP with one or several bundles
  push        upload a bundle to the Hugging Face Hub
  verify      check a data set before a training
  backbones   count the architectures and weights of timm that work as a backbone, or list their names
  configs     list the configs that come with the package, or print one

options:
  COMMAND --help            the keys of a command; of fit, validate, test, flops and calibrate the most important
                            ones, and --help_all shows every key
  COMMAND --print_config    the configuration that results from a command line
  --debug                   show where an error comes from
  --version                 print the version
  --import MODULE           import a module of yours first, whose classes configs, checkpoints and bundles may name
  --print_shtab=bash        print a script that completes commands and keys in the shell (bash or zsh)

examples:
  dynadapter train FOLDER
  dynadapter fit --config quickstart
  dynadapter fit --resume runs/quickstart/version_0
  dynadapter sweep SWEEP.yaml --dry_run
  dynadapter fit --config vtab --config repadapter --data.root DATA --data.task cifar
  dynadapter test --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
  dynadapter report runs/quickstart/version_0
  dynadapter predict --ckpt_path .../last.ckpt --images FOLDER --out out.csv
  dynadapter calibrate --ckpt_path .../last.ckpt --goal.cost 0.5 --bundle FOLDER
  dynadapter predict --bundle FOLDER --images FOLDER --out out.csv
  dynadapter test --bundle FOLDER --data VTAB1k --data.root FOLDER --data.task cifar
  dynadapter export --bundle FOLDER --out FOLDER
  dynadapter serve --bundle FOLDER
  dynadapter push OWNER/NAME --bundle FOLDER
  dynadapter fit --model.adapter.help LoRA

Settings come in layers. A later layer overrides an earlier one: defaults, checkpoint, config files in their order,
command line.
"""
TRAINER = ("fit", "validate", "test", "flops", "calibrate")
"""Commands with a full configuration: model, data, trainer."""
OWN = ("train", "predict", "report", "sweep", "export", "bench", "serve", "push", "verify", "backbones", "configs")
"""Commands with few settings; each is a module here with a ``run(args)``."""
COMMANDS = (*TRAINER, *OWN)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Errors are printed in one line. The exit code is 2 for invalid input and for a machine that fails; 1 for what looks
    like a bug, for errors that ``verify`` finds in data, and for failed runs of a sweep or workers of Ray; 130 after
    Ctrl-C, 143 after SIGTERM, 129 after SIGHUP and 138 after SIGUSR1; 141 if what reads the output ends, as in
    ``| head``. ``--debug`` shows the traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if args[0] == "--version":
        print(f"dynadapter {dynadapter.__version__}")
        return
    from dynadapter.cli.errors import Stopped, Terminated, describe, stoppable

    try:
        with stoppable():
            try:
                _run(args)
                sys.stdout.flush()
            except SystemExit:  # such as after --print_config
                sys.stdout.flush()
                raise
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Terminated as stopped:
        end(str(stopped), stopped.code)
    except Stopped as stopped:
        end(str(stopped), stopped.code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            if notes := getattr(error, "__notes__", ()):
                end(f"what reads the output has ended; {'; '.join(notes)}", 141)
            raise SystemExit(141) from None
        if debug:
            raise
        end(*describe(error))


def _is_output_closed() -> bool:
    """Check whether what reads standard output has ended; then the rest is dropped, which fails again at the exit."""
    try:
        print(flush=True)  # an empty line shows it, also where output is not buffered
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run(args: list[str]) -> None:
    from dynadapter.cli.configs import config_files, find_config
    from dynadapter.cli.errors import Mistake, nearest
    from dynadapter.cli.imports import import_own, take_imports

    args = take_imports(args)
    if any(arg.partition("=")[0] == "--print_shtab" for arg in args):
        import_module("dynadapter.cli.completion").run(args)
        return
    command = args[0] if args else ""
    if command not in COMMANDS:
        what = "the command comes first" if command.startswith("-") else f"there is no command {command!r}"
        hint = nearest(command, COMMANDS, cutoff=0.5)
        raise Mistake(f"{what}{hint + ' There' if hint else '; there'} are {', '.join(COMMANDS)}")
    import_own()
    for file in config_files(args[1:])[0]:  # torch and Lightning take seconds to load: look for the files first
        find_config(file)
    if command == "test" and any(arg.partition("=")[0] == "--bundle" for arg in args):
        import_module("dynadapter.cli.test_bundle").run(args[1:])
    elif command in OWN:
        import_module(f"dynadapter.cli.{command}").run(args[1:])
    else:
        with quiet():
            import_module("dynadapter.cli.app").DynCLI(args)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advertisements, and warnings on which a user cannot act."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    with warnings.catch_warnings():
        # The backbone is in evaluation mode because it is frozen, and small sets load fastest in the main process.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        # Lightning's own use of torch's trees; nothing that a user could change.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        # A checkpoint holds the state of callbacks of the training that no other command needs.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
        # Calls of Lightning 2.6 that jsonargparse 5 will drop; the bound on its version keeps them.
        warnings.filterwarnings("ignore", message=r"\s*.*was deprecated in v4\.")
        warnings.filterwarnings("ignore", message=r"\s*By default only one JsonargparseDeprecationWarning")
        # It warns of names in a config that dynadapter.cli.safety refuses.
        warnings.filterwarnings("ignore", message=r"(?s).*import path denylist")
        yield


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def end(line: str, code: int) -> NoReturn:
    """Print one line and end with an exit code."""
    sys.stderr.write(f"dynadapter: {line}\n")
    raise SystemExit(code)
