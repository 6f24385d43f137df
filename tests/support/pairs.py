"""Parameters of a test in pairs: any two values of different parameters meet in some item.

Where all of them together would be many, and what goes wrong needs one or two of them, not three.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def in_pairs(names: str, *values: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the values of several parameters, in pairs.

    The same items in every run.

    Arguments:
        names: of the parameters, as for `parametrize`: `"network, rule, bias"`.
        values: of each.
    """
    chosen = [list(each) for each in values]
    numbers = AllPairs([list(range(len(each))) for each in chosen])
    items = [tuple(each[k] for each, k in zip(chosen, row, strict=True)) for row in numbers]
    return pytest.mark.parametrize(names, items)
