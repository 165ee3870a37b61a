"""The engine cache: what finds an engine again, what does not, and what damage and interruptions leave."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from quantized_mlp import mlp

from sanawm.errors import UserError
from sanawm_export.provenance import file_digest
from sanawm_export.tensorrt.audit import AuditRow
from sanawm_export.tensorrt.cache import EngineCache, WeightDigests, digest, graph_digest, sources_digest
from sanawm_export.tensorrt.job import Built

KEY = digest("engine")


def add(cache: EngineCache, folder: Path, key: str = KEY, content: bytes = b"an engine") -> None:
    file = folder / "new.engine"
    file.write_bytes(content)
    rows = (AuditRow("qkv", "bf16", "bf16"),)
    cache.add(key, file, Built(1.5, 1 << 30, len(content), file_digest(file), "lib", True, rows, cubins=("sm_120",)), {"kernels": [{"name": "gdn"}]})
    assert not file.exists()


def test_what_is_added_is_found(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    assert cache.find(KEY) is None
    add(cache, tmp_path)
    found = EngineCache(tmp_path / "cache").find(KEY)
    assert found is not None and found.file.read_bytes() == b"an engine"
    assert found.built.rows == (AuditRow("qkv", "bf16", "bf16"),) and found.built.cubins == ("sm_120",)
    assert found.extras == {"kernels": [{"name": "gdn"}]}


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    add(cache, tmp_path)
    add(cache, tmp_path)
    assert [p.name for p in (tmp_path / "cache" / "engines" / KEY[:2]).iterdir()] == [KEY]


@pytest.mark.parametrize("damage", ["engine", "report", "missing"])
def test_damage_counts_as_absent_and_is_removed(tmp_path: Path, damage: str) -> None:
    cache = EngineCache(tmp_path / "cache")
    add(cache, tmp_path)
    folder = tmp_path / "cache" / "engines" / KEY[:2] / KEY
    if damage == "engine":
        (folder / "engine").write_bytes(b"another engine")
    elif damage == "report":
        (folder / "report.json").write_text('{"built": {}}')
    else:
        (folder / "engine").unlink()
    assert cache.find(KEY) is None
    add(cache, tmp_path)
    assert cache.find(KEY) is not None


def test_requests_lead_to_engines(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    cache.remember("ab" * 32, KEY)
    assert cache.recall("ab" * 32) is None, "the engine itself is not there"
    add(cache, tmp_path)
    assert cache.recall("ab" * 32) is not None and cache.recall("cd" * 32) is None
    (tmp_path / "cache" / "requests" / "ab" / ("ab" * 32)).write_text("../../../etc/passwd")
    assert cache.recall("ab" * 32) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the engine cache"):
        add(EngineCache(tmp_path / "file"), tmp_path)


def saved(folder: Path, name: str, bits: int = 0) -> ir.Model:
    """A graph whose weight lies in a file of its own."""
    model = mlp({"c": ("bf16", "bf16")})
    value = model.graph.initializers["c.weight"]
    assert value.const_value is not None
    data = bytearray(value.const_value.tobytes())
    data[7] ^= bits
    (folder / name).write_bytes(b"head" + data)
    value.const_value = ir.ExternalTensor(name, 4, len(data), ir.DataType.BFLOAT16, shape=ir.Shape((256, 256)), name="c.weight", base_dir=folder)
    return model


def test_the_content_of_weights_counts_and_their_place_does_not(tmp_path: Path) -> None:
    def key(model: ir.Model) -> str:
        return graph_digest(model, WeightDigests().of(model))

    first = key(saved(tmp_path, "one.bin"))
    assert key(saved(tmp_path, "two.bin")) == first
    assert key(saved(tmp_path, "three.bin", bits=1)) != first
    other = saved(tmp_path, "four.bin")
    next(iter(other.graph)).name = "renamed"
    assert key(other) != first, "names travel into engines"


def test_sources_are_part_of_a_request() -> None:
    whole, part = sources_digest(), sources_digest(("sanawm_kernels",))
    assert whole == sources_digest() and whole != part
