"""Circuits: components by name, the direct edges between them, and the smallest sets of edges.

components   heads, MLPs and embeddings of a captured transformer as neuron sets; sets by position
edges        the relevance of every direct edge, by one message for each component
circuit      the smallest set of edges that keeps a share of the relevance; files
"""

from nrm.circuits.circuit import Circuit, find_circuit
from nrm.circuits.components import Components, by_token, components
from nrm.circuits.edges import Edge, Edges, Walks

__all__ = [
    "Circuit",
    "Components",
    "Edge",
    "Edges",
    "Walks",
    "by_token",
    "components",
    "find_circuit",
]
