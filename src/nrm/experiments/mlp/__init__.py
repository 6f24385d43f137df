"""Joint relevance of neurons in a multilayer perceptron (Table 2, Fig. 4, App. J).

nrm reproduce mlp-mnist --data DIR --out DIR
"""

from nrm.experiments.mlp.data import Data, Part, load, read_idx
from nrm.experiments.mlp.network import MLP, Recipe, Trained, train, trained

__all__ = ["MLP", "Data", "Part", "Recipe", "Trained", "load", "read_idx", "train", "trained"]
