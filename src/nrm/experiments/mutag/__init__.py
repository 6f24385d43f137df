"""Subgraphs and walks in molecules: a graph network trained on MUTAG (GNN-LRP as queries).

A pretrained GIN of three blocks says whether a molecule is mutagenic. For every molecule: the
relevance of single atoms and of rings, the most relevant walks of atoms, and what message passing
costs beside an enumeration of walks.

    python -m nrm.experiments.mutag --data DIR --out DIR
"""

from nrm.experiments.mutag.enumeration import enumerated_subgraph, walk_relevance, walks_inside
from nrm.experiments.mutag.gin import GIN, composite, load_gin
from nrm.experiments.mutag.molecules import Molecule, load_molecules
from nrm.experiments.mutag.relevance import experiment, explain

__all__ = [
    "GIN",
    "Molecule",
    "composite",
    "enumerated_subgraph",
    "experiment",
    "explain",
    "load_gin",
    "load_molecules",
    "walk_relevance",
    "walks_inside",
]
