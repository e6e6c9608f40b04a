"""Kills and damage: what is left of a training, of a prediction, and of every kind of file that the package reads.

    python benchmarks/soak.py

Kills: a training and a prediction run again and again in processes of their own, each killed (SIGKILL) at a random
moment and taken up where it stopped, until one gets to its end; that must be bit for bit what an uninterrupted one
gives (weights, optimiser state, logs; the table of predictions). Damage: files of every kind are cut off, get a bit
flipped, are emptied, or hold another file's content; the command that reads one must refuse it in a line, or give
what it gave before. Needs a few minutes on two cores. One JSON line a trial, and a summary; a trial that is done is
not done again, and its random numbers follow from its number.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import RESULTS, Log, arguments, machine
from PIL import Image
from rich.console import Console
from rich.table import Table

COMMAND = [sys.executable, "-m", "dynadapter.cli"]
HANG = 120
"""Seconds after which a command that should be done in five counts as hanging."""
CLASSES = ("disc", "ring", "square")
TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# ---- what there is to break ------------------------------------------------------------------------------------------


def draw(kind: int, rng: np.random.Generator) -> Image.Image:
    """Draws a disc, a ring or a square of a random size, place and colour on noise."""
    y, x = np.mgrid[:32, :32]
    cy, cx, size = rng.integers(10, 22), rng.integers(10, 22), rng.integers(5, 9)
    far = np.hypot(y - cy, x - cx)
    inside = [far < size, (far < size) & (far > size - 3), np.maximum(abs(y - cy), abs(x - cx)) < size - 1][kind]
    pixels = rng.integers(0, 90, (32, 32, 3))
    pixels[inside] = rng.integers(140, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def make_task(folder: Path, train: int = 240, held: int = 60) -> None:
    """Writes a task in VTAB's layout, its images as PNG and JPEG by turns."""
    rng = np.random.default_rng(0)
    for split, count in (("train800", train), ("val200", held), ("test", held)):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for k in range(count):
            name = f"images/{split}/{k:04}.{'png' if k % 2 else 'jpg'}"
            draw(k % 3, rng).save(folder / name)
            lines.append(f"{name} {k % 3}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def config(work: Path, epochs: int) -> dict[str, Any]:
    """Gives the configuration of a small training with everything switched on."""
    return {
        "seed_everything": 3,
        "model": {
            "trunk": "vit_tiny_patch16_224",
            "pretrained": False,
            "weights": str(work / "trunk.safetensors"),
            "trunk_args": TRUNK,
            "adapter": {"class_path": "LoRA", "init_args": {"rank": 4}},
            "every": 1,
        },
        "data": {
            "class_path": "VTAB1k",
            "init_args": {
                "root": str(work),
                "task": "task",
                "image_size": 32,
                "batch_size": 16,
                "normalization": "half",
                "augment": "flip",
            },
        },
        "trainer": {"max_epochs": epochs, "default_root_dir": str(work / "runs"), "enable_progress_bar": False},
    }


def set_up(work: Path, epochs: int) -> None:
    """Makes everything that is to be broken, once."""
    if (work / "ready").exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    import safetensors.torch
    import timm

    make_task(work / "task")
    torch.manual_seed(0)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TRUNK)
    safetensors.torch.save_file(trunk.state_dict(), work / "trunk.safetensors")
    (work / "config.yaml").write_text(yaml.safe_dump(config(work, epochs)))
    start = time.perf_counter()
    run("fit", "--config", work / "config.yaml")
    seconds = time.perf_counter() - start
    ckpt = work / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    run(
        "calibrate",
        "--ckpt_path",
        ckpt,
        "--goal.cost",
        "0.7",
        "--bundle",
        work / "bundle",
        "--out",
        work / "calibrated",
    )
    weights = ("--weights", work / "trunk.safetensors")
    run("export", "--bundle", work / "bundle", "--out", work / "onnx", *weights)
    run("export", "--bundle", work / "bundle", "--out", work / "programs", "--format", "programs", *weights)
    run(
        "verify",
        "--data",
        "VTAB1k",
        "--data.root",
        work,
        "--data.task",
        "task",
        "--out",
        work / "report.json",
        codes=(0, 1),
    )
    for kind, format in (("zip", "zip"), ("tar.gz", "gztar"), ("tar.xz", "xztar")):
        made = shutil.make_archive(str(work / "task"), format, work / "task", "images/test")
        Path(made).rename(work / f"archive.{kind}")
    predict(work, work / "predicted.csv").wait()
    (work / "ready").write_text(json.dumps({"seconds": seconds}))


