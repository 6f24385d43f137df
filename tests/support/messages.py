"""How many messages an answer takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nrm import Measure


def messages_sent(R: Measure, ask: Callable[[], object]) -> dict[str, int]:
    """How many messages passed each operation, by its output, while something was asked."""
    counted: Counter[str] = Counter()
    for operation, propagation in R.forward_pass.propagations.items():

        def pull(message, wanted, normalized=True, *, at=operation, plain=propagation.pull):  # type: ignore[no-untyped-def]
            counted[at.output.name] += len(message)
            return plain(message, wanted, normalized)

        propagation.pull = pull  # type: ignore[method-assign]
    try:
        ask()
    finally:
        for propagation in R.forward_pass.propagations.values():
            del propagation.pull
    return dict(counted)
