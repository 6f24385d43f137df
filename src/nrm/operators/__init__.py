"""How relevance passes each kind of operator, and the table that says which kind each one is."""

from nrm.operators.contribution import Contribution
from nrm.operators.derivatives import LocalLinear, ToFirstOrder
from nrm.operators.products import MatrixProduct, Product, Quotient
from nrm.operators.routing import Identity, Routing
from nrm.operators.row import Call, Columns, Operator, Propagation, Setting, Slot, fill, picks
from nrm.operators.sums import Sum, WeightedSum
from nrm.operators.table import (
    COMPLEX_LINEAR,
    Block,
    carries_none,
    functional,
    has_row,
    in_place,
    keeps_values,
    lookup,
    operation,
    reads_layout,
    register,
    standard,
)

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
    "keeps_values",
    "lookup",
    "operation",
    "picks",
    "reads_layout",
    "register",
    "standard",
]
