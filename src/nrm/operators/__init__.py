"""How relevance passes each kind of operator, and the table that says which kind each one is."""

from nrm.operators.base import Columns, Operator, Propagation, Setting, Slot, fill
from nrm.operators.call import Call
from nrm.operators.identity import Identity
from nrm.operators.table import carries_none, functional, in_place, lookup, register

__all__ = [
    "Call",
    "Columns",
    "Identity",
    "Operator",
    "Propagation",
    "Setting",
    "Slot",
    "carries_none",
    "fill",
    "functional",
    "in_place",
    "lookup",
    "register",
]
