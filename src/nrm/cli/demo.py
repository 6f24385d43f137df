"""What the demo explains: digits that a small network has not seen."""

from __future__ import annotations

from nrm.cli.pictures import Picture, shown
from nrm.cli.provenance import versions, weights_used
from nrm.cli.report import Subject
from nrm.experiments.digit_net import Trained

DIGITS = (3, 6)
LAYERS = ["conv2", "conv3"]


def example(trained: Trained, digit: int) -> tuple[Picture, Subject]:
    """The held-out picture of a digit that the network is surest of."""
    own = (trained.y == digit).nonzero().flatten()
    best = int(own[trained.model(trained.x[own]).softmax(1)[:, digit].argmax()])
    x = trained.x[best]
    weights = weights_used(trained.model, None) | {"source": "trained by the demo"}
    made_from = {"weights": weights, "versions": versions()}
    named = f"digit {best} of the held-out ones"
    subject = Subject(named, "DigitNet", digit, str(digit), made_from)
    return Picture(x[None], shown(x)), subject
