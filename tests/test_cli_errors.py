"""Invalid input: one line with the wrong name and the way out, exit code 2, no traceback, and nothing written."""

import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, refused
from PIL import Image
from test_cli_predict import write_bundle, write_images

from dynadapter.cli import main
from dynadapter.cli.errors import Mistake, describe
from dynadapter.cli.explain import explain
from dynadapter.training.callbacks import FlopsReport

Row = tuple[str, ...]
"""A command line in the folder of the fixture `world`, and what the message must contain."""
FIT = "fit -c tiny.yaml --trainer.fast_dev_run=true"
PREDICT = "predict --bundle flowers --images photos --out a.csv"


def fit(args: str, *words: str) -> Row:
    return (f"{FIT} {args}", *words)


def file(content: str, *words: str) -> Row:
    return (f"fit -c tiny.yaml -c FILE {content}", *words)


def data(task: str, *words: str, more: str = "") -> Row:
    return fit(f"--data=VTAB1k --data.root=. --data.task={task} {more}", *words)


def predict(part: str, other: str, *words: str) -> Row:
    return (PREDICT.replace(part, other), *words)


TABLE = [
    # the command
    ("trian photos", "there is no command 'trian'; did you mean 'train'?"),
    ("-c tiny.yaml fit", "command comes first", "fit, validate, test, flops, calibrate, train, predict"),
    ("configs vtba", "did you mean 'vtab'?"),
    ("configs vtab lora", "configs takes at most one name"),
    # config files
    ("fit -c", "-c needs a file", "quickstart"),
    ("fit --config=", "-c needs a file"),
    ("fit -c quick", "'quick'; did you mean 'quickstart'?"),
    ("fit -c vtabb", "'vtabb'; did you mean 'vtab'?", "vtab, "),
    ("fit -c tinny.yaml", "tinny.yaml'; did you mean 'tiny.yaml'?"),
    ("fit -c photos", "'photos' cannot be read: it is not a file; give a YAML file"),
    ("fit -c images/0.png", "0.png", "cannot be read"),
    file("model: [1, 2", "not valid YAML", "line 1"),
    file("a\tb", "not valid YAML", "line 1"),
    file("- model", "holds no keys"),
    file("model: 3", "model must be a mapping"),
    file("model: {every: 2}\nmodel: {every: 3}", "line 2", "'model'", "twice"),
    fit("--trainer.fast_dev_run=false --trainer.default_root_dir=tiny.yaml", "trainer.default_root_dir"),
    # values without a key, and keys without a value
    fit("extra", "'extra'", "--KEY VALUE"),
    fit("-epochs 3", "'-epochs' belongs to no setting; did you mean '--epochs'?"),
    fit("epochs=3", "did you mean '--epochs'?"),
    fit("--model", "--model needs a value"),
    fit("--sparsity=off", "'off' with that section; one setting is --sparsity.NAME VALUE"),
    ("fit vtab.yaml", "a config file is given as -c vtab.yaml"),
    ("test run/checkpoints/last.ckpt", "a checkpoint is given as --ckpt_path run/checkpoints/last.ckpt"),
    ("export flowers --out e", "a bundle is given as --bundle flowers"),
    predict("--images photos", "photos", "a folder of images is given as --images photos"),
    ("verify photos", "--data ImageFolder --data.root photos"),
    # what must be given
    ("test", "data is missing", "--data Shapes", "from --ckpt_path"),
    ("test --bundle flowers", "data is missing; give a config file with a data section, or --data"),
    ("test -c tiny.yaml", "test needs a checkpoint", "--ckpt_path"),
    ("fit --ckpt_path good.ckpt", "--config", "config.yaml"),
    ("report", "runs must be given, as in: dynadapter report RUN"),
    ("export --bundle flowers", "--out must be given"),
    ("push me/x", "--bundle must be given, as in: dynadapter push OWNER/NAME --bundle FOLDER"),
    fit("--data=VTAB1k --data.task=cifar", "data", "root must be given, as in --data.root"),
    file("sparsity: {keep: {class_path: Linear, init_args: {start: 1}}}", "sparsity.keep", "end must be given"),
    # keys
    fit("--conf vtab", "did you mean 'config'?"),
    fit("--epoch 3", "did you mean 'epochs'?"),
    fit("--seed 3", "did you mean 'seed_everything'?"),
    fit("--rank 4", "did you mean 'model.adapter.rank'?"),
    fit("--max_steps 4", "did you mean 'trainer.max_steps'?"),
    fit("--modle.adapter.rank 4", "did you mean 'model.adapter.rank'?"),
    fit("--model.rank=2", "'model.rank'; did you mean 'model.adapter.rank'?"),
    fit("--trainer.max_epoch=3", "'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
    fit("--checkpoint.monitr=val/acc", "'checkpoint.monitr'; did you mean 'checkpoint.monitor'?"),
    fit("--trainer.gpus 1", "trainer has: accelerator, strategy, devices"),
    fit("--model.num_classes=5", "model.num_classes", "comes from the data"),
    file("modle: {every: 2}", "'modle.every'; did you mean 'model.every'?"),
    file("early_exit: {policy: []}", "'early_exit.policy'; did you mean 'early_exit.policies'?"),
    file("fit: {model: {every: 3}}", "'fit.model.every'; did you mean 'model.every'?"),
    file("images: x", "'images'", "model, data"),
    file("lr: 3", "'lr' is short for 'model.optimizer.lr'"),
    ("verify --dta ImageFolder", "did you mean 'data'?"),
    ("sweep sweep.yaml", "'taks'; did you mean 'tasks'?"),
    # settings of a class
    fit("--model.adapter.rnak=4", "model.adapter: ", "'rnak'; did you mean 'rank'?"),
    fit("--model.adapter=RepAdapter --model.adapter.rank=4", "no setting 'rank'; LoRA, DoRA, FacT have it"),
    fit("--model.heads.hiden=4", "model.heads: ", "'hiden'; did you mean 'hidden'?"),
    fit("--model.optimizer=AdamW --model.optimizer.lrr=1", "model.optimizer: ", "'lrr'; did you mean 'lr'?"),
    fit("--model.optimizer.learning_rate=1", "--model.optimizer.help CLASS"),
    fit("--data.batchsize=4", "data: ", "'batchsize'; did you mean 'batch_size'?"),
    fit("--data=Shapes --data.val_fraction=0.1", "no setting 'val_fraction'; ImageFolder"),
    file("model: {adapter: {class_path: LoRA, init_args: {rnak: 3}}}", "LoRA has no setting 'rnak'", "'rank'"),
    file("model: {adapter: {class_path: LoRA, rank: 3}}", "init_args: {rank: 8}"),
    file("model: {adapter: {class_pth: LoRA}}", "'class_pth'; did you mean 'class_path'?"),
    # class names
    fit("--model.adapter=LoRa", "model.adapter", "'LoRa'; did you mean 'LoRA'?", "RepAdapter"),
    fit(
        "--model.adapter=Nope",
        "'Nope'",
        "AdaptFormer, Adapter, AdapterPlus, BitFit, ByBlocks",
        "LoRA, Peft, RepAdapter, SSF",
    ),
    fit("--model.heads=Blanced", "'Blanced'; did you mean 'Balanced'?"),
    fit("--data=Shape", "'Shape'; did you mean 'Shapes'?", "VTAB1k"),
    fit("--data.augment=randaug", "the only one is Augment"),
    fit("--model.optimizer=AdmW", "'AdmW'; did you mean 'AdamW'?"),
    fit("--early_exit.policies=[Confidense]", "'Confidense'; did you mean 'Confidence'?"),
    fit("--trainer.callbacks=[EarlyStoping]", "'EarlyStoping'; did you mean 'EarlyStopping'?"),
    fit("--trainer.logger wandb", "did you mean 'WandbLogger'?"),
    file("model: {adapter: {class_path: collections.OrderedDict}}", "'collections.OrderedDict'", "LoRA"),
    file("model: {adapter: {class_path: nowhere.Mine}}", "'nowhere'"),
    (
        "fit --data.image_size=32 --data=ImageFolder --data.root=.",
        "data: ",
        "--data CLASS before its settings",
        "ImageFolder, ImageLists",
    ),
    (
        "fit -c lora -c FILE data: {init_args: {batch_size: 7}}",
        "data: the class is missing",
        "give --data CLASS",
        "ImageFolder, ImageLists",
    ),
    fit("--model.heads=Heads", "model.heads: ", "--model.heads CLASS", "Attentive, Balanced"),
    # types
    fit("--model.every=2.5", "model.every", "whole number", "'2.5'"),
    fit("--model.adapter.rank=four", "model.adapter.rank", "whole number", "'four'"),
    fit("--model.pretrained=maybe", "model.pretrained", "true or false", "'maybe'"),
    fit("--model.exit_depths=3", "model.exit_depths", "a list", "'3'"),
    fit("--early_exit.policies=Confidence", "early_exit.policies: expected a list"),
    fit("--lr=0,01", "model.optimizer.lr: expected a number, not '0,01'"),
    fit("'--model.adapter={class_path: LoRA, init_args: {rank: x}}'", "model.adapter.rank", "whole number, not 'x'"),
    fit("--model.backbone_args=[3]", "model.backbone_args", "a mapping", "'[3]'"),
    fit("--sparsity.keep=0.9", "sparsity.keep", "'0.9'", "{class_path: Constant, init_args: {value: 0.9}}"),
    fit("--sparsity.masked=frozn", "sparsity.masked", "frozen, gradient", "'frozn'; did you mean 'frozen'?"),
    fit("--model.adapter.split=qv2", "model.adapter.split", "fused, qv", "'qv2'"),
    fit("--data.normalization=imagnet", "data.normalization", "'imagnet'; did you mean 'imagenet'?"),
    fit("--trainer.precision=17", "trainer.precision", "'17'", "bf16-mixed"),
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
    fit("--model.weights=broken.pth", "broken.pth"),
    # data
    fit("--data=VTAB1k --data.root=nowhere --data.task=cifar", "nowhere", "does not exist"),
    data("task_", "task_", "did you mean task"),
    data("task", "train800val200.txt", "train800.txt", more="--data.split=train800val200"),
    data("broken", "images/broken.png", "on_error"),
    fit("--data=ImageFolder --data.root=.", "train", "train/CLASS/image.png"),
    # checkpoints
    ("test --ckpt_path none.ckpt", "none.ckpt", "does not exist", "such as "),
    ("test --ckpt_path images", "is a folder", "such as "),
    ("test --ckpt_path short.ckpt", "short.ckpt", "not a readable checkpoint"),
    ("test --ckpt_path code.ckpt", "code.ckpt", "not a readable checkpoint"),
    ("test --ckpt_path foreign.ckpt", "foreign.ckpt", "not written by dynadapter"),
    ("test --ckpt_path future.ckpt", "format 99", "update dynadapter"),
    ("test --ckpt_path good.ckpt --model.adapter.rank=3", "does not fit", "lora_a"),
    ("test --ckpt_path good.ckpt --model.backbone_seed=3", "backbone", "backbone_args"),
    ("test --ckpt_path good.ckpt --data=VTAB1k --data.root=. --data.task=task", "classes"),
    ("predict --ckpt_path future.ckpt --out p.csv --images images", "format 99", "update dynadapter"),
    predict("--bundle flowers", "--ckpt_path run", "is a folder; give the file that fit wrote, such as run/ch"),
    predict("--bundle flowers", "--ckpt_path run/checkpoints/lats.ckpt", "did you mean 'run/checkpoints/last.c"),
    (
        "flops -c tiny.yaml --model.adapter=Adapter --merged=true",
        "Adapter",
        "BitFit, DoRA, FacT, LoRA, RepAdapter, SSF",
    ),
    # bundles
    predict("flowers", "flower", "there is no bundle flower; did you mean 'flowers'?"),
    predict("flowers", "hf_hub:me/x", "hf-hub:OWNER/NAME"),
    predict("flowers", "run", "run is a run, not a bundle; make one with dynadapter calibrate"),
    predict("flowers", "done", "done is not the bundle itself; give done/bundle"),
    ("bench --bundle flowers --arms [mergd]", "did you mean 'merged'?"),
    # train and report
    ("train phtos", "phtos does not exist; did you mean 'photos'?"),
    ("train photos --output x", "'--output'; did you mean '--out'?"),
    ("train photos --cost half", "goal.cost: expected a number, not 'half'"),
    ("train photos --goal.acc_drop 1", "'acc_drop'; did you mean 'accuracy_drop'?"),
    ("train --out x photos", "train needs the images first"),
    ("report runn", "runn does not exist; did you mean 'run'?"),
    ("report photos", "photos is not the folder of a run"),
]


@pytest.fixture(scope="module")
def world(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks, checkpoints, bundles and other files, most of them with one fault."""
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
    write_bundle(folder / "flowers", write_images(folder / "photos", 6))
    write_bundle(folder / "done" / "bundle", folder / "photos")
    (folder / "runs").mkdir()  # the parent of runs stays when a command fails
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "run.json").write_text("{}")
    (folder / "run" / "checkpoints" / "last.ckpt").write_text("")
    (folder / "sweep.yaml").write_text("taks: [a]\n")

    shutil.copy(tiny_run / "checkpoints" / "last.ckpt", folder / "good.ckpt")
    content = torch.load(folder / "good.ckpt", weights_only=True)
    whole = (folder / "good.ckpt").read_bytes()
    (folder / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}, "hyper_parameters": {}}, folder / "foreign.ckpt")
    torch.save({"state_dict": Path("code")}, folder / "code.ckpt")  # needs more than weights to load
    torch.save(content | {"dynadapter": content["dynadapter"] | {"format": 99}}, folder / "future.ckpt")
    return folder


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].replace(FIT, "FIT")[:90])
def test_mistake_is_one_line(row, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    line, is_file, content = row[0].partition("-c FILE ")
    if is_file:
        Path("wrong.yaml").write_text(content)
    before = {*world.rglob("*")}
    shown = refused([*shlex.split(line), *(["-c", "wrong.yaml"] if is_file else [])], capsys)
    assert shown.startswith("dynadapter: error: ")
    for words in row[1:]:
        assert words in shown
    for words in ("jsonargparse", "<class", "'?;"):
        assert words not in shown
    assert {*world.rglob("*")} == before


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
