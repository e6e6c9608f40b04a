"""The commands with a whole configuration: help, layers of settings, run folders, what is printed and written."""

import csv
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from commands import TINY, printed, refused
from lightning.pytorch import Trainer

from dynadapter.adapters import LoRA
from dynadapter.cli import main
from dynadapter.cli.runs import RUN_VARIABLE, create_run_folder
from dynadapter.data import Shapes
from dynadapter.training.module import ExitClassifier

pytestmark = pytest.mark.filterwarnings(  # about a user's own settings
    "ignore:The number of training batches", "ignore:The `srun` command is available"
)


@pytest.fixture
def checkpoint(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of that run's checkpoint, in a run of its own."""
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / "version_0")) / "checkpoints" / "last.ckpt"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


# ---- help


def test_help_names_sections_in_order(capsys):
    text = printed(["fit", "--help"], capsys)
    assert text.startswith("usage: dynadapter fit [--config FILE ...] [--KEY VALUE ...]\n")
    sections = ("model", "data", "early_exit", "exit_weights", "sparsity", "flops_report", "checkpoint", "trainer")
    assert sorted(sections, key=lambda name: text.index(f"\n{name}: ")) == list(sections)


def test_help_of_a_class(capsys):
    assert "rank" in printed(["fit", "--model.adapter.help", "LoRA"], capsys)


def test_printed_config_can_be_read_back(capsys, tmp_path, built):
    file = tmp_path / "printed.yaml"
    file.write_text(printed(["fit", "-c", TINY, "--model.adapter.rank=3", "--print_config"], capsys))
    cli = built("fit", "-c", file, "--trainer.fast_dev_run=true")
    assert next(iter(cli.model.net.backbone.blocks)).attn.qkv.lora_a.shape[0] == 3


# ---- runs


def test_run_folder_holds_everything(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
    assert not list(tiny_run.rglob("events.out.tfevents.*"))  # TensorBoard only on request
    resumable, weights = (tiny_run / "checkpoints" / name for name in ("last.ckpt", "weights.ckpt"))
    assert set((tiny_run / "checkpoints").iterdir()) == {resumable, weights}
    assert weights.stat().st_size < resumable.stat().st_size
    whole, part = (torch.load(path, weights_only=True)["state_dict"] for path in (resumable, weights))
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert any(row.get("val/acc") for row in rows(tiny_run / "metrics.csv"))
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["model"]["adapter"]["class_path"] == "dynadapter.LoRA"


def test_run_repeats_from_its_config(tiny_run, tmp_path):
    root = tmp_path / "runs"
    for _ in range(2):
        main(["fit", "-c", str(tiny_run / "config.yaml"), f"--trainer.default_root_dir={root}"])
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tiny_run, root / "version_0", root / "version_1")
    ]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_run_folders_of_parallel_runs(tmp_path):
    (tmp_path / "runs" / "version_²").mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path / "runs", "version"), range(20)))
    assert {folder.name for folder in folders} == {f"version_{k}" for k in range(20)}


