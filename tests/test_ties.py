"""Ties in token merging: found as by a loop, and judged by exit and class in an export."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from test_class_first import network, pictures
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from dynadapter.adapters import LoRA
from dynadapter.exits.policies import Confidence, route
from dynadapter.exits.token_merging import TokenMerging, smallest_gap
from dynadapter.serve.bundle import merged_copy
from dynadapter.serve.comparison import compare
from dynadapter.serve.ties import tied_images

MERGING = TokenMerging((0,), 0.4)


@pytest.mark.parametrize(
    ("own", "count", "prefix"), [(16, 6, 1), (16, 8, 0), (9, 1, 2), (3, 1, 1), (2, 1, 0), (5, 0, 0)]
)
def test_smallest_gap_by_loop(own: int, count: int, prefix: int) -> None:
    x = torch.randn(4, prefix + own, 6, generator=torch.Generator().manual_seed(own), dtype=torch.float64)
    for image, found in zip(x[:, prefix:], smallest_gap(x, count, prefix).tolist(), strict=True):
        rows = [sorted((float(cosine_similarity(a, b, 0)) for b in image[1::2]), reverse=True) for a in image[::2]]
        rows.sort(key=lambda row: -row[0])
        gaps = [rows[count - 1][0] - rows[count][0]] if 0 < count < len(rows) else []
        gaps += [row[0] - row[1] for row in rows[:count] if len(row) > 1]
        assert found == pytest.approx(min(gaps, default=float("inf")))


def tied_net() -> tuple[Any, Tensor]:
    """Return a network, and images of which the second has equal patches, so that any of them may merge."""
    backbone = make_vit(depth=2)
    nn.init.zeros_(backbone.pos_embed)
    images = pictures(4)
    images[1] = images[1, :, :, :8].repeat(1, 1, 4)
    return network(backbone, LoRA(rank=2), token_merging=MERGING), images


def test_tied_images_are_found() -> None:
    net, images = tied_net()
    assert tied_images(net, images, batch_size=3).tolist() == [False, True, False, False]
    assert net.token_merging is MERGING
    net.token_merging = None
    assert not tied_images(net, images).any()


class Played:
    """A runner whose logits of one image are others."""

    def __init__(self, net: Any, policy: Confidence, add: Tensor, image: Tensor) -> None:
        self.net, self.policy, self.add, self.image = net, policy, add, image

    @torch.no_grad()
    def every_exit(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images)
        changed = (x == self.image).flatten(1).all(1)
        return (self.net(x) + self.add * changed[:, None]).numpy()

    def route(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = torch.from_numpy(self.every_exit(images))
        taken = route(self.policy, logits)
        return logits[taken, torch.arange(len(taken))].numpy(), taken.numpy()


def test_export_judges_ties_by_exit_and_class() -> None:
    net, images = tied_net()
    policy = Confidence(1.0)
    shift, turn = torch.full((5,), 0.01), 100 * torch.eye(5)
    with torch.no_grad():
        least = int(net(images)[-1, 1].argmin())

    def compared(add: Tensor, image: int) -> dict[str, Any]:
        return compare(Played(net, policy, add, images[image]), net, policy, images, 1e-4)[1]  # type: ignore[arg-type]

    assert compared(shift, 1)["ties"] == 1
    assert compared(shift, 1)["largest_difference"] <= 1e-4
    assert compared(0 * shift, 1)["ties"] == 0
    with pytest.raises(ValueError, match=r"image 2 of 4 has a tie in token merging, .* another exit or class"):
        compared(turn[least], 1)
    with pytest.raises(ValueError, match=r"logits differ .*keep the adapters apart \(merge=False, --merge false\)"):
        compared(shift, 0)


def test_merging_adapters_judges_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = tied_net()
    real = type(net).forward
    calls: list[int] = []

    def other(self: Any, x: Tensor) -> Tensor:
        """Play rounding that turns the tie: after the merge the second image has other logits."""
        calls.append(1)
        logits = real(self, x)
        if len(calls) == 2:  # the first is the unmerged network
            logits[:, 1] += 0.01
        return logits

    monkeypatch.setattr(type(net), "forward", other)
    _, proof = merged_copy(net, images, Confidence(1.0))
    assert proof.difference < 1e-4
    calls.clear()
    with pytest.raises(ValueError, match="merging the adapters changes the logits"):
        merged_copy(net, images.flip(0)[[0, 1, 3, 2]], Confidence(1.0))  # whose second image has no tie
