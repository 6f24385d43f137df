"""Graph networks: nodes, edges and subgraphs as neuron sets, and walks of nodes.

The nodes of a graph lie along one axis of every variable, its features along the others. A walk of
neurons visits one node in each layer of message passing; walks that visit the same nodes add up to
one walk of nodes.
"""

from nrm.graph_networks.edges import EdgeLayer, edge_layers, edge_relevance, node_layers
from nrm.graph_networks.walks import (
    NodeWalk,
    NodeWalks,
    edges,
    node_walks,
    nodes,
    step,
    subgraph,
    top_walks,
)

__all__ = [
    "EdgeLayer",
    "NodeWalk",
    "NodeWalks",
    "edge_layers",
    "edge_relevance",
    "edges",
    "node_layers",
    "node_walks",
    "nodes",
    "step",
    "subgraph",
    "top_walks",
]
