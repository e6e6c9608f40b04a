"""``dynadapter flops``: the GMACs up to each exit, without weights or images."""

from dynadapter.cost import cost_table, exit_costs, exit_parameters
from dynadapter.data import ImageData
from dynadapter.printing import print_tables
from dynadapter.training.module import ExitClassifier


def print_costs(model: ExitClassifier, data: ImageData, merged: bool) -> None:
    """Print the cost table of a network.

    Args:
        model: The network.
        data: The data module, for the image size.
        merged: Whether to merge the adapters first. The printed parameters are always the trained ones.
    """
    parameters = [f"{count:,}" for count in exit_parameters(model.net)]
    if merged:
        model.merge()
    table = cost_table(exit_costs(model.net, data.image_size), parameters=parameters)
    table.title = f"{model.backbone_name}, one image{', adapters merged' if merged else ''}"
    print_tables(table)
