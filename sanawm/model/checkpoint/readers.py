"""Lazy readers of tensor files: names, shapes and dtypes at once, one tensor at a time."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from sanawm.errors import CheckpointError
from sanawm.keys import Shape
from sanawm.model.checkpoint.lazy import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I64": "int64"}
# Where a training checkpoint keeps the model: SANA-WM's distillation, then other trainers.
_CONTAINERS = ("generator", "state_dict")
# What unpickling damaged or hostile bytes may raise.
_UNPICKLING = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, struct.error)


class TensorReader(Protocol):
    """Tensors of one or several files under the names the files give them."""

    files: tuple[Path, ...]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU; memory-mapped where the format allows."""


class SafetensorsReader:
    """One safetensors file or the shards of one model."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            # The numpy flavour reads headers without torch.
            with _safetensors_errors(file), safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    if name in self._where:
                        other = self._where[name].name
                        raise CheckpointError(f"{file}: tensor {name} is also in {other}; expected each tensor in one shard")
                    view = handle.get_slice(name)
                    self._where[name] = file
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _DTYPES.get(view.get_dtype(), view.get_dtype())

    def get(self, name: str) -> Tensor:
        file = self._where[name]
        with _safetensors_errors(file):
            if file not in self._open:
                require("torch")
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            return self._open[file].get_tensor(name)


class PickleReader:
    """A file written by `torch.save`: the model in it, and nothing else of a training state.

    Only tensors are unpickled (`weights_only`). Zip files are memory-mapped, so a critic or optimizer beside the model is never read; files
    of torch < 1.6 are read whole.
    """

    def __init__(self, file: Path) -> None:
        self.files: tuple[Path, ...] = (file,)
        self._tensors = _model_state(_unpickle(file), file)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensors(path: Path) -> TensorReader:
    """Reader of a .safetensors file, a sharded .safetensors.index.json, or a torch file; CheckpointError if damaged or not one of them."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the path of a .safetensors or .pt file")
    if path.name.endswith(".index.json"):
        return SafetensorsReader(_shards(path))
    if path.suffix == ".safetensors":
        return SafetensorsReader((path,))
    if path.suffix in PICKLES:
        return PickleReader(path)
    raise CheckpointError(f"{path.name} is not a tensor file; expected .safetensors, .safetensors.index.json or {', '.join(PICKLES)}")


def find_tensors(folder: Path) -> Path | None:
    """The one safetensors file of a folder, or its shard index; None where there is none."""
    if not folder.is_dir():
        return None
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return indices[0]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} holds several safetensors files ({names}) and no index; leave one, or give the file itself")
    return files[0] if files else None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error}); download it again") from error
    shards = tuple(index.parent / name for name in names)
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder ({outside[0]}); download it again")
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}; download it again")
    return shards


@contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error


def _unpickle(file: Path) -> Any:
    torch = require("torch")
    with open(file, "rb") as head:
        zip_like = head.read(2) == b"PK"
    if zip_like and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is cut short: it has no zip directory at its end; download or copy it again")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zip_like)
    except _UNPICKLING as error:
        text = str(error)
        # torch's own message advises to load with weights_only=False; that advice must not reach a user.
        if isinstance(error, pickle.UnpicklingError):
            if found := re.search(r"(?:GLOBAL|instantiate|class|function) (?:GLOBAL )?`?([A-Za-z_]\w*(?:\.\w+)+)", text):
                raise CheckpointError(
                    f"{file} holds more than tensors: loading it would run `{found[1]}`, and code in a checkpoint is never run; "
                    "get a .safetensors file, or have its publisher save the tensors alone"
                ) from error
            detail = re.search(r"Unsupported operand \d+", text)
            text = f"{detail[0] if detail else 'refused'} while unpickling tensors only"
        reason = (text or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} is damaged or not a torch checkpoint ({reason}); download or copy it again") from error


def _model_state(loaded: Any, file: Path) -> dict[str, Any]:
    import torch

    while isinstance(loaded, Mapping):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        inner = next((key for key in _CONTAINERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        loaded = loaded[inner]
    found = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise CheckpointError(f"{file} holds no tensors under {' or '.join(_CONTAINERS)} or at its top level; found: {found or 'nothing'}")
