"""The base of the data modules: batches, order, cached images, broken files, classes, configs."""

import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import raises_one_line
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from PIL import Image
from test_images import noise, save
from tiny import make_classifier, trainer

from dynadapter.data import Augment, ImageData, ImageFolder, Shapes, UnreadableImage, VTAB1k
from dynadapter.data.dataset import ImageDataset, Padded
from dynadapter.data.samplers import CachedLoader, EpochOrder, share_batch
from dynadapter.images.reading import load_image
from dynadapter.training.callbacks import BidirectionalSparsity
from dynadapter.training.losses import IGNORED
from dynadapter.training.mixing import Mixing
from dynadapter.training.schedules import Constant, Linear


class Files(ImageData):
    """The smallest subclass: the images of a folder, all of class 0."""

    def __init__(self, folder: Path, **options):
        super().__init__(**options)
        self.folder = folder
        self.class_names = ["thing"]

    def samples(self, split):
        return [(path, 0) for path in sorted(self.folder.glob("*"))] if split != "val" else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of different sizes and one that is none."""
    for i in range(7):
        save(tmp_path / "set" / f"{i}.png", noise(5 + i, 9 - i, 3, seed=i))
    (tmp_path / "set" / "broken.png").write_bytes((tmp_path / "set" / "3.png").read_bytes()[:60])
    return tmp_path / "set"


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; choose from: bicubic, bilinear, nearest"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
        ({"max_skipped": -1}, "max_skipped must be at least 0, not -1"),
        ({"augment": "mixup"}, "unknown augment 'mixup'; choose from: none, flip, Augment"),
        ({"on_error": "ignore"}, "unknown on_error 'ignore'; choose from: raise, skip"),
    ],
)
def test_wrong_options_are_named(options, words):
    with raises_one_line(ValueError, match=re.escape(words)):
        Shapes(**options)


# Batches and their order


def test_batches_and_what_is_dropped(folder):
    (folder / "broken.png").unlink()
    data = Files(folder, batch_size=3, image_size=8)
    data.setup("fit")
    train = list(data.train_dataloader())
    assert [len(images) for images, _ in train] == [3, 3]
    data.setup("test")
    test = list(data.test_dataloader())
    assert [len(images) for images, _ in test] == [3, 3, 1]
    images, targets = test[0]
    assert (images.shape, images.dtype, targets.dtype) == ((3, 3, 8, 8), torch.float32, torch.int64)
    expected = [torch.from_numpy(data.preprocess(load_image(path))) for path in sorted(folder.glob("*"))]
    assert torch.equal(torch.cat([images for images, _ in test]), torch.stack(expected))


def indices(order: EpochOrder) -> list[int]:
    return [index for index, _ in order]


def test_order_depends_on_seed_and_epoch():
    def orders(seed: int, epochs: range) -> list[list[tuple[int, int]]]:
        order = EpochOrder(range(50), 5, seed=seed)
        result = []
        for epoch in epochs:
            order.set_epoch(epoch)
            torch.rand(3)  # other draws do not matter
            result.append(list(order))
        return result

    whole = orders(0, range(4))
    assert orders(0, range(2, 4)) == whole[2:]  # as after a resume
    assert orders(7, range(4))[0] != whole[0]
    assert len({tuple(order) for order in whole}) == 4
    assert all(sorted(index for index, _ in order) == list(range(50)) for order in whole)
    assert len({number for order in whole for _, number in order}) == 200
    plain = EpochOrder(range(50), 5, seed=0)  # without set_epoch
    assert [list(plain) for _ in range(4)] == whole


@pytest.mark.parametrize(("count", "together", "accumulated"), [(50, 12, 1), (48, 12, 1), (100, 6, 3), (11, 12, 2)])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_one_batch(count, together, accumulated, processes):
    size = together // processes
    one = EpochOrder(range(count), together, seed=3, accumulated=accumulated)
    shares = [
        EpochOrder(range(count), size, seed=3, processes=processes, rank=rank, accumulated=accumulated)
        for rank in range(processes)
    ]
    steps = -(-len(one) // together)
    for epoch in range(2):
        for order in (one, *shares):
            order.set_epoch(epoch)
        expected, lists = list(one), [list(share) for share in shares]
        assert [len(share) for share in shares] == [len(items) for items in lists]
        for step in range(steps):
            parts = [items[step * size : (step + 1) * size] for items in lists]
            assert all(parts), "a process without a batch would keep the others waiting"
            assert [index for index, _ in parts[0]] == shares[0].batch(epoch, step)
            assert sorted(chain.from_iterable(parts)) == sorted(expected[step * together : (step + 1) * together])
        assert sum(map(len, lists)) == len(expected) == len({index for index, _ in expected})


def test_fewer_images_than_a_step_are_used():
    assert len(EpochOrder(range(10), 3, seed=0)) == 9
    assert len(EpochOrder(range(10), 3, seed=0, accumulated=2)) == 6  # whole steps
    assert len(EpochOrder(range(5), 3, seed=0, accumulated=2)) == 3
    assert len(EpochOrder(range(2), 3, seed=0, accumulated=2)) == 2
    uneven = [EpochOrder(range(7), 8, seed=0, processes=2, rank=rank) for rank in (0, 1)]
    assert sorted(indices(uneven[0]) + indices(uneven[1])) == list(range(7))
    assert [order.weight for order in uneven] == [8 / 7, 6 / 7]  # the mean of weighted means is the mean of all
    with pytest.raises(ValueError, match=r"^2 training image\(s\) for 3 processes; train on at most 2$"):
        EpochOrder(range(2), 3, seed=0, processes=3, rank=0)


def test_padding_for_several_processes(folder):
    (folder / "broken.png").unlink()
    data = Files(folder, image_size=4)
    filled = Padded(data.dataset("test"), 4)
    assert (len(filled), len(Padded(data.dataset("test"), 7))) == (8, 7)
    assert [target for _, target in filled] == [0] * 7 + [IGNORED]
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED
    assert len(Padded(data.dataset("val"), 3)) == 0


@pytest.mark.parametrize(
    ("given", "processes", "accumulated", "expected"),
    [
        (None, 1, 1, (5, None)),
        (None, 2, 1, (5, "batches: 10 images = 2 processes x 5 (x 1 accumulated)")),
        (12, 1, 1, (12, "batches: 12 images = 1 process x 12 (x 1 accumulated)")),
        (12, 2, 3, (2, "batches: 12 images = 2 processes x 2 (x 3 accumulated)")),
        (
            12,
            5,
            1,
            "global_batch_size=12 does not divide by 5 process(es) x 1 accumulated batch(es); give a multiple of 5",
        ),
        (2, 2, 2, "does not divide by 2 process(es) x 2 accumulated batch(es); give a multiple of 4"),
    ],
)
def test_a_global_batch_is_divided(given, processes, accumulated, expected, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("dynadapter.data.samplers.rank_zero_info", said.append)
    data = Shapes(batch_size=5, global_batch_size=given)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            share_batch(data.batch_size, data.global_batch_size, processes, accumulated)
        return
    size, line = expected
    assert share_batch(data.batch_size, data.global_batch_size, processes, accumulated) == size
    assert said == ([line] if line else [])


def test_global_batch_counts_accumulation(folder):
    (folder / "broken.png").unlink()
    data = Files(folder, batch_size=1, global_batch_size=4, image_size=4)
    model = Mean()
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(model, data)
    assert model.seen["train"] == 4  # two batches of two: a step; three images are left over
    assert [len(images) for images, _ in data.test_dataloader()] == [1] * 7  # evaluation keeps its own


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_cached_batches_equal_decoded_ones(folder, augment, processes, monkeypatch):
    (folder / "broken.png").unlink()

    def epochs(rank: int, cache: bool) -> list[list[torch.Tensor]]:
        torch.manual_seed(0)
        monkeypatch.setattr(ImageData, "_processes", lambda self: (processes, rank))
        data = Files(folder, cache=cache, image_size=8, batch_size=2, augment=augment)
        monkeypatch.setattr(Files, "samples", lambda self, split: [(p, i % 3) for i, p in enumerate(paths)])
        data.class_names = ["a", "b", "c"]
        data.setup("fit")
        train, val = data.train_dataloader(), data.val_dataloader()
        if cache:
            monkeypatch.setattr(ImageDataset, "pixels", None)
        assert isinstance(train, CachedLoader) == isinstance(val, CachedLoader) == cache
        return [list(batch) for loader in (train, val, train, train) for batch in loader]

    paths = sorted(folder.glob("*"))
    for rank in range(processes):
        expected = epochs(rank, cache=False)
        found = epochs(rank, cache=True)
        monkeypatch.undo()
        assert len(found) == len(expected) > 4
        assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_cached_images_move_if_they_fit(folder):
    (folder / "broken.png").unlink()
    dataset = Files(folder, cache=True, image_size=8).dataset("train")
    meta = torch.device("meta")
    dataset.move_to(meta, room=7 * 3 * 8 * 8 - 1)
    assert dataset.cached.device.type == "cpu"
    dataset.move_to(meta, room=7 * 3 * 8 * 8)
    indices = torch.arange(2, device=meta)
    assert {part.device for part in (dataset.cached, *dataset.batch(indices))} == {meta}


def test_flip_mirrors_half_of_the_images(folder):
    (folder / "broken.png").unlink()
    data = Files(folder, image_size=8, augment="flip")
    mirrored = 0
    for number in range(20):
        for index in range(7):
            tested, trained = data.dataset("test")[index, number][0], data.dataset("train")[index, number][0]
            assert torch.equal(tested, data.dataset("train")[index][0])  # not mirrored without a number
            assert torch.equal(trained, tested) or torch.equal(trained, tested.flip(-1))
            mirrored += not torch.equal(trained, tested)
    assert mirrored == 70
    numbers = [number for _, number in EpochOrder(range(1000), 10, seed=0)]
    assert 400 < sum(number % 2 for number in numbers) < 600


def test_flips_do_not_depend_on_workers(folder):
    (folder / "broken.png").unlink()

    def epochs(workers: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        loader = Files(folder, num_workers=workers, batch_size=2, image_size=8, augment="flip").train_dataloader()
        return [images for _ in range(3) for images, _ in loader]

    assert all(torch.equal(a, b) for a, b in zip(epochs(0), epochs(2), strict=True))


# Broken files


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(folder, workers, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # the wait for the worker's end
    data = Files(folder, num_workers=workers, image_size=8)
    data.setup("test")
    with pytest.raises(UnreadableImage) as caught:
        list(data.test_dataloader())
    assert str(caught.value).startswith(f"cannot read image {folder / 'broken.png'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_leaves_it_out_and_lists_it(folder, workers):
    data = Files(folder, num_workers=workers, image_size=8, batch_size=4, on_error="skip")
    with pytest.warns(UserWarning, match=r"test: skipped 1 unreadable image\(s\): .*broken.png \("):
        data.setup("test")
    assert list(data.skipped) == [str(folder / "broken.png")]
    assert [len(images) for images, _ in data.test_dataloader()] == [4, 3]
    data.setup("test")  # a second call reads nothing again


def test_too_many_skipped_images_are_listed(tmp_path):
    save(tmp_path / "good.png")
    for i in range(3):
        (tmp_path / f"bad{i}.png").write_bytes(b"")
    data = Files(tmp_path, on_error="skip", max_skipped=2)
    with pytest.raises(ValueError, match="3 images cannot be read, more than max_skipped=2") as caught:
        data.setup("fit")
    assert all(f"bad{i}.png" in str(caught.value) for i in range(3))
    assert "\n" not in str(caught.value)


def test_an_image_in_two_sets_counts_once(folder):
    data = Files(folder, on_error="skip", max_skipped=1)
    with pytest.warns(UserWarning, match="train: skipped 1"):
        data.setup("fit")
    with pytest.warns(UserWarning, match="test: skipped 1"):
        data.setup("test")
    assert len(data.skipped) == 1


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image of train can be read"):
        Files(tmp_path, on_error="skip").setup("fit")


def test_unknown_stage():
    with pytest.raises(ValueError, match="unknown stage 'train'; choose from: fit, validate, test"):
        Shapes().setup("train")


# Lightning and its command line


class Mean(LightningModule):
    """Train one number and count the images."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, int] = {"train": 0, "val": 0, "test": 0}

    def training_step(self, batch, index):
        self.seen["train"] += len(batch[0])
        return (batch[0].mean() - self.number) ** 2

    def validation_step(self, batch, index):
        self.seen["val"] += len(batch[0])

    def test_step(self, batch, index):
        self.seen["test"] += len(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_every_stage_under_a_trainer(tmp_path, folder):
    (folder / "broken.png").unlink()
    run = trainer(default_root_dir=tmp_path, enable_checkpointing=True)
    data = Files(folder, batch_size=2, image_size=4)
    model = Mean()
    run.fit(model, data)
    assert model.seen == {"train": 12, "val": 0, "test": 0}
    run.test(model, data)
    assert model.seen["test"] == 7
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)["datamodule_hyper_parameters"]
    assert checkpoint["image_size"] == 4


