"""The digits that ship with scikit-learn."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dynadapter.data import Digits
from dynadapter.data.splits import hold_out


def labels(data: Digits, split: str) -> list[int]:
    return [label for _, label in data.dataset(split).samples]


def test_classes_are_known_before_setup():
    data = Digits()
    assert data.num_classes == 10
    assert data.class_names == [str(i) for i in range(10)]


def test_the_splits_are_the_digits_each_once_and_stratified():
    data = Digits(image_size=8)
    sizes = [len(data.dataset(split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 1797
    np.testing.assert_allclose(np.array(sizes) / 1797, [0.6, 0.2, 0.2], atol=0.005)
    found = Counter(
        (np.asarray(image).tobytes(), label)
        for s in ("train", "val", "test")
        for image, label in data.dataset(s).samples
    )
    digits = load_digits()
    whole = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert found == Counter((image.tobytes(), label) for image, label in zip(whole, digits.target, strict=True))
    for split in ("train", "val", "test"):
        counts = Counter(labels(data, split))
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 6  # 174 to 183 images a class


def test_the_splits_are_always_the_same():
    torch.manual_seed(1)
    first = labels(Digits(), "train")
    torch.manual_seed(2)
    assert labels(Digits(), "train") == first


def test_items_are_the_enlarged_digits():
    data = Digits(image_size=32, normalization="half", batch_size=5)
    data.setup("test")
    images, targets = next(iter(data.test_dataloader()))
    source, label = data.dataset("test").samples[0]
    expected = np.asarray(source.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255 * 2 - 1
    np.testing.assert_allclose(images[0], np.stack([expected] * 3), atol=1e-6)
    assert targets[0] == label


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_shows_each_image_once(workers):
    data = Digits(image_size=8, batch_size=100, num_workers=workers, cache=True)
    data.setup("fit")
    assert [len(targets) for _, targets in data.val_dataloader()] == [100, 100, 100, 59]
    seen = torch.cat([targets for _, targets in data.train_dataloader()])
    assert len(seen) == 1000  # of 1077, the last incomplete batch dropped


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_hold_out_parts_each_class(fraction):
    generator = np.random.default_rng(0)
    classes = [*generator.choice(list("abcd"), 97, p=[0.6, 0.2, 0.15, 0.05]).tolist(), "single"]
    kept, held = hold_out(classes, fraction, seed=3)
    assert sorted(kept + held) == list(range(98))
    assert (kept, held) == (sorted(kept), sorted(held))
    for name, count in Counter(classes).items():
        out = sum(classes[i] == name for i in held)
        if count == 1 or fraction == 0:
            assert out == 0
        else:
            assert 1 <= out <= count - 1
            assert abs(out - fraction * count) <= 1
    if fraction:
        assert hold_out(classes, fraction, seed=4)[1] != held
        assert hold_out(classes, fraction, seed=3)[1] == held
