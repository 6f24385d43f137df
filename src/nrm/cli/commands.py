"""The words of the command line: which there are, how they are read, and how a refusal reads.

Nothing here imports torch, so that `nrm --help` and misspelt options are answered at once.

Reading. No option that is given is passed over, and no command is imported before it is asked for.
Other packages add commands by the entry-point group `nrm.commands`:

    [project.entry-points."nrm.commands"]
    mine = "my_package.module:function"

makes `nrm mine` of a function with typer's annotations. Its module is imported when the command is
asked for, or listed by `nrm --help`: it is to import little, and the rest when it is called. One
that cannot be imported is listed all the same, and says why when it is called.

Refusing. Within `one_line_errors` whatever is refused becomes one line on stderr.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nrm.cli import INTERRUPTED, interrupts_raise
from nrm.errors import NrmError, one_line, printable

TOP = "top1"
"""The target that is the largest output."""
SECOND = "top2"
"""What a target is explained against that is the largest of the others."""
IMAGENET = "imagenet"
"""The transform of pictures that is built in."""
AUTO = "auto"
"""The composite that suits the model."""
COMPOSITES = (
    "GammaFlat",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "EpsilonGammaFlat",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "LRPZero",
    "CPLRP",
    "Circuits",
    "AttnLRP",
    "LRPAll",
    "Occlusion",
    "LocalLinear",
    "IntegratedGradients",
)
"""Those of `nrm.composites` that the input and their names make, as `--help` lists them."""


RESULT = "result.json"
EPOCHS = 20
"""For which the network of the demo is trained."""

REFUSED = 2
"""How a command ends that was given what it does not take."""
GROUP = "nrm.commands"
_ARGUMENTS = "nrm.arguments"
_WANTED = re.compile(r"[\d.]+ ?([kKMGT]i?B|bytes)\b")  # the first figure of a message


# -- reading --------------------------------------------------------------------------------------


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
    try:
        app.command(entry.name, cls=Command)(entry.load())
    except Exception as error:  # any code may stand behind a name
        any_arguments = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(entry.name, cls=Command, context_settings=any_arguments)(_failing(entry, error))
    return typer.main.get_command(app)


def _failing(entry: EntryPoint, error: Exception) -> Callable[[], None]:
    """A command in the place of one that cannot be imported."""
    what = f"{type(error).__name__}: {one_line(error)}"
    reason = f"{entry.value} cannot be made a command: {what}"

    def fail() -> None:
        typer.echo(f"error: nrm {entry.name}: {reason}", err=True)
        raise typer.Exit(REFUSED)

    fail.__doc__ = reason
    return fail


def arguments(ctx: typer.Context) -> list[str]:
    """What was typed after the name of the command."""
    return list(ctx.meta.get(_ARGUMENTS, ()))


def composites_beginning(text: str) -> list[str]:
    """Names of composites, for the shell to complete one."""
    return [name for name in (AUTO, *COMPOSITES) if name.startswith(text)]


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


# -- refusing -------------------------------------------------------------------------------------


class CommandError(NrmError):
    """Something given on the command line does not exist, cannot be read or does not fit."""


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Errors on purpose end the command with one line and exit code 2; `debug` lets them through.

    So do files that cannot be read or written, and running out of memory. A reader that goes away
    (`nrm layers | head`) ends it without a word. Warnings become single lines too, each shown once.
    """
    shown: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = f"warning: {' '.join(str(message).split())}"
        if text not in shown:
            shown.add(text)
            typer.echo(text, err=True)

    with interrupts_raise(), warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # typer ends without a word
        except Exception as error:
            short = out_of_memory(error)
            if debug or not (short or isinstance(error, NrmError | OSError)):
                raise
            typer.echo(f"error: {short or one_line(error)}", err=True)
            raise typer.Exit(REFUSED) from None


def out_of_memory(error: BaseException) -> str | None:
    """What there is to say of an error that comes, also by another, of a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if (
            isinstance(cause, MemoryError)
            or type(cause).__name__ == "OutOfMemoryError"  # torch's, which need not be imported
            or "DefaultCPUAllocator" in text  # torch has no type for it
            or "out of memory" in text
        ):
            wanted = _WANTED.search(text)
            return f"there is not enough memory{f' for {wanted[0]}' if wanted else ''}"
        cause = cause.__cause__ or cause.__context__
    return None


def as_text(path: object) -> str:
    """A path as text that can be written down; what is no text in it is replaced."""
    return printable(os.fsencode(str(path)).decode("utf-8", errors="replace"))


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages of an extra; ends the command, saying what to install, if one is missing.

    Example:
        >>> with needs("cli"):
        ...     import typer
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nrm"):
            raise
        package = error.name.partition(".")[0]
        sys.stderr.write(f"error: {package} is not installed: pip install 'nrm[{extra}]'\n")
        raise SystemExit(2) from None
