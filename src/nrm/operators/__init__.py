"""How relevance passes each kind of operator, and the table that says which kind each one is."""

from nrm.operators.contribution import Contribution
from nrm.operators.custom import Block, operation
from nrm.operators.derivatives import LocalLinear, ToFirstOrder
from nrm.operators.functions import GATE, SQUASHED, WEIGHTS, Function
from nrm.operators.products import MatrixProduct, Product, Quotient
from nrm.operators.routing import Identity, Routing
from nrm.operators.row import Call, Columns, Operator, Propagation, Setting, Slot, fill, picks
from nrm.operators.sums import Sum, WeightedSum
from nrm.operators.table import (
    COMPLEX_LINEAR,
    carries_none,
    describe,
    function_of,
    functional,
    has_row,
    in_place,
    keeps_values,
    lookup,
    reads_layout,
    register,
    registered,
    row_of,
    standard,
)

__all__ = [
    "COMPLEX_LINEAR",
    "GATE",
    "SQUASHED",
    "WEIGHTS",
    "Block",
    "Call",
    "Columns",
    "Contribution",
    "Function",
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
    "describe",
    "fill",
    "function_of",
    "functional",
    "has_row",
    "in_place",
    "keeps_values",
    "lookup",
    "operation",
    "picks",
    "reads_layout",
    "register",
    "registered",
    "row_of",
    "standard",
]