elsewhere = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resumed training saves in another folder


class Noise(ImageData):
    """Twenty-two images of three classes."""

    def __init__(self, **options):
        super().__init__(**({"batch_size": 6, "image_size": 32, "augment": "flip"} | options))
        self.class_names = ["a", "b", "c"]

    def samples(self, split):
        return [(Image.fromarray(noise(8, 8, 3, seed=i)), i % 3) for i in range(22 if split == "train" else 4)]


class Steps(Callback):
    """Record the images of each training step."""

    def __init__(self):
        self.seen: list[tuple] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, trainer.global_step, float(batch[0].sum())))


def fitted(folder: Path, checkpoint: Path | None = None, seed: int = 0, accumulate: int = 1, **options):
    """Train three epochs of three batches, with a checkpoint after each optimiser step."""
    torch.manual_seed(seed)
    steps, module = Steps(), make_classifier(num_classes=3, mixing=Mixing(prob=0.5))
    dropout = BidirectionalSparsity(shallow=Constant(0.3), keep=Linear(0.5, 1.0))
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(steps, dropout, saving, enable_checkpointing=True, max_epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module, datamodule=Noise(**options), ckpt_path=checkpoint)
    return module.state_dict(), steps.seen


@elsewhere
@pytest.mark.parametrize(
    ("options", "stops"),  # optimiser steps of the checkpoint, and batches left
    [
        ({}, {1: 8, 3: 6, 5: 4}),  # after the first step, at an end, and in between
        ({"accumulate": 2}, {1: 7, 3: 4, 4: 3}),
        ({"num_workers": 2}, {5: 4}),
        ({"num_workers": 2, "accumulate": 2}, {4: 3}),
        ({"cache": True}, {5: 4}),
    ],
    ids=str,
)
def test_training_resumes_within_an_epoch(options, stops, tmp_path):
    whole, seen = fitted(tmp_path, **options)
    assert len({total for *_, total in seen}) == len(seen) == 9
    for stop, left in stops.items():
        torch.rand(stop)
        resumed, rest = fitted(tmp_path / f"{stop}", tmp_path / f"step={stop}.ckpt", **options)
        assert rest == seen[-left:]
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@elsewhere
def test_other_data_cannot_resume_mid_epoch(tmp_path, monkeypatch):
    fitted(tmp_path)
    # Between epochs other batches are allowed
    _, rest = fitted(tmp_path / "ended", tmp_path / "step=3.ckpt", batch_size=11)
    assert [batch for _, batch, *_ in rest] == [0, 1, 0, 1]
    monkeypatch.setattr(Noise, "samples", lambda self, split, samples=Noise.samples: samples(self, split)[:21])
    with pytest.raises(ValueError, match=r"middle of epoch 1 with 22 training images, and .* go on with 21 training"):
        fitted(tmp_path / "no", tmp_path / "step=4.ckpt")


