"""One result file from several that were measured on one machine in one run.

    python benchmarks/merge_results.py -o benchmarks/results/h200-engine.json engine-bf16.json engine-fp8.json peers.json numerics.json

Rows are put one after the other. A row with `peer_of` names the case that it is a peer of, in whichever file; that case gets the fastest of
its peers. What a file holds beside its rows is kept under `details` by the file's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sanawm_export.peers import attach

_HEAD = ("hardware", "driver", "versions", "commit", "date", "notes", "rows")


def merge(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One document of result files by name. Raises ValueError for several machines or commits, and for two rows of one case."""
    documents = list(results.values())
    for key in ("hardware", "commit"):
        if len(found := {document[key] for document in documents}) != 1:
            raise ValueError(f"expected results of one {key}, found {', '.join(map(str, found))}; merge what was measured together")
    rows = [dict(row) for document in documents for row in document["rows"]]
    cases = [row["case"] for row in rows]
    if twice := sorted({case for case in cases if cases.count(case) > 1}):
        raise ValueError(f"measured twice: {', '.join(twice)}; keep one of them")
    attach(rows)
    versions: dict[str, str] = {}
    for document in documents:
        versions |= document["versions"]
    return {
        "hardware": documents[0]["hardware"], "driver": next((d["driver"] for d in documents if d["driver"]), None), "versions": versions,
        "commit": documents[0]["commit"], "date": max(document["date"] for document in documents), "notes": _notes(documents), "rows": rows,
        "details": {name: rest for name, document in results.items() if (rest := {k: v for k, v in document.items() if k not in _HEAD})},
    }  # fmt: skip


def _notes(documents: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(document["notes"] for document in documents if document["notes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--allow-missing", action="store_true", help="leave out files that are not there, and say so")
    options = parser.parse_args()
    there = [path for path in options.files if path.exists() or not options.allow_missing]
    for path in sorted(set(options.files) - set(there)):
        print(f"{path} is missing", file=sys.stderr)
    merged = merge({path.stem: json.loads(path.read_text()) for path in there})
    temporary = options.output.with_name(f".{options.output.name}.partial")
    temporary.write_text(json.dumps(merged, indent=1) + "\n")
    temporary.replace(options.output)


if __name__ == "__main__":
    main()
