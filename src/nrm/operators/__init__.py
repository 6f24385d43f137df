"""How relevance passes each kind of operator, and the table that says which kind each one is."""

from nrm.operators.aten import COMPLEX_LINEAR
from nrm.operators.call import GATE, SQUASHED, WEIGHTS, Call, Function, Slot, fill, picks
from nrm.operators.custom import Block, operation
from nrm.operators.derivatives import LocalLinear, ToFirstOrder
from nrm.operators.products import MatrixProduct, Product, Quotient
from nrm.operators.propagation import Columns, Contribution, Propagation, Setting
from nrm.operators.routing import PassThrough, Routing
from nrm.operators.row import Operator
from nrm.operators.samples import MANY, Samples
from nrm.operators.secants import Secants
from nrm.operators.sums import Sum, WeightedSum
from nrm.operators.table import (
    carries_none,
    describe,
    function_of,
    functional,
    has_row,
    in_place,
    lookup,
    reads_layout,
    reads_sizes,
    register,
    registered,
    row_of,
    standard,
    unregister,
)

__all__ = [
    "COMPLEX_LINEAR",
    "GATE",
    "MANY",
    "SQUASHED",
    "WEIGHTS",
    "Block",
    "Call",
    "Columns",
    "Contribution",
    "Function",
    "LocalLinear",
    "MatrixProduct",
    "Operator",
    "PassThrough",
    "Product",
    "Propagation",
    "Quotient",
    "Routing",
    "Samples",
    "Secants",
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
    "lookup",
    "operation",
    "picks",
    "reads_layout",
    "reads_sizes",
    "register",
    "registered",
    "row_of",
    "standard",
    "unregister",
]