OTHER_ORDERS = {
    "batches": ({}, {"batch_size": 7}, "batches of 6 images, and it would go on with batches of 7"),
    "balanced": ({}, {"balanced": True}, "balanced=False, and it would go on with balanced=True"),
    "unbalanced": ({"balanced": True}, {}, "balanced=True"),
    "repeats": ({"augment": Augment(repeats=2)}, {"augment": Augment(repeats=3)}, "augment.repeats=3"),
    "no repeats": ({"augment": Augment(repeats=2)}, {}, "augment.repeats=1"),
    "labels": ({}, {"shift": 1}, "the list of images and labels"),
    "steps": ({"global_batch_size": 6}, {"accumulated": 2, "global_batch_size": 12}, "12 images in an epoch"),
}


@pytest.mark.parametrize("case", OTHER_ORDERS)
def test_other_order_cannot_resume(case):
    first, second, words = OTHER_ORDERS[case]

    def loader(shift: int = 0, accumulated: int = 1, **options):
        data = Noise(**options)
        data.samples = lambda split: [(image, (k + shift) % 3) for image, k in Noise.samples(data, split)]
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=accumulated,
            strategy=SimpleNamespace(broadcast=lambda seed: seed),
            distributed_sampler_kwargs=None,
            num_devices=1,
        )
        return data.train_dataloader()

    stopped, again, same = loader(**first), loader(**second), loader(**first)
    next(iter(stopped))
    for one in (again, same):
        one.load_state_dict(stopped.state_dict())
    assert len(list(same)) == len(stopped) - 1
    with raises_one_line(ValueError, match=re.escape(words)):
        next(iter(again))
    finished = loader(**first)
    assert len(list(finished)) == len(finished)
    again = loader(**second)
    again.load_state_dict(finished.state_dict() | {"epoch": 1, "batches": 0})  # as at the start of the next epoch
    assert len(list(again)) == len(again)


