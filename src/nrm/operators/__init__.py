"""How relevance passes each kind of operator, and the table that says which kind each one is."""

from nrm.operators.base import Columns, Operator, Propagation, Setting, Slot, fill
from nrm.operators.call import Call, picks
from nrm.operators.contribution import Contribution
from nrm.operators.identity import Identity
from nrm.operators.layers import Sum
from nrm.operators.local_linear import LocalLinear, ToFirstOrder
from nrm.operators.own import Block, operation
from nrm.operators.products import MatrixProduct, Product, Quotient
from nrm.operators.routing import Routing
from nrm.operators.table import (
    COMPLEX_LINEAR,
    carries_none,
    functional,
    has_row,
    in_place,
    lookup,
    register,
)
from nrm.operators.weighted_sum import WeightedSum

__all__ = [
    "COMPLEX_LINEAR",
    "Block",
    "Call",
    "Columns",
    "Contribution",
    "Identity",
    "LocalLinear",
    "MatrixProduct",
    "Operator",
    "Product",
    "Propagation",
    "Quotient",
    "Routing",
    "Setting",
    "Slot",
    "Sum",
    "ToFirstOrder",
    "WeightedSum",
    "carries_none",
    "fill",
    "functional",
    "has_row",
    "in_place",
    "lookup",
    "operation",
    "picks",
    "register",
]
