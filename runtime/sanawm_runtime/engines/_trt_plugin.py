"""The plugin that launches our compiled kernels inside an engine, for building and for running.

It is one generic plugin: what it computes is the launch list it carries.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from sanawm.errors import EngineError
from sanawm_runtime.engines._trt_device import load_driver
from sanawm_runtime.engines._trt_launch import HIDDEN_POINTERS, Kernel, LaunchList
from sanawm_runtime.engines._trt_library import Library

NAME, VERSION, NAMESPACE = "SanaLaunches", "1", "sanawm"
DESCRIPTION_FIELD, CODE_FIELD = "launches", "cubins"

_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "u32": ctypes.c_uint32, "fp32": ctypes.c_float}
# Dynamic shared memory above this needs the kernel's permission.
_DEFAULT_SHARED = 48 * 1024

# Failures inside `enqueue`: the library reports that a plugin failed and not why.
_failures: list[EngineError] = []


def take_failure() -> EngineError | None:
    """The first error a plugin met since the last call."""
    first = _failures[0] if _failures else None
    _failures.clear()
    return first


# Loaded functions by context, code and symbol: the blocks of a model share their kernels.
_functions: dict[tuple[int, str, str], Any] = {}


class Launcher:
    """Launches a list's kernels on the current context. `driver` can be given for tests."""

    def __init__(self, launches: LaunchList, driver: Any = None) -> None:
        self._list = launches
        self._driver = driver if driver is not None else load_driver()
        self._bound = [_Bound(launch.arguments) for launch in launches.launches]
        self._digests = [hashlib.sha256(kernel.cubin).hexdigest() for kernel in launches.kernels]

    def run(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Enqueue every launch; addresses in the order of the list's operands. Raises EngineError."""
        driver = self._driver
        code, context = driver.cuCtxGetCurrent()
        self._check(code, "no CUDA context is current")
        for launch, bound in zip(self._list.launches, self._bound, strict=True):
            kernel = self._list.kernels[launch.kernel]
            function = self._function(int(context), kernel, self._digests[launch.kernel])
            bound.point(inputs, outputs, workspace)
            code = driver.cuLaunchKernel(function, *launch.grid, kernel.threads, 1, 1, kernel.shared, driver.CUstream(stream), bound.address, 0)[0]
            self._check(code, f"{kernel.name} cannot be launched")

    def _function(self, context: int, kernel: Kernel, digest: str) -> Any:
        driver = self._driver
        key = (context, digest, kernel.symbol)
        if key not in _functions:
            code, module = driver.cuModuleLoadData(kernel.cubin)
            self._check(code, f"{kernel.name} for {self._list.capability} cannot be loaded")
            code, function = driver.cuModuleGetFunction(module, kernel.symbol.encode())
            self._check(code, f"{kernel.name} has no function {kernel.symbol}")
            if kernel.shared > _DEFAULT_SHARED:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._check(driver.cuFuncSetAttribute(function, attribute, kernel.shared)[0], f"{kernel.name} cannot have {kernel.shared} bytes")
            _functions[key] = function
        return _functions[key]

    def _check(self, code: Any, what: str) -> None:
        if code != self._driver.CUresult.CUDA_SUCCESS:
            name = self._driver.cuGetErrorName(code)[1]
            raise EngineError(f"{self._list.name}: {what} ({name.decode() if isinstance(name, bytes) else code})")


class _Bound:
    """The arguments of one launch in C memory, and the array of pointers to them that the driver reads."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._pointers = [(i, a) for i, a in enumerate(arguments) if a.source not in _C_TYPES]
        values: list[Any] = [_C_TYPES[a.source](a.value) if a.source in _C_TYPES else ctypes.c_void_p() for a in arguments]
        self._values = values + [ctypes.c_void_p() for _ in range(HIDDEN_POINTERS)]
        self._array = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(v) for v in self._values))
        self.address = ctypes.addressof(self._array)

    def point(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int) -> None:
        for i, argument in self._pointers:
            base = workspace if argument.source == "workspace" else (inputs if argument.source == "input" else outputs)[argument.index]
            self._values[i].value = base + argument.value


def _noting_failures(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except EngineError as error:
            _failures.append(error)
            raise

    return wrapped


@cache
def _classes(trt: Any) -> tuple[type, type]:
    dtypes = {
        "float32": trt.DataType.FLOAT, "bfloat16": trt.DataType.BF16, "float16": trt.DataType.HALF, "int64": trt.DataType.INT64,
        "bool": trt.DataType.BOOL,
    }  # fmt: skip

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc, name-defined]
        def __init__(self, launches: LaunchList) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = len(launches.outputs)
            self.timing_cache_id = ""
            self.launches = launches
            self._launcher: Launcher | None = None
            # The library keeps pointers to what it is given, so these live as long as the plugin.
            text, code = launches.to_fields()
            self._fields = [
                trt.PluginField(DESCRIPTION_FIELD, np.frombuffer(text.encode(), np.int8).copy(), trt.PluginFieldType.INT8),
                trt.PluginField(CODE_FIELD, np.frombuffer(code, np.int8).copy(), trt.PluginFieldType.INT8),
            ]

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.launches)

        def get_output_data_types(self, input_types: Any) -> Any:
            return [dtypes[operand.dtype] for operand in self.launches.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            shapes = []
            for operand in self.launches.outputs:
                dims = trt.DimsExprs(len(operand.shape))
                for axis, size in enumerate(operand.shape):
                    dims[axis] = builder.constant(size)
                shapes.append(dims)
            return shapes

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            operands = (*self.launches.inputs, *self.launches.outputs)
            found = tensors[position].desc
            return bool(found.format == trt.TensorFormat.LINEAR and found.type == dtypes[operands[position].dtype])

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return self.launches.workspace

        def get_valid_tactics(self) -> Any:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass  # there is one tactic, and the library insists on telling

        @_noting_failures
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            self._check_shapes([tuple(t.desc.dims) for t in inputs])

        @_noting_failures
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            self._check_shapes([tuple(t.dims) for t in inputs])

        def _check_shapes(self, found: list[tuple[int, ...]]) -> None:
            wanted = [operand.shape for operand in self.launches.inputs]
            if found != wanted:
                raise EngineError(f"{self.launches.name}: compiled for inputs {wanted}, found {found}; build the engine again")

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(self._fields)

        @_noting_failures
        def enqueue(self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int) -> None:
            if self._launcher is None:
                self._launcher = Launcher(self.launches)
            self._launcher.run(inputs, outputs, workspace, stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            kinds = ((DESCRIPTION_FIELD, trt.PluginFieldType.INT8), (CODE_FIELD, trt.PluginFieldType.INT8))
            self.field_names = trt.PluginFieldCollection([trt.PluginField(name, np.array([], np.int8), kind) for name, kind in kinds])

        @_noting_failures
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: bytes(np.asarray(field.data, np.int8)) for field in fields}
            if not found.keys() >= {DESCRIPTION_FIELD, CODE_FIELD}:
                raise EngineError(f"plugin {name}: expected the fields {DESCRIPTION_FIELD} and {CODE_FIELD}, found {', '.join(found) or 'none'}")
            return Plugin(LaunchList.from_fields(found[DESCRIPTION_FIELD].decode(), found[CODE_FIELD]))

    return Plugin, Creator


@cache
def register(library: Library) -> Any:
    """Make the plugin known to the library, once a process; engines that carry it can then be built and opened. Raises EngineError."""
    trt = library.module
    creator = _classes(trt)[1]()
    registry = trt.get_plugin_registry()
    if registry is None or not registry.register_creator(creator, NAMESPACE):
        raise EngineError(f"{library.title} refused the plugin {NAME}; another plugin of that name is loaded")
    return creator


def make_plugin(library: Library, launches: LaunchList) -> Any:
    """The plugin object around a launch list."""
    return _classes(library.module)[0](launches)
