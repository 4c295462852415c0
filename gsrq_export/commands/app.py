"""The command line: one click group, a small file a command."""

from __future__ import annotations

import sys

import click

from gsrq_export import __version__
from gsrq_export.commands.build import build
from gsrq_export.commands.compare import compare
from gsrq_export.commands.evaluate import evaluate
from gsrq_export.commands.export import export
from gsrq_export.commands.generate import generate
from gsrq_export.commands.inspect import inspect
from gsrq_export.commands.plugins import plugins
from gsrq_export.commands.recipes import recipes
from gsrq_export.commands.regress import regress
from gsrq_export.commands.serve import serve
from gsrq_export.commands.sign import sign
from gsrq_export.commands.tune import tune
from gsrq_export.commands.verify import verify
from gsrq_export.errors import GsrqError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gsrq")
def cli() -> None:
    """Key-value caches of one bit an element or less, from calibration to deployable artifacts."""


for command in (
    build,
    compare,
    evaluate,
    export,
    generate,
    inspect,
    plugins,
    recipes,
    regress,
    serve,
    sign,
    tune,
    verify,
):
    cli.add_command(command)


def main() -> None:
    """Run the program. Exit status 0: done; 1: checked and found wanting; 2: bad input."""
    try:
        cli(prog_name="gsrq")
    except GsrqError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has enough
        sys.stderr.close()
        sys.exit(0)
