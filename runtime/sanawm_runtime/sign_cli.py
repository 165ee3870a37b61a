"""`sanawm sign`: keys, signatures of bundles, and their verification."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sanawm.console import json_option, print_json
from sanawm.errors import BundleError

_PASSPHRASE = "SANAWM_KEY_PASSPHRASE"


def _passphrase(ask: bool, confirm: bool = False) -> bytes | None:
    given = os.environ.get(_PASSPHRASE)
    if given is None and ask:
        given = click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return given.encode() if given else None


@click.group()
def sign() -> None:
    """Sign bundles with Ed25519, and check who signed one."""


@sign.command()
@click.option("-o", "--output", "stem", type=click.Path(path_type=Path), required=True, help="Name without suffix: makes NAME.key and NAME.pub.")
@click.option("--passphrase", "ask", is_flag=True, help=f"Ask for a passphrase that encrypts the private key; {_PASSPHRASE} gives it too.")
@json_option
def keygen(stem: Path, ask: bool, as_json: bool) -> None:
    """Make a key pair. Keep the .key file to yourself; give the .pub file to those who shall trust your bundles."""
    from sanawm_runtime.sign import generate_keys, key_id, load_public_key

    private, public = generate_keys(stem, _passphrase(ask, confirm=True))
    name = key_id(load_public_key(public))
    if as_json:
        print_json({"private_key": str(private), "public_key": str(public), "key": name})
    else:
        click.echo(f"{private} (keep it secret)\n{public}\nkey {name}")


@sign.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", "key_file", type=click.Path(path_type=Path), required=True, help="Private key, a .key file of keygen.")
@click.option("--passphrase", "ask", is_flag=True, help=f"Ask for the key's passphrase; {_PASSPHRASE} gives it too.")
@json_option
def sign_(bundle: Path, key_file: Path, ask: bool, as_json: bool) -> None:
    """Hash every file of BUNDLE, then write its signature.json."""
    from sanawm_runtime.sign import load_private_key, sign_bundle

    name = sign_bundle(bundle, load_private_key(key_file, _passphrase(ask)))
    if as_json:
        print_json({"bundle": str(bundle), "key": name})
    else:
        click.echo(f"signed {bundle} with key {name}")


@sign.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", "keys", type=click.Path(path_type=Path), multiple=True, required=True, help="Trusted public key; may be repeated.")
@json_option
def verify(bundle: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Check that one of the keys signed BUNDLE and that every file matches; exit 1 if not."""
    from sanawm_runtime.bundle import Bundle
    from sanawm_runtime.sign import key_id, load_public_key, read_signatures, verify_manifest

    trusted = [load_public_key(path) for path in keys]
    signer: list[str] = []
    try:
        opened = Bundle.open(
            bundle,
            verify="full",
            manifest_check=lambda root, data: signer.append(verify_manifest(data, read_signatures(root), trusted, f"bundle {root}")),
        )
    except BundleError as error:
        if as_json:
            print_json({"ok": False, "error": str(error), "trusted": [key_id(key) for key in trusted]})
        else:
            click.echo(f"FAILED: {error}", err=True)
        click.get_current_context().exit(1)
    if as_json:
        print_json({"ok": True, "key": signer[0], "digest": opened.digest, "files": len(opened.manifest.files)})
    else:
        click.echo(f"ok: {len(opened.manifest.files)} files, signed by {signer[0]}")
