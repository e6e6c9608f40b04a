"""``dynadapter train``: from images to a bundle, again after an interruption, and what it refuses."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from PIL import Image

from dynadapter import load
from dynadapter.backbones.availability import is_available
from dynadapter.calibrate import Goal
from dynadapter.cli import calibrate, imports, main, train, train_checks
from dynadapter.cli.errors import Mistake
from dynadapter.cli.report import Given
from dynadapter.data import ImageFolder
from dynadapter.training.module import ExitClassifier

TINY = [
    "--backbone=vit_tiny_patch16_224",
    "--model.pretrained=false",
    "--model.backbone_args={patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3}",
    "--model.every=1",
    "--data.image_size=32",
    "--trainer.accelerator=cpu",
    "--epochs=2",
]
COLOURS = {"blue": (20, 30, 200), "red": (200, 30, 20)}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 2 x 20 images, ``photos/CLASS/NUMBER.png``."""
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(20):
            Image.new("RGB", (20, 24), tuple(part + 2 * k for part in colour)).save(
                tmp_path / "photos" / name / f"{k}.png"
            )
    return tmp_path / "photos"


SAME = "give the same command with another goal"


def train_on(place: object, *more: str) -> list[str]:
    return [
        "train",
        str(place),
        *TINY,
        *(more if any("goal" in one or "cost" in one for one in more) else [*more, "--cost=0.8"]),
    ]