def test_run_folder_shared_by_processes(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    first = create_run_folder(tmp_path, "version")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert create_run_folder(tmp_path, "version") == first
    monkeypatch.delenv(RUN_VARIABLE)  # under a launcher that tells nothing
    create_run_folder(tmp_path, "version")
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_failed_start_leaves_no_folder(tmp_path, capsys):
    policy = "[{class_path: Confidence, init_args: {threshold: [0.1, 0.2, 0.3, 0.4]}}]"
    refused(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", f"--early_exit.policies={policy}"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("off", ["--trainer.fast_dev_run=true", "--trainer.barebones=true"])
def test_trial_run_leaves_no_files(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", TINY, off, *(["--trainer.log_every_n_steps=0"] if "bare" in off else [])])
    assert not list(tmp_path.rglob("*"))


def test_logger_off_and_logger_of_the_user(tmp_path, built):
    cli = built("fit", "-c", TINY, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}")
    assert not cli.trainer.loggers
    own = "{class_path: CSVLogger, init_args: {save_dir: elsewhere}}"
    cli = built("fit", "-c", TINY, f"--trainer.logger={own}", f"--trainer.default_root_dir={tmp_path}")
    assert [logger.save_dir for logger in cli.trainer.loggers] == ["elsewhere"]
    saved = cli.trainer.checkpoint_callback.dirpath
    assert saved == str(tmp_path / "version_1" / "checkpoints")


def test_run_folders_without_logger(tmp_path):
    for _ in range(2):
        main(["fit", "-c", TINY, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"])
    for number in range(2):
        run = tmp_path / f"version_{number}"
        found = {path.name for path in run.rglob("*")}
        assert found == {"config.yaml", "run.json", "checkpoints", "last.ckpt", "weights.ckpt"}


def test_monitor_keeps_best_and_last(tmp_path):
    arguments = ["--checkpoint.monitor=val/acc", "--checkpoint.mode=max", "--trainer.max_epochs=2"]
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", *arguments])
    saved = {path.name for path in (tmp_path / "version_0" / "checkpoints").iterdir()}
    assert saved == {"best.ckpt", "last.ckpt", "weights.ckpt"}


def test_fit_from_checkpoint_needs_config(checkpoint, capsys):
    assert f"--resume {checkpoint.parent.parent}" in refused(["fit", "--ckpt_path", checkpoint], capsys)
    config = str(checkpoint.parent.parent / "config.yaml")
    root, saved = checkpoint.parent.parent.parent, checkpoint.read_bytes()
    more = [f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2"]
    main(["fit", "--config", config, "--ckpt_path", str(checkpoint), *more])
    assert checkpoint.read_bytes() == saved
    again = torch.load(root / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert again["global_step"] == 4  # two steps an epoch


# ---- layers of settings


def test_test_with_checkpoint_alone(checkpoint, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    main(["test", "--ckpt_path", str(checkpoint)])
    assert "confidence" in capsys.readouterr().out  # the table of the policies
    results = tmp_path / "runs" / "test_0"  # beside the training
    assert {path.name for path in results.iterdir()} == {"config.yaml", "metrics.csv", "hparams.yaml", "run.json"}
    assert rows(results / "metrics.csv")[0]["test/acc"]
    assert not list(elsewhere.iterdir())


def test_validate_with_checkpoint_alone(checkpoint):
    main(["validate", "--ckpt_path", str(checkpoint)])
    assert rows(checkpoint.parents[2] / "validate_0" / "metrics.csv")[0]["val/acc"]


def test_checkpoint_beats_defaults(checkpoint, built):
    cli = built("test", "--ckpt_path", checkpoint)
    assert cli.model.backbone_name == "vit_tiny_patch16_224"
    assert cli.model.net.exit_depths == (1, 2, 3)
    assert isinstance(cli.datamodule, Shapes)
    assert (cli.datamodule.batch_size, cli.datamodule.preprocess.normalization) == (48, "half")


def test_config_files_beat_checkpoint(checkpoint, tmp_path, built):
    one = write(tmp_path / "one.yaml", {"model": {"label_smoothing": 0.1}, "data": {"init_args": {"batch_size": 8}}})
    two = write(tmp_path / "two.yaml", {"model": {"label_smoothing": 0.2}})
    cli = built("test", "--ckpt_path", checkpoint, "-c", one, f"--config={two}")
    assert (cli.model.label_smoothing, cli.datamodule.batch_size) == (0.2, 8)
    assert cli.datamodule.preprocess.normalization == "half"  # what they do not name stays


def test_command_line_beats_all_in_any_order(checkpoint, tmp_path, built):
    file = write(tmp_path / "a.yaml", {"ckpt_path": None, "model": {"label_smoothing": 0.1}, "data": "Shapes"})
    arguments = ["--model.label_smoothing=0.3", "--data.batch_size=7", "--ckpt_path", checkpoint]
    for order in ([*arguments, "-c", file], ["-c", file, *arguments]):
        cli = built("test", *order)
        assert (cli.model.label_smoothing, cli.datamodule.batch_size) == (0.3, 7)


def test_command_line_beats_hyperparameters(checkpoint, built):
    """Lightning would let the checkpoint's hyperparameters beat the command line (Lightning #20801)."""
    assert built("test", "--ckpt_path", checkpoint, "--model.label_smoothing=0.3").model.hparams.label_smoothing == 0.3


def test_config_file_names_checkpoint(checkpoint, tmp_path, built):
    file = write(tmp_path / "a.yaml", {"ckpt_path": str(checkpoint)})
    assert built("test", "-c", file).model.net.exit_depths == (1, 2, 3)


def test_parts_switched_off(tmp_path, built, capsys):
    file = write(tmp_path / "off.yaml", {"sparsity": None, "early_exit": False})
    cli = built("fit", "-c", TINY, "-c", file, "--exit_weights", "null", f"--trainer.default_root_dir={tmp_path}")
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert not names & {"BidirectionalSparsity", "EarlyExit", "ExitWeights"}
    assert names >= {"FlopsReport", "RunCheckpoint"}
    cli = built("fit", "-c", TINY, "-c", file, "--checkpoint=null", f"--trainer.default_root_dir={tmp_path}")
    assert not cli.trainer.checkpoint_callbacks


def test_switched_off_part_in_saved_config(tmp_path):
    main(["fit", "-c", TINY, "--sparsity=null", f"--trainer.default_root_dir={tmp_path}"])
    assert yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())["sparsity"] is None


@pytest.mark.parametrize("adapter", [LoRA(rank=3), None])
def test_checkpoint_made_in_python(adapter, tmp_path, built):
    module = ExitClassifier(
        8,
        backbone="vit_tiny_patch16_224",
        pretrained=False,
        backbone_args={"patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3},
        image_size=32,
        adapter=adapter,
        every=2,
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **options)
    with pytest.warns():  # Lightning on a frozen backbone and few workers
        trainer.fit(module, datamodule=Shapes(image_size=32, normalization="none"))
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    cli = built("test", "--ckpt_path", tmp_path / "mine.ckpt", f"--trainer.default_root_dir={tmp_path}")
    assert cli.model.net.exit_depths == (2, 3)
    assert cli.datamodule.preprocess.normalization == "none"
    assert cli.model.backbone_hash == module.backbone_hash


# ---- predict


# ---- flops


def test_flops_fetches_no_weights(built):
    assert not built("flops", "-c", TINY, "--model.pretrained=true").model.hparams.pretrained
