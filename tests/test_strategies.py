"""Values of ``--trainer.strategy``, and the files of a sharded training."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from commands import TINY, refused
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from dynadapter.cli import main
from dynadapter.cli.errors import Mistake
from dynadapter.cli.strategies import FSDP2, require_known, require_own_processes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.strategy=deepspeed_stage_2"], "DeepSpeed is not supported: .* give --trainer.strategy ddp"),
        (["--trainer.strategy=fsdp"], "the first version of FSDP, .* give --trainer.strategy fsdp2"),
        (["--trainer.strategy=fsdp2", "--trainer.precision=16-mixed"], "give --trainer.precision bf16-mixed"),
        (["--trainer.strategy=ddp_fork", "--trainer.devices=2"], "are for notebooks: .* give --trainer.strategy ddp"),
        (["--trainer.strategy={class_path: ModelParallelStrategy}"], "would save folders, .* give .* fsdp2"),
    ],
)
def test_unsupported_strategy_is_refused(args, words, tmp_path, capsys):
    line = refused(["fit", "-c", TINY, *args, f"--trainer.default_root_dir={tmp_path}"], capsys)
    assert re.search(words, line), line
    assert not list(tmp_path.iterdir())


def test_supported_strategies_pass():
    require_known(ModelParallelStrategy(save_distributed_checkpoint=False), "bf16-mixed")
    require_known("fsdp2", "32-true")
    require_known("ddp", 16)
    with pytest.raises(Mistake):
        require_known(ModelParallelStrategy(save_distributed_checkpoint=False), 16)


def test_fsdp2_shards_over_all_processes():
    strategy = FSDP2()
    strategy.parallel_devices = [torch.device("cpu")] * 3
    strategy.num_nodes = 2
    strategy.set_world_ranks()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)


def test_too_many_cpu_processes_are_refused():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quiet = {"accelerator": "cpu", "strategy": "ddp", "logger": False, "enable_checkpointing": False}
    require_own_processes(Trainer(devices=3, **quiet))
    with pytest.raises(Mistake, match=rf"^trainer.devices={8 + 2 * cores} would start as many .*; give at most \d+$"):
        require_own_processes(Trainer(devices=8 + 2 * cores, **quiet))  # which starts none before it fits


@pytest.mark.slow
def test_sharded_run_writes_plain_files(tmp_path):
    """It resumes sharded, and one process tests its checkpoint."""

    def run(*args: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "dynadapter.cli", *args], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    two = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]
    plain = ["--sparsity=null"]
    run("fit", "-c", TINY, *two, *plain, "--data.batch_size=24", f"--trainer.default_root_dir={tmp_path}")
    run("fit", "--resume", str(tmp_path / "version_0"), "--trainer.max_epochs=2")
    for version, steps in ((0, 2), (1, 4)):
        saved = tmp_path / f"version_{version}" / "checkpoints"
        held = {path.name: torch.load(path, weights_only=True) for path in saved.iterdir()}
        assert {name: one["global_step"] for name, one in held.items()} == {"last.ckpt": steps, "weights.ckpt": steps}
        assert not any("base_layer" in name for one in held.values() for name in one["state_dict"])
    record = json.loads((tmp_path / "version_1" / "run.json").read_text())
    assert record["trainer"]["strategy"] == "FSDP2"
    assert record["trainer"]["global_batch_size"] == 48
    main(["test", "--ckpt_path", str(saved / "last.ckpt")])
    assert json.loads((tmp_path / "test_0" / "run.json").read_text())["results"]["test/acc"] >= 0