@elsewhere
def test_resumed_order_ignores_the_new_seed(tmp_path):
    _, seen = fitted(tmp_path)
    _, rest = fitted(tmp_path / "other", tmp_path / "step=2.ckpt", seed=5)
    assert rest == seen[2:]


def test_plain_loader_resumes():
    torch.manual_seed(0)
    loader = Noise().train_dataloader()
    whole = [images for images, _ in loader]
    assert loader.state_dict()["batches"] == 3
    stopped, again = Noise().train_dataloader(), Noise().train_dataloader()
    batches = iter(stopped)
    next(batches)
    again.load_state_dict(stopped.state_dict())
    assert again.state_dict() == stopped.state_dict()
    assert all(torch.equal(a, b) for a, (b, _) in zip(whole[1:], again, strict=True))
    assert again.sampler.epoch == 1
    assert len(list(again)) == 3  # the next epoch is whole


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_invalid_labels_are_named(label, monkeypatch):
    monkeypatch.setattr(Noise, "samples", lambda self, split: [(Path("a.png"), 0), (Path("b.png"), label)])
    for stage, split in (("fit", "train"), ("test", "test")):
        with pytest.raises(ValueError, match=f"^label {label} of b.png for {split} is not a class; .* classes 0 to 2$"):
            Noise().setup(stage)


