"""Count the cost of each exit, in GMACs and relative to the static network.

A cost is a number of multiply-adds (MACs) for one image: 1 GMAC = 10^9 MACs, and 1 MAC = 2 FLOPs. A relative cost is
always "% of static": whole-block MACs over those of the static network, which has the same adapters in the same merge
state, no exits, and keeps every token.
"""

from dynadapter.cost.costs import ExitCosts, exit_costs
from dynadapter.cost.table import cost_table, exit_parameters

__all__ = ["ExitCosts", "cost_table", "exit_costs", "exit_parameters"]
