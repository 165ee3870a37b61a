"""The cost model's assumptions from measured rows: `python benchmarks/engine_shares.py benchmarks/results/h200-engine.json`.

Prints `cost.ACHIEVED` and the gap between launches as the rows say; they are copied into sanawm_export/cuda/cost.py with the date.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sanawm.config import StreamConfig
from sanawm_export.cuda import cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    rows = json.loads(parser.parse_args().result.read_text())["rows"]
    print({name: round(share, 2) for name, share in cost.achieved(rows).items()})
    for recipe in ("bf16", "fp8"):
        gap = cost.gap_us(rows, recipe, len(StreamConfig().timesteps))
        print(f"{recipe}: {'not measured' if gap is None else f'{gap:.2f} us more a launch'}")


if __name__ == "__main__":
    main()
