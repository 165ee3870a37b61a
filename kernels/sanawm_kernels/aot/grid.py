"""Grid rules: integer expressions over named sizes, evaluated without executing code.

A rule is text such as `"cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)"`: integers, names, + - * // %, and the functions cdiv, min and max.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}


def evaluate(rule: str, sizes: Mapping[str, int]) -> int:
    """Value of `rule` for the given sizes; ValueError for anything that is not a grid rule or names a size that is not given."""
    try:
        tree = ast.parse(rule, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"grid rule '{rule}' is not an expression") from error
    return _value(tree.body, sizes, rule)


def names(rule: str) -> set[str]:
    """Sizes a rule refers to."""
    called = {node.func for node in ast.walk(ast.parse(rule, mode="eval")) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(ast.parse(rule, mode="eval")) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS} - {
        node.id for node in called if isinstance(node, ast.Name)
    }


def _value(node: ast.expr, sizes: Mapping[str, int], rule: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise ValueError(f"grid rule '{rule}' needs the size {node.id}, given are {', '.join(sorted(sizes)) or 'none'}")
        return int(sizes[node.id])
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, sizes, rule), _value(node.right, sizes, rule))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
        return _FUNCTIONS[node.func.id](*(_value(argument, sizes, rule) for argument in node.args))
    raise ValueError(f"grid rule '{rule}' may only use integers, sizes, + - * // %, cdiv, min and max")
