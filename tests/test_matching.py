"""What a model and its data agree on: labels, class names and preprocessing, in Python and on the command line."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, VIT, raises_one_line
from lightning.pytorch import LightningDataModule
from PIL import Image
from tiny import loader, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.backbones import create_backbone, own_preprocessing, set_image_size
from dynadapter.cli import main
from dynadapter.data import ImageFolder, Shapes, VTAB1k
from dynadapter.data.classes import match_classes
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def coloured(root: Path, classes: list[str], splits: dict[str, int]) -> Path:
    """Write images whose first pixel says their class, at any brightness."""
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., k % 3] += np.uint8(60 + 40 * (k // 3))
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images that are easy to tell apart."""
    return coloured(tmp_path_factory.mktemp("three"), ["a", "b", "c"], {"train": 8, "val": 2, "test": 4})


def part_of(root: Path, folder: Path, classes: str) -> Path:
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for name in classes:
            (folder / split / name).symlink_to(root / split / name)
    return folder


def learner(classes: int = 3, **options: Any) -> ExitClassifier:
    return make_classifier(num_classes=classes, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **options)


@pytest.fixture(scope="module")
def learned(three: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExitClassifier, Path]:
    """A model trained in Python without class names, and its checkpoint."""
    model, fitting = learner(), trainer(max_epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting.fit(model, datamodule=ImageFolder(three, batch_size=8, normalization="half", resize="crop"))
    path = tmp_path_factory.mktemp("run") / "a.ckpt"
    fitting.save_checkpoint(path)
    return model, path


def accuracy(model: ExitClassifier, data: Any) -> float:
    [measured] = trainer().test(model, datamodule=data, verbose=False)
    return measured["test/acc"]


# ---- predict


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("batch", "files"),
    [
        (IMAGES, [""] * 6),
        ([IMAGES], [""] * 6),
        ([IMAGES, torch.tensor([0, 1, 0, 2, 0, -100])], [""] * 6),
        ([IMAGES, torch.eye(6)], [""] * 6),  # mixed labels
        ((IMAGES, list("abcdef")), list("abcdef")),
        ([IMAGES, tuple("abcdef"), torch.zeros(6)], list("abcdef")),
    ],
)
def test_predict_keeps_every_image(batch: Any, files: list[str]) -> None:
    model = make_classifier().eval()
    with torch.no_grad():
        expected = [model.class_names[k] for k in model.net(IMAGES)[-1].argmax(-1)]
        got = model.predict_step(batch, 0)
    assert (got["files"], got["classes"]) == (files, expected)
    assert len(got["confidence"]) == len(got["exit_index"]) == 6


@pytest.mark.parametrize("batch", [{"images": IMAGES}, IMAGES[0], [IMAGES[0], IMAGES[1]], "abc", []])
def test_predict_refuses_what_are_no_images(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"a batch to predict is .*; give images \(batch, channels, height, width\)"):
        make_classifier().predict_step(batch, 0)


def test_predict_on_labelled_loader(three: Path) -> None:
    data = ImageFolder(three, image_size=32, batch_size=5)
    got = trainer().predict(learner(), data.test_dataloader())
    assert sum(len(batch["classes"]) for batch in got) == 12


# ---- data modules of a user


