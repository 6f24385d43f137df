"""A PyTorch model as a graph of variables and operations with module paths as addresses."""

from nrm.graph.capture import Captured, capture, reproduces
from nrm.graph.graph import Graph, Operation, Variable

__all__ = ["Captured", "Graph", "Operation", "Variable", "capture", "reproduces"]
