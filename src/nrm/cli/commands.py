"""How commands are found and read: none is imported before it is asked for, and no option that is
given is passed over.

Other packages add commands by the entry-point group `nrm.commands`:

    [project.entry-points."nrm.commands"]
    mine = "my_package.module:function"

makes `nrm mine` of a function with typer's annotations. Its module is imported when the command is
asked for, or listed by `nrm --help`: it is to import little, and the rest when it is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nrm.cli.errors import REFUSED, CommandError

GROUP = "nrm.commands"
_ARGUMENTS = "nrm.arguments"


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the last would win silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. They are kept for `arguments`."""
        ctx.meta[_ARGUMENTS] = list(args)
        if args and not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, times in Counter(order).items():
                several = any(getattr(parameter, how, 0) for how in ("multiple", "is_flag"))
                if times > 1 and parameter.param_type_name == "option" and not several:
                    name = max(parameter.opts, key=len)
                    typer.echo(f"error: {name} is given {times} times; give it once", err=True)
                    raise typer.Exit(REFUSED)
        found: list[str] = super().parse_args(ctx, args)
        return found


class Commands(TyperGroup):
    """The commands of nrm, and those of other packages, which cannot take the place of these."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all, nrm's own first."""
        own: list[str] = super().list_commands(ctx)
        return [*own, *sorted(entry.name for entry in _entries() if entry.name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, imported if it is another package's; `None` if there is none."""
        found = super().get_command(ctx, cmd_name)
        if found is None:
            found = next((_loaded(e) for e in _entries() if e.name == cmd_name), None)
        return found


def _entries() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _loaded(entry: EntryPoint) -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(entry.name, cls=Command)(entry.load())
    return typer.main.get_command(app)


def arguments(ctx: typer.Context) -> list[str]:
    """What was typed after the name of the command."""
    return list(ctx.meta.get(_ARGUMENTS, ()))


def refuse_unread(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would be passed over.

    Arguments:
        given: options and their values; `None` where one was not given.
        why: nothing reads them.

    Raises:
        CommandError: names the first of them.
    """
    for option, value in given.items():
        if value is not None:
            raise CommandError(f"{option} has no effect {why}: leave it out")
