"""A script that gives a number that the explorer shows, when it is run."""

from __future__ import annotations

from nrm.errors import QueryError, printable
from nrm.explore.answers import Request
from nrm.explore.columns import divided_columns
from nrm.explore.explained import target_of
from nrm.explore.opened import Input, Opened
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
    aim = target_of(request.target, request.against, R, opened)
    selected = parse(request.selection, R)
    condition = ""
    if selected is None:
        notation = f"R({aim.notation}) = 1"
        lines = ['print(f"total at the input: {float(R.heatmap().sum()):.6f}")']
    else:
        notation = f"R({selected.notation}, {aim.notation})"
        condition = ", given=selection" if request.mode == "given" else ", selection"
        lines = [
            f"selection = {selected.python}",
            'print(f"R(selection) = {float(R(selection)):.6f}")',
        ]
    for column in divided_columns(R, opened, request.columns):
        values, number = f"R.channels({column.layer!r}{condition})[0]", "part"
        if column.by.how != "channels":
            values = f"torch.cat([R(part{condition}) for part in {column.python()}])"
        if list(column.numbers) != list(range(len(column.numbers))):
            number = f"{list(column.numbers)}[part]"
        lines.append(
            f"values = {values}\n"
            f"for part in values.abs().topk(min({request.top}, len(values))).indices.tolist():\n"
            f'    print({column.layer!r}, {number}, f"{{float(values[part]):+.6f}}")'
        )
    imports = ["import nrm", "import torch"]
    body = f"{opened.python}\n{chosen.python}"
    imports += [line for line in body.splitlines() if line.startswith(("import ", "from "))]
    kept = [line for line in body.splitlines() if not line.startswith(("import ", "from "))]
    return _TEXT.format(
        version=__version__,
        title=_in_words(f"{opened.name}, {chosen.name}"),
        imports="\n".join(sorted(dict.fromkeys(imports))),
        model="\n".join(kept).strip(),
        target=aim.python,
        notation=notation,
        total="\n".join(lines),
    )


def _in_words(text: str) -> str:
    """A name that ends no string, wherever it is from."""
    return printable(text).replace("\\", "/").replace('"', "'")
