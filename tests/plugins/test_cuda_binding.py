"""The ctypes declarations of the CUDA kernels' C interface against its header; no GPU needed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gsrq_export import GsrqError, native
from gsrq_export.cuda import library

HEADER = native.source_dir() / "include/gsrq/cuda/gsrq_cuda.h"
STRUCTS = {
    "gsrq_codebook": library.CodebookStruct,
    "gsrq_layer": library.LayerStruct,
    "gsrq_call": library.CallStruct,
    "gsrq_rows": library.RowsStruct,
    "gsrq_clustering": library.ClusteringStruct,
}
C_TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "const char*": ctypes.c_char_p,
    "const gsrq_layer*": ctypes.POINTER(library.LayerStruct),
    "const gsrq_call*": ctypes.POINTER(library.CallStruct),
    "const gsrq_rows*": ctypes.POINTER(library.RowsStruct),
    "const gsrq_clustering*": ctypes.POINTER(library.ClusteringStruct),
}


def c_type(text: str) -> object:
    text = text.replace("gsrq_layer* layer", "const gsrq_layer* layer").replace("const const", "const")
    kind = re.sub(r"\s*\b\w+$", "", text.strip()) if not text.strip().endswith("*") else text.strip()
    kind = kind or text.strip()
    return C_TYPES.get(kind, ctypes.c_void_p if kind.endswith("*") else None)


def test_structures_are_laid_out_as_in_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in struct._fields_:
            member = f"(({name}*)0)->{field}"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({member}));')
    lines.append('printf("dtypes %d %d %d abi %d\\n", GSRQ_F32, GSRQ_F16, GSRQ_BF16, GSRQ_CUDA_ABI);')
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    heads = "#include <stddef.h>\n#include <stdio.h>\n#include <gsrq/cuda/gsrq_cuda.h>\n"
    source.write_text(heads + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    include = f"-I{native.source_dir() / 'include'}"
    subprocess.run([compiler, "-std=c99", "-Wall", "-Werror", include, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for name, struct in STRUCTS.items():
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in struct._fields_:
            member = getattr(struct, field)
            expected.append(f"{name}.{field} {member.offset} {member.size}")
    types = [library.DTYPES[t] for t in (torch.float32, torch.float16, torch.bfloat16)]
    expected.append(f"dtypes {types[0]} {types[1]} {types[2]} abi {library.ABI}")
    assert said == expected


def test_functions_are_declared_as_in_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    declared = re.findall(r"^GSRQ_CUDA_API ([\w ]+\*?) ?(gsrq_cuda_\w+)\(([^)]*)\);", text, re.MULTILINE)
    assert {name for _, name, _ in declared} == set(library.PROTOTYPES)
    for result, name, arguments in declared:
        kinds = [] if arguments == "void" else [c_type(a) for a in arguments.split(",")]
        assert library.PROTOTYPES[name] == (C_TYPES[result.strip()], kinds), name


def test_a_file_that_is_no_library_and_one_of_another_version(tmp_path: Path) -> None:
    other = tmp_path / "libother.so"
    other.write_bytes(b"not a library")
    with pytest.raises(GsrqError, match="is no library of GSRQ's CUDA kernels") as error:
        library.CudaLibrary(other)
    assert "gsrq plugins build --cuda" in error.value.mend
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "old.c"
    names = [name for name in library.PROTOTYPES if name != "gsrq_cuda_abi"]
    source.write_text(
        "int gsrq_cuda_abi(void) { return 99; }\n" + "".join(f"int {n}(void) {{ return 0; }}\n" for n in names)
    )
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    with pytest.raises(GsrqError, match=f"interface version 99, this program needs {library.ABI}"):
        library.CudaLibrary(other)


def test_without_a_library_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(native.CUDA.variable, raising=False)
    library.load.cache_clear()
    with pytest.raises(GsrqError, match="no library of CUDA kernels") as error:
        library.load()
    assert "gsrq plugins build --cuda" in error.value.mend
