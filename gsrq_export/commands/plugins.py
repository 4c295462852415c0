"""gsrq plugins: the native library of the operator."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from gsrq_export import native


@click.group()
def plugins() -> None:
    """Build and find the native operator library."""


@plugins.command("build")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Compilers at once.")
@click.option("--build-dir", type=click.Path(path_type=Path, file_okay=False), help="Keep the build tree here.")
@click.option("--cuda/--no-cuda", default=None, help="Also the CUDA kernels; default: if there are nvcc and a GPU.")
@click.option("--cuda-arch", multiple=True, metavar="90", help="Compute capability; repeat for more.  [80, 90, 100]")
@click.option(
    "--tensorrt-headers",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Also the plugin of this TensorRT: the folder of its NvInfer.h; repeat for both major versions.",
)
def build_plugins(
    jobs: int, build_dir: Path | None, cuda: bool | None, cuda_arch: tuple[str, ...], tensorrt_headers: tuple[Path, ...]
) -> None:
    """Compile plugins/ with CMake; needs a C++17 compiler. The results are found by all other commands."""
    hosts = [(native.tensorrt_target(headers), headers) for headers in tensorrt_headers]
    if cuda_arch and cuda is False:
        raise click.UsageError("--cuda-arch goes with --cuda")
    if cuda is None:
        cuda = bool(cuda_arch) or (native.nvcc() is not None and native.cuda_devices() > 0)
    with tempfile.TemporaryDirectory(prefix="gsrq-build-") as temporary:
        work = build_dir or Path(temporary)  # shared: the second library with CUDA links what the first compiled
        click.echo(native.build(work, jobs))
        for target in (native.CUDA, native.ORT_CUDA) if cuda else ():
            click.echo(native.build(work, jobs, target, cuda_arch))
        for target, headers in hosts:
            click.echo(native.build(work, jobs, target, cuda_arch, headers))


TARGETS = {"ort": native.ORT, "cuda": native.CUDA, "ort-cuda": native.ORT_CUDA} | {
    f"tensorrt{major}": target for major, target in native.TENSORRT.items()
}


@plugins.command("path")
@click.option("--of", "name", type=click.Choice(list(TARGETS)), default="ort", show_default=True, help="Which library.")
def path(name: str) -> None:
    """Print a library's path; exit status 1 if none is built for this version."""
    target = TARGETS[name]
    found = native.find(target)
    if found is None:
        options = " --tensorrt-headers DIR" if name.startswith("tensorrt") else " --cuda" if target.cuda else ""
        click.echo(f"no library is built; run `gsrq plugins build{options}`", err=True)
        raise SystemExit(1)
    click.echo(found)
