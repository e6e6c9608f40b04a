"""Exit tokens: what they read, what they leave undisturbed, and what runs on a network that has them."""

import copy

import pytest
import torch
from conftest import CLASSES, VIT, make_vit, parting
from lightning.pytorch import Trainer
from timm.layers import SwiGLU
from timm.models import create_model
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import QUIET, loader, make_classifier
from torch import nn
from torch.nn import functional as F

from dynadapter import Adapter, AdaptFormer, Attentive, Confidence, FacT, LinearHeads, LoRA, RepAdapter, Stream, inject
from dynadapter.adapters import AdapterPlus, adapter_layers
from dynadapter.backbones import run_with_exit_tokens
from dynadapter.cost import exit_costs
from dynadapter.cost.table import exit_parameters
from dynadapter.exits.exit_tokens import ExitTokens
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never, route
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.serve.bundle import bundle_from_classifier, load
from dynadapter.training.losses import joint_loss
from dynadapter.training.module import ExitClassifier
from dynadapter.training.sharding import shard

ADAPTERS = {
    "none": None,
    "adapter": Adapter(bottleneck=4),
    "adaptformer": AdaptFormer(bottleneck=4, dropout=0.0),
    "fact": FacT(rank=2),
    "lora": LoRA(rank=2),
    "repadapter": RepAdapter(bottleneck=4, dropout=0.0),
}
MERGINGS = {"every token": None, "merged": TokenMerging((0, 1), 0.25, proportional=True)}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(6) % CLASSES


def network(adapter=LoRA(rank=2), heads=ExitTokens(count=3, rank=2), merging=None, **backbone):  # noqa: B008
    """Build a network whose adapters and updates are not zero; its backbone is always the same."""
    torch.manual_seed(0)
    vit = make_vit(**backbone)
    if adapter is not None:
        inject(vit, adapter)
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    net = ExitNet(vit, heads, every=2, token_merging=merging)
    if net.beside is not None:
        for updates in net.beside.updates:
            nn.init.normal_(updates.query.up, std=0.2)
            nn.init.normal_(updates.hidden.up, std=0.2)
    return net


def adapted(model, *specs):
    for spec in specs:
        inject(model, spec)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("merging", MERGINGS)
