"""Augmentation of training images: random numbers, settings, and what stays unchanged."""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import raises_one_line
from PIL import Image

from dynadapter.data import Augment, ImageFolder, Shapes
from dynadapter.data.augment import Augmentation
from dynadapter.data.samplers import EpochOrder
from dynadapter.images.preprocess import Preprocess
from dynadapter.spec import plain, restore
from dynadapter.training.random_state import seeded

PLAIN = {"scale": None, "hflip": 0.0}
"""Nothing is changed."""
KINDS = {
    "crop": Augment(hflip=0),
    "flips": Augment(scale=None, vflip=0.5),
    "rand": Augment(auto="rand-m9-mstd0.5-inc1"),
    "auto": Augment(auto="original"),
    "3a": Augment(auto="3a", color_jitter=0.3),
    "augmix": Augment(auto="augmix-m5-w4-d2"),
    "colours": Augment(**PLAIN, color_jitter=0.4),
    "erasing": Augment(**PLAIN, erasing=1.0),
    "own": Augment(**PLAIN, transforms=({"RandomRotation": {"degrees": 90}}, {"RandomInvert": {"p": 0.5}})),
}
PREPROCESS = Preprocess(image_size=24, normalization="half")


def picture(seed: int = 0, size: tuple[int, int] = (40, 31)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] // 4, size[1] // 4)).resize(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(10):
            picture(k + 10 * (name == "b")).save(tmp_path / name / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_number_decides_everything(kind):
    changed, image = Augmentation(KINDS[kind], PREPROCESS), picture()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    results = [changed(image, number) for number in (*range(8), *range(8))]
    assert all(one.shape == (3, 24, 24) and one.dtype == torch.float32 and one.isfinite().all() for one in results)
    assert all(torch.equal(a, b) for a, b in zip(results[:8], results[8:], strict=True))
    assert len({one.numpy().tobytes() for one in results}) > 1
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_nothing_switched_on_changes_nothing(resize):
    preprocess = Preprocess(image_size=24, resize=resize)
    found = Augmentation(Augment(**PLAIN), preprocess)(picture(), 7)
    assert torch.equal(found, torch.from_numpy(preprocess(picture())))


@pytest.mark.parametrize("auto", [None, "rand-m9-mstd0.5-inc1", "original"])
def test_results_are_those_of_timm(auto):
    """Without flips, whose random numbers torchvision's second version draws elsewhere."""
    mean, std = PREPROCESS.statistics
    reference = timm.data.create_transform(
        24,
        is_training=True,
        scale=(0.3, 1.0),
        hflip=0,
        color_jitter=None,
        auto_augment=auto,
        interpolation="bicubic",
        mean=mean,
        std=std,
    )
    ours = Augmentation(Augment(scale=(0.3, 1.0), hflip=0, auto=auto), PREPROCESS)
    for number in range(6):
        with seeded(number):
            expected = reference(picture(number))
        assert torch.allclose(ours(picture(number), number), expected, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_do_not_depend_on_workers(folder, workers):
    def epochs(workers: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        augment = Augment(auto="rand-m9", erasing=0.5)
        data = ImageFolder(folder, num_workers=workers, batch_size=4, image_size=16, augment=augment)
        loader = data.train_dataloader()
        return [images for _ in range(2) for images, _ in loader]

    first, second = epochs(0), epochs(workers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[len(first) // 2])


def test_evaluation_is_not_augmented(folder):
    plain_data, data = (ImageFolder(folder, image_size=16, augment=one) for one in ("none", Augment(erasing=1.0)))
    for split in ("train", "val"):
        for k in range(len(data.dataset(split))):
            assert torch.equal(data.dataset(split)[k][0], plain_data.dataset(split)[k][0])
    assert torch.equal(data.dataset("val")[0, 5][0], plain_data.dataset("val")[0][0])
    assert not torch.equal(data.dataset("train")[0, 5][0], plain_data.dataset("train")[0][0])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_repeated_images_have_numbers_of_their_own(processes):
    parts = [
        list(EpochOrder(range(24), 12 // processes, seed=3, processes=processes, rank=rank, repeats=3))
        for rank in range(processes)
    ]
    together = [one for group in zip(*parts, strict=True) for one in group]
    assert together == list(EpochOrder(range(24), 12, seed=3, repeats=3))
    counts = Counter(index for index, _ in together)
    assert set(counts.values()) == {3}
    assert len(counts) == 8
    assert len({number for _, number in together}) == 24


def test_settings_survive_a_file():
    for augment in KINDS.values():
        assert restore(plain(augment), Augment) == augment


def test_images_in_memory_are_augmented():
    data = Shapes(augment=Augment(scale=(0.5, 1.0)), batch_size=4)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 48, 48)


MISTAKES = [
    ({"scale": (0.5, 0.2)}, "scale=[0.5, 0.2] must be two rising fractions"),
    ({"ratio": (0, 1)}, "ratio=[0, 1] must be two rising numbers"),
    ({"hflip": 1.5}, "hflip=1.5 must be in [0, 1]"),
    ({"erasing": -1}, "erasing=-1 must be in [0, 1]"),
    ({"color_jitter": 2}, "color_jitter=2 must be in [0, 1]"),
    ({"repeats": 0}, "repeats=0 must be at least 1"),
    ({"auto": "rend-m9"}, "auto='rend-m9' is not a policy of timm"),
    ({"auto": "rand-m9-zz"}, "auto='rand-m9-zz' is not a policy of timm"),
    ({"transforms": ({"Lambda": {"lambd": print}},)}, "has no transform 'Lambda'"),
    ({"transforms": ({"os": {}},)}, "has no transform 'os'"),
    ({"transforms": ({"RandomRotation": {}},)}, "transforms: RandomRotation: "),
    ({"transforms": ({"RandomRotation": {"degrees": 3}, "RandomInvert": {}},)}, "must be a name with arguments"),
    ({"transforms": ({"RandomRotation": [9]},)}, "must be a name with arguments"),
    ({"transforms": ({"RandomApply": {"transforms": [{"Lambda": {"lambd": print}}]}},)}, "has no transform 'Lambda'"),
    ({"transforms": ({"RandomOrder": {"transforms": ["Grayscale"]}},)}, "'Grayscale' must be a name with arguments"),
]


@pytest.mark.parametrize(("settings", "words"), MISTAKES)
def test_wrong_settings_are_named(settings, words):
    with raises_one_line(ValueError, match=re.escape(words)):
        Augment(**settings)


def test_cached_images_are_refused(folder):
    with pytest.raises(ValueError, match="cache keeps resized images, and Augment needs whole ones; set cache: false"):
        ImageFolder(folder, cache=True, augment=Augment())


FAILING = [
    ({"Resize": {"size": [9, 9]}}, "must give images of 24 x 24 pixels, not (9, 9)"),
    ({"RandomZoomOut": {"p": 0.01}}, "must give images of 24 x 24 pixels, not ("),
    ({"PILToTensor": {}}, "must give images of 24 x 24 pixels, not Tensor"),
    ({"Normalize": {"mean": [0.5], "std": [0.5]}}, "transforms: Normalize: "),
    ({"CutMix": {"num_classes": 3}}, "transforms: CutMix: "),
    ({"RandomIoUCrop": {}}, "transforms: RandomIoUCrop: "),
    ({"RandomApply": {"transforms": [{"GaussianNoise": {}}], "p": 0.01}}, "transforms: RandomApply: Gaussian Noise "),
    ({"RandomCrop": {"size": 30}}, "transforms: RandomCrop: "),
]


@pytest.mark.parametrize(("given", "words"), FAILING)
def test_transforms_are_tried_before_a_training(given, words, folder):
    data = ImageFolder(folder, image_size=24, augment=Augment(transforms=(given,)))
    with raises_one_line(ValueError, match=re.escape(words)):
        data.setup("fit")


def test_nested_transforms_are_built():
    nested = {"RandomApply": {"transforms": [{"RandomChoice": {"transforms": [{"Grayscale": {}}]}}], "p": 1.0}}
    changed = Augmentation(Augment(**PLAIN, transforms=(nested,)), PREPROCESS)
    red, green, blue = changed(picture(), 0)
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    kept = {"RandomApply": {"transforms": [{"Grayscale": {}}], "p": 0.0}}
    same = Augmentation(Augment(**PLAIN, transforms=(kept,)), PREPROCESS)
    assert torch.equal(same(picture(), 0), torch.from_numpy(PREPROCESS(picture())))


def test_transforms_fit_the_size():
    """Some work with one size alone."""
    changed = Augmentation(Augment(transforms=({"RandomCrop": {"size": 24, "padding": 3}},)), PREPROCESS)
    assert changed(picture(), 0).shape == (3, 24, 24)