@pytest.mark.parametrize(
    ("name", "value"), [("dataset", TensorDataset(torch.zeros(1))), ("preprocessing", torch.nn.Identity())]
)
def test_data_with_a_name_of_ours(name: str, value: Any) -> None:
    class Own(LightningDataModule):
        class_names = [str(k) for k in range(CLASSES)]  # noqa: RUF012

        def train_dataloader(self) -> Any:
            return loader(1)

    data, model = Own(), make_classifier()
    setattr(data, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no validation
        trainer(max_steps=1).fit(model, datamodule=data)
    assert (model.preprocessing, model.images) == ({}, {})


# ---- class names


@pytest.mark.parametrize(
    ("own", "names", "index"),
    [
        (["b", "a"], ["a", "b", "c"], [1, 0]),
        (["0", "1", "10", "2"], [str(k) for k in range(11)], [0, 1, 10, 2]),  # folders on a model of lists
        (["0", "1", "2"], ["0", "1", "10", "2"], [0, 1, 3]),  # lists on a model of folders
        (["00", "01", "10"], [str(k) for k in range(11)], [0, 1, 10]),
        (["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], list("abcdefghijk"), [0, 1, 10, *range(2, 10)]),
        (["x", "y"], ["0", "1"], [0, 1]),  # a model without names
        (["cafe\u0301", "a"], ["a", "caf\u00e9"], [1, 0]),  # folders of macOS on a model of Linux
    ],
)
def test_classes_are_matched(own: list[str], names: list[str], index: list[int]) -> None:
    assert match_classes(own, names) == index


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (["a", "z"], ["a", "b"]),
        (["1", "2"], ["0", "1"]),  # numbers that the model does not have
        (["x", "y"], ["0", "1", "2"]),  # some of the classes of a model without names
        (["0", "1", "2"], ["a", "b"]),
    ],
)
def test_classes_that_do_not_match_raise(own: list[str], names: list[str]) -> None:
    with raises_one_line(ValueError, match="the model has"):
        match_classes(own, names)


@pytest.mark.parametrize("trained_on", ["lists", "folders"])
def test_numbered_classes_keep_their_labels(trained_on: str, tmp_path: Path) -> None:
    names = [str(k) for k in range(12)]
    coloured(tmp_path / "set", names, {"train": 1, "val": 1, "test": 2})
    for name in ("train800", "val200", "train800val200", "test"):
        split = {"test": "test", "val200": "val"}.get(name, "train")
        lines = [f"{split}/{k}/0.png {k}\n" for k in range(12)]
        (tmp_path / "set" / f"{name}.txt").write_text("".join(lines))
    folders, lists = ImageFolder(tmp_path / "set"), VTAB1k(tmp_path, "set")
    model, data = (lists, folders) if trained_on == "lists" else (folders, lists)
    before = data.dataset("train").samples  # relabelled below
    data.take_classes(model.class_names)
    for split in ("train", "test"):
        for path, label in data.dataset(split).samples:
            assert model.class_names[label] == path.parent.name
    assert len(before) == len(data.dataset("train").samples) == 12


def test_names_come_from_the_data(learned, three, tmp_path):
    model, path = learned
    assert model.class_names == ["a", "b", "c"]
    again = load_classifier(path)
    assert again.class_names == ["a", "b", "c"]
    assert again.data_config["init_args"]["root"] == str(three)
    whole = accuracy(model, ImageFolder(three))
    assert whole > 0.9
    for name in "abc":  # each class alone scores as it does among all
        root = part_of(three, tmp_path / name, name)
        assert accuracy(model, ImageFolder(root)) == accuracy(again, ImageFolder(root)) > 0.9
    fresh = learner()  # asks the data first and the checkpoint then
    data = ImageFolder(part_of(three, tmp_path / "two", "bc"))
    [measured] = trainer().test(fresh, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    assert fresh.class_names == ["a", "b", "c"]
    assert measured["test/acc"] > 0.9


def test_names_come_from_a_loader(three, tmp_path):
    data = ImageFolder(three, image_size=32, normalization="none", batch_size=8)
    model, fitting = learner(), trainer(max_steps=1, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="validation"):
        fitting.fit(model, data.train_dataloader())
    assert model.class_names == ["a", "b", "c"]
    assert model.preprocessing == data.preprocessing


def test_more_classes_than_the_data(three):
    model = learner(classes=4)
    trainer(max_steps=1, limit_val_batches=1).fit(model, datamodule=ImageFolder(three, batch_size=8))
    assert model.class_names == ["a", "b", "c", "unused 3"]
    with pytest.raises(
        ValueError, match=r"the model has 2 classes and the data have 3 \(a, b, c\); give num_classes=3"
    ):
        trainer(max_steps=1).fit(learner(classes=2), datamodule=ImageFolder(three, batch_size=8))


def test_command_line_takes_the_model_of_python(learned, three, tmp_path, capsys):
    path = learned[1]
    main(["test", "--ckpt_path", str(path), f"--trainer.default_root_dir={tmp_path}", *QUIET])
    main([*["test", "--data", "ImageFolder"], f"--data.root={part_of(three, tmp_path / 'two', 'bc')}",
          f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}", *QUIET])  # fmt: skip
    assert capsys.readouterr().out.count("100.0%") >= 2


# ---- preprocessing


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_base_patch16_224.orig_in21k", 224),
        ("convnext_tiny.fb_in1k", 224),
        ("swin_tiny_patch4_window7_224.ms_in1k", 224),
        ("vit_base_patch16_clip_224.openai", 224),
        ("vit_small_patch14_dinov2.lvd142m", 518),
    ],
)
def test_auto_is_the_configuration_of_timm(name: str, size: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    data = Shapes()
    data.take_preprocessing(own_preprocessing(model, name), trained=False)
    config = timm.data.resolve_data_config({}, model=model)
    assert data.image_size == size == config["input_size"][-1]
    assert data.preprocess.statistics == (config["mean"], config["std"])
    assert data.preprocess.interpolation == config["interpolation"]


def test_auto_of_packaged_and_given_sizes() -> None:
    micro = create_backbone("micro", 5)
    assert own_preprocessing(micro, "micro") == {
        "image_size": 48,
        "interpolation": "bicubic",
        "normalization": "half",
    }
    wide = create_backbone("micro", 5, image_size=96)
    assert own_preprocessing(wide, "micro", 96)["image_size"] == 96
    model = make_classifier("convnext", image_size=64)  # takes any size
    assert model.own_preprocessing["image_size"] == 64


def test_micro_costs_what_it_was_made_for(tmp_path, capsys):
    main(
        ["flops", "-c", "vtab", "-c", "linear_heads", "--data=Shapes", "--model.backbone=micro", "--model.adapter=null"]
    )
    last = next(line for line in capsys.readouterr().out.splitlines() if "│    4 │" in line)
    assert float(last.split("│")[3]) < 0.1


def told(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "not read as in the training" in str(one.message)]


def test_training_prints_its_preprocessing(three, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(max_steps=1, limit_val_batches=1).fit(learner(), datamodule=ImageFolder(three, batch_size=8))
    [line] = [record.message for record in caplog.records if record.message.startswith("images: ")]
    assert line == "images: 32 x 32 pixels, stretch, bicubic, normalization half (mean and deviation 0.5)"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ""),
        ({"normalization": "half", "resize": "crop", "image_size": 32}, ""),
        ({"normalization": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}, ""),
        ({"normalization": "none"}, "normalization=none instead of half"),
        ({"interpolation": "bilinear"}, "interpolation=bilinear instead of bicubic"),
        ({"resize": "stretch"}, "resize=stretch instead of crop"),
        ({"image_size": 48}, "image_size=48 instead of 32"),
    ],
)
@pytest.mark.parametrize("way", ["test", "validate", "checkpoint"])
def test_other_preprocessing_is_told_once(given, words, way, learned, three):
    model, path = learned
    data = ImageFolder(three, batch_size=8, cache=way == "validate", **given)
    if way == "checkpoint":
        options = {"datamodule": data, "ckpt_path": path, "verbose": False, "weights_only": True}
        said = told(lambda: trainer().test(learner(), **options))
    else:
        said = told(lambda: [getattr(trainer(), way)(model, datamodule=data, verbose=False) for _ in range(2)])
    assert len(said) == bool(words)
    assert not words or words in said[0]
    changed = {name: value for name, value in given.items() if name != "normalization" or value == "none"}
    assert data.preprocessing == {**model.preprocessing, **changed}  # obeyed
    assert model.preprocessing["normalization"] == "half"


