"""The precision that an engine realised, read back from real engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from quantized_mlp import build, mlp

from sanawm.errors import EngineError, UserError
from sanawm_export.tensorrt import graph
from sanawm_export.tensorrt.audit import AuditRow, asked_precisions, audit, counts, require_agreement, require_recipe
from sanawm_export.tensorrt.plan import Plan, read_plan

MIXED = {"a": ("nvfp4", "nvfp4"), "b": ("fp8", "fp8"), "c": ("bf16", "bf16"), "d": ("nvfp4", "bf16")}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], Plan]]:
    """What was asked and the plan, for a mix on sm_120 and for what sm_89 and sm_86 have."""
    folder = tmp_path_factory.mktemp("plans")
    found = {}
    for capability, names in (("sm_120", "abcd"), ("sm_89", "bc"), ("sm_86", "c")):
        model = mlp({name: MIXED[name] for name in names})
        asked = asked_precisions(graph.name_layers(model))
        found[capability] = (asked, read_plan(build(model, folder / capability, capability)))
    return found


def test_every_product_is_found_with_its_precision(plans: dict[str, tuple[dict[str, str], Plan]]) -> None:
    asked, plan = plans["sm_120"]
    assert asked == {"a": "nvfp4", "b": "fp8", "c": "bf16", "d": "bf16 x nvfp4"}
    rows = audit(asked, plan)
    assert {row.layer: row.realised for row in rows} == {"a": "nvfp4", "b": "fp8", "c": "bf16", "d": "bf16"}
    assert counts(rows) == {"bf16": 2, "fp8": 1, "nvfp4": 1}
    assert plan.accelerators == ("sm120",) and plan.cubins == () and plan.plugins == 0
    # Four-bit weights are half a byte an element, and the library's constants lie beside them.
    assert WEIGHTS <= plan.weight_bytes < WEIGHTS + 100_000 and plan.device_memory > 0


# a: half a byte an element with a byte for sixteen; b: one byte; c: two; d becomes bfloat16.
WEIGHTS = 256 * 256 * (1 + 2) + 256 * 256 * 9 // 16


def test_a_silent_change_of_precision_fails(plans: dict[str, tuple[dict[str, str], Plan]]) -> None:
    rows = audit(*plans["sm_120"])
    message = r"^mlp: the engine does not compute what the recipe asks: d asked bf16 x nvfp4, got bf16; choose another recipe for this target$"
    with pytest.raises(UserError, match=message):
        require_agreement("mlp", rows)
    require_agreement("mlp", [row for row in rows if row.layer != "d"])


@pytest.mark.parametrize(("capability", "expected"), [("sm_89", {"b": "fp8", "c": "bf16"}), ("sm_86", {"c": "bf16"})])
def test_older_targets(plans: dict[str, tuple[dict[str, str], Plan]], capability: str, expected: dict[str, str]) -> None:
    asked, plan = plans[capability]
    assert {row.layer: row.realised for row in audit(asked, plan)} == expected == asked
    assert plan.accelerators == (capability.replace("_", ""),)


@pytest.mark.parametrize(("capability", "name"), [("sm_89", "a"), ("sm_86", "b")])
def test_the_library_refuses_what_a_target_does_not_have(tmp_path: Path, capability: str, name: str) -> None:
    kind = {"a": "fp4_e2m1", "b": "fp8_e4m3"}[name]
    with pytest.raises(EngineError, match=rf"cannot build it: .*{capability.replace('_', '')}.*{kind}"):
        build(mlp({name: MIXED[name]}), tmp_path / "e", capability)


@pytest.mark.parametrize("capability", ["sm_90", "sm_100", "sm_87"])
def test_targets_that_the_library_does_not_have(tmp_path: Path, capability: str) -> None:
    with pytest.raises(EngineError, match=rf"does not build for {capability}; it builds for .*sm_86, sm_89, sm_120"):
        build(mlp({"c": MIXED["c"]}), tmp_path / "e", capability)


def test_layers_without_a_product_of_their_own() -> None:
    plan = Plan(("sm120",), (), 0, 0, 0, 0, (), 0)
    # What the engine computed while it was built, or inside another kernel, is in the types of the graph; four bits never are.
    assert all(row.agrees for row in audit({"gate": "fp32", "embed": "bf16"}, plan))
    assert not audit({"qkv": "nvfp4"}, plan)[0].agrees
    assert not AuditRow("qkv", "nvfp4", "bf16 and nvfp4").agrees


def test_graph_and_recipe_are_compared() -> None:
    require_recipe("denoise", {"a": "fp8", "other": "bf16"}, {"a": "fp8", "absent": "nvfp4"})
    with pytest.raises(UserError, match="denoise: the exported graph is not the recipe's: a is bf16 in the graph and fp8 in the recipe"):
        require_recipe("denoise", {"a": "bf16"}, {"a": "fp8"})


def test_other_files_are_not_taken_for_engines(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"ptrt" * 1000)
    with pytest.raises(EngineError, match="the engine's sections are not where this version looks for them"):
        read_plan(tmp_path / "junk")
    path = build(mlp({"c": MIXED["c"]}), tmp_path / "e")
    path.write_bytes(path.read_bytes().replace(b"header {\n", b"HEADER {\n"))
    with pytest.raises(EngineError, match="no compiled graph was found"):
        read_plan(path)
