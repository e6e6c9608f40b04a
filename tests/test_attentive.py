"""Attentive heads against multi-head attention with all its projections."""

import pytest
import torch
from conftest import BACKBONES, make_vit, parting
from torch.nn import functional as F

from dynadapter.cost import exit_costs
from dynadapter.exits.attentive import Attentive, AttentiveHead
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import route
from dynadapter.exits.token_merging import TokenMerging

WIDTH, CLASSES, TOKENS = 24, 5, 10


def head(queries: int = 3, class_token: bool = True) -> AttentiveHead:
    torch.manual_seed(0)
    built = AttentiveHead(WIDTH, CLASSES, queries, class_token)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built.double()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_equals_attention_with_projections(queries, class_token):
    built = head(queries, class_token)
    tokens = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    x = F.layer_norm(tokens, (WIDTH,), built.norm.weight, built.norm.bias, eps=1e-6)
    # Split each learned vector into a query and a key projection, as attention is usually written, and the classifier
    # into a value projection and the rest
    keys, values = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64)
    query = torch.linalg.solve(keys, built.queries.T).T * WIDTH**0.5
    read = F.scaled_dot_product_attention(query.expand(3, -1, -1), x @ keys, x @ values)
    assert read.shape == (3, queries, WIDTH)
    features = torch.cat([x[:, 0]] * class_token + [torch.linalg.solve(values.T, read.mT).mT.flatten(1)], -1)
    torch.testing.assert_close(built(tokens), built.classify(features))


def test_merged_tokens_count_as_often():
    built, tokens = head(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    counts = torch.tensor([1, 3, 1, 2, 1, 1, 1, 4, 1, 1])
    repeated = tokens.repeat_interleave(counts, 1)
    torch.testing.assert_close(built(tokens, counts.double().log().expand(2, -1)), built(repeated))


@pytest.mark.parametrize("kind", BACKBONES)
def test_routing_equals_stacked_logits(kind):
    net = ExitNet(BACKBONES[kind](), Attentive(), every=2).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = net(images)
        policy = parting(logits[0])
        routed = net.early(images, policy, class_first=True)
    index = route(policy, logits)
    assert routed.exit_index.tolist() == index.tolist()
    torch.testing.assert_close(routed.logits, logits[index, torch.arange(6)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merging", [None, TokenMerging((0,), 0.25)])
def test_cost_by_formula(merging):
    nets = [ExitNet(make_vit(), heads, every=2, token_merging=merging) for heads in (Attentive(6), LinearHeads())]
    attentive, linear = (exit_costs(net).macs for net in nets)
    width = nets[0].backbone.embed_dim
    tokens = 1 + (16 if merging is None else 12)
    more = 2 * 6 * tokens * width + 6 * width * nets[0].num_classes
    norm = 5 * (tokens - 1) * width  # of the tokens that a linear head on the class token does not read
    assert attentive[0] - linear[0] == more + norm


def test_mistakes():
    with pytest.raises(ValueError, match="queries=0 must be a whole number of at least 1 and at most 64"):
        Attentive(queries=0)
