"""Signatures: what they cover, who is trusted, and that nothing is parsed or deserialized before they hold."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
from click.testing import CliRunner

from sanawm.cli import main
from sanawm.errors import BundleError, InputError
from sanawm_runtime import World, sign
from sanawm_runtime.bundle import MANIFEST_NAME, Bundle
from sanawm_runtime.sign_cli import sign as command


@pytest.fixture
def keys(tmp_path):
    return sign.generate_keys(tmp_path / "maker")


@pytest.fixture
def bundle(toy_bundle, tmp_path):
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


@pytest.fixture
def signed(bundle, keys):
    sign.sign_bundle(bundle, sign.load_private_key(keys[0]))
    return bundle


def open_with(bundle, *public):
    return Bundle.open(bundle, manifest_check=sign.signature_check(public))


def test_a_signed_bundle_opens_with_its_makers_key(signed, keys, toy_engine):
    assert open_with(signed, keys[1]).manifest.name == "toy"
    with World.open(signed, trusted_keys=[keys[1]]) as world:
        assert world.bundle.verify().ok
    # The signature is no stray file.
    assert not Bundle.open(signed).verify().by_state("extra")


def test_an_unsigned_bundle_is_refused_only_where_keys_are_given(bundle, keys, toy_engine):
    with pytest.raises(BundleError, match="is not signed"):
        World.open(bundle, trusted_keys=[keys[1]])
    World.open(bundle).close()


def test_another_key_is_not_trusted(signed, tmp_path):
    _, stranger = sign.generate_keys(tmp_path / "stranger")
    with pytest.raises(BundleError, match="the trusted keys are"):
        open_with(signed, stranger)
    with pytest.raises(InputError, match="at least one"):
        sign.signature_check([])


def test_one_of_several_keys_is_enough(signed, keys, tmp_path):
    private, public = sign.generate_keys(tmp_path / "second")
    assert open_with(signed, public, keys[1])
    sign.sign_bundle(signed, sign.load_private_key(private))
    assert len(sign.read_signatures(signed)) == 2
    assert open_with(signed, public) and open_with(signed, keys[1])
    # Signing again replaces one's own entry.
    sign.sign_bundle(signed, sign.load_private_key(private))
    assert len(sign.read_signatures(signed)) == 2


@pytest.mark.parametrize("place", [0, 100, -2])
def test_any_changed_byte_of_the_manifest_is_noticed_before_it_is_parsed(signed, keys, monkeypatch, place):
    data = bytearray((signed / MANIFEST_NAME).read_bytes())
    data[place] ^= 1
    (signed / MANIFEST_NAME).write_bytes(data)
    parsed = []
    monkeypatch.setattr("sanawm_runtime.bundle.reader.parse_manifest", lambda *a: parsed.append(a))
    with pytest.raises(BundleError, match="does not match the manifest"):
        open_with(signed, keys[1])
    assert not parsed


def test_a_rewritten_manifest_with_right_hashes_is_refused(signed, keys):
    # What hashes alone cannot notice: another program, and a manifest that names its hash.
    import hashlib

    (signed / "programs" / "decode.bin").write_bytes(b"evil")
    manifest = json.loads((signed / MANIFEST_NAME).read_text())
    manifest["files"]["programs/decode.bin"] = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    (signed / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert Bundle.open(signed, verify="full")
    with pytest.raises(BundleError, match="does not match"):
        open_with(signed, keys[1])


def test_a_changed_program_is_never_deserialized(signed, keys, toy_engine, monkeypatch):
    place = signed / "programs" / "denoise_first.bin"
    place.write_bytes(place.read_bytes()[::-1])
    with World.open(signed, trusted_keys=[keys[1]]) as world:
        with pytest.raises(BundleError, match="SHA-256"):
            world.warm_up()


def test_the_cpu_engine_hands_no_unverified_byte_to_its_library(tiny_bundle, tmp_path, monkeypatch):
    import onnxruntime

    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with World.open(bundle) as world:
        entry = world.bundle.manifest.programs["prompt_kv"]
        seen = []
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: seen.append(a))
        for name in (entry.file, entry.extras["weights"]):
            data = bytearray((bundle / name).read_bytes())
            data[len(data) // 2] ^= 1
            (bundle / name).write_bytes(data)
            with pytest.raises(BundleError, match="SHA-256"):
                world.engine.load("prompt_kv")
            data[len(data) // 2] ^= 1
            (bundle / name).write_bytes(data)
        assert not seen


def test_signatures_do_not_serve_other_purposes(signed, keys):
    # The same key over the bare manifest is another statement.
    import base64

    data = (signed / MANIFEST_NAME).read_bytes()
    bare = base64.b64encode(sign.load_private_key(keys[0]).sign(data)).decode()
    document = json.loads((signed / "signature.json").read_text())
    document["signatures"][0]["signature"] = bare
    (signed / "signature.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="does not match"):
        open_with(signed, keys[1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"signatures": []}',
        '{"signatures": [{"key": "00", "signature": "AA=="}]}',
        '{"signatures": [{"key": "' + "0" * 64 + '", "signature": "!!"}]}',
        '{"signatures": [{"key": "' + "0" * 64 + '", "signature": "' + "A" * 86 + '==", "algorithm": "none"}]}',
        '{"signatures": ' + "[" * 100 + "]" * 100 + "}",
        " " * 20_000,
    ],
)
def test_a_malformed_signature_is_a_sentence(signed, keys, text):
    (signed / "signature.json").write_text(text)
    with pytest.raises(BundleError):
        open_with(signed, keys[1])


def test_a_signature_is_not_read_through_a_link(signed, keys, tmp_path):
    (signed / "signature.json").rename(tmp_path / "elsewhere.json")
    (signed / "signature.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="symbolic link"):
        open_with(signed, keys[1])


def test_a_manifest_may_not_list_its_signature(bundle):
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["files"]["signature.json"] = {"size": 0, "sha256": "0" * 64}
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="its signature"):
        Bundle.open(bundle)


def test_a_damaged_bundle_is_not_signed(bundle, keys):
    (bundle / "programs" / "decode.bin").write_bytes(b"chance")
    with pytest.raises(BundleError, match="decode"):
        sign.sign_bundle(bundle, sign.load_private_key(keys[0]))
    assert not (bundle / "signature.json").exists()


def test_private_keys_are_private_and_never_overwritten(keys, tmp_path):
    assert stat.S_IMODE(os.stat(keys[0]).st_mode) == 0o600
    before = keys[0].read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        sign.generate_keys(tmp_path / "maker")
    keys[0].rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"maker\.pub"):
        sign.generate_keys(tmp_path / "maker")
    # No private key without its public one is left behind.
    assert not keys[0].exists() and (tmp_path / "kept").read_bytes() == before


def test_keys_of_other_kinds_and_other_files_are_refused(keys, tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "ec.key").write_bytes(pem)
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "text").write_text("hello")
    for load, names in ((sign.load_private_key, ("ec.key", "text", "maker.pub", "none")), (sign.load_public_key, ("ec.pub", "text", "none"))):
        for name in names:
            with pytest.raises(InputError):
                load(tmp_path / name)


def test_the_commands(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SANAWM_KEY_PASSPHRASE", "correct horse")
    runner = CliRunner()

    def run(*arguments, code=0):
        result = runner.invoke(command, [*map(str, arguments), "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    made = run("keygen", "-o", tmp_path / "maker")
    assert "ENCRYPTED" in (tmp_path / "maker.key").read_text()
    refused = run("verify", bundle, "--key", tmp_path / "maker.pub", code=1)
    assert not refused["ok"] and "not signed" in refused["error"]
    assert run("sign", bundle, "--key", tmp_path / "maker.key")["key"] == made["key"]
    verified = run("verify", bundle, "--key", tmp_path / "maker.pub")
    assert verified["ok"] and verified["key"] == made["key"] and verified["digest"] == Bundle.open(bundle).digest
    (bundle / "programs" / "decode.bin").write_bytes(b"other!")
    assert not run("verify", bundle, "--key", tmp_path / "maker.pub", code=1)["ok"]


def test_a_wrong_passphrase_is_a_sentence(bundle, tmp_path, monkeypatch, capsys):
    sign.generate_keys(tmp_path / "maker", b"right")
    monkeypatch.setenv("SANAWM_KEY_PASSPHRASE", "wrong")
    with pytest.raises(SystemExit) as stop:
        main(["sign", "sign", str(bundle), "--key", str(tmp_path / "maker.key")])
    assert stop.value.code == 2
    assert "passphrase" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.parametrize("name", ["run", "serve"])
def test_commands_refuse_what_is_not_signed(bundle, keys, how, name, toy_engine, monkeypatch, capsys):
    arguments = {"run": ["--image", "none.png", "--prompt", "a", "--action", "w-24", "-o", "none.mp4"], "serve": ["--port", "0"]}[name]
    if how == "option":
        arguments += ["--trusted-key", str(keys[1])]
    else:
        monkeypatch.setenv("SANAWM_TRUSTED_KEYS", str(keys[1]))
    with pytest.raises(SystemExit) as stop:
        main([name, str(bundle), *arguments])
    assert stop.value.code == 2
    assert "is not signed, and a signature is required" in capsys.readouterr().err
