"""What the demo explains: digits that a small network has not seen."""

from __future__ import annotations

from nrm.cli.pictures import Picture, shown
from nrm.cli.report import Subject
from nrm.experiments.digit_net import Trained

DIGITS = (3, 6)
LAYERS = ["conv2", "conv3"]


def example(trained: Trained, digit: int) -> tuple[Picture, Subject]:
    """The held-out picture of a digit that the network is surest of."""
    own = (trained.y == digit).nonzero().flatten()
    best = int(own[trained.model(trained.x[own]).softmax(1)[:, digit].argmax()])
    x = trained.x[best]
    subject = Subject(f"digit {best} of the held-out ones", "DigitNet", digit, str(digit))
    return Picture(x[None], shown(x)), subject