def fails(line: list[str], words: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


def test_folder_becomes_a_bundle(photos, capsys):
    main(train_on(photos))
    out = capsys.readouterr().out
    assert re.search(r"32 images of 2 classes to train on, 8 held out \(\d to \d of a class\)", out)
    assert "dynadapter predict --bundle runs/photos/bundle --images FOLDER --out labels.csv" in out
    bundle = load("runs/photos/bundle")
    assert bundle.class_names == ("blue", "red")
    assert Path("runs/photos/version_0/report/report.html").is_file()
    main(["predict", "--bundle=runs/photos/bundle", f"--images={photos}", "--out=labels.csv"])
    assert len(Path("labels.csv").read_text().splitlines()) == 41
    fails(train_on(photos), "runs/photos/bundle exists: classify images with", capsys)
    Path("runs/photos/version_0/report/report.html").unlink()  # interrupted after the bundle was written
    main(train_on(photos))
    assert Path("runs/photos/version_0/report/report.html").is_file()
    fails(train_on(photos), "runs/photos/bundle exists: classify images with", capsys)


def test_table_becomes_a_bundle(photos, tmp_path):
    rows = [f"photos/{name}/{k}.png,{name}" for name in COLOURS for k in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    main(train_on("list.csv", "--out=out", "--goal.accuracy_drop=5", "--goal.metric=balanced_accuracy"))
    bundle = load("out/bundle")
    assert bundle.class_names == ("blue", "red")
    assert bundle.config.measured["goal"].startswith("balanced accuracy at most 5 points below")


def test_monitored_checkpoint_is_calibrated(photos):
    main(train_on(photos, "--checkpoint.monitor=val/acc", "--checkpoint.mode=max"))
    assert Path("runs/photos/version_0/checkpoints/best.calibration.json").is_file()
    assert "calibrated" in Path("runs/photos/version_0/report/report.html").read_text()


def test_config_file_names_the_columns(photos, tmp_path, capsys):
    rows = [f"photos/{name}/{k}.png,{name},{k % 3}" for name in COLOURS for k in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["path,colour,label", *rows]))
    section = "{class_path: ImageTable, init_args: {label_column: colour, val_fraction: 0.5}}"
    (tmp_path / "table.yaml").write_text(f"data: {section}")
    main(train_on("list.csv", "-c", "table.yaml"))
    assert re.search(r"(1\d|2\d) images of 2 classes to train on", capsys.readouterr().out)
    assert load("runs/list/bundle").class_names == ("blue", "red")


@pytest.mark.parametrize(
    ("settings", "images", "steps"),
    [
        ([], 32, 1),
        (["--batch_size=4"], 32, 8),
        (["--data.batch_size", "4"], 32, 8),
        (["-c", "small.yaml"], 32, 4),
        (["-c", "small.yaml", "--batch_size=4"], 32, 8),
        (["--data.global_batch_size=5"], 32, 6),  # the incomplete batch is left out
        (["--batch_size=4", "--trainer.accumulate_grad_batches=2"], 32, 4),
        (["--batch_size=4", "-c", "two.yaml"], 32, 4),
        (["--data.shots=2", "--batch_size=1"], 4, 4),
        (["--data.shots=2"], 4, 1),
    ],
)
def test_epochs_follow_the_steps(settings, images, steps, photos, monkeypatch, capsys):
    Path("small.yaml").write_text("data: {class_path: ImageFolder, init_args: {batch_size: 8}}")
    Path("two.yaml").write_text("trainer: {devices: 2}")
    monkeypatch.setattr(train, "STEPS", 100)
    arguments = train._fit_arguments(train.read([str(photos), "--backbone=micro", *settings]))
    assert f"--trainer.max_epochs={min(40, round(100 / steps))}" in arguments
    assert capsys.readouterr().out.startswith(f"{images} images of 2 classes to train on, 8 held out")


@pytest.mark.parametrize(
    ("config", "more", "epochs", "steps", "devices"),
    [
        ("{max_steps: 9000}", [], -1, 9000, 1),  # own_images has 20 epochs
        ("{max_steps: 9000}", ["--epochs=3"], 3, 9000, 1),
        ("{max_steps: 9000, max_epochs: 4}", [], 4, 9000, 1),
        ("{max_steps: 9000}", ["--trainer.max_steps", "-1"], train.MOST, -1, 1),
        ("{devices: 2}", ["--trainer.max_steps=7"], -1, 7, 2),
        ("{devices: 2}", ["--trainer.devices=3"], train.MOST, -1, 3),
    ],
)
def test_trainer_settings_reach_fit(config, more, epochs, steps, devices, photos, capsys):
    Path("own.yaml").write_text(f"trainer: {config}")
    arguments = train._fit_arguments(train.read([str(photos), "--backbone=micro", "-c", "own.yaml", *more]))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (found["max_epochs"], found["max_steps"], int(found["devices"])) == (epochs, steps, devices)


def test_further_processes_only_train(photos, monkeypatch):
    Path("run").mkdir()
    monkeypatch.setattr(train, "_trained", lambda *_: Path("run"))
    monkeypatch.setattr("dynadapter.cli.runs.is_first_process", lambda: False)
    main(train_on(photos))
    assert not list(Path("run").iterdir())


def test_runs_are_named_as_the_folder(tmp_path):
    for name in ("photos.v2", "photos.v3"):
        Path(name).mkdir()
        assert train.read([name]).out == Path("runs", name)
    Path("list.v2.csv").write_text("path,label")
    assert train.read(["list.v2.csv"]).out == Path("runs/list.v2")


def test_same_command_continues(photos, monkeypatch, capsys):
    """A signal after the first epoch, then the same command, then one whose goal cannot be reached.

    Its settings include a logger, which a run folder alone may not name.
    """
    monkeypatch.setenv(imports.VARIABLE, "math")  # as --import=math
    after_epoch = ExitClassifier.on_train_epoch_end
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    line = train_on(photos, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir", "logs")
    fails(line, f"continue with: dynadapter train {photos} --backbone", capsys, code=143)
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", after_epoch)
    fails([*line, "--lr=1e-4"], "runs/photos holds a training with other settings: dynadapter fit", capsys)
    fails([*line, "--cost=0.001"], f"the training in runs/photos/version_0 is kept: {SAME}", capsys)
    assert not Path("runs/photos/version_1").exists()
    accuracy = [*(arg for arg in line if not arg.startswith("--cost")), "--goal.accuracy_drop=-90"]
    fails(accuracy, f"the training in runs/photos/version_1 is kept: {SAME}", capsys)
    begun = time.time()
    main(line)
    assert "the training in runs/photos/version_1 is finished" in capsys.readouterr().out
    assert Path("runs/photos/version_1/checkpoints/last.ckpt").stat().st_mtime < begun
    assert not Path("runs/photos/version_2").exists()


def test_older_run_with_a_checkpoint_continues(photos, monkeypatch, capsys):
    """Behind it are a run that was killed before it wrote anything, and a folder of the user."""
    after_epoch = ExitClassifier.on_train_epoch_end
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    line = train_on(photos)
    fails(line, "continue with", capsys, code=143)
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", after_epoch)
    for name in ("version_1", "version_old"):
        Path("runs/photos", name).mkdir()
    main(line)
    assert re.search("continuing after step .*, from runs/photos/version_0/checkpoints/", capsys.readouterr().out)


def test_line_that_began_a_training():
    """Runs that continue another one in the same folder have lines of their own."""
    lines = [
        "fit -c a --epochs=2",
        "fit --resume=out/version_0 --epochs=3",
        "fit --resume out/version_0",
        "fit -c a --epochs=2 --ckpt_path=out/version_0/checkpoints/last.ckpt --init_from=null",
    ]
    for number, line in enumerate(lines):
        Path("out", f"version_{number}").mkdir(parents=True)
        Path("out", f"version_{number}", "run.json").write_text(json.dumps({"command_line": f"dynadapter {line}"}))
    assert train._begun(Path("out")) == ["dynadapter", *lines[0].split()]
    assert train._continuing(Path("out/version_1"), ["fit"]) == ["fit", "--resume", "out/version_1"]  # keeps its epochs


@pytest.mark.parametrize(
    ("given", "arguments", "device"),
    [
        ("accelerator: cpu", ["accelerator=cpu"], ["--device=cpu"]),
        ("accelerator: cpu, devices: 2", ["accelerator=cpu"], ["--device=cpu"]),  # calibrate runs on one
        ("accelerator: auto", ["accelerator=auto"], []),
        ("accelerator: gpu, devices: [1]", ["accelerator=gpu", "devices=[1]"], []),
        ("devices: '3, 1'", ["devices=[3]"], []),
    ],
)
def test_device_of_the_training_measures(given, arguments, device, photos, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "_trained", lambda *_: Path("run"))
    monkeypatch.setattr(train, "require_trained", lambda _: None)
    monkeypatch.setattr("dynadapter.cli.report.find_run", lambda run: Given(Path(run), Path("last.ckpt")))
    monkeypatch.setattr("dynadapter.cli.app.DynCLI", calls.append)
    monkeypatch.setattr("dynadapter.cli.report.run", calls.append)
    Path("own.yaml").write_text(f"trainer: {{{given}}}")
    main(["train", str(photos), "--backbone=micro", "-c", "own.yaml"])
    assert [arg for arg in calls[0] if "trainer" in arg] == [f"--trainer.{one}" for one in arguments]
    assert calls[1] == ["run", *device]


@pytest.mark.parametrize("out", ["photos", "photos/runs", "photos/red/runs", "linked"])
def test_results_among_the_classes_are_refused(out, photos, capsys):
    Path("linked").symlink_to("photos")
    words = f"={out} lies among the class folders of photos; give a folder elsewhere"
    fails(train_on("photos", f"--out={out}"), f"--out{words}", capsys)
    fit = ["fit", "--data=ImageFolder", "--data.root=photos", *TINY[1:], "--model.backbone=vit_tiny_patch16_224"]
    fails([*fit, f"--trainer.default_root_dir={out}"], f"trainer.default_root_dir{words}", capsys)
    assert {path.name for path in photos.iterdir()} == {"blue", "red"}
    assert not (photos / "red" / "runs").exists()


@pytest.mark.parametrize("setting", ["out", "bundle", "trainer.default_root_dir"])
def test_calibrate_refuses_places_among_classes(setting, photos):
    place = "photos/red/more"
    trainer = SimpleNamespace(world_size=1, default_root_dir=place if setting.startswith("trainer") else "runs")
    given = {} if setting.startswith("trainer") else {setting: place}
    settings = calibrate.Settings(Goal(cost=0.5), "last.ckpt", **given)
    with pytest.raises(Mistake, match=f"{setting}={place} lies among the class folders of photos"):
        calibrate.calibrate(trainer, None, ImageFolder("photos"), settings)
    assert not Path(place).exists()


def test_results_beside_the_classes_are_allowed(photos, tmp_path):
    data = ImageFolder("photos")
    for out in ("photos/.runs", "photos2", "runs"):
        train_checks.require_outside(data, Path(out), "--out")
    photos.rename("train")
    (tmp_path / "photos").mkdir()
    Path("train").rename("photos/train")
    train_checks.require_outside(ImageFolder("photos"), Path("photos/runs"), "--out")
    with pytest.raises(Mistake, match="class folders of photos/train"):
        train_checks.require_outside(ImageFolder("photos"), Path("photos/train/runs"), "--out")


def test_layout_of_the_current_folder_has_a_name(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos / "red")
    fails(["train", "."], "expected train/CLASS/image.png or red/CLASS/image.png", capsys)


def test_chosen_settings_stay_when_repeated(photos, monkeypatch, capsys):
    """Another machine would choose another backbone, and more images other epochs; settings of the user count."""
    after_epoch = ExitClassifier.on_train_epoch_end
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(train, "choose_backbone", lambda: "vit_tiny_patch16_224")
    monkeypatch.setattr(train, "STEPS", 3)
    monkeypatch.setattr(train, "FEWEST", 1)
    line = ["train", str(photos), *TINY[1:-1], "--cost=0.8"]
    fails(line, "continue with", capsys, code=143)
    monkeypatch.setattr(ExitClassifier, "on_train_epoch_end", after_epoch)
    monkeypatch.setattr(train, "choose_backbone", lambda: pytest.fail("chose another backbone"))
    for k in range(50):
        Image.new("RGB", (20, 24), (k, 9, 99)).save(photos / "blue" / f"more{k}.png")
    fails([*line, "--epochs=2"], "runs/photos holds a training with other settings: dynadapter fit", capsys)
    main(line)
    chosen = "as the training in runs/photos: model.backbone=vit_tiny_patch16_224, trainer.max_epochs=3\n"
    assert chosen in capsys.readouterr().out
    settings = yaml.safe_load(Path("runs/photos/version_1/config.yaml").read_text())
    assert (settings["model"]["backbone"], settings["trainer"]["max_epochs"]) == ("vit_tiny_patch16_224", 3)


@pytest.mark.filterwarnings("ignore:.*skipped .* unreadable image")
def test_way_out_of_a_damaged_image(photos, capsys):
    """The failed run leaves no folder that would block the same command with one setting more."""
    for damaged in sorted((photos / "red").glob("*.png"))[:8]:
        damaged.write_bytes(damaged.read_bytes()[:60])
    fails(train_on(photos), "remove it, or give --data.on_error skip", capsys)
    main(train_on(photos, "--data.on_error", "skip"))
    assert Path("runs/photos/bundle").is_dir()


MISTAKES = [
    (["photos", "--checkpoint.dirpath=saved"], "train saves its checkpoints below --out; leave checkpoint.dirpath out"),
    (["photos", "--trainer.default_root_dir", "e"], "train saves its runs in --out; give --out FOLDER instead of"),
    (["photos", "--trainer={default_root_dir: e}"], "train saves its runs in --out; give --out FOLDER instead of"),
    (["photos", "--checkpoint={dirpath: saved}"], "train saves its checkpoints below --out; leave checkpoint.dirpath"),
    (["photos", "--model.weights", "w.pt"], "give --backbone NAME --model.weights FILE"),
    (["photos", "--model={weights: w.pt}"], "give --backbone NAME --model.weights FILE"),
    (["photos", "--trainer.max_steps=0", "--backbone=micro"], "trainer.max_steps=0 trains nothing; give more than 0"),
    (["photos", "--trainer.limit_train_batches=0.0"], "trainer.limit_train_batches=0.0 trains nothing"),
    (["photos", "--checkpoint", "null"], "checkpoint is off, and train calibrates and deploys a checkpoint"),
    (["photos", "--trainer.enable_checkpointing=no"], "trainer.enable_checkpointing is off, and train calibrates and"),
    (["photos", "--checkpoint.save_weights_only", "true"], "checkpoint.save_weights_only leaves out what an"),
    (["photos", "--trainer.fast_dev_run=true"], "trainer.fast_dev_run saves no run, and train deploys one; leave"),
    (["photos", "--trainer.fast_dev_run=3"], "trainer.fast_dev_run saves no run"),
    (["photos", "--trainer.barebones=true"], "trainer.barebones saves no run"),
    (["photos", "--trainer={fast_dev_run: 1}"], "trainer.fast_dev_run saves no run"),
    (["photos", "--checkpoint={save_weights_only: true}"], "checkpoint.save_weights_only leaves out"),
    (["photos", "--data.val_split", "out"], "has no setting 'val_split'"),
    (["photos", "out", "o21"], "there is no option 'out'; did you mean '--out'?"),
    (["photos", "-cost", "0.5"], "there is no option -cost; long options begin with two dashes, as in --cost"),
    (["--epochs=3"], "train needs the images first, as in: dynadapter train FOLDER"),
    (["no"], "no does not exist; give the folder of your images, with a folder for each class"),
    (["file.txt"], "file.txt is neither a folder nor a .csv or .parquet file"),
    (["photos", "--epoch=3"], "there is no key 'epoch'; did you mean"),
    (["photos", "--out"], "--out needs a value"),
    (["photos", "--cost=2"], "goal.cost"),
    (["photos", "--backbone=vit_tiny_patch16_224", "--cost=0.1"], "goal.cost=0.1 cannot be reached: with all samples"),
    ([], "train needs the images first, as in: dynadapter train FOLDER"),
    (["photos", "--cost=half"], "goal.cost: expected a number, not 'half'"),
    (["photos", "--goal.cost=0.5", "--goal.risk=0.1"], "are 2 goals"),
    (["photos", "--goal.reference=no.ckpt"], "goal.reference=no.ckpt does not exist; give a checkpoint or a bundle"),
    (["photos", "--goal.metric=f1"], "goal.metric=f1 must be accuracy or balanced_accuracy"),
    (["photos", "--goal.speed=2"], "there is no goal 'speed'; choose from cost"),
    (["photos", "--data.val_fraction=0"], "photos has 0 images to choose exits on; val_fraction above 0"),
    (["photos/red"], "photos/red holds 20 images and no folder for each class; expected train/CLASS/image.png or red/"),
    (["photos", "--backbone=vit_tyny_patch16_224", "--model.pretrained=false"], "timm has no model"),
]


@pytest.mark.parametrize("given", [["--epochs=0"], ["--trainer={max_epochs: 0}"], ["-c", "none.yaml"], ["--epochs=-3"]])
def test_training_without_a_step_is_refused(given, photos, capsys):
    Path("none.yaml").write_text("trainer: {max_epochs: 0}")
    words = f"trainer.max_epochs={'-3' if given == ['--epochs=-3'] else '0'} trains nothing; give more than 0"
    fails(["train", "photos", "--backbone=micro", *given], words, capsys)


def test_training_needs_an_end(photos, capsys):
    fails(["train", "photos", "--epochs=-1"], "trainer.max_epochs=-1 has no end; give more than 0", capsys)
    ends = ("max_steps=5", "max_time=00:00:01:00", "max_time.seconds=3", "callbacks+=EarlyStopping")
    for end in ends:
        train_checks.require_steps([], ["--trainer.max_epochs=-1", f"--trainer.{end}"])
    train_checks.require_steps([{"trainer": {"max_epochs": -1, "callbacks": [{"class_path": "EarlyStopping"}]}}], [])


def test_complete_config_is_no_mistake():
    """It names every setting, also those that are null or off."""
    checkpoint = {"dirpath": None, "save_weights_only": False}
    trainer = {"enable_checkpointing": None, "fast_dev_run": False, "barebones": False}
    layers = [{"checkpoint": checkpoint, "trainer": trainer}, {"checkpoint": True}]
    train_checks.require_checkpoints(layers, ["--checkpoint.dirpath=null", "--trainer.fast_dev_run=0"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("trainer: {enable_checkpointing: false}", "trainer.enable_checkpointing is off"),
        ("checkpoint: {save_weights_only: true}", "checkpoint.save_weights_only leaves out"),
        ("trainer: {fast_dev_run: true}", "trainer.fast_dev_run saves no run"),
        ("trainer: 5", "trainer must be a mapping, as in 'trainer: {NAME: VALUE}', not 5"),
        ("trainer: max_epochs", "trainer"),
    ],
)
def test_config_that_saves_no_run_is_refused(config, words, photos, capsys):
    Path("own.yaml").write_text(config)
    fails(train_on("photos", "-c", "own.yaml"), words, capsys)
    assert not Path("runs").exists()


def test_heads_without_a_step_are_not_deployed(photos, capsys):
    """The second command finds the finished training."""
    for _ in range(2):
        fails(train_on(photos, "--trainer.max_time=00:00:00:00"), "version_0 made no step; give another --out", capsys)
    assert not Path("runs/photos/bundle").exists()


@pytest.mark.parametrize(("args", "words"), MISTAKES)
def test_mistakes_are_one_line(args, words, photos, capsys):
    Path("file.txt").write_text("x")
    fails(["train", *args, *(TINY[1:] if len(args) > 1 else [])], words, capsys)
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


def test_too_few_images_are_refused_at_once(tmp_path, capsys):
    for name in COLOURS:
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / name / "0.png")
    fails(["train", "few"], "few has 0 images to choose exits on;", capsys)


def test_help_names_what_it_writes(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    assert "usage: dynadapter train FOLDER" in out
    assert f"[{train.FEWEST} to {train.MOST}:" in out


# ---- the backbone


def test_packaged_backbone_is_available():
    assert is_available("micro")


@pytest.mark.parametrize(
    ("answer", "expected"), [(lambda: None, True), (lambda: time.sleep(30), False), (lambda: 1 / 0, False)]
)
def test_hub_is_asked_for_a_while(answer, expected, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: answer())
    begun = time.monotonic()
    assert is_available(train.CPU, seconds=0.3) is expected
    assert time.monotonic() - begun < 2


def test_cached_weights_are_available(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/some/file")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("asked"))
    assert is_available(train.CPU)


@pytest.mark.parametrize(
    ("gpu", "hub", "expected"),
    [(True, True, train.GPU), (False, True, train.CPU), (True, False, "micro"), (False, False, "micro")],
)
def test_backbone_fits_the_machine(gpu, hub, expected, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("dynadapter.backbones.availability.is_available", lambda name: hub)
    assert train.choose_backbone() == expected
    out = capsys.readouterr().out
    assert ("training micro" in out) is (not hub)
    assert ("--backbone NAME --model.weights FILE" in out) is (not hub)
