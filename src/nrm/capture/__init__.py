"""A PyTorch model as a flat graph of operators, with module paths as addresses."""

from nrm.capture.call import ModelCall, Output, check_nested, is_copy, wide, without_autocast
from nrm.capture.export import Captured, capture, reproduces, run
from nrm.capture.tracing import capturing

__all__ = [
    "Captured",
    "ModelCall",
    "Output",
    "capture",
    "capturing",
    "check_nested",
    "is_copy",
    "reproduces",
    "run",
    "wide",
    "without_autocast",
]
