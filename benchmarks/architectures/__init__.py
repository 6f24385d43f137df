"""The architectures that `benchmarks.zoo` and its test explain: small, random, offline.

Each family has a file, which lists its models as it is imported: the order of the table.
"""

from benchmarks.architectures import (  # noqa: I001 - the order of the table
    convolutional,
    dense_pictures,
    vision,
    recurrent,
    language,
    graphs,
    parts,
)
from benchmarks.architectures.cases import CASES, NEEDS, Case, build

__all__ = [
    "CASES",
    "NEEDS",
    "Case",
    "build",
    "convolutional",
    "dense_pictures",
    "graphs",
    "language",
    "parts",
    "recurrent",
    "vision",
]