def test_other_tokens_do_not_see_them(adapter, merging):
    nets = [network(ADAPTERS[adapter], heads, MERGINGS[merging]).eval() for heads in (ExitTokens(), LinearHeads())]
    with torch.no_grad():
        ours, plain = (net(IMAGES)[-1] for net in nets)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_block_equals_masked_attention():
    """One attention over all tokens, in which a mask hides the exit tokens from all."""
    block = make_vit().double().blocks[0]
    update, more = nn.Linear(48, 48, bias=False).double(), nn.Linear(48, 192).double()
    x, exit_tokens = torch.randn(2, 7, 48, dtype=torch.float64), torch.randn(2, 3, 48, dtype=torch.float64)
    bias = torch.rand(2, 7, dtype=torch.float64)
    attention, both = block.attn, block.norm1(torch.cat([x, exit_tokens], 1))
    added = torch.cat([update(both[:, 7:]), torch.zeros(2, 3, 96)], -1)
    qkv = attention.qkv(both) + torch.cat([torch.zeros(2, 7, 144), added], 1)
    q, k, v = qkv.view(2, 10, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mask = torch.zeros(2, 1, 10, 10, dtype=torch.float64)
    mask[:, 0, :, 7:] = -torch.inf
    mask[:, 0, :, :7] += bias[:, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(2, 10, 48)
    y = torch.cat([x, exit_tokens], 1) + attention.proj(mixed)
    normed = block.norm2(y)
    hidden = block.mlp.fc1(normed) + torch.cat([torch.zeros(2, 7, 192), more(normed[:, 7:])], 1)
    expected = y + block.mlp.fc2(F.gelu(hidden))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(
                torch.cat(run_with_exit_tokens(block, x, exit_tokens, update, more, bias), 1), expected
            )


@pytest.mark.parametrize("adapter", [kind for kind in ADAPTERS if kind != "none"])
def test_last_exit_trains_as_static(adapter):
    nets = [network(ADAPTERS[adapter], heads).train() for heads in (ExitTokens(), LinearHeads())]
    nets[1].exit_weights.zero_()[-1] = nets[0].exit_weights[-1]  # the static network's loss
    for net in nets:
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            joint_loss(net(IMAGES), TARGETS, net.exit_weights).backward()
            optimizer.step()
    ours, static = (dict(net.backbone.named_parameters()) for net in nets)
    for name in ours:
        torch.testing.assert_close(ours[name], static[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [LoRA(rank=2), FacT(rank=2)], ids=lambda adapter: adapter.label)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_early_losses_train_only_their_own(checkpointing, adapter):
    net = network(adapter).train()
    net.backbone.set_grad_checkpointing(checkpointing)
    F.cross_entropy(net(IMAGES)[:-1].flatten(0, 1), TARGETS.repeat(2)).backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {name for name, p in net.named_parameters() if name.startswith(("beside.", "heads."))}
    assert reached == expected
    own = [p for layer in adapter_layers(net).values() for p in layer.own_parameters().values()]
    assert own
    assert all(p.requires_grad for p in own)


def test_gradient_checkpointing_keeps_less():
    """Of a stage with exit tokens it keeps the inputs of the blocks; the gradients stay."""
    kept, gradients = [], []
    for on in (False, True):
        net = network(depth=4).train()
        net.backbone.set_grad_checkpointing(on)
        seen: dict[int, int] = {}

        def keep(x, seen=seen):
            seen[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = joint_loss(net(IMAGES), TARGETS, net.exit_weights)
            kept.append(sum(seen.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0] / 2
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("merging", MERGINGS)
@pytest.mark.parametrize("backbone", ["class token", "mean"])
def test_routing_and_stream_equal_stacked(merging, backbone):
    args = {} if backbone == "class token" else {"class_token": False, "global_pool": "avg"}
    net = network(merging=MERGINGS[merging], **args).eval()
    with torch.no_grad():
        logits = net(IMAGES)
        policy = parting(logits[0])
        index = route(policy, logits)
        assert 0 < index.bool().sum() < len(index)
        routed, never = net.early(IMAGES, policy), net.early(IMAGES, Never())
        at_exit = net.at(1)(IMAGES)
    stream = Stream(net, policy, batch=2)
    for image in IMAGES:
        stream.push(image[None])
    answers = stream.flush()
    expected = logits[index, torch.arange(len(index))]
    assert routed.exit_index.tolist() == index.tolist() == [answer.exit_index for answer in answers]
    for found in (routed.logits, torch.stack([answer.logits for answer in answers])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(never.logits, logits[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_exit, logits[1], rtol=1e-4, atol=1e-5)


def test_merge_keeps_every_exit():
    net = network().eval()
    merged = copy.deepcopy(net).merge()
    with torch.no_grad():
        torch.testing.assert_close(merged(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(*QUIET, "ignore:The .val_dataloader. does not have many workers")
def test_checkpoint_and_bundle_keep_them(tmp_path):
    model = make_classifier(heads=ExitTokens(count=3, rank=2, scale=5.0))
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model.eval()
    again = ExitClassifier.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu").eval()
    bundle = load(bundle_from_classifier(model, tmp_path / "bundle", policy=Confidence(0.5), preprocessing={}))
    with torch.no_grad():
        expected = model.net(IMAGES)
        for net in (again.net, bundle.net):
            assert net.heads[0].classify.in_features == 3 * 48
            torch.testing.assert_close(net(IMAGES), expected)


@pytest.mark.parametrize("merging", MERGINGS)
def test_static_cost_has_no_exit_tokens(merging):
    nets = [network(None, heads, MERGINGS[merging]) for heads in (ExitTokens(count=3), Attentive())]
    ours, plain = (exit_costs(net) for net in nets)
    static = exit_costs(ExitNet(make_vit(), exit_depths=[]))
    assert ours.static == plain.static == static.static == static.macs[0]


def test_cost_by_formula():
    count, rank, width, tokens, blocks, exits = 3, 2, 48, 17, 4, 2
    nets = [network(None, heads) for heads in (ExitTokens(count, rank), LinearHeads())]
    assert nets[0].exit_depths == (2, 4, 6)
    ours, plain = (exit_costs(net) for net in nets)
    products = [whole - light for whole, light in zip(ours.macs, ours.light, strict=True)]
    others = [whole - light for whole, light in zip(plain.macs, plain.light, strict=True)]
    hidden = nets[0].backbone.blocks[0].mlp.fc1.out_features
    block = count * width * (2 * width + 2 * hidden) + count * rank * (3 * width + hidden) + 2 * count * tokens * width
    head = (count - 1) * width * CLASSES
    assert products[-1] - others[-1] == blocks * block + exits * head
    assert products[0] - others[0] == 2 * block + head


def test_parameters_count_where_used():
    net = network()
    used = exit_parameters(net)
    assert used[-1] == sum(p.numel() for p in net.parameters() if p.requires_grad)
    more = [sum(p.numel() for p in (*update.parameters(),)) for update in net.beside.updates]
    lora = sum(p.numel() for name, p in net.backbone.blocks[0].named_parameters() if "lora" in name)
    heads = [sum(p.numel() for p in head.parameters()) for head in net.heads]
    assert used[0] == net.beside.first.numel() + sum(more[:2]) + 2 * lora + heads[0]
    assert used[1] - used[0] == sum(more[2:]) + 2 * lora + heads[1]


def test_network_without_exits_has_none():
    assert ExitNet(make_vit(), ExitTokens(), exit_depths=[]).beside is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExitTokens(count=0), "count=0 must be a whole number of at least 1 and at most 64"),
        (lambda: ExitTokens(count=65), "count=65 must be a whole number of at least 1 and at most 64"),
        (lambda: ExitTokens(rank=0), "rank=0 must be a whole number of at least 1"),
        (lambda: ExitTokens(scale=0), "scale=0 must be a finite number above 0"),
        (
            lambda: ExitNet(create_model("swin_tiny_patch4_window7_224", num_classes=3), ExitTokens()),
            "not SwinTransformerBlock of SwinTransformer; use other heads, such as Attentive",
        ),
        (
            lambda: ExitNet(create_model("vit_tiny_patch16_224", **VIT, block_fn=ParallelScalingBlock), ExitTokens()),
            "not ParallelScalingBlock of VisionTransformer",
        ),
        (lambda: network(AdaptFormer(targets=("*.qkv",))), "not the adapter AdaptFormer on their qkv; use other heads"),
        (
            lambda: ExitNet(adapted(make_vit(), AdapterPlus(), AdaptFormer(targets=("*.qkv",))), ExitTokens()),
            "not the adapter AdaptFormer on their qkv; use other heads",
        ),
        (
            lambda: ExitNet(
                adapted(create_model("eva02_tiny_patch14_224", num_classes=3), AdapterPlus()), ExitTokens()
            ),
            "not EvaBlock of Eva; use other heads",
        ),
        (lambda: network(AdaptFormer(targets=("*.attn",))), "not the adapter AdaptFormer on their attention; use oth"),
        (lambda: network(None, mlp_layer=SwiGLU), "ExitTokens needs timm's plain ViT blocks with plain MLPs"),
        (lambda: shard(network(), None), "ExitTokens cannot be trained sharded"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(ValueError, match=message):
        build()
