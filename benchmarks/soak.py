"""Kills and damage: what is left of a training, of a prediction, and of every kind of file that the package reads.

    python benchmarks/soak.py

Kills: a training and a prediction run again and again in processes of their own, each killed (SIGKILL) at a random
moment and taken up where it stopped, until one gets to its end; that must be bit for bit what an uninterrupted one
gives (weights, optimiser state, logs; the table of predictions, every image in it once). Damage: files of every kind
are cut off, get a bit flipped, are emptied, or hold another file's content; the command that reads one must refuse it
in a line, or give what it gave before. A config that says something else is another config, and is counted apart.

Needs about ten minutes of one core. One JSON line a trial, and a summary; a trial that is done is not done again, and
its random numbers follow from its number.
"""

import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the processes that are killed

import numpy as np
import torch
import yaml
from common import RESULTS, Log, arguments, machine
from PIL import Image
from rich.console import Console
from rich.table import Table

HANG = 300
"""Seconds after which a command that should be done in five counts as hanging; the machine may have other work."""
CLASSES = ("disc", "ring", "square")
BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
Chain = Callable[[Path, random.Random], tuple[int, str]]
GOOD = ("same", "refused", "harmless", "another config")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dynadapter.cli.app", "dynadapter.cli.predict", "dynadapter.serve.bundle", "common"])


# ---- commands --------------------------------------------------------------------------------------------------------


def child(args: list[str], told: str) -> None:
    """Runs a command in a process of its own, what it prints in a file."""
    from dynadapter.cli import main

    with open(told, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    main(args)


def ended(work: Path, *args: object, due: Callable[[float], bool] = lambda _: False) -> tuple[int, str]:
    """Runs a command until it ends, or kills it when that is due.

    Returns:
        The exit code, -9 after a kill; and the last line that was said.

    Raises:
        TimeoutError: If it hangs.
    """
    told = work / "told.txt"
    process = PROCESSES.Process(target=child, args=([*map(str, args)], str(told)))
    begun = time.perf_counter()
    process.start()
    while process.exitcode is None:
        spent = time.perf_counter() - begun
        if due(spent) or spent > HANG:
            process.kill()
            process.join()
            if spent > HANG:
                raise TimeoutError
        process.join(0.003)
    assert process.exitcode is not None
    return process.exitcode, (told.read_text().strip() or "-").splitlines()[-1]


def fit(work: Path, *more: object) -> tuple[object, ...]:
    return ("fit", "--config", work / "config.yaml", *more)


def predict(work: Path, out: Path) -> tuple[object, ...]:
    """A prediction of all images of the task, in batches of four."""
    images = ("--images", work / "task" / "images", "--batch_size", 4)
    return ("predict", *bundle(work), *images, "--out", out)


def bundle(work: Path) -> tuple[object, ...]:
    return ("--bundle", work / "bundle", "--weights", work / "backbone.safetensors")


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
    model = {
        "backbone": "vit_tiny_patch16_224",
        "pretrained": False,
        "weights": str(work / "backbone.safetensors"),
        "backbone_args": BACKBONE,
        "adapter": {"class_path": "LoRA", "init_args": {"rank": 4}},
        "every": 1,
    }
    data = {"root": str(work), "task": "task", "image_size": 32, "batch_size": 16, "normalization": "half"}
    return {
        "seed_everything": 3,
        "model": model,
        "data": {"class_path": "VTAB1k", "init_args": data | {"augment": "flip"}},
        "trainer": {"max_epochs": epochs, "default_root_dir": str(work / "runs"), "enable_progress_bar": False},
    }


def set_up(work: Path, epochs: int) -> None:
    """Makes everything that is to be broken, once, and keeps a copy of it."""
    if kept(work).exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    import safetensors.torch
    import timm

    make_task(work / "task")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=3, **BACKBONE)
    safetensors.torch.save_file(backbone.state_dict(), work / "backbone.safetensors")
    (work / "config.yaml").write_text(yaml.safe_dump(config(work, epochs)))
    done(work, *fit(work, "--trainer.max_epochs", 1, "--trainer.default_root_dir", work / "warm"))
    begun = time.perf_counter()
    done(work, *fit(work))
    (work / "seconds.json").write_text(json.dumps(time.perf_counter() - begun))
    ckpt = work / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    goal = ("--goal.cost", 0.7, "--bundle", work / "bundle", "--out", work / "calibrated")
    done(work, "calibrate", "--ckpt_path", ckpt, *goal)
    done(work, "export", *bundle(work), "--out", work / "onnx")
    done(work, "export", *bundle(work), "--out", work / "programs", "--format", "programs")
    where = ("--data.root", work, "--data.task", "task", "--out", work / "report.json")
    done(work, "verify", "--data", "VTAB1k", *where)
    for kind, format in (("zip", "zip"), ("tar.gz", "gztar"), ("tar.xz", "xztar")):
        made = shutil.make_archive(str(work / "made"), format, work / "task", "images/test")
        Path(made).rename(work / f"archive.{kind}")
    done(work, *predict(work, work / "predicted.csv"))
    shutil.copytree(work, kept(work).with_suffix(".partial"), dirs_exist_ok=True)
    kept(work).with_suffix(".partial").rename(kept(work))


