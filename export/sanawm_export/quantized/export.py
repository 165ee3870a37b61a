"""Export of the quantized transformer's programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sanawm.model.dit import SanaWM
from sanawm.programs import Geometry, programs
from sanawm_calibration.apply import Progress, QuantizedModel, quantize_model, replace_layers
from sanawm_calibration.recipe import Recipe, layer_table, load_recipe
from sanawm_calibration.store import Calibration
from sanawm_export.onnx.export import ExportedProgram, program_module, write_graph
from sanawm_export.onnx.trace import trace
from sanawm_export.onnx.weights import module_tensors
from sanawm_export.quantized.bodies import add_bodies
from sanawm_export.quantized.formats import check_formats, graph_formats, name_products
from sanawm_export.quantized.judge import lower_for_onnxruntime
from sanawm_export.quantized.modules import export_module
from sanawm_export.quantized.weights import link_weights, write_weights

PART = "dit"
WEIGHTS = f"{PART}.safetensors"
# Where the transformer sits in the modules that programs are traced from.
_PREFIX = "model."


def prepare_export(
    model: SanaWM,
    calibration: Calibration,
    recipe: Recipe | str | Path,
    *,
    merge: bool = False,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize the transformer by a recipe and put its layers into the form that is traced, in place; their own weights are freed.

    The result says what became of every layer. Raises CalibrationError and RecipeError naming the layer at fault.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    table = layer_table(chosen, model.config, calibration.found_table())
    quantized = quantize_model(model, table, calibration, merge=merge, keep_weights=False, progress=progress)
    dtype = model.dtype
    replace_layers(model, quantized, lambda packed: export_module(packed, dtype))
    return quantized


def export_quantized(
    model: SanaWM,
    geometry: Geometry,
    calibration: Calibration,
    recipe: Recipe | str | Path,
    directory: Path,
    *,
    names: Iterable[str] | None = None,
    merge: bool = False,
    cpu: bool = False,
    check: bool = True,
    on_layer: Progress | None = None,
    on_program: Callable[[str], None] | None = None,
) -> Iterator[ExportedProgram]:
    """Quantize the transformer and write its weight file and graphs into `directory`, one program at a time.

    `model` has the geometry's dtype and is consumed: its layers are replaced as they are quantized. `merge` merges the attention's
    projections of equal format. `cpu` writes graphs that ONNX Runtime's CPU provider runs, for judging: FP4 values carried in wider types, the
    same numbers. `names` restricts which programs are written. Every graph's formats are compared with the recipe's before it is written.
    """
    quantized = prepare_export(model, calibration, recipe, merge=merge, progress=on_layer)
    yield from export_prepared(model, quantized, geometry, directory, names=names, cpu=cpu, check=check, on_program=on_program)


def export_prepared(
    model: SanaWM,
    quantized: QuantizedModel,
    geometry: Geometry,
    directory: Path,
    *,
    names: Iterable[str] | None = None,
    cpu: bool = False,
    check: bool = True,
    on_program: Callable[[str], None] | None = None,
) -> Iterator[ExportedProgram]:
    """The graphs and weights of a transformer that `prepare_export` has prepared; arguments as for `export_quantized`."""
    model.eval().requires_grad_(False)
    weights = directory / WEIGHTS
    write_weights(weights, module_tensors(model))
    wanted = None if names is None else set(names)
    for name, program in programs(geometry, (PART,)).items():
        if wanted is not None and name not in wanted:
            continue
        if on_program:
            on_program(name)
        graph = trace(program, program_module(program, model))
        check_formats(graph_formats(graph, _PREFIX), quantized.table, name)
        name_products(graph, _PREFIX)
        add_bodies(graph)
        link_weights(graph, weights, _PREFIX)
        if cpu:
            graph = lower_for_onnxruntime(graph)
        yield write_graph(graph, program, weights, check=check)
