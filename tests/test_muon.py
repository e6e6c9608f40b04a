"""tools/pretrain's Muon against torch's own, and its iteration against singular values."""

import pytest
import torch

from tools.pretrain.muon import Muon, orthogonalized

DEFAULTS = torch.optim.Muon([torch.zeros(2, 2)]).defaults
SHAPES = [(6, 6), (12, 4), (4, 12), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_iteration_maps_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = DEFAULTS["ns_coefficients"]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(DEFAULTS["ns_steps"]):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalized(matrix, (a, b, c), DEFAULTS["ns_steps"], DEFAULTS["eps"])
    torch.testing.assert_close(found, left @ torch.diag(values) @ right)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_torchs_up_to_bfloat16(shape):
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=draw)
    own, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1}
    mine = Muon([own], **settings)
    theirs = torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(6):
        if step == 3:  # the state of either continues the other
            mine_state, their_state = mine.state_dict(), theirs.state_dict()
            mine.load_state_dict(their_state)
            theirs.load_state_dict(mine_state)
        own.grad = torch.randn(shape, generator=draw)
        other.grad = own.grad.clone()
        mine.step()
        theirs.step()
    moved = (other - start).abs().max()
    assert moved > 0.05
    assert (own - other).abs().max() < 0.03 * moved  # bfloat16 has 8 bits


def test_zero_gradient_is_no_nan():
    own = torch.nn.Parameter(torch.ones(3, 2))
    own.grad = torch.zeros(3, 2)
    Muon([own, torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(own.detach(), torch.ones(3, 2))
