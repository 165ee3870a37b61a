"""`python toy_command.py SECONDS ARGUMENTS…`: the sanawm command on the toy engine, whose chunks take at least SECONDS each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import toy

from sanawm.cli import main
from sanawm_runtime import engines


class Slow(toy.ToyEngine):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        toy.slow(self, "commit", float(sys.argv[1]))


if __name__ == "__main__":
    engines._ENGINES["onnxruntime"] = Slow
    main(sys.argv[2:])
