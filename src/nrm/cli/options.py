"""Commands whose options mean what they say: none that is given is passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from nrm.cli.errors import REFUSED, CommandError

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
