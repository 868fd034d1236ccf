"""The commands: each reads its options and calls one function of the rooms below. Nothing is measured or judged here."""

import functools
import io
import sys
from pathlib import Path

import cyclopts
from cyclopts.config import Dict as Settings
from rich.console import Console
from rich.markup import escape

from pdbench.cli import measure, read, recipe, search  # they register their commands
from pdbench.cli.app import app, console
from pdbench.errors import UserError

_WITH_RECIPE = ("run", "bench", "sweep", "search", "calibrate", "serve", "doctor", "proxy")
"""Commands that take a recipe; each ignores options of the others."""


def _recipe_settings(arguments: list[str]) -> list[Settings]:
    """A recipe (a .toml file) gives every option that no flag sets."""
    if not arguments or arguments[0] not in _WITH_RECIPE:
        return []
    paths = [Path(text) for text in arguments[1:] if text.endswith(".toml") and not text.startswith("-")]
    if len(paths) > 1:
        raise UserError(f"several recipes, {' and '.join(map(str, paths))}: name one, and give the rest as flags")
    if not paths:
        return []
    settings = recipe.read(paths[0], arguments[0])
    foreign = set.union(*(_options(command) for command in _WITH_RECIPE)) - _options(arguments[0])
    settings = {key: value for key, value in settings.items() if key not in foreign}
    settings = recipe.without_replaced(settings, arguments)
    return [Settings(settings, use_commands_as_keys=False, source=str(paths[0]))]


@functools.cache
def _options(command: str) -> set[str]:
    """The options of a command, as a recipe names them."""
    names = (name for argument in app[command].assemble_argument_collection() for name in argument.names)
    return {name[2:].replace("-", "_") for name in names if name.startswith("--")}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a UserError becomes one line on stderr and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # Where the terminal's encoding lacks a letter, a question mark is better than no measurement.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        for word in arguments:
            try:
                word.encode()
            except UnicodeEncodeError:  # no results file could hold it
                raise UserError(f"{word!a} is not UTF-8: write it in other letters", exit_code=2) from None
        app.config = _recipe_settings(arguments)
        ended: SystemExit | None = None
        try:
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        except SystemExit as error:
            ended = error
        if console.problem and not isinstance(console.problem, BrokenPipeError):  # who closed a pipe has read enough
            raise UserError(
                f"not all that was said could be written ({console.problem.strerror}): make room, or another place for it",
                exit_code=2 if arguments[:1] == ["compare"] else 1,  # there 1 says that a condition is met
            )
        if ended:
            raise ended
    except UserError as error:
        earlier = error.__context__  # what went wrong before a `finally` failed, too
        if isinstance(earlier, UserError) and not error.__suppress_context__:
            error.args = (f"{earlier}; then {error}",)
        stderr.print(f"[red]pdbench:[/red] {escape(str(error))}")
        sys.exit(error.exit_code)
    except cyclopts.CycloptsError as error:
        command = " ".join(("pdbench", *(error.command_chain or ())))
        stderr.print(f"[red]pdbench:[/red] {escape(str(error).strip())} Try `{command} --help`.")
        sys.exit(2)
