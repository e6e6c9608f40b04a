"""``dynadapter test --bundle``: measure a bundle on the test images of a data module."""

from typing import TYPE_CHECKING

from rich.table import Table

from dynadapter.cli.configs import config_files
from dynadapter.cli.errors import mistakes
from dynadapter.cli.networks import BACKEND, BUNDLE, POLICY, WEIGHTS, check_network, load_network
from dynadapter.cli.parser import CommandParser
from dynadapter.cli.verify import data_sections
from dynadapter.printing import print_tables

if TYPE_CHECKING:
    from dynadapter.data import ImageData
    from dynadapter.serve.bundle import Bundle


def parser() -> CommandParser:
    """Return the parser of the command."""
    from dynadapter.data import ImageData

    made = CommandParser("test", "Measure a bundle on the test images of a data module.", {"data": ImageData})
    made.add_argument("--bundle", type=str, required=True, help=f"The bundle: {BUNDLE}.")
    words = "Where the images come from; its settings are --data.NAME VALUE. Or -c FILE with a data section."
    made.add_subclass_arguments(ImageData, "data", required=True, help=words)
    made.add_options({**POLICY, **WEIGHTS, **BACKEND})
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    from dynadapter.cli.safety import check_config

    made = parser()
    if {"-h", "--help"} & set(args):
        made.print_help()
        return
    files, rest = config_files(args)
    given = made.parse_args([*data_sections(files, rest), *rest])
    check_config(given)
    given.ckpt_path = None
    check_network(given.bundle)
    data: ImageData = made.instantiate(given).data
    bundle = load_network(given)
    assert bundle.preprocess is not None  # as load_network requires
    size = bundle.preprocess.image_size
    if given.backend == "auto" and bundle.graphs is not None and data.wanted.image_size not in ("auto", size):
        bundle.graphs = None
        print(f"backend torch instead: the exported graphs take images of {size} pixels", flush=True)
    with mistakes():
        data.take_classes(bundle.class_names)  # further sets may have classes that the first one lacks
        tables = [table for one in (data, *data.further_tests()) for table in measure(bundle, one)]
    print_tables(*tables)


def measure(bundle: "Bundle", data: "ImageData") -> list[Table]:
    """Measure every exit and the policy on the test images; for ``auto``, with the preprocessing of the bundle."""
    import torch

    from dynadapter.cli.networks import stacked
    from dynadapter.cost import cost_table, exit_costs
    from dynadapter.cost.table import percents, policy_table
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
    table = cost_table(costs, accuracy=percents(right / samples), share=percents(shares))
    table.title = f"Exits ({data.test_label}, shares under {bundle.policy.name})"
    routed_as = {bundle.policy.name: (routed_right / samples, shares)}
    return [table, policy_table(f"Early exits ({data.test_label})", costs, routed_as)]
