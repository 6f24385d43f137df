"""Search for the most relevant flows: which combination of parts, one of each layer, carries most.

flows              what is found
intervals          between which bounds what is still to come lies, seen from every neuron
branch_and_bound   the exact search
greedy             the layer-by-layer search of CRP, as a baseline
find               the entry
"""

from nrm.search.branch_and_bound import Budget
from nrm.search.find import Way, find_flows, in_depth
from nrm.search.flows import Flow, Flows, Order, keys

__all__ = ["Budget", "Flow", "Flows", "Order", "Way", "find_flows", "in_depth", "keys"]
