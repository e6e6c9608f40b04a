"""Invalid input: one line with the wrong name and the way out, exit code 2, and no traceback."""

import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import TINY, refused
from PIL import Image

from dynadapter.cli import main
from dynadapter.cli.errors import Mistake, describe
from dynadapter.cli.explain import explain
from dynadapter.training.callbacks import FlopsReport


class Row(NamedTuple):
    """Invalid input, and what the line must name."""

    args: str  # {W} is the folder of the fixture `world`
    names: tuple[str, ...]


def fit(args: str, *names: str) -> Row:
    return Row(f"fit -c {TINY} --trainer.fast_dev_run=true {args}", names)


def file(content: str, *names: str) -> Row:
    return Row(f"fit -c {TINY} -c FILE {content}", names)


def data(task: str, *names: str, more: str = "") -> Row:
    return fit(f"--data=VTAB1k --data.root={{W}} --data.task={task} {more}", *names)


TABLE = [
    # the command
    Row("fti", ("'fti'", "did you mean 'fit'")),
    Row(f"-c {TINY} fit", ("command comes first", "fit, validate, test, flops, calibrate, train, predict")),
    Row("fit -c vtabb", ("'vtabb'", "did you mean 'vtab'", "vtab, ")),
    Row("fit", ("data is missing", "--data Shapes")),
    Row("test", ("data is missing", "--ckpt_path")),
    Row("test --ckpt x.ckpt", ("'ckpt'", "did you mean 'ckpt_path'")),
    Row("fit -c", ("-c needs a file", "quickstart")),
    fit("extra", "'extra'", "--KEY VALUE"),
    fit("--model", "--model needs a value"),
    fit(f"--model={TINY}x", "tiny.yamlx"),
    # keys
    fit("--modle.every=2", "'modle.every'", "'model.every'"),
    fit("--model.evry=2", "'model.evry'", "'model.every'"),
    fit("--model.rank=2", "'model.rank'", "'model.adapter.rank'"),
    fit("--trainer.max_epoch=3", "'trainer.max_epoch'", "'trainer.max_epochs'"),
    fit("--checkpoint.monitr=val/acc", "'checkpoint.monitr'", "'checkpoint.monitor'"),
    fit("--sparsity.shalow=null", "'sparsity.shalow'", "'sparsity.shallow'"),
    fit("--print_confg", "'print_confg'", "'print_config'"),
    fit("--model.num_classes=5", "model.num_classes", "comes from the data"),
    file("modle: {every: 2}", "'modle.every'", "'model.every'"),
    file("early_exit: {policy: []}", "'early_exit.policy'", "'early_exit.policies'"),
    file("fit: {model: {every: 3}}", "'fit.model.every'", "'model.every'"),
    file("model: 3", "model must be a mapping"),
    file("images: x", "'images'", "model, data"),
    # settings of a class
    fit("--model.adapter.rnak=4", "model.adapter", "'rnak'", "'rank'"),
    fit("--model.heads.hiden=4", "model.heads", "'hiden'", "'hidden'"),
    fit("--model.optimizer=AdamW --model.optimizer.lrr=1", "model.optimizer", "'lrr'", "'lr'"),
    fit("--data.batchsize=4", "data", "'batchsize'", "'batch_size'"),
    file("model: {adapter: {class_path: LoRA, init_args: {rnak: 3}}}", "LoRA", "'rnak'", "'rank'"),
    file("model: {adapter: {class_path: LoRA, rank: 3}}", "init_args: {rank: 8}"),
    file("model: {adapter: {class_pth: LoRA}}", "'class_pth'", "'class_path'"),
    file("early_exit: {policies: [{class_path: Confidence, init_args: {treshold: 0.5}}]}", "'treshold'", "'threshold'"),
    file("sparsity: {keep: {class_path: Linear, init_args: {start: 1}}}", "sparsity.keep", "end must be given"),
    fit("--data=VTAB1k --data.task=cifar", "data", "root must be given", "--data.root"),
    # class names
    fit("--model.adapter=LoRa", "model.adapter", "'LoRa'", "'LoRA'", "RepAdapter"),
    fit(
        "--model.adapter=Nope",
        "'Nope'",
        "AdaptFormer, Adapter, AdapterPlus, BitFit, ByBlocks",
        "LoRA, Peft, RepAdapter, SSF",
    ),
    fit("--model.heads=Blanced", "'Blanced'", "'Balanced'"),
    fit("--data=Shape", "'Shape'", "'Shapes'", "VTAB1k"),
    fit("--model.optimizer=AdmW", "'AdmW'", "'AdamW'"),
    fit("--model.lr_schedule=Cosin", "'Cosin'", "'Cosine'"),
    fit("--exit_weights.weighting=EarlyLate", "'EarlyLate'", "'EarlyToLate'"),
    fit("--early_exit.policies=[Confidense]", "'Confidense'", "'Confidence'"),
    fit("--trainer.callbacks=[EarlyStoping]", "'EarlyStoping'", "'EarlyStopping'"),
    fit("--trainer.logger=CVSLogger", "'CVSLogger'", "'CSVLogger'"),
    file("model: {adapter: {class_path: collections.OrderedDict}}", "'collections.OrderedDict'", "LoRA"),
    file("model: {adapter: {class_path: nowhere.Mine}}", "'nowhere'"),
    file("trainer: {callbacks: [{class_path: EarlyStoping}]}", "'EarlyStoping'", "'EarlyStopping'"),
    Row(
        "fit --data.image_size=32 --data=ImageFolder --data.root={W}",
        ("data: ", "--data CLASS before its settings", "ImageFolder, ImageLists"),
    ),
    fit("--model.heads=Heads", "model.heads: ", "--model.heads CLASS", "Attentive, Balanced"),
    # types
    fit("--model.every=two", "model.every", "whole number", "'two'"),
    fit("--model.every=2.5", "model.every", "whole number", "'2.5'"),
    fit("--model.adapter.rank=four", "model.adapter.rank", "whole number", "'four'"),
    fit("--model.pretrained=maybe", "model.pretrained", "true or false", "'maybe'"),
    fit("--model.exit_depths=3", "model.exit_depths", "a list", "'3'"),
    fit("--model.optimizer=AdamW --model.optimizer.lr=fast", "model.optimizer.lr: expected a number, not 'fast'"),
    fit("'--model.adapter={class_path: LoRA, init_args: {rank: x}}'", "model.adapter.rank", "whole number, not 'x'"),
    fit("--model.backbone_args=[3]", "model.backbone_args", "a mapping", "'[3]'"),
    fit("--sparsity.keep=0.9", "sparsity.keep", "'0.9'", "{class_path: Constant, init_args: {value: 0.9}}"),
    fit("--sparsity.masked=frozn", "sparsity.masked", "frozen, gradient", "'frozen'"),
    fit("--model.adapter.split=qv2", "model.adapter.split", "fused, qv", "'qv2'"),
    fit("--data.normalization=imagnet", "data.normalization", "'imagnet'", "'imagenet'"),
    fit("--trainer.precision=17", "trainer.precision", "'17'", "bf16-mixed"),
    fit("--trainer.max_epochs=three", "trainer.max_epochs", "whole number", "'three'"),
    fit("--seed_everything=x", "seed_everything", "whole number", "'x'"),
    # values
    fit("--model.every=9", "every=9", "1 to 3"),
    fit("--model.exit_depths=[2,9]", "[2, 9]", "from 1 to 3"),
    fit("--model.adapter.rank=0", "rank=0", "at least 1"),
    fit("--model.adapter.scale=-1", "scale=-1", "above 0"),
    fit("--model.adapter.dropout=1.5", "dropout=1.5", "below 1"),
    fit("--model.adapter=RepAdapter --model.adapter.groups=3", "groups=3", "bottleneck=8"),
    fit("--model.adapter.targets=[\"'*.nothing'\"]", "'*.nothing'", "blocks.*.attn.qkv"),
    fit("--model.label_smoothing=1.5", "label_smoothing=1.5", "below 1"),
    fit("--model.mixing=Mixing --model.mixing.prob=2", "prob=2", "[0, 1]"),
    fit("--model.optimizer=AdamW --model.optimizer.lr=-1", "-1"),
    fit("--model.lr_schedule=Warmup --model.lr_schedule.fraction=2", "fraction=2", "[0, 1)"),
    fit("--sparsity.keep=Constant --sparsity.keep.value=2", "keep=", "[0, 1]"),
    fit("'--early_exit.policies=[{class_path: Confidence, init_args: {threshold: 1.5}}]'", "1.5", "[0, 1]"),
    fit(
        "'--early_exit.policies=[{class_path: Confidence, init_args: {threshold: [0.9, 0.8, 0.7]}}]'",
        "3 values",
        "2 early exits",
    ),
    fit("--early_exit.policies=[Never,Never]", "never", "once"),
    fit("--data.batch_size=0", "batch_size", "at least 1"),
    fit("--data.image_size=4", "4"),
    fit("--trainer.accelerator=gpuu", "gpuu", "cpu"),
    fit("--trainer.devices=0", "devices"),
    fit("--trainer.strategy=ddpp", "ddpp", "ddp"),
    # backbones
    fit("--model.backbone=vit_tinny_patch16_224", "'vit_tinny_patch16_224'", "vit_tiny_patch16_224"),
    fit("--model.backbone=vgg11 --model.backbone_args=null", "VGG", "VisionTransformer"),
    fit("--model.backbone_args.dpth=4", "'dpth'", "depth"),
    fit("--model.backbone_args.embed_dim=25", "embed_dim"),
    fit("--model.weights=nowhere.pth", "nowhere.pth", ".safetensors"),
    fit("--model.weights={W}/broken.pth", "broken.pth"),
    # files
    Row("fit -c {W}/tinny.yaml", ("tinny.yaml", "did you mean", "tiny.yaml")),
    Row("fit -c {W}", ("cannot be read",)),
    Row("fit -c {W}/images/0.png", ("0.png", "cannot be read")),
    file("model: [1, 2", "not valid YAML", "line 1"),
    file("a\tb", "not valid YAML", "line 1"),
    file("- model", "holds no keys"),
    file("model: {every: 2}\nmodel: {every: 3}", "line 2", "'model'", "twice"),
    fit("--trainer.fast_dev_run=false --trainer.default_root_dir={W}/tiny.yaml", "trainer.default_root_dir"),
    # data
    fit("--data=VTAB1k --data.root=nowhere --data.task=cifar", "nowhere", "does not exist"),
    data("task_", "task_", "did you mean task"),
    data("task", "train800val200.txt", "train800.txt", more="--data.split=train800val200"),
    data("broken", "images/broken.png", "on_error"),
    fit("--data=ImageFolder --data.root={W}", "train", "train/CLASS/image.png"),
    # checkpoints
    Row(f"test -c {TINY}", ("test needs a checkpoint", "--ckpt_path")),
    Row("test --ckpt_path {W}/none.ckpt", ("none.ckpt", "does not exist", "such as {W}/")),
    Row("test --ckpt_path {W}", ("is a folder", "such as {W}/")),
    Row("test --ckpt_path last", ("last", "does not exist")),
    Row("test --ckpt_path", ("--ckpt_path needs a value",)),
    Row("test --ckpt_path {W}/images/0.png", ("0.png", "not a readable checkpoint")),
    Row("test --ckpt_path {W}/short.ckpt", ("short.ckpt", "not a readable checkpoint")),
    Row("test --ckpt_path {W}/code.ckpt", ("code.ckpt", "not a readable checkpoint")),
    Row("test --ckpt_path {W}/foreign.ckpt", ("foreign.ckpt", "not written by dynadapter")),
    Row("test --ckpt_path {W}/future.ckpt", ("format 99", "update dynadapter")),
    Row("fit --ckpt_path {W}/good.ckpt", ("--config", "config.yaml")),
    Row("test --ckpt_path {W}/good.ckpt --model.adapter.rank=3", ("does not fit", "lora_a")),
    Row("test --ckpt_path {W}/good.ckpt --model.backbone_seed=3", ("backbone", "backbone_args")),
    Row("test --ckpt_path {W}/good.ckpt --data=VTAB1k --data.root={W} --data.task=task", ("classes",)),
    # predict
    Row("predict --ckpt_path {W}/good.ckpt --out {W}/p.csv", ("images must be given",)),
    Row("predict --ckpt_path {W}/good.ckpt --out {W}/p.csv --images {W}/nowhere", ("{W}/nowhere", "does not exist")),
    Row("predict --ckpt_path {W}/good.ckpt --out {W}/p.csv --images {W}/nolists", ("no image", ".png")),
    Row(
        "predict --ckpt_path {W}/good.ckpt --images {W}/images/broken.png --output {W}/p.csv",
        ("none of the images can be read", "p.csv.skipped.csv"),
    ),
    Row("predict --ckpt_path {W}/future.ckpt --out {W}/p.csv --images {W}/images", ("format 99", "update dynadapter")),
    Row("predict --ckpt_path {W}/good.ckpt --images {W}/images --output {W}/tiny.yaml", ("tiny.yaml", "no format")),
    Row("flops -c {F} --model.adapter=Adapter --merged=true", ("Adapter", "BitFit, DoRA, FacT, LoRA, RepAdapter, SSF")),
]


