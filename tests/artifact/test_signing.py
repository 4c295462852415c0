"""Artifacts signed with a key pair: what was signed passes, every change is refused by name."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import ROOT

pytest.importorskip("model_signing", reason="the extra sign is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from gsrq_export.artifact.manifest import SIGNATURE
from gsrq_export.artifact.signing import require_signature, sign_artifact
from gsrq_export.artifact.verify import find_problems
from gsrq_export.commands.app import cli
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.stages.keys import file_hash

GOLDEN = ROOT / "tests" / "golden" / "1.0" / "artifact"


def write_keys(directory: Path, name: str, key: object = None, password: bytes | None = None) -> tuple[Path, Path]:
    """(private, public) PEM files."""
    secret = key or ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(secret.private_bytes(pem, pkcs8, encryption))  # type: ignore[attr-defined]
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(secret.public_key().public_bytes(pem, info))  # type: ignore[attr-defined]
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def made(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact = shutil.copytree(GOLDEN, tmp_path_factory.mktemp("signed") / "artifact")
    assert sign_artifact(artifact, keys[0]) == artifact / SIGNATURE
    return artifact


@pytest.fixture
def signed(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "renamed")  # another place, another name: the signature holds


def refusal(artifact: Path, key: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        require_signature(artifact, key)
    return str(caught.value)


def test_signature_and_manifest_agree(signed: Path, keys: tuple[Path, Path]) -> None:
    assert find_problems(signed) == []
    report = require_signature(signed, keys[1])
    assert report.deep
    assert SIGNATURE not in report.manifest.files
    unsigned = {p.relative_to(GOLDEN) for p in GOLDEN.rglob("*")}
    assert {p.relative_to(signed) for p in signed.rglob("*")} == unsigned | {Path(SIGNATURE)}


def rehash(artifact: Path, name: str) -> None:
    """An attacker's: the manifest agrees with the file again."""
    data = json.loads((artifact / "manifest.json").read_text())
    path = artifact / name
    data["files"][name] = {"sha256": file_hash(path), "size": path.stat().st_size}
    (artifact / "manifest.json").write_text(json.dumps(data))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.onnx.data", lambda a: flip(a / "model.onnx.data")),
    ("manifest.json", lambda a: (a / "manifest.json").write_text((a / "manifest.json").read_text() + "\n")),
    ("metrics.json", lambda a: (a / "metrics.json").unlink()),
    ("extra.txt", lambda a: (a / "extra.txt").write_text("x")),
    (".gitignore", lambda a: (a / ".gitignore").write_text("x")),
    (".git/config", lambda a: ((a / ".git").mkdir(), (a / ".git/config").write_text("x"))),
    ("report.html", lambda a: ((a / "report.html").write_text("<html>"), rehash(a, "report.html"))),
    ("planted.txt", lambda a: ((a / "planted.txt").write_text("x"), rehash(a, "planted.txt"))),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_a_changed_missing_or_added_file_is_refused_by_name(
    signed: Path, keys: tuple[Path, Path], name: str, change: Callable[[Path], object]
) -> None:
    change(signed)
    assert name in refusal(signed, keys[1])


def test_links_are_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.move(signed / "metrics.json", tmp_path / "elsewhere.json")
    (signed / "metrics.json").symlink_to(tmp_path / "elsewhere.json")
    assert "metrics.json" in refusal(signed, keys[1])


def test_another_key_and_no_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    assert "Key mismatch" in refusal(signed, other)
    # An attacker signs again with a key of his own, and names ours in the bundle.
    bundle = json.loads((signed / SIGNATURE).read_text())
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    private, _ = write_keys(tmp_path, "attacker")
    sign_artifact(signed, private)
    forged = json.loads((signed / SIGNATURE).read_text())
    forged["verificationMaterial"]["publicKey"]["hint"] = hint
    (signed / SIGNATURE).write_text(json.dumps(forged))
    assert "not of this key, or was changed" in refusal(signed, keys[1])
    (signed / SIGNATURE).unlink()
    assert f"has no {SIGNATURE}" in refusal(signed, keys[1])


def test_a_damaged_signature_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    path = signed / SIGNATURE
    good = path.read_bytes()
    bundle = json.loads(good)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    swapped = {**bundle, "dsseEnvelope": {**bundle["dsseEnvelope"]}}
    swapped["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    for content in (b"", b"{}", b"[]", b"\xff\xfe", b"null", good[: len(good) // 2], json.dumps(swapped).encode()):
        path.write_bytes(content)
        assert SIGNATURE in refusal(signed, keys[1])


def test_a_signature_that_leaves_files_out_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """Made with the right key, but by a tool that was told to look away."""
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE, "model.onnx"], ignore_git_paths=False)
    signer = signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(config)
    signer.sign(signed, signed / SIGNATURE)
    assert "leaves out ['model.onnx']" in refusal(signed, keys[1])


def test_keys_that_cannot_be_used(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("no key")
    edwards = write_keys(tmp_path, "edwards", ed25519.Ed25519PrivateKey.generate())
    before = (signed / SIGNATURE).read_bytes()
    for private, public in ((tmp_path / "text.pem",) * 2, edwards, (tmp_path / "absent",) * 2, keys[::-1]):
        with pytest.raises(GsrqError, match="--key") as caught:
            sign_artifact(signed, private)
        assert "openssl ecparam" in caught.value.mend
        with pytest.raises(GsrqError, match="--key"):
            require_signature(signed, public)
    assert (signed / SIGNATURE).read_bytes() == before


def test_an_unsound_artifact_is_not_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    before = (signed / SIGNATURE).read_bytes()
    flip(signed / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx: its sha256"):
        sign_artifact(signed, keys[0])
    assert (signed / SIGNATURE).read_bytes() == before


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, [str(a) for a in arguments])


def test_commands(tmp_path: Path) -> None:
    artifact = shutil.copytree(GOLDEN, tmp_path / "artifact")
    private, public = write_keys(tmp_path, "locked", ec.generate_private_key(ec.SECP384R1()), password=b"secret")
    assert isinstance(run("sign", "--artifact", artifact, "--key", private).exception, GsrqError)
    result = run("sign", "--artifact", artifact, "--key", private, GSRQ_SIGN_PASSWORD="secret")
    assert result.exit_code == 0, result.exception
    verified = run("verify", "--artifact", artifact, "--key", public)
    assert "signed by this key" in verified.output
    assert "signed" not in run("verify", "--artifact", artifact).output
    (artifact / "extra.txt").write_text("x")
    assert "extra.txt" in str(run("verify", "--artifact", artifact, "--key", public).exception)


def test_serve_can_require_a_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Refused before a server is looked for; with the right key that is what comes next."""
    other = write_keys(tmp_path, "other")[1]
    missing = ["--tritonserver", str(tmp_path / "none")]

    def said(artifact: Path, key: Path) -> str:
        return str(
            CliRunner().invoke(cli, ["serve", "--artifact", str(artifact), "--key", str(key), *missing]).exception
        )

    assert "Key mismatch" in said(signed, other)
    assert f"has no {SIGNATURE}" in said(GOLDEN, keys[1])
    accepted = said(signed, keys[1])
    assert str(tmp_path / "none") in accepted
    assert SIGNATURE not in accepted
    assert "Key mismatch" not in accepted
