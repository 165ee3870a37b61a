"""An exported graph made ready for one target: lowered, its layers' precisions noted, identified by its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sanawm.programs import Program
from sanawm_export.tensorrt import audit, graph
from sanawm_export.tensorrt.cache import FORMAT, WeightDigests, digest, external_tensors, graph_digest
from sanawm_export.tensorrt.job import Job
from sanawm_export.tensorrt.kernels import KernelCompiler
from sanawm_export.tensorrt.lowering import FUSED, GDN, fuse_gdn
from sanawm_export.tensorrt.network import BuildOptions
from sanawm_runtime.engines._trt_launch import describe
from sanawm_runtime.engines._trt_library import Library


@dataclass
class Lowering:
    """What turns graphs into jobs for one target: library, capability ("sm_120"), how GDN nodes are lowered, engine options."""

    library: Library
    capability: str
    gdn: GDN
    compiler: KernelCompiler
    options: BuildOptions = field(default_factory=BuildOptions)
    timing_cache: Path | None = None
    weights: WeightDigests = field(default_factory=WeightDigests)

    def job(self, program: Program, exported: Path, folder: Path, recipe: Mapping[str, str] | None = None) -> tuple[Job, str, dict[str, Any]]:
        """The build of an exported graph: the job, whose files go into `folder`; its content key; facts for the manifest.

        Raises UserError when the graph does not ask for the recipe's precisions or the kernels do not serve it.
        """
        model = graph.load_graph(exported)
        layers = graph.name_layers(model)
        asked = audit.asked_precisions(layers)
        audit.require_recipe(program.name, asked, recipe or {})
        plugin = self.gdn == "plugin"
        graph.inline(model, keep=lambda kind: plugin and kind in FUSED)
        launches = fuse_gdn(model, self.capability, self.compiler.compile) if plugin else []
        graph.sink_uint8(model)
        # Weights are found beside the exported graph wherever the lowered one lies, and no two graphs share a file name.
        stem = f"{program.name}.{self.capability}"
        lowered, engine = folder / f"{stem}.onnx", folder / f"{stem}.engine"
        lowered.write_bytes(graph.serialize(model))
        used = dict(external_tensors(model))
        facts = {
            "format": FORMAT, "graph": graph_digest(model, self.weights.of(model)), "engine": self.library.engine, "version": self.library.version,
            "capability": self.capability, "options": vars(self.options), "asked": asked,
        }  # fmt: skip
        job = Job(
            self.library.engine, self.capability, program, lowered, exported.parent, engine, self.options, asked, bool(launches),
            sum(tensor.nbytes for tensor in used.values()), self.timing_cache,
        )  # fmt: skip
        kernels = {row["name"]: row for made in launches for row in describe(made)}
        return job, digest(facts), {"gdn": self.gdn if launches else None, "kernels": list(kernels.values())}

    def request_key(self, program: Program, facts: Mapping[str, Any]) -> str:
        """Key of a build before anything is exported; `facts`: checkpoint, configuration, precision, sources and versions."""
        signature = [[t.name, t.dtype, t.shape] for side in (program.inputs, program.outputs) for t in side]
        return digest(
            {
                "format": FORMAT, "facts": dict(facts), "program": program.name, "signature": signature, "engine": self.library.engine,
                "version": self.library.version, "capability": self.capability, "gdn": self.gdn, "options": vars(self.options),
            }
        )  # fmt: skip

