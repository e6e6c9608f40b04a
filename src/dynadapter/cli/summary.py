"""What a command prints about its network: parameters, exits and costs."""

from collections import Counter

from rich.table import Table

from dynadapter.adapters import adapter_layers
from dynadapter.cost import cost_table, exit_costs, exit_parameters
from dynadapter.training.module import ExitClassifier


def network_lines(model: ExitClassifier) -> list[str]:
    """Return the parameters and the exits of a network, as two lines."""
    net = model.net
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    adapters = Counter(layer.kind for layer in adapter_layers(net.backbone).values())
    parts = " and ".join([*(f"{count} x {kind}" for kind, count in adapters.items()), "the heads"])
    return [
        f"{model.backbone_name}: {frozen:,} frozen and {trained:,} trained parameters, in {parts}",
        f"exits after blocks {', '.join(map(str, net.exit_depths))} of {net.depth}",
    ]


def costs_of(model: ExitClassifier, image_size: int, merged: bool) -> Table:
    """Return the cost of each exit as a table.

    Args:
        model: The network.
        image_size: Height and width in pixels.
        merged: Whether to merge the adapters first, which changes the network.
    """
    parameters = [f"{count:,}" for count in exit_parameters(model.net)]  # those trained, merged or not
    if merged:
        model.merge()
    table = cost_table(exit_costs(model.net, image_size), parameters=parameters)
    table.title = f"{model.backbone_name}, one image{', adapters merged' if merged else ''}"
    return table
