"""Kill trainings and predictions at random moments, and compare their results with an uninterrupted run.

    python benchmarks/soak.py

A training and a prediction run in processes of their own; each is killed (SIGKILL) at random moments and resumed, until
it ends. The result must equal an uninterrupted one bit for bit: weights, optimiser state and schedules, or the table of
predictions. One JSON line a chain of kills; a chain that is done is not run again, and its random numbers follow from
its number.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the processes that are killed

import numpy as np
import torch
import yaml
from common import Line, Log, Row, arguments, show
from PIL import Image

BACKBONE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
HANG = 300
"""Seconds after which a command that takes about five counts as hanging."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dynadapter.cli.app", "dynadapter.serve.bundle", "common"])


# ---- commands


def child(args: list[str], output: str) -> None:
    """Run a command in this process, its output in a file."""
    from dynadapter.cli import main

    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    main(args)


def run(work: Path, *args: object, due: Callable[[float], bool] = lambda _: False) -> tuple[int, str]:
    """Run a command in a process of its own until it ends, or kill it when ``due(seconds)`` is true.

    Returns:
        The exit code, -9 after a kill, and the last line of the output.

    Raises:
        TimeoutError: If it hangs.
    """
    output = work / "output.txt"
    process = PROCESSES.Process(target=child, args=([*map(str, args)], str(output)))
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
    return process.exitcode, (output.read_text().strip() or "-").splitlines()[-1]


def must_run(work: Path, *args: object) -> None:
    """Run a command that must succeed."""
    code, line = run(work, *args)
    if code:
        raise SystemExit(f"{' '.join(map(str, args))} ended with {code}: {line}")


def predict(work: Path, out: Path, *more: object) -> tuple[object, ...]:
    """Return the command that predicts all test images by the bundle."""
    source = ("--bundle", work / "bundle", "--weights", work / "backbone.safetensors")
    return ("predict", *source, "--images", work / "task" / "images", "--out", out, *more)


# ---- what is to be killed


def make_task(folder: Path) -> None:
    """Write a task in VTAB's layout: noise of three brightnesses, as PNG and JPEG by turns."""
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {}
    for split, count in (("train800", 240), ("val200", 60), ("test", 60)):
        (folder / "images" / split).mkdir(parents=True)
        for k in range(count):
            name = f"images/{split}/{k:04}.{'png' if k % 2 else 'jpg'}"
            pixels = rng.integers(60 * (k % 3), 60 * (k % 3) + 120, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            lists.setdefault(split, []).append(f"{name} {k % 3}\n")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(lines))


def set_up(work: Path, epochs: int) -> None:
    """Make the task, an uninterrupted training, its bundle and an uninterrupted prediction, once."""
    if (work / "seconds.json").exists():
        return
    import safetensors.torch
    import timm

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_task(work / "task")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=3, **BACKBONE)
    safetensors.torch.save_file(backbone.state_dict(), work / "backbone.safetensors")
    weights = {"backbone": "vit_tiny_patch16_224", "weights": str(work / "backbone.safetensors")}
    adapter = {"class_path": "LoRA", "init_args": {"rank": 4}}
    data = {"root": str(work), "task": "task", "image_size": 32, "batch_size": 16, "normalization": "half"}
    config = {
        "seed_everything": 3,
        "model": weights | {"backbone_args": BACKBONE, "adapter": adapter, "every": 1},
        "data": {"class_path": "VTAB1k", "init_args": data | {"augment": "flip"}},
        "trainer": {"max_epochs": epochs, "default_root_dir": str(work / "runs"), "enable_progress_bar": False},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    begun = time.perf_counter()
    must_run(work, "fit", "--config", work / "config.yaml")
    seconds = time.perf_counter() - begun
    goal = ("--goal.cost", 0.7, "--bundle", work / "bundle", "--out", work / "calibrated")
    must_run(work, "calibrate", "--ckpt_path", checkpoint(work / "runs" / "version_0"), *goal)
    must_run(work, *predict(work, work / "predicted.csv"))
    (work / "seconds.json").write_text(json.dumps(seconds))


def checkpoint(run_folder: Path) -> Path:
    """Return the last checkpoint of a run."""
    return run_folder / "checkpoints" / "last.ckpt"


# ---- kills


def training_chain(work: Path, rng: random.Random) -> tuple[int, str]:
    """Kill and resume a training up to eight times; return the number of kills and the outcome."""
    seconds, root = json.loads((work / "seconds.json").read_text()), work / "killed"
    shutil.rmtree(root, ignore_errors=True)
    for kills in range(9):
        runs = sorted(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
        saved = [path for path in runs if checkpoint(path).exists()]
        new = ("--config", work / "config.yaml", "--trainer.default_root_dir", root)
        moment = rng.uniform(0, seconds) if kills < 8 else HANG
        args = ("fit", "--resume", saved[-1]) if saved else ("fit", *new)
        code, line = run(work, *args, due=lambda spent, moment=moment: spent > moment)
        if code != -signal.SIGKILL:
            last = max(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
            return kills, f"failed: {line}" if code else compare_runs(work / "runs" / "version_0", last)
    raise AssertionError("the last run of a chain is not killed")


def compare_runs(whole: Path, last: Path) -> str:
    """Compare the checkpoints of two runs bit for bit."""
    one, two = (torch.load(checkpoint(path), weights_only=True) for path in (whole, last))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        if not equal(one.get(part), two.get(part)):
            return f"differs: {part}"
    return "same"


def equal(one: Any, two: Any) -> bool:
    """Return whether two structures hold the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def prediction_chain(work: Path, rng: random.Random) -> tuple[int, str]:
    """Kill and resume a prediction up to six times; return the number of kills and the outcome."""
    out = work / "killed.csv"
    for path in work.glob("killed.csv*"):
        path.unlink()
    for kills in range(7):
        moment = rng.uniform(0, 4) if kills < 6 else HANG
        code, line = run(work, *predict(work, out), due=lambda spent, moment=moment: spent > moment)
        if code != -signal.SIGKILL:
            same = not code and out.read_bytes() == (work / "predicted.csv").read_bytes()
            return kills, "same" if same else f"failed: {line}" if code else "differs"
    raise AssertionError("the last run of a chain is not killed")


# ---- the program


def rows(lines: list[Line]) -> list[Row]:
    """Return a table row for each command: its kills and the outcomes of its chains."""
    found = []
    for what in dict.fromkeys(line["key"]["what"] for line in lines):
        own = [line for line in lines if line["key"]["what"] == what]
        counts = Counter(line["outcome"] for line in own)
        words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        found.append({"command": what, "kills": sum(line["kills"] for line in own), "chains": len(own), "ends": words})
    return found


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the outcomes; the exit status is 1 if a chain went wrong."""
    parser = arguments(__doc__ or "", "soak.jsonl")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dynadapter-soak")
    parser.add_argument("--chains", type=int, default=25, help="chains of kills of a training, and of a prediction")
    parser.add_argument("--epochs", type=int, default=12, help="of the training")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    log = Log(args.out)
    set_up(args.work, args.epochs)
    for what, chain in {"fit": training_chain, "predict": prediction_chain}.items():
        for number in range(args.chains if args.only in what else 0):
            key = {"what": what, "chain": number}
            if not log.find(key):
                kills, outcome = chain(args.work, random.Random(f"{what} {number}"))
                log.add(key, kills=kills, outcome=outcome)
    show(rows(log.lines))
    sys.exit(any(line["outcome"] != "same" for line in log.lines))


if __name__ == "__main__":
    main()
