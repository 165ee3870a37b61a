"""Hostile inputs for fuzzing: documents and bytes with a few things changed."""

from __future__ import annotations

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("SANAWM_FUZZ_CASES", "120"))
# A case that takes longer than this is a hang. Reading is a matter of microseconds; the rest is for busy machines.
HANG_MS = 5000


def cases(share=1.0):
    # Data too large or slow to generate says nothing about the readers.
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]
    return settings(max_examples=max(20, int(CASES * share)), deadline=HANG_MS, database=None, suppress_health_check=checks)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=40),
    st.sampled_from(["", "..", "/etc/passwd", "\x00", "\ud800", "a" * 5000, "CON", "\u202e", "1e999", "-0", "NaN", "sm_120", "manifest.json"]),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=5), s, max_size=4)),
    st.integers(1, 200).map(lambda depth: _nested(depth)),
)


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def places(tree, path=()):
    """Paths to every node of a JSON tree."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def with_change(tree, path, how, value):
    """The tree with one node replaced, removed, renamed or doubled."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    last = path[-1]
    if how == "remove":
        del node[last]
    elif how == "rename" and isinstance(node, dict):
        node[str(value)[:20]] = node.pop(last)
    elif how == "double" and isinstance(node, list):
        node.append(copy.deepcopy(node[last]))
    else:
        node[last] = value
    return tree


@st.composite
def changed_json(draw, tree):
    """Bytes of a JSON document with a few nodes changed."""
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(tree))
        path = found[draw(st.integers(0, len(found) - 1))]
        tree = with_change(tree, path, draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"])), draw(HOSTILE))
    return json.dumps(tree).encode()


@st.composite
def changed_bytes(draw, data):
    """Bytes with a few cut, set, doubled or inserted."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        how = draw(st.sampled_from(["set", "cut", "insert", "double", "truncate", "number"]))
        if how == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "cut":
            del data[at : at + length]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=length))
        elif how == "double":
            data[at:at] = data[at : at + length]
        elif how == "truncate":
            del data[at:]
        else:
            data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"]))
    return bytes(data)
