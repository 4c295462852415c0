"""Building and finding the library of CUDA kernels; nothing here needs a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from gsrq_export import native
from gsrq_export.commands.plugins import plugins
from gsrq_export.errors import GsrqError

KERNEL = """
#include "gsrq/cuda/gsrq_cuda.h"
namespace gsrq::cuda {
__global__ void fill(int* out) { out[threadIdx.x] = 1; }
int inner(int* out) { fill<<<1, 32>>>(out); return cudaGetLastError(); }
}
int32_t gsrq_cuda_abi(void) { return gsrq::cuda::inner(nullptr); }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources and an empty cache."""
    copy = tmp_path / "plugins"
    shutil.copytree(native.source_dir(), copy)
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.CUDA.variable, raising=False)
    monkeypatch.delenv(native.ORT.variable, raising=False)
    monkeypatch.setattr(native, "source_dir", lambda: copy)
    return copy


def exported(library: Path) -> set[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("binutils' nm is not installed")
    text = subprocess.run([nm, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in text.splitlines()}


def test_a_library_stays_valid_while_its_own_sources_do(sources: Path) -> None:
    def keys() -> tuple[str, str]:
        return native._source_hash(native.ORT), native._source_hash(native.CUDA)

    ort, cuda = keys()
    for changed, path in (("cuda", "src/cuda/api.cu"), ("ort", "src/cpu/layer.cpp"), ("both", "include/gsrq/layout.h")):
        file = sources / path
        content = file.read_text()
        file.write_text(content + "\n")
        assert (keys()[0] != ort, keys()[1] != cuda) == (changed != "cuda", changed != "ort"), path
        file.write_text(content)
    assert keys() == (ort, cuda)


def test_what_a_build_of_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    with pytest.raises(GsrqError, match="no CUDA compiler found") as error:
        native.build(target=native.CUDA)
    assert "CUDA toolkit" in error.value.mend
    for names, target in ((("9.0",), native.CUDA), (("sm_90",), native.CUDA), (("90",), native.ORT)):
        with pytest.raises(GsrqError, match="architectures: "):
            native.build(target=target, architectures=names)


def test_the_command_builds_cuda_where_it_can_be_used_or_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, tuple[str, ...]]] = []
    headers = []
    for major in native.TENSORRT:
        folder = tmp_path / str(major)
        folder.mkdir()
        lines = f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR 9\n"
        (folder / "NvInferVersion.h").write_text(lines)
        headers += ["--tensorrt-headers", str(folder)]

    def build(
        build_dir: Path | None,
        jobs: int,
        target: native.Target = native.ORT,
        architectures: tuple[str, ...] = (),
        tensorrt_headers: Path | None = None,
    ) -> Path:
        assert tensorrt_headers is None or native.tensorrt_target(tensorrt_headers) is target
        built.append((target.library, architectures))
        return Path(target.library)

    monkeypatch.setattr(native, "build", build)
    ort, cuda, both = native.ORT.library, native.CUDA.library, native.ORT_CUDA.library
    chosen = ("80", "90")
    for options, compiler, devices, expected in (
        ([], None, 1, [(ort, ())]),
        ([], "nvcc", 0, [(ort, ())]),
        ([], "nvcc", 1, [(ort, ()), (cuda, ()), (both, ())]),
        (["--no-cuda"], "nvcc", 1, [(ort, ())]),
        (["--cuda"], "nvcc", 0, [(ort, ()), (cuda, ()), (both, ())]),
        (["--no-cuda", *headers], "nvcc", 0, [(ort, ()), *((t.library, ()) for t in native.TENSORRT.values())]),
        (["--cuda-arch", "80", "--cuda-arch", "90"], "nvcc", 0, [(ort, ()), (cuda, chosen), (both, chosen)]),
    ):
        monkeypatch.setattr(native, "nvcc", lambda compiler=compiler: compiler)
        monkeypatch.setattr(native, "cuda_devices", lambda devices=devices: devices)
        built.clear()
        result = CliRunner().invoke(plugins, ["build", *options])
        assert result.exit_code == 0, result.output
        assert built == expected, options
    assert CliRunner().invoke(plugins, ["build", "--no-cuda", "--cuda-arch", "90"]).exit_code == 2


def test_the_path_of_each_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    for name, target in (
        ("ort", native.ORT),
        ("cuda", native.CUDA),
        ("ort-cuda", native.ORT_CUDA),
        ("tensorrt11", native.TENSORRT[11]),
    ):
        monkeypatch.delenv(target.variable, raising=False)
        missing = CliRunner().invoke(plugins, ["path", "--of", name])
        assert missing.exit_code == 1
        assert ("--cuda" in missing.output) == (name in ("cuda", "ort-cuda"))
        assert ("--tensorrt-headers" in missing.output) == (name == "tensorrt11")
        file = tmp_path / target.library
        file.touch()
        monkeypatch.setenv(target.variable, str(file))
        assert CliRunner().invoke(plugins, ["path", "--of", name]).output.strip() == str(file)


@pytest.mark.slow
def test_a_build_exports_the_c_functions_alone(sources: Path) -> None:
    """Of one small kernel in the kernels' place, as those take minutes."""
    if native.nvcc() is None:
        pytest.skip("nvcc is not installed")
    for path in (sources / "src/cuda").glob("*.cu"):
        path.unlink()
    (sources / "src/cuda/small.cu").write_text(KERNEL)
    assert native.find(native.CUDA) is None
    library = native.build(target=native.CUDA, jobs=1, architectures=("80", "90"))
    assert native.find(native.CUDA) == library
    assert native.describe(library, native.CUDA).instruction_sets == ("80", "90")
    assert exported(library) == {"gsrq_cuda_abi", "gsrq_cuda_architectures"}
    other = native.build(target=native.CUDA, jobs=1, architectures=("90",))
    assert other != library
    assert native.describe(other, native.CUDA).instruction_sets == ("90",)
    (sources / "src/cuda/small.cu").write_text("#error broken on purpose\n")
    with pytest.raises(GsrqError, match=r"(?s)did not compile.*broken on purpose"):
        native.build(target=native.CUDA, jobs=1)
    assert native.find(native.CUDA) is None


def test_a_built_library_has_what_the_header_declares() -> None:
    library = native.find(native.CUDA)
    if library is None:
        pytest.skip("no CUDA library is built: gsrq plugins build --cuda")
    header = (native.source_dir() / "include/gsrq/cuda/gsrq_cuda.h").read_text()
    declared = set(re.findall(r"^GSRQ_CUDA_API [^(;]*?(gsrq_cuda_\w+)\(", header, re.MULTILINE))
    assert len(declared) > 10
    assert exported(library) == declared
    sets = native.describe(library, native.CUDA).instruction_sets
    assert {name.rstrip("af") for name in sets} <= {"80", "90", "100"}  # 90a has what 9.0 alone can do


def test_the_library_for_onnx_runtime_on_cuda_exports_its_entry_points_alone() -> None:
    library = native.find(native.ORT_CUDA)
    if library is None:
        pytest.skip("no CUDA library is built: gsrq plugins build --cuda")
    assert exported(library) == {"RegisterCustomOps", "GsrqInstructionSets", "GsrqCudaArchitectures"}
