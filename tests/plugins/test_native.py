"""Building and finding the library; its layout header and its ABI declarations against their sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gsrq_export import native
from gsrq_export.cache.rule import CODE_TILE, CODEBOOK_SIZE, CacheRule, code_run, from_token_order, to_token_order
from gsrq_export.errors import GsrqError

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or "c++"

LAYOUT_PROGRAM = """
#include "gsrq/layout.h"
extern "C" int64_t coded(int64_t n, int64_t s, int64_t w, int64_t p) { return gsrq_coded(n, s, w, p); }
extern "C" int64_t slot(int64_t j, int64_t s, int64_t w, int64_t p) { return gsrq_slot(j, s, w, p); }
extern "C" int64_t coded32(int64_t n, int64_t s, int64_t w, int64_t p) { return gsrq_coded32(n, s, w, p); }
extern "C" int64_t slot32(int64_t j, int64_t s, int64_t w, int64_t p) { return gsrq_slot32(j, s, w, p); }
extern "C" int64_t slots(int64_t s, int64_t w, int64_t p) { return gsrq_exact_slots(s, w, p); }
extern "C" int64_t row(int64_t j, int64_t s) { return gsrq_code_row(j, s); }
extern "C" int64_t byte(int64_t g, int64_t r, int64_t stages) { return gsrq_code_byte(g, r, stages); }
extern "C" int64_t run(int by_head, int64_t g, int64_t r, int64_t w, int64_t d) {
  return gsrq_code_run(by_head, g, r, w, d);
}
extern "C" int64_t offset(int64_t c, int64_t b, int64_t row, int64_t run) { return gsrq_code_offset(c, b, row, run); }
extern "C" int64_t size() { return GSRQ_CODEBOOK_SIZE; }
extern "C" int64_t tile() { return GSRQ_CODE_TILE; }
"""


def test_the_header_and_python_state_the_same_layout(tmp_path: Path) -> None:
    source, shared = tmp_path / "layout.cpp", tmp_path / "layout.so"
    source.write_text(LAYOUT_PROGRAM)
    include = f"-I{native.source_dir() / 'include'}"
    subprocess.run([COMPILER, "-shared", "-fPIC", include, str(source), "-o", str(shared)], check=True)
    c = ctypes.CDLL(str(shared))
    for name in ("coded", "slot", "coded32", "slot32", "slots", "row", "byte", "run", "offset", "size", "tile"):
        getattr(c, name).restype = ctypes.c_int64
    i64 = ctypes.c_int64
    assert (c.size(), c.tile()) == (CODEBOOK_SIZE, CODE_TILE)
    for rule in (CacheRule(), CacheRule(0, 0, 1), CacheRule(3, 5, 7), CacheRule(1, 0, 4), CacheRule(0, 9, 2)):
        swp = (i64(rule.sinks), i64(rule.window), i64(rule.block))
        assert c.slots(*swp) == rule.exact_slots
        tokens = torch.tensor([*range(400), 2**33, 2**33 + 1])
        assert [c.coded(i64(n), *swp) for n in tokens.tolist()] == [rule.coded(n) for n in tokens.tolist()]
        assert [c.slot(i64(n), *swp) for n in tokens.tolist()] == rule.slot(tokens).tolist()
        narrow = torch.tensor([*range(400), 2**31 - 2, 2**31 - 1])
        assert [c.coded32(i64(n), *swp) for n in narrow.tolist()] == [rule.coded(n) for n in narrow.tolist()]
        assert [c.slot32(i64(n), *swp) for n in narrow.tolist()] == rule.slot(narrow).tolist()
        assert c.row(i64(rule.sinks + 17), i64(rule.sinks)) == 17
    # docs/operator.md: byte g * R + r is stage r of sub-vector g, as Codebook.encode lays them out.
    order = torch.arange(5 * 3).reshape(5, 3)
    assert [[c.byte(i64(g), i64(r), i64(3)) for r in range(3)] for g in range(5)] == order.tolist()
    # (sub-vectors, stages, their width, head_dim): one a head, several a head, several heads a sub-vector.
    for groups, stages, width, head_dim in ((3, 5, 16, 16), (6, 2, 8, 24), (2, 7, 64, 16)):
        for by_head in (False, True):
            run = code_run(groups, stages, width, head_dim, by_head)
            assert c.run(int(by_head), *map(i64, (groups, stages, width, head_dim))) == run
            rows, row_bytes = 3 * CODE_TILE, groups * stages
            codes = torch.arange(rows * row_bytes).reshape(rows, row_bytes)
            stored = from_token_order(codes, run)
            assert to_token_order(stored, run).equal(codes)
            flat = stored.flatten()
            for row in range(rows):
                at = [c.offset(i64(row), i64(byte), i64(row_bytes), i64(run)) for byte in range(row_bytes)]
                assert flat[at].equal(codes[row])


def test_abi_declarations_equal_onnxruntimes_header(tmp_path: Path) -> None:
    include = os.environ.get("GSRQ_ORT_INCLUDE")
    if not include:
        pytest.skip("GSRQ_ORT_INCLUDE names no directory with onnxruntime_c_api.h (it is in no wheel)")
    ours = native.source_dir() / "ort"
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{ours}", str(HERE / "check_ort_abi.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_only_a_library_of_the_current_sources_is_found(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(native.ORT.variable, raising=False)
    sources = tmp_path / "plugins"
    shutil.copytree(native.source_dir(), sources)
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(native, "source_dir", lambda: sources)
    assert native.find() is None
    key = native._key(COMPILER)
    kept = native.cache_dir() / key / native.ORT.library
    kept.parent.mkdir(parents=True)
    shutil.copy2(library, kept)
    assert native.find() == kept
    monkeypatch.setenv("CXX", "no-such-compiler")  # a machine that only runs what another built
    assert native.find() == kept
    header = sources / "include/gsrq/layout.h"
    header.write_text(header.read_text() + "\n")
    assert native.find() is None


def test_a_named_library_comes_first(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.ORT.variable, str(library))
    assert native.find() == library
    assert native.ensure() == library
    monkeypatch.setenv(native.ORT.variable, str(tmp_path / "gone.so"))
    with pytest.raises(GsrqError, match=r"GSRQ_ORT_LIBRARY is .*gone\.so, which is no file"):
        native.find()


def test_a_failed_build_shows_the_log_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "plugins"
    shutil.copytree(native.source_dir(), sources)
    (sources / "src/cpu/select.cpp").write_text("#error broken on purpose\n")
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.ORT.variable, raising=False)
    monkeypatch.setattr(native, "source_dir", lambda: sources)
    with pytest.raises(GsrqError, match=r"(?s)did not compile.*broken on purpose"):
        native.build(jobs=1)
    assert native.find() is None
    assert not list((tmp_path / "cache").rglob("*.so*"))


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(GsrqError, match=r"no C\+\+ compiler found") as error:
        native.build()
    assert "install g++" in error.value.mend
    with pytest.raises(GsrqError, match="jobs is 0"):
        native.build(jobs=0)


def test_describe_is_of_the_file(library: Path, tmp_path: Path) -> None:
    described = native.describe(library)
    assert described.sha256 == hashlib.sha256(library.read_bytes()).hexdigest()
    assert described.instruction_sets[0] == "generic"
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    with pytest.raises(GsrqError, match="is no GSRQ library"):
        native.describe(other)


def test_only_the_entry_points_are_exported(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("binutils' nm is not installed")
    text = subprocess.run([nm, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in text.splitlines() if line.split()[-2] == "T"}
    assert names == {"RegisterCustomOps", "GsrqInstructionSets"}