def run(*args: object, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, timeout=20 * HANG
    )
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(map(str, args))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def start(*args: object) -> subprocess.Popen[str]:
    """Starts a command that may be killed."""
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed(process: subprocess.Popen[str], due: Callable[[float], bool]) -> bool:
    """Waits until a process ends by itself, or kills it when that is due; says whether it was killed."""
    begun = time.perf_counter()
    while process.poll() is None:
        spent = time.perf_counter() - begun
        if due(spent):
            process.kill()
            process.communicate()
            return True
        if spent > 20 * HANG:
            process.kill()
            raise TimeoutError
        time.sleep(0.002)
    return False


def training_kills(work: Path, log: Log, kills: int) -> None:
    """Kills trainings until there were so many kills; every training that gets to its end is compared."""
    full = json.loads((work / "ready").read_text())["seconds"]
    root = work / "killed"
    done = sum(line["kills"] for line in log.lines if line["key"]["what"] == "fit")
    chain = sum(line["key"]["what"] == "fit" for line in log.lines)
    while done < kills:
        rng = random.Random(f"fit {chain}")
        shutil.rmtree(root, ignore_errors=True)
        args: list[object] = ["fit", "--config", work / "config.yaml", "--trainer.default_root_dir", root]
        count, wanted, folder, outcome = 0, rng.randint(3, 8), None, ""
        while not outcome:
            # A process that has just started has little to lose, so most kills come later.
            moment = rng.uniform(0.3 * full, full) if rng.random() < 0.8 else rng.uniform(0, 0.5 * full)
            process = start(*args)
            if count < wanted and killed(process, lambda spent, moment=moment: spent > moment):
                count += 1
            else:
                text, _ = process.communicate()
                outcome = differs(work, root) or "same" if process.returncode == 0 else f"failed: {text[-300:]}"
                break
            folders = sorted(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
            saved = [path for path in folders if (path / "checkpoints" / "last.ckpt").exists()]
            folder = saved[-1] if saved else None
            base = args[:5] if not folder else ["fit", "--resume", folder]
            args = list(base)
        log.add({"what": "fit", "chain": chain}, kills=count, outcome=outcome)
        print(f"training {chain}: killed {count} times, then {outcome}", flush=True)
        done, chain = done + max(count, 1), chain + 1


def differs(work: Path, root: Path) -> str:
    """Compares the last run below a folder with the uninterrupted one; says in what they differ, or nothing."""
    whole = work / "runs" / "version_0"
    last = max(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    for name in ("weights.ckpt", "last.ckpt"):
        one, two = (
            torch.load(path / "checkpoints" / name, map_location="cpu", weights_only=True) for path in (whole, last)
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            if not same(one.get(part), two.get(part)):
                return f"differs: {part} of {name}"
    if rows(whole / "metrics.csv") != rows(last / "metrics.csv"):
        return "differs: metrics.csv"
    return ""


def same(one: Any, two: Any) -> bool:
    """Says whether two structures hold the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def rows(file: Path) -> list[dict[str, str]]:
    """Reads the lines of a log, whatever the order of its columns."""
    with file.open(newline="") as stream:
        return [dict(sorted((k, v) for k, v in row.items() if v)) for row in csv.DictReader(stream)]


def predict(work: Path, out: Path) -> subprocess.Popen[str]:
    """Starts a prediction of all images of the task."""
    weights = ("--weights", work / "trunk.safetensors")
    images = work / "task" / "images"
    return start("predict", "--bundle", work / "bundle", *weights, "--images", images, "--out", out, "--batch_size", 4)


def prediction_kills(work: Path, log: Log, kills: int) -> None:
    """Kills predictions until there were so many kills; every one that gets to its end is compared."""
    whole = (work / "predicted.csv").read_bytes()
    out, partial = work / "killed.csv", work / "killed.csv.partial"
    done = sum(line["kills"] for line in log.lines if line["key"]["what"] == "predict")
    chain = sum(line["key"]["what"] == "predict" for line in log.lines)
    while done < kills:
        rng = random.Random(f"predict {chain}")
        for path in work.glob("killed.csv*"):
            path.unlink()
        count, wanted, outcome = 0, rng.randint(2, 6), ""
        while not outcome:
            written = partial.stat().st_size if partial.exists() else 0
            size = rng.uniform(written, len(whole))  # most kills come while it writes
            moment = rng.uniform(0, 10) if rng.random() < 0.3 else HANG

            def due(spent: float, size: float = size, moment: float = moment) -> bool:
                return spent > moment or (partial.exists() and partial.stat().st_size > size)

            process = predict(work, out)
            if count < wanted and killed(process, due):
                count += 1
                continue
            text, _ = process.communicate()
            equal = out.exists() and out.read_bytes() == whole
            outcome = ("same" if equal else "differs") if process.returncode == 0 else f"failed: {text[-300:]}"
        log.add({"what": "predict", "chain": chain}, kills=count, outcome=outcome)
        print(f"prediction {chain}: killed {count} times, then {outcome}", flush=True)
        done, chain = done + max(count, 1), chain + 1


# ---- damage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kind of file, and what reads it.

    Args:
        files: Those that may be damaged, in the work folder.
        read: Reads them and gives something to compare; it is told a folder for what it writes.
        checked: Whether a change of the content must show; a config that says something else is another config.
    """

    files: tuple[str, ...]
    read: Callable[[Path, Path], Any]
    checked: bool = True


def command(*args: object, codes: tuple[int, ...] = (0,)) -> str:
    """Runs a command in this process; gives what it printed.

    Raises:
        Refused: If it ended with another exit code.
    """
    from dynadapter.cli import main

    said, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            main([*map(str, args)])
        except SystemExit as ending:
            code = ending.code or 0
    if code not in codes:
        raise Refused(int(code), errors.getvalue() + said.getvalue())
    return said.getvalue()


class Refused(Exception):
    """A command has ended with an exit code and a message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.line = next((line for line in text.splitlines()[::-1] if line.startswith(("dynadapter:", "error:"))), "")


def read_checkpoint(work: Path, out: Path) -> bytes:
    """Predicts by the checkpoint."""
    ckpt = work / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    images = work / "task" / "images" / "test"
    quiet = ("--trainer.enable_progress_bar", "false")
    command("predict", "--ckpt_path", ckpt, "--images", images, "--out", out / "p.csv", *quiet)
    return (out / "p.csv").read_bytes()


def read_bundle(work: Path, out: Path) -> bytes:
    """Predicts by the bundle."""
    weights = ("--weights", work / "trunk.safetensors")
    images = work / "task" / "images" / "test"
    command("predict", "--bundle", work / "bundle", *weights, "--images", images, "--out", out / "p.csv")
    return (out / "p.csv").read_bytes()


def read_onnx(work: Path, out: Path) -> str:
    """Predicts by ONNX Runtime."""
    from dynadapter import runtime

    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = runtime.main([str(work / "onnx"), str(work / "task" / "images" / "test"), "--threads", "1"])
    if code:
        raise Refused(code, errors.getvalue())
    return said.getvalue()


def read_programs(work: Path, out: Path) -> Any:
    """Runs the exported programs."""
    from dynadapter.export import load_programs

    try:
        programs = load_programs(work / "programs")
    except ValueError as error:
        raise Refused(2, f"error: {error}") from error
    return programs.every_exit(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)).numpy().tobytes()


def read_data(work: Path, out: Path) -> str:
    """Verifies the data against the report that was written when they were whole."""
    where = ("--data.root", work, "--data.task", "task", "--expect", work / "report.json")
    command("verify", "--data", "VTAB1k", *where)
    return "as expected"


def read_config(work: Path, out: Path) -> str:
    """Parses the config file."""
    return command("fit", "--config", work / "config.yaml", "--print_config")


def read_partial(work: Path, out: Path) -> bytes:
    """Goes on with the prediction that was interrupted."""
    weights = ("--weights", work / "trunk.safetensors")
    images = work / "task" / "images"
    for path in work.glob("stopped.csv*"):
        shutil.copy(path, out)
    command(
        "predict", "--bundle", work / "bundle", *weights, "--images", images, "--out", out / "stopped.csv",
        "--batch_size", 4,
    )  # fmt: skip
    return (out / "stopped.csv").read_bytes()


def read_archive(kind: str) -> Callable[[Path, Path], Any]:
    """Makes a reader that extracts an archive."""

    def read(work: Path, out: Path) -> Any:
        command("unpack", "--archive", work / f"archive.{kind}", "--out", out / "unpacked")
        files = sorted(path for path in (out / "unpacked").rglob("*") if path.is_file())
        return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    return read


TARGETS = {
    "checkpoint": Target(("runs/version_0/checkpoints/last.ckpt",), read_checkpoint),
    "trunk weights": Target(("trunk.safetensors",), read_checkpoint),
    "bundle": Target(("bundle/model.safetensors", "bundle/config.json"), read_bundle),
    "onnx": Target(("onnx/stage*.onnx", "onnx/manifest.json"), read_onnx),
    "programs": Target(("programs/stage*.pt2", "programs/manifest.json"), read_programs),
    "image": Target(("task/images/*/*.jpg", "task/images/*/*.png"), read_data),
    "list": Target(("task/*.txt",), read_data),
    "zip": Target(("archive.zip",), read_archive("zip")),
    "tar.gz": Target(("archive.tar.gz",), read_archive("tar.gz")),
    "tar.xz": Target(("archive.tar.xz",), read_archive("tar.xz")),
    "partial predictions": Target(("stopped.csv.*",), read_partial),
    "config": Target(("config.yaml",), read_config, checked=False),
}
DAMAGE = ("cut off", "bit flipped", "emptied", "swapped")


def damaged(content: bytes, damage: str, work: Path, kind: str, rng: random.Random) -> bytes:
    """Gives the content of a file after a damage."""
    if damage == "emptied":
        return b""
    if damage == "cut off":
        return content[: rng.randrange(len(content))]
    if damage == "bit flipped":
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    others = [path for name, target in TARGETS.items() if name != kind for path in found(work, target)]
    return rng.choice(others).read_bytes()


def found(work: Path, target: Target) -> list[Path]:
    """Lists the files of a target."""
    return sorted(path for pattern in target.files for path in work.glob(pattern))


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends what hangs."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(target: Target, work: Path, whole: Any) -> tuple[str, str]:
    """Reads a damaged file; gives what came of it, and the line that was said."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with alarm(HANG):
                result = target.read(work, Path(folder))
        except Refused as refused:
            told = refused.code in (1, 2) and refused.line and "bug:" not in refused.line
            return ("refused" if told else "crashed", refused.line or str(refused)[-300:])
        except TimeoutError:
            return "hung", ""
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"[:300]
    if result == whole:
        return "harmless", ""
    return ("silently wrong" if target.checked else "another config"), ""


def stop_a_prediction(work: Path) -> None:
    """Leaves a prediction half done, as a thing to damage."""
    partial = work / "stopped.csv.partial"
    while not partial.exists():
        killed(predict(work, work / "stopped.csv"), lambda _: partial.exists() and partial.stat().st_size > 2000)


def damages(work: Path, log: Log, count: int) -> None:
    """Damages files of every kind in turn."""
    stop_a_prediction(work)
    wholes: dict[str, Any] = {}
    for trial in range(count):
        kind = list(TARGETS)[trial % len(TARGETS)]
        damage = DAMAGE[trial // len(TARGETS) % len(DAMAGE)]
        key = {"what": "damage", "trial": trial}
        if log.find(key):
            continue
        target, rng = TARGETS[kind], random.Random(f"damage {trial}")
        if kind not in wholes:
            with tempfile.TemporaryDirectory() as folder:
                wholes[kind] = target.read(work, Path(folder))
        file = rng.choice(found(work, target))
        content = file.read_bytes()
        try:
            file.write_bytes(damaged(content, damage, work, kind, rng))
            outcome, line = outcome_of(target, work, wholes[kind])
        finally:
            file.write_bytes(content)
        name = str(file.relative_to(work))
        log.add(key, kind=kind, damage=damage, file=name, outcome=outcome, line=line.replace(str(work), "WORK"))
        if outcome not in ("refused", "harmless", "another config"):
            print(f"{trial}: {name} {damage}: {outcome} {line}", flush=True)


# ---- summary ---------------------------------------------------------------------------------------------------------


def summary(log: Log) -> dict[str, Any]:
    """Counts the outcomes."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in log.lines:
        what = line["key"]["what"]
        if what == "damage":
            counts[f"{line['kind']}, {line['damage']}"][line["outcome"]] += 1
        else:
            counts[what]["kills"] += line["kills"]
            counts[what][line["outcome"]] += 1
    good = ("refused", "harmless", "another config", "same", "kills")
    bad = [line for line in log.lines if line["outcome"] not in good]
    return {"machine": machine(), "outcomes": {name: dict(found) for name, found in counts.items()}, "bad": bad}


def main() -> None:
    """Runs what is not done yet, prints the summary and writes it."""
    parser = arguments(__doc__ or "", "soak.jsonl")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "dynadapter-soak"), help="scratch folder")
    parser.add_argument("--kills", type=int, default=50, help="kills of a training, and of a prediction")
    parser.add_argument("--damages", type=int, default=240, help="damaged files")
    parser.add_argument("--epochs", type=int, default=12, help="of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, log = Path(args.work), Log(args.out)
    set_up(work, args.epochs)
    for name, part in (("fit", training_kills), ("predict", prediction_kills), ("damage", damages)):
        if args.only in name:
            part(work, log, args.damages if name == "damage" else args.kills)
    told = summary(log)
    table = Table("what", "outcomes")
    for what, found in sorted(told["outcomes"].items()):
        table.add_row(what, ", ".join(f"{count} {name}" for name, count in sorted(found.items())))
    Console(width=120).print(table)
    print(f"{len(told['bad'])} of {len(log.lines)} trials went wrong")
    path = RESULTS / "soak.json" if args.out == parser.get_default("out") else Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(bool(told["bad"]))


if __name__ == "__main__":
    main()
