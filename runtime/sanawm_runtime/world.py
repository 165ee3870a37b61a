"""An opened bundle that starts streams."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sanawm.camera import (
    DEFAULT_SCHEME,
    ActionScheme,
    adjust_for_resize_crop,
    default_intrinsics,
    load_image,
    load_intrinsics,
    resize_and_crop,
    to_model_range,
)
from sanawm.camera.image import CropGeometry
from sanawm.camera.intrinsics import normalise_intrinsics
from sanawm.programs import ENCODERS, ITEM_SIZES, Geometry, Program, programs
from sanawm.prompt import PromptTokenizer
from sanawm_runtime.bundle import Bundle, TargetEntry
from sanawm_runtime.cache import Cache
from sanawm_runtime.device import device_capability
from sanawm_runtime.engines import open_engine
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.errors import BundleError, EngineError, StreamClosed
from sanawm_runtime.memory import device_memory, size_text
from sanawm_runtime.prompts import Prompts
from sanawm_runtime.rollout import Progress
from sanawm_runtime.stream import AtEnd, Stream
from sanawm_runtime.targets import check_target
from sanawm_runtime.turns import Turns

ImageSource = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image
IntrinsicsSource = str | os.PathLike[str] | NDArray


# After a first and a second chunk, a steady one for each of the two sets of state that take turns.
RECORDED_CHUNKS = 4


def _check_device(target: TargetEntry) -> None:
    # A bundle for the CPU does not need the driver to be asked.
    if target.capability is not None:
        check_target(target, device_capability())


class World:
    """A bundle made ready: its engine, its prompt tokenizer and its geometry.

    Any number of streams may run on one world, from any threads: each start and each chunk is one turn at the engine. Use as a context
    manager or call `close`.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, *, free_encoders: bool = False, cache: str | os.PathLike[str] | None = None
    ) -> None:
        self.bundle = bundle
        self.config = bundle.manifest.config
        self.turns = Turns()
        self._free_encoders = free_encoders
        self.engine = open_engine(bundle, threads)
        try:
            self._prepare(None if cache is None else Cache(cache), free_encoders)
        except BaseException:
            self.close()
            raise

    def _prepare(self, cache: Cache | None, free_encoders: bool) -> None:
        bundle = self.bundle
        self._tokenizer = self._open_tokenizer()
        entry = bundle.manifest.programs.get("denoise_first")
        latents = next((t for t in entry.inputs if t.name == "latents" and len(t.shape) == 5), None) if entry else None
        if latents is None or not 1 <= latents.shape[2] <= self.config.dit.rope_frames or latents.dtype not in ITEM_SIZES:
            raise BundleError(f"bundle {bundle.root}: program denoise_first is missing or has other inputs; rebuild it with this version")
        self.geometry = Geometry(self.config, self._tokenizer.max_length, latents.shape[2], latents.dtype)
        self.programs = programs(self.geometry)
        self._check_signatures()
        self._check_room(free_encoders)
        self._prompts = Prompts(self, cache, free_encoders)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: Literal["sizes", "full"] = "sizes",
        trusted_keys: Sequence[str | os.PathLike[str]] | None = None,
        free_encoders: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ) -> World:
        """Open the bundle at `path`, cheapest checks first; every file is hashed before it is used.

        threads: CPU threads of the onnxruntime engine (default: all cores). verify: "full" hashes the whole bundle now. trusted_keys: files
        of Ed25519 public keys, one of which must have signed the bundle. free_encoders: give back the text and image encoders' memory after
        each start. cache: a folder that keeps encoded prompts, so that a repeated one needs no text encoder. Raises BundleError, EngineError.
        """
        signed = None
        if trusted_keys is not None:
            from sanawm_runtime.sign import signature_check

            signed = signature_check(trusted_keys)
        bundle = Bundle.open(path, verify=verify, manifest_check=signed, target_check=_check_device)
        return cls(bundle, threads, free_encoders=free_encoders, cache=cache)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames in pixels."""
        return self.config.image_height, self.config.image_width

    @property
    def closed(self) -> bool:
        return self.turns.closed

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Load every program now instead of when it is first needed. `progress` gets a program's name, its number from 1, and how many.

        An engine that records graphs also makes a few chunks of a stream that nobody sees: the next stream takes over its memory and graphs. With
        free_encoders that comes first, so that the encoders run while the device is empty.
        """
        if self._free_encoders:
            self._record()
        names = [name for name in self.programs if not (self._free_encoders and name in ENCODERS)]
        for number, name in enumerate(names, start=1):
            if progress:
                progress(name, number, len(names))
            with self.turns.take():
                self.engine.activate()
                self.engine.load(name)
        if not self._free_encoders:
            self._record()

    def _record(self) -> None:
        if self.engine.whole_chunks:
            with self.start(np.zeros((*self.image_size, 3), np.uint8), "") as stream:
                for _ in stream.play("", chunks=RECORDED_CHUNKS):
                    pass

    def start(
        self,
        image: ImageSource,
        prompt: str,
        *,
        intrinsics: IntrinsicsSource | None = None,
        fov_degrees: float | None = None,
        seed: int = 42,
        scheme: str | ActionScheme = DEFAULT_SCHEME,
        at_end: AtEnd = "stop",
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """Begin a stream: encode the first frame and the prompt.

        image: path, file bytes, PIL image, or (H, W, 3) uint8; resized and cropped to the model's frame. intrinsics: in pixels of that image:
        "fx,fy,cx,cy", a file, or an array (4,), (3, 3), (F, 4), (F, 3, 3), of which the first row holds for the stream; without them a pinhole
        of `fov_degrees` horizontally (70 by default). seed: 0 to 2**64 - 1; the same seed gives the same bytes. scheme: what held keys mean.
        at_end: what happens after 1024 latent frames, see `Stream`. on_progress: called after each program of a chunk with its stage, how
        many are done and how many there are, in the thread that steps. cancel: once set (and `turns.wake()` called), a start that still
        waits for the engine raises Cancelled. Raises InputError, CameraError, EngineError, StreamClosed.
        """
        pixels, geometry = self.prepare_image(image)
        rows = self.input_intrinsics(intrinsics, geometry, 1, fov_degrees)
        return self.start_prepared(pixels, prompt, rows, seed=seed, scheme=scheme, at_end=at_end, on_progress=on_progress, cancel=cancel)

    def start_prepared(
        self,
        pixels: NDArray[np.uint8],
        prompt: str,
        intrinsics: NDArray[np.float64],
        *,
        seed: int = 42,
        scheme: str | ActionScheme = DEFAULT_SCHEME,
        at_end: AtEnd = "stop",
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """`start` on a frame of the model's size and intrinsics (F, 4) in its pixels, one row a pixel frame; the last one holds on."""
        ids, mask = self._tokenizer.encode(prompt)
        if self.closed:
            raise StreamClosed("the world is closed; open it again")
        with self.turns.take(*(() if cancel is None else (cancel.is_set,))):
            self.engine.activate()
            text = self._prompts.buffers(ids, mask)
            latent = self.encode_image(to_model_range(pixels))
            return Stream(self, text, latent, pixels, intrinsics, seed, scheme=scheme, at_end=at_end, on_progress=on_progress)

    def input_intrinsics(
        self, intrinsics: IntrinsicsSource | None, geometry: CropGeometry, frames: int, fov_degrees: float | None = None
    ) -> NDArray[np.float64]:
        """Intrinsics of the input image, in any accepted form, as (frames, 4) in pixels of the model's frame. Raises CameraError."""
        width, height = geometry.source
        if intrinsics is None:
            fov = {} if fov_degrees is None else {"fov_degrees": fov_degrees}
            rows = np.tile(default_intrinsics(width, height, **fov), (frames, 1))
        elif isinstance(intrinsics, np.ndarray):
            rows = normalise_intrinsics(intrinsics, frames)
        else:
            rows = load_intrinsics(intrinsics, frames, (width, height))
        return adjust_for_resize_crop(rows, geometry)

    def prepare_image(self, image: ImageSource) -> tuple[NDArray[np.uint8], CropGeometry]:
        """Any accepted image as a frame of the model's size, (H, W, 3) uint8, and how it was cut. Raises InputError."""
        source = image if isinstance(image, (np.ndarray, Image.Image)) else load_image(image)
        return resize_and_crop(source, *self.image_size)

    def run_program(self, name: str, **inputs: NDArray) -> dict[str, Buffer]:
        """Run a program on host arrays; its outputs in fresh buffers. The caller holds the engine's turn."""
        program = self.programs[name]
        buffers = {spec.name: self.engine.allocate(spec) for spec in (*program.inputs, *program.outputs)}
        for key, values in inputs.items():
            self.engine.write(buffers[key], values)
        self.engine.run(name, buffers)
        return {spec.name: buffers[spec.name] for spec in program.outputs}

    def encode_image(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latent (1, C, 1, h, w) of a frame (1, 3, 1, H, W) in [-1, 1]. The caller holds the engine's turn."""
        latent = self.engine.read(self.run_program("image_encoder", image=image)["latents"])
        if self._free_encoders:
            self.engine.unload("image_encoder")
        return latent

    def _open_tokenizer(self) -> PromptTokenizer:
        from tokenizers import Tokenizer

        extras = self.bundle.manifest.programs["text_encoder"].extras if "text_encoder" in self.bundle.manifest.programs else {}
        try:
            tokenizer = Tokenizer.from_str(self.bundle.read(str(extras["tokenizer"])).decode())
            chi = json.loads(self.bundle.read(str(extras["prompt"])))["chi"]
        except BundleError:
            raise
        except Exception as error:  # the tokenizer library raises nothing more specific
            raise BundleError(f"bundle {self.bundle.root}: its tokenizer cannot be used ({error}); rebuild it") from error
        return PromptTokenizer(tokenizer, chi, self.config.dit.text_tokens)

    def _check_room(self, free_encoders: bool) -> None:
        """Refuse what will not fit before gigabytes of it have been read."""
        needed, free = device_memory(self.bundle), self.engine.free_bytes()
        if needed is None or free is None:
            return
        wanted = needed.streaming if free_encoders else needed.whole
        if free >= wanted:
            return
        less = f"open it with free_encoders (--free-encoders), which needs {size_text(needed.streaming)}, or "
        raise EngineError(
            f"{self.bundle.root} needs {size_text(wanted)} of device memory ({needed}), found {size_text(free)} free; "
            f"{less if needed.streaming <= free else ''}close other programs"
        )

    def _check_signatures(self) -> None:
        for name, program in self.programs.items():
            entry = self.bundle.manifest.programs.get(name)
            found = None if entry is None else _flat(entry)
            if found != _flat(program):
                raise BundleError(f"bundle {self.bundle.root}: program {name} is missing or has another signature; rebuild it with this version")

    def close(self) -> None:
        """Wait for the step in progress, then give back the engine's memory; further calls on streams of this world raise StreamClosed."""
        if self.turns.close():
            self.engine.activate()
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _flat(program: Program | object) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(t.name, t.dtype, tuple(t.shape)) for side in ("inputs", "outputs") for t in getattr(program, side)]
