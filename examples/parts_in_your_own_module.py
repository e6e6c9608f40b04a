"""The parts of dynadapter in a LightningModule of your own: `python examples/parts_in_your_own_module.py`.

A frozen Vision Transformer learns scikit-learn's handwritten digits through LoRA and four exits, in half a minute on a
CPU. Nothing is downloaded: the backbone's weights are random, yours come with `pretrained=True` or `weights="file"`.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from dynadapter import (
    Balanced,
    BidirectionalSparsity,
    Confidence,
    EarlyToLate,
    ExitNet,
    ExitWeights,
    FlopsReport,
    Linear,
    LoRA,
    create_backbone,
    exit_costs,
    inject,
    joint_loss,
)
from dynadapter.training.contents import trainable_only


class Digits(LightningModule):
    """An ordinary LightningModule. What is dynadapter's in it has a comment."""

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        # Any timm ViT, Swin or ConvNeXt, frozen but for its own classifier ...
        tiny = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "weight_init": "jax"}
        backbone = create_backbone("vit_tiny_patch16_224", num_classes=10, **tiny)
        # ... with adapters around the layers that a pattern names ...
        inject(backbone, LoRA(rank=8, targets=("*.qkv", "*.fc1")))
        # ... and an exit after every third of its 12 blocks: MLP heads first, linear ones later.
        self.net = ExitNet(backbone, heads=Balanced(), every=3)
        # The exit policy; Entropy, Margin, Patience or your own subclass work too.
        self.policy = Confidence(threshold)
        # Checkpoints without the frozen backbone. Leave this out to save everything.
        trainable_only(self)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        logits = self.net(images)  # (exits, batch, classes)
        return joint_loss(logits, labels, self.net.exit_weights)  # ExitWeights writes these weights

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        images, labels = batch
        for k, logits in enumerate(self.net(images), start=1):
            self.log(f"test/acc_exit{k}", (logits.argmax(-1) == labels).float().mean(), on_epoch=True)
        routed = self.net.early(images, self.policy)  # samples really leave; results in the order of the input
        self.log("test/acc", (routed.logits.argmax(-1) == labels).float().mean(), on_epoch=True)
        return routed  # FlopsReport reads the exits off it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Splits the 1797 digits of 8 x 8 pixels into 1200 for training and the rest for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), train_size=1200, random_state=0, stratify=labels)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=64),
    )


def main(max_epochs: int = 10) -> dict[str, float]:
    """Trains, tests with samples leaving early, and returns what the test has measured."""
    seed_everything(0)
    module, (train, test) = Digits(), loaders()
    # The cost of each exit can be known before any training.
    costs = exit_costs(module.net)
    print("one image up to each exit:", ", ".join(f"{macs / 1e6:.1f}" for macs in costs.macs), "million multiply-adds")
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            ExitWeights(EarlyToLate()),  # the early exits weigh most at first, the late ones at the end
            # Dropout that falls with depth, and a random part of the adapters' elements that moves in a step.
            BidirectionalSparsity(shallow=Linear(0.1, 0.0), keep=Linear(0.7, 1.0)),
            FlopsReport(),  # prints the tables at the end
        ],
    )
    trainer.fit(module, train)
    (measured,) = trainer.test(module, test, verbose=False)
    return measured


if __name__ == "__main__":
    main()