def test_images_of_a_batch_are_named(folder):
    (folder / "broken.png").unlink()
    data = Files(folder, batch_size=2, image_size=4)
    assert data.files(0, 0) == []  # unknown before there is an order
    loader = data.train_dataloader()
    for step, (images, _) in enumerate(loader):
        expected = torch.stack(
            [torch.from_numpy(data.preprocess(load_image(Path(file)))) for file in data.files(0, step)]
        )
        assert torch.equal(images, expected)
    assert data.files(1, 0) != data.files(0, 0)
    held = Noise()
    held.train_dataloader()
    assert re.fullmatch("image [0-9]+", held.files(0, 0)[0])


def test_settings_are_plain_data(tmp_path):
    save(tmp_path / "train" / "a" / "0.png")
    data = ImageFolder(tmp_path, image_size=32, normalization="half")
    torch.save(dict(data.hparams), tmp_path / "settings.pt")
    settings = torch.load(tmp_path / "settings.pt", weights_only=True)
    assert settings["root"] == str(tmp_path)
    assert ImageFolder(**settings).hparams == data.hparams


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    return parser


@pytest.mark.parametrize("kind", [VTAB1k, ImageFolder, Shapes])
def test_configs_take_every_setting(kind):
    common = {
        "batch_size": 8,
        "global_batch_size": 16,
        "num_workers": 1,
        "image_size": 64,
        "normalization": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        "interpolation": "bilinear",
        "resize": "crop",
        "augment": "flip",
        "cache": True,
        "on_error": "skip",
        "max_skipped": 3,
    }
    own = {VTAB1k: {"root": "data", "task": "cifar"}, ImageFolder: {"root": "data"}, Shapes: {}}[kind]
    config = parser().parse_object({"data": {"class_path": kind.__name__, "init_args": common | own}})
    parsed = config.data.init_args
    assert parsed.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert {name: parsed[name] for name in common if name != "normalization"} == {
        name: value for name, value in common.items() if name != "normalization"
    }


