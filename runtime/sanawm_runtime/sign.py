"""Detached Ed25519 signatures of bundles.

A signature covers the bytes of `manifest.json`, which hash every other file. It lies beside the manifest as `signature.json` and is checked
before anything in the manifest is looked at.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sanawm.errors import BundleError, EngineError, InputError
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.bundle.manifest import MANIFEST_NAME, SIGNATURE_NAME
from sanawm_runtime.bundle.paths import open_inside
from sanawm_runtime.bundle.strict_json import decode, parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_SIGNATURE_BYTES = 16 * 2**10
_MOST_SIGNATURES = 16
_MAX_KEY_BYTES = 16 * 2**10
# Keeps a signature from meaning anything in another protocol that signs with the same key.
_CONTEXT = b"sanawm bundle manifest 1\x00"
_KEY_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Signature:
    """One signer: SHA-256 of the raw public key in hexadecimal, and the signature in base64."""

    key: str
    signature: str
    algorithm: Literal["ed25519"] = "ed25519"


@dataclass(frozen=True)
class SignatureFile:
    """What `signature.json` holds."""

    signatures: tuple[Signature, ...]
    schema_version: Literal[1] = 1


def parse_signatures(data: bytes, what: str = SIGNATURE_NAME) -> tuple[Signature, ...]:
    """Read `signature.json` from untrusted bytes. Raises BundleError, and nothing else."""
    file: SignatureFile = decode(SignatureFile, parse_json(data, what, max_bytes=MAX_SIGNATURE_BYTES), what)
    if not 1 <= len(file.signatures) <= _MOST_SIGNATURES:
        raise BundleError(f"{what}: expected 1 to {_MOST_SIGNATURES} signatures, found {len(file.signatures)}; sign the bundle again")
    for index, entry in enumerate(file.signatures):
        if not _KEY_ID.fullmatch(entry.key) or len(_decoded(entry.signature)) != 64:
            raise BundleError(f"{what}.signatures[{index}]: not the name of a key and an Ed25519 signature; sign the bundle again")
    return file.signatures


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return b""


def _library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise EngineError("signatures need the cryptography package, which is not installed; run `pip install 'sanawm[serve]'`") from error


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def generate_keys(stem: str | os.PathLike[str], passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Make a key pair: `<stem>.key` (PKCS 8 PEM, readable by its owner only, encrypted if a passphrase is given) and `<stem>.pub`.

    Never overwrites. Raises InputError.
    """
    _library()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    locked = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    base = Path(stem)
    places = base.with_name(base.name + ".key"), base.with_name(base.name + ".pub")
    made: list[Path] = []
    try:
        for place, data, mode in ((places[0], private, 0o600), (places[1], public, 0o644)):
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(place)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
    except OSError as error:
        for half in made:
            half.unlink(missing_ok=True)
        raise InputError(f"cannot write {place}: {error.strerror or error}; keys are never overwritten, choose another name") from error
    return places


def load_private_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """An Ed25519 private key from a PEM file. Raises InputError."""
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_key_bytes(path), passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no private key could be read ({error}); give the .key file of `sanawm sign keygen`, and its passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: expected an Ed25519 key, found {type(key).__name__}; make one with `sanawm sign keygen`")
    return key


def load_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """An Ed25519 public key from a PEM file. Raises InputError."""
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_key_bytes(path))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no public key could be read ({error}); give the .pub file of `sanawm sign keygen`") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: expected an Ed25519 key, found {type(key).__name__}; make one with `sanawm sign keygen`")
    return key


def _key_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions") from error


def sign_bundle(root: str | os.PathLike[str], key: Ed25519PrivateKey) -> str:
    """Sign the bundle at `root`, after every file of it was hashed; other signers' valid entries stay. Returns the key's id.

    Raises BundleError for a bundle that is not whole, InputError where the signature cannot be written.
    """
    # A signature vouches for the content, so a damaged bundle gets none.
    place = Path(root)
    bundle = Bundle.open(place, verify="full")
    data = _manifest_bytes(place)
    if hashlib.sha256(data).hexdigest() != bundle.digest:
        raise BundleError(f"bundle {place}: {MANIFEST_NAME} changed while it was read; sign it when nothing writes to it")
    name = key_id(key.public_key())
    entry = Signature(name, base64.b64encode(key.sign(_CONTEXT + data)).decode())
    others = tuple(other for other in _present(place) if other.key != name)
    text = json.dumps(asdict(SignatureFile((*others, entry))), indent=1) + "\n"
    parse_signatures(text.encode(), str(place / SIGNATURE_NAME))
    temporary = place / f".{SIGNATURE_NAME}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_text(text)
        os.replace(temporary, place / SIGNATURE_NAME)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {place / SIGNATURE_NAME}: {error.strerror or error}; free space or mend its permissions") from error
    return name


def _manifest_bytes(root: Path) -> bytes:
    with os.fdopen(open_inside(root, MANIFEST_NAME), "rb") as file:
        return file.read()


def _present(root: Path) -> tuple[Signature, ...]:
    return read_signatures(root) if os.path.lexists(root / SIGNATURE_NAME) else ()


def read_signatures(root: Path) -> tuple[Signature, ...]:
    """The entries of a bundle's `signature.json`, not verified. Raises BundleError."""
    if not os.path.lexists(root / SIGNATURE_NAME):
        raise BundleError(f"bundle {root}: is not signed, and a signature is required; sign it with `sanawm sign sign`, or get one from its maker")
    with os.fdopen(open_inside(root, SIGNATURE_NAME), "rb") as file:
        return parse_signatures(file.read(MAX_SIGNATURE_BYTES + 1), str(root / SIGNATURE_NAME))


def verify_manifest(data: bytes, signatures: Sequence[Signature], keys: Sequence[Ed25519PublicKey], what: str) -> str:
    """The id of the first of `keys` that signed manifest bytes. Raises BundleError if none did, or if one of them did not sign these bytes."""
    _library()
    from cryptography.exceptions import InvalidSignature

    trusted = {key_id(key): key for key in keys}
    for entry in signatures:
        if entry.key not in trusted:
            continue
        try:
            trusted[entry.key].verify(_decoded(entry.signature), _CONTEXT + data)
        except InvalidSignature:
            raise BundleError(
                f"{what}: the signature of key {entry.key[:16]} does not match the manifest, so one of them was changed; get the bundle again"
            ) from None
        return entry.key
    found = ", ".join(entry.key[:16] for entry in signatures)
    raise BundleError(f"{what}: signed by {found}, and the trusted keys are {', '.join(name[:16] for name in trusted)}; check where it came from")


def signature_check(paths: Sequence[str | os.PathLike[str]]) -> Callable[[Path, bytes], None]:
    """For `Bundle.open(manifest_check=…)`: refuse manifests that none of these public keys (PEM files) signed. Raises InputError."""
    keys = [load_public_key(path) for path in paths]
    if not keys:
        raise InputError("expected at least one trusted key; give the .pub file of who signs your bundles")

    def check(root: Path, data: bytes) -> None:
        verify_manifest(data, read_signatures(root), keys, f"bundle {root}")

    return check