def test_other_preprocessing_on_the_command_line(learned, tmp_path, capsys):
    at = [f"--ckpt_path={learned[1]}", f"--trainer.default_root_dir={tmp_path}", *QUIET]
    for command in ("test", "validate"):
        assert len(told(lambda c=command: main([c, *at, "--data.normalization=none"]))) == 1
    assert len(told(lambda: main(["flops", at[0], "--data.image_size=64"]))) == 1
    assert not told(lambda: main(["test", *at]))


def test_image_size_can_change_and_return(learned):
    net = load_classifier(learned[1]).net
    generator = torch.Generator().manual_seed(0)
    images: Tensor = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        before = net(images)
        for size in (48, 64):
            set_image_size(net.backbone, size)
            assert net(torch.randn(2, 3, size, size, generator=generator)).isfinite().all()
        set_image_size(net.backbone, 32)
        assert torch.equal(net(images), before)
    with pytest.raises(ValueError, match="image_size=50 does not fit the backbone, which was built for 32 pixels"):
        set_image_size(net.backbone, 50)


def test_image_size_changes_from_what_was_loaded_or_trained():
    """Two networks that had different positions until one took the weights of the other."""
    tiny = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    nets = [create_backbone("vit_tiny_patch16_224", 3, **tiny) for _ in range(2)]
    for net in nets:
        set_image_size(net, 48)
    nets[0].load_state_dict(nets[1].state_dict())
    for net in nets:
        net.to(torch.bfloat16)  # a cast is no change of the weights
        set_image_size(net, 64)
    assert torch.equal(nets[0].pos_embed, nets[1].pos_embed)
    assert nets[0].pos_embed.dtype is torch.bfloat16
    with torch.no_grad():
        nets[0].pos_embed.add_(1)
        trained = nets[0].pos_embed.clone()
    set_image_size(nets[0], 32)
    set_image_size(nets[0], 64)
    assert nets[0].pos_embed.float().mean() > trained.float().mean() - 0.5


def test_wide_backbone_takes_no_square_images(three):
    model = learner(backbone_args=VIT | {"img_size": (32, 48)})
    data = ImageFolder(three, image_size=32, batch_size=8)
    for use in (lambda: set_image_size(model.net.backbone, 32), lambda: trainer().fit(model, datamodule=data)):
        with raises_one_line(
            ValueError, match=r"img_size=\(32, 48\): the backbone was built for images that are not sq"
        ):
            use()


def test_image_size_on_meta():
    tiny = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    net, real = create_backbone("vit_tiny_patch16_224", 3, **tiny).to("meta"), torch.rand(1, 37, 48)
    for size in (48, 64, 48):
        set_image_size(net, size)
    net.to_empty(device="cpu").pos_embed.data.copy_(real)
    set_image_size(net, 64)
    assert net.pos_embed.shape == (1, 65, 48)
    set_image_size(net, 48)
    assert torch.equal(net.pos_embed, real)


def test_training_on_another_size_raises(three):
    data = ImageFolder(three, image_size=48, batch_size=8)
    with pytest.raises(ValueError, match="give images of 48 pixels, and the backbone was built for 32; leave out"):
        trainer(max_steps=1).fit(learner(), datamodule=data)


def test_loader_of_tensors_needs_no_names() -> None:
    model = learner(classes=5)
    batches = DataLoader(TensorDataset(IMAGES, torch.arange(6) % 5), 2)
    with pytest.warns(UserWarning, match="validation"):
        trainer(max_steps=1).fit(model, batches)
    assert model.class_names == list("01234")
    assert model.preprocessing == {}
