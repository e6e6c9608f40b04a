"""``dynadapter test --bundle``: measure a bundle on the test images of a data module."""

from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from dynadapter.cli.configs import config_files
from dynadapter.cli.errors import mistakes
from dynadapter.cli.networks import BACKEND, BUNDLE, check_network, load_network
from dynadapter.cli.parser import CommandParser
from dynadapter.cli.verify import data_section
from dynadapter.printing import print_tables

if TYPE_CHECKING:
    from torch import Tensor

    from dynadapter.data import ImageData
    from dynadapter.serve.bundle import Bundle

OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "policy": (dict | str | None, None, "Exit policy instead of the stored one, such as Never or Patience."),
    "threshold": (float | list[float] | None, None, "Threshold instead of the policy's own: one, or a list."),
    "weights": (str | None, None, "File of the backbone's weights, where the bundle needs one."),
    "pretrained": (bool | None, None, "Whether timm may fetch the backbone's weights; default: as in training."),
    "backend": BACKEND,
    "device": (Literal["auto", "cpu", "cuda"], "auto", "Where the network runs; auto takes a GPU if there is one."),
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    from dynadapter.data import ImageData

    made = CommandParser("test", "Measure a bundle on the test images of a data module.", {"data": ImageData})
    made.add_argument("--bundle", type=str, required=True, help=f"The bundle: {BUNDLE}.")
    words = "Where the images come from; its settings are --data.NAME VALUE. Or -c FILE with a data section."
    made.add_subclass_arguments(ImageData, "data", required=True, help=words)
    for name, (kind, default, words) in OPTIONS.items():
        made.add_argument(f"--{name}", type=kind, default=default, help=words)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    from dynadapter.cli.safety import check_config

    made = parser()
    if {"-h", "--help"} & set(args):
        made.print_help()
        return
    files, rest = config_files(args)
    given = made.parse_args([*(f"--data={data_section(file)}" for file in files), *rest])
    check_config(given)
    given.ckpt_path = None
    check_network(given.bundle)
    data: ImageData = made.instantiate(given).data
    bundle = load_network(given)
    with mistakes():
        tables = [table for one in (data, *data.further_tests()) for table in measure(bundle, one)]
    print_tables(*tables)


def measure(bundle: "Bundle", data: "ImageData") -> list[Table]:
    """Measure every exit and the policy on the test images; for ``auto``, with the preprocessing of the bundle.

    Returns:
        The tables that ``test`` prints for a checkpoint.

    Raises:
        ValueError: The data have no test images, or a class that the bundle does not know.
    """
    import torch

    from dynadapter.cli.networks import stacked
    from dynadapter.cost import cost_table, exit_costs
    from dynadapter.exits.policies import read_off

    assert bundle.preprocess is not None
    exits = bundle.net.num_exits
    right, routed_right, counts = torch.zeros(exits), 0.0, torch.zeros(exits)
    for logits, targets in stacked(bundle, data, "test"):
        correct = (logits.argmax(-1) == targets) & logits.isfinite().all(-1)
        right += correct.sum(-1)
        routed = read_off(bundle.policy, logits)
        counts += routed.exit_index.bincount(minlength=exits)
        routed_right += float(((routed.logits.argmax(-1) == targets) & routed.logits.isfinite().all(-1)).sum())
    samples = float(counts.sum())
    shares = counts / samples
    counted = bundle.costs if data.image_size == bundle.preprocess.image_size else None
    costs = counted or exit_costs(bundle.net, data.image_size)
    table = cost_table(costs, accuracy=_percent(right / samples), share=_percent(shares))
    table.title = f"Exits ({data.test_label}, shares under {bundle.policy.name})"
    routing = Table(title=f"Early exits ({data.test_label})")
    for heading in ("policy", "accuracy", "GMACs", "% of static", "exit shares"):
        routing.add_column(heading, justify="left" if heading == "policy" else "right")
    average = costs.average(shares)
    accuracy, relative = f"{routed_right / samples:.1%}", f"{average / costs.static:.1%}"
    routing.add_row(bundle.policy.name, accuracy, f"{average / 1e9:.3g}", relative, " / ".join(_percent(shares)))
    return [table, routing]


def _percent(values: "Tensor") -> list[str]:
    return [f"{value:.1%}" for value in values.tolist()]
