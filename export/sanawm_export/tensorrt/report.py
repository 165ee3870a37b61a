"""What a build says about itself, for the manifest and for the person who waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sanawm_export.tensorrt import audit
from sanawm_export.tensorrt.cache import Cached
from sanawm_runtime.engines._trt_library import Library


def program_extras(cached: Cached) -> dict[str, Any]:
    """What the manifest says about one engine besides its signature."""
    built = cached.built
    return {
        "precision": audit.counts(built.rows),
        "layers": {row.layer: row.realised for row in built.rows},
        "device_memory": built.device_memory,
        "weight_bytes": built.weight_bytes,
        "compiled": {"gemms": built.gemms, "attentions": built.attentions, "functions": built.functions, "plugins": built.plugins},
        **cached.extras,
    }


def precision_summary(activations: str, engines: Mapping[str, Cached]) -> dict[str, Any]:
    """Realised precisions over all engines, and how the recurrent blocks are computed."""
    total: Counter[str] = Counter()
    for cached in engines.values():
        total.update(audit.counts(cached.built.rows))
    lowerings = sorted({cached.extras["gdn"] for cached in engines.values() if cached.extras.get("gdn")})
    return {
        "activations": activations,
        "realised": dict(total.most_common()),
        "audited": all(cached.built.audited for cached in engines.values()),
        "gdn": lowerings[0] if lowerings else "matmul",
    }


def unverified(library: Library, target: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences about what nobody has run on the target's hardware."""
    found = [f"No engine of this bundle was run on {target}: that it loads, its speed and its numerics there are unverified."]
    if summary["gdn"] == "plugin":
        found.append(f"{library.title} does not document plugins: that it calls the GDN kernels inside these engines is unverified on hardware.")
    if not summary["audited"]:
        found.append(f"The precision of each layer was not read back: the engine format of {library.title} is not known to this version.")
    return tuple(found)


def build_report(library: Library, seconds: float, engines: Mapping[str, Cached], reused: set[str]) -> dict[str, Any]:
    """Time, memory and size of every engine, and the audit layer by layer."""
    rows = {}
    for name, cached in engines.items():
        built = cached.built
        rows[name] = {
            "seconds": round(built.seconds, 2), "peak_rss": built.peak_rss, "bytes": built.size, "from_cache": name in reused,
            "device_memory": built.device_memory, "cubins": list(built.cubins), "warnings": list(built.warnings),
            "layers": [[row.layer, row.asked, row.realised] for row in built.rows],
        }  # fmt: skip
    return {
        "library": library.title,
        "seconds": round(seconds, 2),
        "peak_rss": max((cached.built.peak_rss for cached in engines.values()), default=0),
        "bytes": sum(cached.built.size for cached in engines.values()),
        "programs": rows,
    }
