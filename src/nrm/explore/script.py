"""A script that gives a number that the explorer shows, when it is run."""

from __future__ import annotations

from nrm.errors import QueryError
from nrm.explore.answers import Request
from nrm.explore.opened import Input, Opened, target_of
from nrm.explore.selection import parse
from nrm.measure import Measure

_TEXT = '''"""Reproduces what the explorer of nrm {version} showed: {title}."""

{imports}

{model}
R = explainer(*inputs, **named, target={target})

# {notation}
{total}
'''


def script(R: Measure, request: Request, opened: Opened, chosen: Input) -> str:
    """Python that makes the measure, and prints the total and every column.

    Arguments:
        R: of the input, of any target.

    Raises:
        NrmError: the request asks for something that is not there.
    """
    from nrm import __version__

    if not (opened.python and chosen.python):
        raise QueryError(
            "this was opened in Python, so that no script knows how: take the line below a number."
        )
    _, target, symbol = target_of(request.target, request.against, R)
    selected = parse(request.selection, R.graph)
    if any('"' in part or "\\" in part for part in (opened.name, chosen.name)):
        raise QueryError("the names of the model and the input cannot be written into a script.")
    given = ", given=selection" if request.mode == "given" else ", selection"
    lines = []
    if selected is None:
        notation, given = f"R({symbol}) = 1", ""
        lines.append('print(f"total at the input: {float(R.heatmap().sum()):.6f}")')
    else:
        notation = f"R({selected.notation}, {symbol})"
        lines.append(f"selection = {selected.python}")
        lines.append('print(f"R(selection) = {float(R(selection)):.6f}")')
    for layer in request.columns:
        R.graph.variable(layer)
        lines.append(
            f"values = R.channels({layer!r}{given})[0]\n"
            f"for channel in values.abs().topk(min({request.top}, len(values))).indices.tolist():\n"
            f'    print({layer!r}, channel, f"{{float(values[channel]):+.6f}}")'
        )
    imports = ["import nrm"]
    body = f"{opened.python}\n{chosen.python}"
    imports += [line for line in body.splitlines() if line.startswith(("import ", "from "))]
    kept = [line for line in body.splitlines() if not line.startswith(("import ", "from "))]
    return _TEXT.format(
        version=__version__,
        title=f"{opened.name}, {chosen.name}",
        imports="\n".join(sorted(dict.fromkeys(imports))),
        model="\n".join(kept).strip(),
        target=target,
        notation=notation,
        total="\n".join(lines),
    )
