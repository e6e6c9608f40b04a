"""Typing errors in commands and configs: one line with the wrong word and the way out, exit code 2."""

import shlex
from pathlib import Path

import pytest
from commands import refused
from PIL import Image
from test_cli_predict import write_bundle, write_images

PREDICT = "predict --bundle flowers --images photos --out a.csv"
FIT = "fit --data Shapes"
TYPOS = [
    # commands
    ("trian photos", "'trian'; did you mean 'train'?"),
    ("predcit --bundle flowers", "did you mean 'predict'?"),
    ("calib --ckpt_path x", "did you mean 'calibrate'?"),
    ("--bundle flowers predict", "the command comes first"),
    # configs
    ("fit -c quick", "'quick'; did you mean 'quickstart'?"),
    ("fit -c vtba", "'vtba'; did you mean 'vtab'?"),
    ("fit --config=", "-c needs a file"),
    ("fit -c photos", "'photos' cannot be read: it is not a file; give a YAML file"),
    ("fit --conf vtab", "did you mean 'config'?"),
    ("fit vtab.yaml", "a config file is given as -c vtab.yaml"),
    ("fit -c short.yaml", "'lr' is short for 'model.optimizer.lr'"),
    ("fit -c key.yaml", "'model.adaptor'; did you mean 'model.adapter'?"),
    ("configs vtba", "did you mean 'vtab'?"),
    ("configs vtab lora", "configs takes at most one name"),
    # keys of fit
    (f"{FIT} --epoch 3", "did you mean 'epochs'?"),
    (f"{FIT} -epochs 3", "'-epochs' belongs to no setting; did you mean '--epochs'?"),
    (f"{FIT} epochs=3", "did you mean '--epochs'?"),
    (f"{FIT} --batch-size 8", "did you mean 'batch_size'?"),
    (f"{FIT} --seed 3", "did you mean 'seed_everything'?"),
    (f"{FIT} --rank 4", "did you mean 'model.adapter.rank'?"),
    (f"{FIT} --max_steps 4", "did you mean 'trainer.max_steps'?"),
    (f"{FIT} --adapter LoRA", "did you mean 'model.adapter'?"),
    (f"{FIT} --modle.adapter.rank 4", "did you mean 'model.adapter.rank'?"),
    (f"{FIT} --model.optimiser=AdamW", "did you mean 'model.optimizer'?"),
    (f"{FIT} --trainer.gpus 1", "trainer has: accelerator, strategy, devices"),
    # values of fit
    (f"{FIT} --model.adapter=lora", "did you mean 'LoRA'?"),
    (f"{FIT} --model.adapter=RepAdapter --model.adapter.rank=4", "no setting 'rank'; LoRA, DoRA, FacT have it"),
    (f"{FIT} --model.optimizer.learning_rate=1", "--model.optimizer.help CLASS"),
    (f"{FIT} --data.val_fraction=0.1", "no setting 'val_fraction'; ImageFolder"),
    (f"{FIT} --data.augment=randaug", "the only one is Augment"),
    (f"{FIT} --sparsity=off", "'off' with that section; one setting is --sparsity.NAME VALUE"),
    (f"{FIT} --early_exit.policies=Confidence", "early_exit.policies: expected a list"),
    (f"{FIT} --lr=0,01", "model.optimizer.lr: expected a number, not '0,01'"),
    (f"{FIT} --trainer.logger wandb", "did you mean 'WandbLogger'?"),
    # train and report
    ("train phtos", "phtos does not exist; did you mean 'photos'?"),
    ("train photos --output x", "'--output'; did you mean '--out'?"),
    ("train photos --cost half", "goal.cost: expected a number, not 'half'"),
    ("train photos --goal.acc_drop 1", "'acc_drop'; did you mean 'accuracy_drop'?"),
    ("train --out x photos", "train needs the images first"),
    ("report", "runs must be given, as in: dynadapter report RUN"),
    ("report runn", "runn does not exist; did you mean 'run'?"),
    ("report photos", "photos is not the folder of a run"),
    ("report run --split tset", "did you mean 'test'?"),
    # bundles, images and checkpoints
    (PREDICT.replace("flowers", "flower"), "there is no bundle flower; did you mean 'flowers'?"),
    (PREDICT.replace("flowers", "hf_hub:me/x"), "hf-hub:OWNER/NAME"),
    (PREDICT.replace("flowers", "run"), "run is a run, not a bundle; make one with dynadapter calibrate"),
    (PREDICT.replace("flowers", "done"), "done is not the bundle itself; give done/bundle"),
    (
        PREDICT.replace("--bundle flowers", "--ckpt_path run"),
        "is a folder; give the file that fit wrote, such as run/ch",
    ),
    (
        PREDICT.replace("--bundle flowers", "--ckpt_path run/checkpoints/lats.ckpt"),
        "did you mean 'run/checkpoints/last.c",
    ),
    (PREDICT.replace("photos", "photo"), "--images: photo does not exist"),
    (PREDICT.replace("--images photos", "photos"), "a folder of images is given as --images photos"),
    (PREDICT.replace("a.csv", "a.xls"), "a.xls names no format"),
    (PREDICT.replace("--out", "--ouput"), "did you mean 'out'?"),
    (f"{PREDICT} --treshold 0.9", "did you mean 'threshold'?"),
    (f"{PREDICT} --top_k two", "top_k: expected a whole number, not 'two'"),
    (f"{PREDICT} --policy Confidense", "did you mean 'Confidence'?"),
    ("test --bundle flowers", "data is missing; give a config file with a data section, or --data"),
    ("test --bundle flowers --data ImageFolder", "root must be given, as in --data.root"),
    ("test --bundle flowers --data ImagFolder --data.root photos", "did you mean 'ImageFolder'?"),
    ("test run/checkpoints/last.ckpt", "a checkpoint is given as --ckpt_path run/checkpoints/last.ckpt"),
    ("calibrate --ckpt_path run/checkpoints/last.ckpt --cost 0.5", "not a readable checkpoint"),
    ("export flowers --out e", "a bundle is given as --bundle flowers"),
    ("export --bundle flowers", "--out must be given"),
    ("bench --bundle flowers --batch_size 8", "did you mean 'batch_sizes'?"),
    ("bench --bundle flowers --arms [mergd]", "did you mean 'merged'?"),
    ("bench --bundle flower", "did you mean 'flowers'?"),
    ("push me/x", "--bundle must be given, as in: dynadapter push OWNER/NAME --bundle FOLDER"),
    ("verify photos", "--data ImageFolder --data.root photos"),
    ("verify --dta ImageFolder", "did you mean 'data'?"),
    ("sweep", "file must be given, as in: dynadapter sweep FILE"),
    ("sweep sweep.yaml", "'taks'; did you mean 'tasks'?"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typos")
    write_bundle(folder / "flowers", write_images(folder / "photos", 6))
    write_bundle(folder / "done" / "bundle", folder / "photos")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "run.json").write_text("{}")
    (folder / "run" / "checkpoints" / "last.ckpt").write_text("")
    (folder / "short.yaml").write_text("lr: 3\ndata: Shapes\n")
    (folder / "key.yaml").write_text("model: {adaptor: LoRA}\ndata: Shapes\n")
    (folder / "sweep.yaml").write_text("taks: [a]\n")
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    return folder


@pytest.mark.parametrize(("line", "words"), TYPOS, ids=lambda value: value[:60])
def test_typo_is_one_line(line, words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = {*world.rglob("*")}
    shown = refused(shlex.split(line), capsys)
    assert shown.startswith("dynadapter: error: ")
    assert words in shown
    assert "'?;" not in shown
    assert {*world.rglob("*")} == before
