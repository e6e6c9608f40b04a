"""Drawn shapes: deterministic, disjoint, balanced, harder step by step, and fast."""

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import trainer

from dynadapter.data import Shapes
from dynadapter.data.shapes import CLASSES, KINDS, draw_shape, draw_split

SPLITS = ("train", "val", "test")
FEW = {"train_images": 24, "val_images": 16, "test_images": 16}


def test_outlines_fit_the_unit_circle():
    for kind in KINDS.values():
        for border in (kind.outline, kind.hole or []):
            assert all(np.hypot(x, y) <= 1.02 for x, y in border)


def test_one_seed_draws_the_same_images():
    first = [drawn.image.tobytes() for drawn in draw_split("val", 16, seed=3)]
    draw_split.cache_clear()
    assert [drawn.image.tobytes() for drawn in draw_split("val", 24, seed=3)][:16] == first
    assert not {drawn.image.tobytes() for drawn in draw_split("val", 16, seed=4)} & set(first)


def test_splits_share_no_image():
    data = Shapes(train_images=200, val_images=100, test_images=100)
    images = [image.tobytes() for split in SPLITS for image, _ in data.samples(split)]
    assert len(set(images)) == 400


def test_classes_are_balanced_and_known():
    data = Shapes(**FEW)
    assert data.class_names == list(CLASSES)
    assert Counter(label for _, label in data.samples("train")) == dict.fromkeys(range(len(CLASSES)), 3)


def test_difficulties_are_uniform_and_in_order():
    data = Shapes()
    found = data.difficulties("train")
    counts, _ = np.histogram(found, bins=5, range=(0, 1))
    assert len(found) == counts.sum() == len(data.samples("train"))
    assert counts.min() > 150
    plain, cluttered = int(np.argmin(found)), int(np.argmax(found))
    images = [np.asarray(data.samples("train")[index][0], dtype=float) for index in (plain, cluttered)]
    edges = [np.abs(np.diff(image, axis=0)).mean() for image in images]
    assert edges[0] < edges[1]


@pytest.mark.parametrize("kind", CLASSES)
def test_plain_shapes_are_large_and_centred(kind):
    shape = np.asarray(draw_shape(Random(0), kind, difficulty=0.0, size=64), dtype=float)
    ground = shape[:2].mean((0, 1))
    y, x = np.nonzero(np.abs(shape - ground).sum(-1) > 100)
    assert 0.15 < len(y) / 64**2 < 0.6
    assert 24 < y.mean() < 40
    assert 20 < x.mean() < 40


def test_plain_classes_have_their_own_colours():
    hues = sorted(kind.hue for kind in KINDS.values())
    assert np.diff([*hues, hues[0] + 1]).min() > 0.07


def test_edges_are_smooth():
    image = np.asarray(draw_shape(Random(1), "circle", difficulty=0.0)).reshape(-1, 3)
    assert len(np.unique(image, axis=0)) > 100


@pytest.mark.parametrize(("size", "options"), [(48, {}), (20, {"image_size": 20})])
def test_items_are_the_drawn_images(size, options):
    data = Shapes(**FEW, **options, normalization="half", batch_size=5)
    data.setup("test")
    images, targets = next(iter(data.test_dataloader()))
    source, label = data.samples("test")[0]
    assert source.size == (size, size)
    expected = np.asarray(source, dtype=np.float32).transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(images[0], expected, atol=1e-6)
    assert targets[0] == label


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_shows_each_image_once(workers):
    data = Shapes(**FEW, image_size=8, batch_size=10, num_workers=workers, cache=True)
    data.setup("fit")
    assert [len(targets) for _, targets in data.val_dataloader()] == [10, 6]
    assert len(torch.cat([targets for _, targets in data.train_dataloader()])) == 20  # the last batch is incomplete


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_images_is_refused(split):
    with pytest.raises(ValueError, match=f"{split}_images=0 must be at least 1"):
        Shapes(**{f"{split}_images": 0})


class Labels(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch[1]


def test_cached_images_in_a_prediction():
    """Lightning makes the loader again for a prediction, without its batch size."""
    data = Shapes(image_size=16, batch_size=6, cache=True, normalization="half", **FEW)
    data.setup("fit")
    loader = data.val_dataloader()
    found = trainer().predict(Labels(), loader)
    assert [len(part) for part in found] == [6, 6, 4]
    assert torch.equal(torch.cat(found), torch.cat([labels for _, labels in loader]))