def kept(work: Path) -> Path:
    """The copy of the work folder in which nothing is ever broken."""
    return work.with_name(f"{work.name}-whole")


def done(work: Path, *args: object) -> None:
    """Runs a command that has to end well."""
    code, line = ended(work, *args)
    if code:
        raise SystemExit(f"{' '.join(map(str, args))} ended with {code}: {line}")


# ---- kills -----------------------------------------------------------------------------------------------------------


def kills(
    what: str, chain: Callable[[Path, random.Random], tuple[int, str]], work: Path, log: Log, wanted: int
) -> None:
    """Runs chains of kills until there were so many kills."""
    lines = [line for line in log.lines if line["key"]["what"] == what]
    killed = sum(line["kills"] for line in lines)
    for number in range(len(lines), 100 * wanted):
        if killed >= wanted:
            return
        try:
            count, outcome = chain(work, random.Random(f"{what} {number}"))
        except TimeoutError:
            count, outcome = 0, "hung"
        log.add({"what": what, "chain": number}, kills=count, outcome=outcome)
        print(f"{what} {number}: killed {count} times, then {outcome}", flush=True)
        killed += count


def training_chain(work: Path, rng: random.Random) -> tuple[int, str]:
    """Kills a training up to eight times and compares what it comes to; gives the kills and the outcome."""
    full, root = json.loads((work / "seconds.json").read_text()), work / "killed"
    shutil.rmtree(root, ignore_errors=True)
    for count in range(9):
        saved = [path for path in versions(root) if (path / "checkpoints" / "last.ckpt").exists()]
        args = ("fit", "--resume", saved[-1]) if saved else fit(work, "--trainer.default_root_dir", root)
        moment = rng.uniform(0, full) if count < 8 else 1e9
        code, line = ended(work, *args, due=lambda spent, moment=moment: spent > moment)
        if code != -signal.SIGKILL:
            return count, f"failed: {line}" if code else differs(work / "runs" / "version_0", versions(root)[-1])
    raise AssertionError("the last one of a chain is not killed")