# Classes by name


class Named(Noise):
    """Images whose class names are letters in a given order."""

    def __init__(self, names: str, **options):
        super().__init__(**options)
        self.class_names = list(names)

    def samples(self, split):
        return [(image, self.class_names.index("abc"[label])) for image, label in super().samples(split)]


def letters(data: ImageData, split: str) -> list[str]:
    return [data.class_names[label] for _, label in data.dataset(split).samples]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("names", ["abc", "cab", "xcyab"])
def test_classes_are_renumbered_by_name(names, early):
    data, plain = Named("bca"), Named("abc")
    if early:  # as if a checkpoint were loaded after the images were found
        assert letters(data, "train") == letters(plain, "train")
    data.take_classes(list(names))
    assert (data.class_names, data.num_classes) == (list(names), len(names))
    for split in ("train", "test"):
        assert letters(data, split) == letters(plain, split)
    data.take_classes(list("abc"))
    assert [label for _, label in data.dataset("test").samples] == [0, 1, 2, 0]


def test_unknown_classes_are_listed():
    line = "the data have classes that the model does not know: b, c; the model has a, x; the data have a, b, c"
    with pytest.raises(ValueError, match=f"^{line}$"):
        Named("abc").take_classes(["a", "x"])
    with pytest.raises(ValueError, match="does not know: 2; the model has 0, 1; the data have 0, 1, 2"):
        Named("012").take_classes(["0", "1"])
    with pytest.raises(ValueError, match=r"and 90 more$"):
        Named([f"class {k}" for k in range(100)]).take_classes(["a"])


def test_missing_names_keep_the_indices():
    named, numbered = Named("bca"), Noise()
    numbered.class_names = ["0", "1", "2"]
    named.take_classes(["0", "1", "2"])  # a model without class names
    with pytest.raises(ValueError, match="4 classes without names, and the data have 3: b, c, a; give the model"):
        named.take_classes(["0", "1", "2", "3"])
    with pytest.raises(ValueError, match="3 classes without names, and the model has 4: x, y, z, t; name the classes"):
        numbered.take_classes(list("xyzt"))
    numbered.take_classes(list("xyz"))  # data without class names
    assert (named.class_names, numbered.class_names) == (list("bca"), list("xyz"))
    assert [label for _, label in numbered.dataset("test").samples] == [0, 1, 2, 0]


def test_changing_accumulation_has_no_global_batch_size() -> None:
    fitting = trainer(GradientAccumulationScheduler({0: 4}), max_epochs=1)
    with pytest.raises(ValueError, match="which GradientAccumulationScheduler changes; give batch_size instead"):
        fitting.fit(make_classifier(num_classes=8), datamodule=Shapes(image_size=32, global_batch_size=16))
