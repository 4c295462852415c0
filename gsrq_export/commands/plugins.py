"""gsrq plugins: the native library of the operator."""

from __future__ import annotations

from pathlib import Path

import click

from gsrq_export import native


@click.group()
def plugins() -> None:
    """Build and find the native operator library."""


@plugins.command("build")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Compilers at once.")
@click.option("--build-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep the build tree here.")
def build_plugins(jobs: int, build_dir: Path | None) -> None:
    """Compile plugins/ with CMake; needs a C++17 compiler. The result is found by all other commands."""
    click.echo(native.build(build_dir, jobs))


@plugins.command("path")
def path() -> None:
    """Print the library's path; exit status 1 if none is built for this version."""
    found = native.find()
    if found is None:
        click.echo("no library is built; run `gsrq plugins build`", err=True)
        raise SystemExit(1)
    click.echo(found)
