"""Signatures of artifacts with a key pair, in the OpenSSF model signing format (optional extra ``sign``).

The signature lies in the artifact, as `SIGNATURE`, and covers every other file, manifest.json included. The manifest
does not list it, so an artifact can be signed after it was built and signed again by another key. No network is used.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from gsrq_export.artifact.manifest import SIGNATURE
from gsrq_export.artifact.verify import Report, verify_artifact
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.stages.storage import TEMPORARY, disk_errors, write_atomic

MAX_SIGNATURE_BYTES = 16 << 20
MAX_KEY_BYTES = 1 << 20
_MAKE_KEYS = (
    "make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
    "openssl ec -in key.pem -pubout -out key.pub"
)


def sign_artifact(artifact: Path, key: Path, password: str | None = None) -> Path:
    """Verify an artifact, then sign it; an older signature is replaced in one step.

    Args:
        key: PEM file of an elliptic-curve private key (P-256, P-384 or P-521).
        password: of the key, if it is encrypted.
    Returns:
        the signature's path.
    Raises:
        ArtifactError: the artifact is not sound.
        GsrqError: the key cannot be used, the directory cannot be written, or the extra ``sign`` is not installed.
    """
    _, signing, _ = _library()
    secret = password.encode() if password is not None else None
    _check_key_file(key)
    try:
        # The library hands the password on to a function that wants bytes.
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    except (ValueError, TypeError, AttributeError) as error:
        raise GsrqError(f"--key {key}: not an elliptic-curve private key: {error}", _MAKE_KEYS) from None
    path = artifact / SIGNATURE
    with disk_errors("signature", artifact.absolute()):
        (artifact / f"{TEMPORARY}{SIGNATURE}").unlink(missing_ok=True)  # of a run that was killed
        verify_artifact(artifact)
        config.set_hashing_config(_hashing())  # hashes first, then writes: the signature is none of the files
        write_atomic(path, lambda temporary: config.sign(artifact, temporary))
    return path


def require_signature(artifact: Path, key: Path, deep: bool = True) -> Report:
    """What a server calls before it loads an artifact: it is sound, and every file is the one that was signed.

    The signature is checked first: nothing of an artifact without a good one is parsed. Whoever can write to the
    directory afterwards can still change it, so it should be read-only for others.

    Args:
        key: PEM file of the public key.
        deep: as of `verify_artifact`; all files' bytes are hashed against the signature in any case.
    Raises:
        ArtifactError: no signature, one of another key, a file that was changed, is missing or was added (each is
            named), or the artifact is not sound.
        GsrqError: the key cannot be read, or the extra ``sign`` is not installed.
    """
    check_signature(artifact, key)
    return verify_artifact(artifact, deep)


def check_signature(artifact: Path, key: Path) -> None:
    """The signature alone. See `require_signature`."""
    _, _, verifying = _library()
    _check_key_file(key)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as error:
        raise GsrqError(f"--key {key}: not an elliptic-curve public key: {error}", _MAKE_KEYS) from None
    path = artifact / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{artifact} has no {SIGNATURE}", "sign it: gsrq sign --artifact A --key KEY")
    if path.stat().st_size > MAX_SIGNATURE_BYTES:
        raise ArtifactError(f"{path} is over {MAX_SIGNATURE_BYTES >> 20} MiB", "it is no signature")
    from cryptography.exceptions import InvalidSignature

    try:
        config.set_hashing_config(_hashing()).verify(artifact, path)
    except InvalidSignature:
        raise ArtifactError(
            f"{path}: the signature is not of this key, or was changed", "do not use this artifact"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{error.filename}: {error.strerror}", "see that the artifact can be read") from None
    except Exception as error:  # the bundle is JSON from a stranger; the library's parsers raise many types
        raise ArtifactError(f"{artifact}: {_reason(error)}", "do not use this artifact, or sign it again") from None
    if left_out := _ignored(path) - {SIGNATURE}:
        raise ArtifactError(f"{path}: the signature leaves out {sorted(left_out)}", "sign it with gsrq sign")


def _reason(error: Exception) -> str:
    text = str(error)
    return text if text.startswith(("Signature mismatch", "Key mismatch")) else f"{SIGNATURE} is no signature: {text}"


def _hashing() -> Any:
    """Every file but the signature, links refused. Built-in ignores (.git) are off: what is there is signed."""
    hashing, _, _ = _library()
    config = hashing.Config().use_file_serialization(max_workers=2)
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _ignored(path: Path) -> set[str]:
    """The names that a signature, already found good, says it does not cover."""
    try:
        payload = json.loads(base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"]))
        names = payload["predicate"]["serialization"].get("ignore_paths", [])
        return {str(name) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ArtifactError(f"{path} is of another format: {error}", "sign it with gsrq sign") from None


def _check_key_file(key: Path) -> None:
    if not key.is_file():
        raise GsrqError(f"--key {key}: no such file", _MAKE_KEYS)
    if key.stat().st_size > MAX_KEY_BYTES:
        raise GsrqError(f"--key {key} is over {MAX_KEY_BYTES >> 20} MiB: not a key", _MAKE_KEYS)


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise GsrqError(
            f"signatures need model-signing ({error})", "install the extra: pip install 'gsrq-export[sign]'"
        ) from None
    return hashing, signing, verifying
