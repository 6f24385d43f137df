"""A PyTorch model as a graph of variables and operations with module paths as addresses."""

from nrm.graph.build import build_graph
from nrm.graph.capture import Captured, capture, reproduces, run
from nrm.graph.graph import Graph, first_tokens
from nrm.graph.heads import Heads
from nrm.graph.model_call import ModelCall, Output, check_nested
from nrm.graph.precision import is_copy, wide, without_autocast
from nrm.graph.quiet import capturing
from nrm.graph.variables import Operation, Variable

__all__ = [
    "Captured",
    "Graph",
    "Heads",
    "ModelCall",
    "Operation",
    "Output",
    "Variable",
    "build_graph",
    "capture",
    "capturing",
    "check_nested",
    "first_tokens",
    "is_copy",
    "reproduces",
    "run",
    "wide",
    "without_autocast",
]
