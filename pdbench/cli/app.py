"""The command line: what every command shares."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts.config import Dict as Settings
from rich.console import Console

from pdbench import __version__
from pdbench.cli import recipe
from pdbench.config import LoadConfig


class Output(Console):
    """The terminal, or the file or pipe in its place. A measurement goes on when that takes no more lines (a full disk, a reader that
    has gone): `problem` is why."""

    problem: OSError | None = None

    def on_broken_pipe(self) -> None:
        raise  # rich would end the process, and with it a measurement

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except OSError as problem:
            self.problem = problem
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.file.fileno())
            os.close(nothing)


console = Output(highlight=False)
_HELP = "Does prefill/decode disaggregation pay, in milliseconds and in joules?"
app = App(name="pdbench", help=_HELP, version=__version__, console=console, suppress_keyboard_interrupt=False)
_RECIPE_HELP = "A TOML file that sets options; a flag overrides what it sets."
Recipe = Annotated[Path | None, Parameter(help=_RECIPE_HELP, validator=recipe.check)]
Language = Literal["en", "zh"]
MEASURING = Group("Measurement and output", sort_key=0)


def check_loads(loads: Sequence[LoadConfig]) -> None:
    """Name what was set and changes none of the loads; of a recipe's options, only those that no flag left without effect. Raises UserError for
    a --primary that is no metric: `pdbench compare` would take another in its place."""
    from pdbench.analysis import thresholds

    for load in loads:
        thresholds.check_metric(load.primary, "--primary")
    settings = {key: value for each in app.config if isinstance(each, Settings) for key, value in each.config.items()}
    settings = {field.name: settings[field.name] for field in fields(LoadConfig) if field.name in settings}
    alone = recipe.without_effect(LoadConfig(**settings))
    lines, *others = map(recipe.without_effect, loads)
    for name, line in lines.items():
        if all(name in each for each in others) and (name not in settings or name in alone):
            console.print(f"[yellow]{line}[/yellow]", soft_wrap=True)