@pytest.fixture(scope="module")
def world(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks, checkpoints and other files, most of them with one fault."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(TINY, folder)
    images = folder / "images"
    images.mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (90 * k, 0, 0)).save(images / f"{k}.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:40])
    for task, lines in {
        "task": "images/0.png 0\nimages/1.png 1",
        "broken": "images/broken.png 0\nimages/1.png 1",
    }.items():
        (folder / task).mkdir()
        (folder / task / "images").symlink_to(images)
        (folder / task / "train800.txt").write_text(lines)
        (folder / task / "val200.txt").write_text("images/0.png 0\nimages/1.png 1")
        (folder / task / "test.txt").write_text("images/0.png 0\nimages/1.png 1")
    (folder / "nolists").mkdir()

    shutil.copy(tiny_run / "checkpoints" / "last.ckpt", folder / "good.ckpt")
    content = torch.load(folder / "good.ckpt", weights_only=True)
    whole = (folder / "good.ckpt").read_bytes()
    (folder / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}, "hyper_parameters": {}}, folder / "foreign.ckpt")
    torch.save({"state_dict": Path("code")}, folder / "code.ckpt")  # needs more than weights to load
    torch.save(content | {"dynadapter": content["dynadapter"] | {"format": 99}}, folder / "future.ckpt")
    return folder