def versions(root: Path) -> list[Path]:
    """Lists the runs below a folder in the order in which they were begun."""
    return sorted(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def differs(whole: Path, last: Path) -> str:
    """Compares a run that went on with the uninterrupted one, bit for bit."""
    for name in ("weights.ckpt", "last.ckpt"):
        one, two = (torch.load(path / "checkpoints" / name, weights_only=True) for path in (whole, last))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            if not same(one.get(part), two.get(part)):
                return f"differs: {part} of {name}"
    return "same" if rows(whole / "metrics.csv") == rows(last / "metrics.csv") else "differs: metrics.csv"


def same(one: Any, two: Any) -> bool:
    """Says whether two structures hold the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def rows(file: Path) -> list[dict[str, str]]:
    """Reads the lines of a table, whatever the order of its columns."""
    with file.open(newline="") as stream:
        return [dict(sorted((k, v) for k, v in row.items() if v)) for row in csv.DictReader(stream)]


def prediction_chain(work: Path, rng: random.Random) -> tuple[int, str]:
    """Kills a prediction up to six times and compares its table; gives the kills and the outcome."""
    whole, out, partial = work / "predicted.csv", work / "killed.csv", work / "killed.csv.partial"
    for path in work.glob("killed.csv*"):
        path.unlink()
    for count in range(7):
        written = partial.stat().st_size if partial.exists() else 0
        size = rng.uniform(written, 1.2 * max(written, 3 * whole.stat().st_size))  # most kills come while it writes
        moment = rng.uniform(0, 3) if rng.random() < 0.2 else 1e9
        if count == 6:
            size = moment = 1e9

        def due(spent: float, size: float = size, moment: float = moment) -> bool:
            return spent > moment or (partial.exists() and partial.stat().st_size > size)

        code, line = ended(work, *predict(work, out), due=due)
        if code != -signal.SIGKILL:
            return count, f"failed: {line}" if code else compared(whole, out)
    raise AssertionError("the last one of a chain is not killed")


def compared(whole: Path, out: Path) -> str:
    """Compares a table of predictions, and says how many images are lost or doubled where it is another."""
    if out.read_bytes() == whole.read_bytes():
        return "same"
    wanted, found = (Counter(row["file"] for row in rows(path)) for path in (whole, out))
    return f"differs: {sum((wanted - found).values())} lost, {sum((found - wanted).values())} doubled"


# ---- damage ----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A command has ended with an exit code and a message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.line = next((line for line in text.splitlines()[::-1] if line.startswith(("dynadapter:", "error:"))), "")


def command(*args: object) -> str:
    """Runs a command in this process; gives what it printed.

    Raises:
        Refused: If it ended with another exit code than 0.
    """
    from dynadapter.cli import main

    return quietly(lambda: main([*map(str, args)]))


def quietly(call: Callable[[], Any]) -> str:
    """Calls a program's main function; gives what it printed."""
    said, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = call() or 0
        except SystemExit as ending:
            code = ending.code or 0
    if code:
        raise Refused(int(code), said.getvalue() + errors.getvalue())
    return said.getvalue()


def read_checkpoint(work: Path, out: Path) -> bytes:
    """Predicts by the checkpoint."""
    ckpt = work / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    images = ("--images", work / "task" / "images" / "test", "--out", out / "p.csv")
    command("predict", "--ckpt_path", ckpt, *images, "--trainer.enable_progress_bar", "false")
    return (out / "p.csv").read_bytes()


def read_bundle(work: Path, out: Path) -> bytes:
    """Predicts by the bundle."""
    command("predict", *bundle(work), "--images", work / "task" / "images" / "test", "--out", out / "p.csv")
    return (out / "p.csv").read_bytes()


def read_onnx(work: Path, out: Path) -> str:
    """Predicts by ONNX Runtime."""
    from dynadapter import runtime

    args = [str(work / "onnx"), str(work / "task" / "images" / "test"), "--threads", "1"]
    return quietly(lambda: runtime.main(args))


def read_programs(work: Path, out: Path) -> bytes:
    """Runs the exported programs."""
    from dynadapter.serve.export import load_programs

    try:
        programs = load_programs(work / "programs")
    except ValueError as error:
        raise Refused(2, f"error: {error}") from error
    return programs.every_exit(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)).numpy().tobytes()


def read_data(work: Path, out: Path) -> str:
    """Verifies the data against the report that was written when they were whole."""
    where = ("--data.root", work, "--data.task", "task", "--expect", work / "report.json")
    command("verify", "--data", "VTAB1k", *where, "--threads", 1)
    return "as expected"


def read_config(work: Path, out: Path) -> str:
    """Parses the config file."""
    return command(*fit(work, "--print_config"))


def read_partial(work: Path, out: Path) -> bytes:
    """Goes on with the prediction that was interrupted."""
    for path in work.glob("stopped.csv*"):
        shutil.copy(path, out)
    command(*predict(work, out / "stopped.csv"))
    return (out / "stopped.csv").read_bytes()


