"""The ``fips`` program that subcommands are added to, and its own options."""

from __future__ import annotations

from typing import Annotated

import typer

from fips.cli.console import stdout

__all__ = ["COMPRESS", "LOOK", "MEASURE", "app"]

app = typer.Typer(
    name="fips",
    help="Smaller transformers: matrices as numbers of few bits, measured by the output of the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
COMPRESS, MEASURE, LOOK = "Compress", "Measure", "Look"
"""Panels of commands."""


def _print_version(asked: bool) -> None:
    """Of fips and of what models are built with, which are not imported for it."""
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        from fips.version import __version__

        stdout.print(f"fips {__version__}", highlight=False)
        for name in ("torch", "transformers"):
            try:
                stdout.print(f"{name} {version(name)}", highlight=False)
            except PackageNotFoundError:
                stdout.print(f"{name} is not installed", highlight=False)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Versions of fips, torch and transformers."
        ),
    ] = False,
) -> None:
    """Smaller transformers: matrices as numbers of few bits, chosen by what they do to the output of the model."""
