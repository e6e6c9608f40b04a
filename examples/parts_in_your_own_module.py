"""Use the parts of dynadapter in your own LightningModule: `python examples/parts_in_your_own_module.py`.

A frozen Vision Transformer learns drawn shapes through LoRA and four exits, in about a minute on a CPU. Nothing is
downloaded: the backbone `micro` and the images come with the package.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from dynadapter import (
    Balanced,
    BidirectionalSparsity,
    Confidence,
    Constant,
    ExitNet,
    ExitWeights,
    FlopsReport,
    LateToEarly,
    LoRA,
    Shapes,
    create_backbone,
    exit_costs,
    inject,
    joint_loss,
)
from dynadapter.training.contents import trainable_only


class ShapeClassifier(LightningModule):
    """An ordinary LightningModule. Comments mark the parts of dynadapter."""

    def __init__(self, num_classes: int, threshold: float = 0.9) -> None:
        super().__init__()
        # A frozen backbone: any timm ViT, Swin or ConvNeXt
        backbone = create_backbone("micro", num_classes, pretrained=True)
        # Adapters around the layers that a pattern names
        inject(backbone, LoRA(rank=8, targets=("*.qkv",)))
        # An exit after every third of the 12 blocks: MLP heads first, linear heads later, as in the paper
        self.net = ExitNet(backbone, heads=Balanced(), every=3)
        # The exit policy; Entropy, Margin, Patience or your own subclass work too
        self.policy = Confidence(threshold)
        # Checkpoints without the frozen backbone; leave this out to save everything
        trainable_only(self)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        logits = self.net(images)  # (exits, batch, classes)
        return joint_loss(logits, labels, self.net.exit_weights)  # ExitWeights writes these weights

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        images, labels = batch
        for k, logits in enumerate(self.net(images), start=1):
            self.log(f"test/acc_exit{k}", (logits.argmax(-1) == labels).float().mean(), on_epoch=True)
        routed = self.net.early(images, self.policy)  # stages run only for the remaining images
        self.log("test/acc", (routed.logits.argmax(-1) == labels).float().mean(), on_epoch=True)
        return routed  # FlopsReport reads the exits from it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


def main(max_epochs: int = 5) -> dict[str, float]:
    """Train, test with early exits, and return the metrics of the test."""
    seed_everything(0)
    data = Shapes(image_size=48, normalization="half", batch_size=32, cache=True)
    module = ShapeClassifier(data.num_classes)
    # The cost of each exit is known before any training
    costs = exit_costs(module.net)
    print("million multiply-adds up to each exit:", ", ".join(f"{macs / 1e6:.1f}" for macs in costs.macs))
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            ExitWeights(LateToEarly(floor=0.1)),  # the late exits count most at the start, the early ones at the end
            # Dropout that falls with depth, and a random 5 % of the adapters' elements frozen in each step
            BidirectionalSparsity(shallow=Constant(0.1), deep=Constant(0.0), keep=Constant(0.95)),
            FlopsReport(),  # prints the tables at the end
        ],
    )
    data.setup("fit")
    trainer.fit(module, data.train_dataloader())  # the module has no validation step
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    return measured


if __name__ == "__main__":
    main()