def read_archive(kind: str) -> Callable[[Path, Path], Any]:
    """Makes a reader that extracts an archive."""

    def read(work: Path, out: Path) -> Any:
        folder = out / "unpacked"
        command("unpack", work / f"archive.{kind}", "--out", folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    return read


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


TARGETS = {
    "checkpoint": Target(("runs/version_0/checkpoints/last.ckpt",), read_checkpoint),
    "backbone weights": Target(("backbone.safetensors",), read_checkpoint),
    "bundle": Target(("bundle/model.safetensors", "bundle/config.json"), read_bundle),
    "onnx": Target(("onnx/stage*.onnx", "onnx/manifest.json"), read_onnx),
    "programs": Target(("programs/stage*.pt2", "programs/manifest.json"), read_programs),
    "image": Target(("task/images/*/*.jpg", "task/images/*/*.png"), read_data),
    "list": Target(("task/*.txt",), read_data),
    "zip": Target(("archive.zip",), read_archive("zip")),
    "tar.gz": Target(("archive.tar.gz",), read_archive("tar.gz")),
    "tar.xz": Target(("archive.tar.xz",), read_archive("tar.xz")),
    "partial predictions": Target(("stopped.csv.partial",), read_partial),
    "config": Target(("config.yaml",), read_config, checked=False),
}
DAMAGE = ("cut off", "bit flipped", "emptied", "swapped")


def damaged(content: bytes, damage: str, others: list[Path], rng: random.Random) -> bytes:
    """Gives the content of a file after a damage."""
    if damage == "emptied":
        return b""
    if damage == "cut off":
        return content[: rng.randrange(len(content))]
    if damage == "bit flipped":
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
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


def read(target: Target, work: Path) -> Any:
    """Reads what is there."""
    with tempfile.TemporaryDirectory() as folder:
        return target.read(work, Path(folder))


def outcome_of(target: Target, work: Path, whole: Any) -> tuple[str, str]:
    """Reads a damaged file; gives what came of it, and the line that was said."""
    try:
        with alarm(HANG):
            result = read(target, work)
    except Refused as refused:
        told = refused.code in (1, 2) and refused.line and "bug:" not in refused.line
        if target.read is read_data:  # whose verdict is a table, and the exit code 1
            told = refused.code in (1, 2)
        return ("refused" if told else "crashed", refused.line or str(refused).strip().splitlines()[-1][:300])
    except TimeoutError:
        return "hung", ""
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"[:300]
    if result == whole:
        return "harmless", ""
    return ("silently wrong" if target.checked else "another config"), ""


def damages(work: Path, log: Log, count: int) -> None:
    """Damages files of every kind in turn."""
    shutil.rmtree(work)
    shutil.copytree(kept(work), work)  # a soak that was itself killed can have left something broken
    partial = work / "stopped.csv.partial"
    ended(work, *predict(work, work / "stopped.csv"), due=lambda _: partial.exists() and partial.stat().st_size > 9000)
    wholes: dict[str, Any] = {}
    for trial in range(count):
        kind = list(TARGETS)[trial % len(TARGETS)]
        damage = DAMAGE[trial // len(TARGETS) % len(DAMAGE)]
        key = {"what": "damage", "trial": trial}
        if log.find(key):
            continue
        target, rng = TARGETS[kind], random.Random(f"damage {trial}")
        if kind not in wholes:
            wholes[kind] = read(target, work)
        file = rng.choice(found(work, target))
        times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        content, others = file.read_bytes(), [p for name, t in TARGETS.items() if name != kind for p in found(work, t)]
        try:
            file.write_bytes(damaged(content, damage, others, rng))
            outcome, line = outcome_of(target, work, wholes[kind])
        finally:
            file.write_bytes(content)
            os.utime(file, ns=times)  # a prediction that goes on looks at them
        name = str(file.relative_to(work))
        log.add(key, kind=kind, damage=damage, file=name, outcome=outcome, line=line.replace(str(work), "WORK"))
        if outcome not in GOOD:
            print(f"{trial}: {name} {damage}: {outcome} {line}", flush=True)


# ---- summary ---------------------------------------------------------------------------------------------------------


def summary(log: Log) -> dict[str, Any]:
    """Counts the outcomes."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in log.lines:
        what = line["key"]["what"]
        if what == "damage":
            what = f"{line['kind']}, {line['damage']}"
        else:
            counts[what]["kills"] += line["kills"]
        counts[what][line["outcome"]] += 1
    bad = [line for line in log.lines if line["outcome"] not in GOOD]
    total = dict(Counter(line["outcome"] for line in log.lines if line["key"]["what"] == "damage"))
    outcomes = {name: dict(found) for name, found in counts.items()}
    return {"machine": machine(), "outcomes": outcomes, "damaged inputs": total, "bad": bad}


def main() -> None:
    """Runs what is not done yet, prints the summary and writes it."""
    parser = arguments(__doc__ or "", "soak.jsonl")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "dynadapter-soak"), help="scratch folder")
    parser.add_argument("--kills", type=int, default=50, help="kills of a training, and of a prediction")
    parser.add_argument("--damages", type=int, default=480, help="damaged files")
    parser.add_argument("--epochs", type=int, default=12, help="of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, log = Path(args.work), Log(args.out)
    set_up(work, args.epochs)
    if args.only in "fit":
        kills("fit", training_chain, work, log, args.kills)
    if args.only in "predict":
        kills("predict", prediction_chain, work, log, args.kills)
    if args.only in "damage":
        damages(work, log, args.damages)
    told = summary(log)
    table = Table("what", "outcomes")
    for what, counted in sorted(told["outcomes"].items()):
        table.add_row(what, ", ".join(f"{count} {name}" for name, count in sorted(counted.items())))
    Console(width=120).print(table)
    print(f"{len(told['bad'])} of {len(log.lines)} trials went wrong")
    path = RESULTS / "soak.json" if args.out == parser.get_default("out") else Path(args.out).with_suffix(".json")
    path.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(bool(told["bad"]))


if __name__ == "__main__":
    main()
