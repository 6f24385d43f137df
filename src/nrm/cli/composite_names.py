"""Composites by name, as `--composite` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from nrm import composites
from nrm.cli.errors import CommandError
from nrm.composites import Composite

DEFAULT = "auto"
_NAMED: dict[str, Callable[[], Composite | None]] = {
    DEFAULT: lambda: None,
    "GammaFlat": composites.GammaFlat,
    "EpsilonPlus": composites.EpsilonPlus,
    "EpsilonPlusFlat": composites.EpsilonPlusFlat,
    "EpsilonGammaFlat": composites.EpsilonGammaFlat,
    "EpsilonAlpha2Beta1Flat": composites.EpsilonAlpha2Beta1Flat,
    "LRPZero": composites.LRPZero,
    "CPLRP": composites.CPLRP,
    "AttnLRP": composites.AttnLRP,
    "LRPAll": composites.LRPAll,
    "Occlusion": composites.Occlusion,
    "LocalLinear": composites.LocalLinear,
    "IntegratedGradients": composites.IntegratedGradients,
}
_BOX = "EpsilonGammaBox"
NAMES = (*_NAMED, _BOX)


def find_composite(name: str, bounds: tuple[Tensor, Tensor] | None) -> Composite | None:
    """A composite with its default parameters; `None` for the one that suits the model.

    Arguments:
        name: in whatever case.
        bounds: smallest and largest input, which the box rule needs.
    """
    known = {one.casefold(): one for one in NAMES}
    if name.casefold() not in known:
        near = difflib.get_close_matches(name.casefold(), known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise CommandError(f"no composite is called {name!r}; {hint}there are {', '.join(NAMES)}")
    chosen = known[name.casefold()]
    if chosen != _BOX:
        return _NAMED[chosen]()
    if bounds is None:
        raise CommandError(
            f"{_BOX} needs the bounds of the inputs, which are known without --transform only"
        )
    return composites.EpsilonGammaBox(*bounds)