def command(row: Row, world: Path) -> list[str]:
    """Return the command line of a row; write its config file if it has one."""
    text = row.args.replace("{W}", str(world)).replace("{F}", TINY)
    if "-c FILE " not in text:
        return shlex.split(text)
    start, _, content = text.partition("-c FILE ")
    (world / "wrong.yaml").write_text(content)
    return [*start.split(), "-c", str(world / "wrong.yaml")]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.args.replace(TINY, "TINY")[:90])
def test_mistake_is_one_line(row, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        main(command(row, world))
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("INFO")]  # Lightning's
    assert ending.value.code == 2
    assert len([line for line in lines if line.startswith("dynadapter: error: ")]) == 1, shown.err
    assert lines[-1].startswith("dynadapter: error: ")
    assert "Traceback" not in shown.err + shown.out
    assert "jsonargparse" not in lines[-1]
    assert "<class" not in lines[-1]
    for name in row.names:
        assert name.replace("{W}", str(world)) in lines[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing is left behind


def test_no_traceback_from_the_program(monkeypatch, capsys):
    args = ["dynadapter", "fit", "-c", TINY, "--model.every=9", "--trainer.fast_dev_run=true"]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("dynadapter.cli", run_name="__main__")
    shown = capsys.readouterr().err
    assert ending.value.code == 2
    assert [line[:19] for line in shown.splitlines() if "every=9" in line] == ["dynadapter: error: "]
    assert "Traceback" not in shown


def test_debug_shows_traceback():
    with pytest.raises(ValueError, match="every=9"):
        main(["fit", "-c", TINY, "--model.every=9", "--trainer.fast_dev_run=true", "--debug"])
    with pytest.raises(Mistake, match="evry"):
        main(["--debug", "fit", "-c", TINY, "--model.evry=9"])


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, AttributeError])
def test_bug_has_exit_code_1(kind, monkeypatch, capsys):
    def fails(self, *args, **kwargs):
        raise kind("oh dear")

    monkeypatch.setattr(FlopsReport, "setup", fails)
    line = refused(["fit", "-c", TINY, "--trainer.fast_dev_run=true"], capsys, code=1)
    assert line.startswith(f"dynadapter: bug: {kind.__name__}: ")
    assert "oh dear" in line
    assert "--debug" in line


def test_bug_in_an_operation(monkeypatch, capsys):
    monkeypatch.setattr(FlopsReport, "setup", lambda self, *args, **kwargs: len(None))
    assert "bug: TypeError" in refused(["fit", "-c", TINY, "--trainer.fast_dev_run=true"], capsys, code=1)


def test_out_of_memory_is_input_error():
    line, code = describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert code == 2
    assert "out of memory" in line


def test_ctrl_c_before_the_start(monkeypatch, capsys):
    def pressed(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynadapter.cli.app.DynCLI", pressed)
    with pytest.raises(SystemExit) as ending:
        main(["fit"])
    assert ending.value.code == 130
    assert capsys.readouterr().err == "dynadapter: interrupted\n"


def test_unknown_message_in_one_line():
    assert explain("something\n  new", {}, []) == "something new"
