"""The joint relevance of all combinations of parts of several layers.

partitions        what layers are divided into: channels, neurons, places of an axis, sets
bridges           the one weighted sum between two layers by which channels are joined
channel_numbers   which channel of a layer the neurons on the way belong to
contraction       all pairs of channels in one step
pairs             by a contraction, or by messages from the side with fewer parts
"""

from nrm.joint.contraction import Contraction, contracted_pairs
from nrm.joint.pairs import Method, all_combinations, all_pairs, best_method, contraction_between
from nrm.joint.partitions import Channels, Division, Neurons, Partition, Sets, partition

__all__ = [
    "Channels",
    "Contraction",
    "Division",
    "Method",
    "Neurons",
    "Partition",
    "Sets",
    "all_combinations",
    "all_pairs",
    "best_method",
    "contracted_pairs",
    "contraction_between",
    "partition",
]
