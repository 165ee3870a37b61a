"""Structured logs and what counts in the metrics."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest

from sanawm_runtime import logs
from sanawm_runtime.chunk import Chunk
from sanawm_runtime.metrics import Metrics


@pytest.fixture
def lines():
    """Set up logging into a text buffer; lines(as_json) gives a function that returns what was written."""
    made = []

    def set_up(as_json, level="debug"):
        out = io.StringIO()
        made.append(logs.set_up(as_json, level, out))
        return lambda: out.getvalue().splitlines()

    yield set_up
    logger = logging.getLogger("sanawm")
    for handler in made:
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_a_line_of_json_says_everything(lines):
    read = lines(True)
    logging.getLogger("sanawm.serve").warning("stream_failed", extra={"session": "ab", "error": "it broke", "count": 3, "path": np.int64(4)})
    (line,) = read()
    event = json.loads(line)
    assert event.pop("time").endswith("Z")
    assert event == {
        "level": "warning",
        "logger": "sanawm.serve",
        "event": "stream_failed",
        "session": "ab",
        "error": "it broke",
        "count": 3,
        "path": "4",
    }


@pytest.mark.parametrize("as_json", [True, False])
def test_a_client_cannot_forge_a_line_or_move_the_cursor(lines, as_json):
    read = lines(as_json)
    hostile = 'x"\n2026-01-01 error fake=1\r\x1b[2J\u2028\u202e'
    logging.getLogger("sanawm.serve").info("refused", extra={"reason": hostile})
    logging.getLogger("sanawm.serve").info(hostile)
    text = read()
    assert len(text) == 2
    assert all(line.isascii() and line.isprintable() for line in text)


def test_lines_for_people_are_readable(lines):
    read = lines(False)
    logging.getLogger("sanawm.live").info("behind", extra={"chunk": 3, "took_s": 1.25, "note": "two words", "empty": ""})
    (line,) = read()
    assert line[12:] == ' info    behind chunk=3 took_s=1.25 note="two words" empty=""'


def test_a_traceback_stays_one_event(lines):
    read = lines(True)
    try:
        raise ValueError("inner\nlines")
    except ValueError:
        logging.getLogger("sanawm").exception("internal_error")
    (line,) = read()
    assert "ValueError: inner" in json.loads(line)["traceback"]


def test_levels_and_setting_up_again(lines):
    first = lines(True, "warning")
    logging.getLogger("sanawm.x").info("quiet")
    second = lines(True, "warning")
    logging.getLogger("sanawm.x").warning("loud")
    assert first() == [] and len(second()) == 1


def test_two_servers_count_apart_and_labels_are_bounded():
    one, other = Metrics(), Metrics()
    frames = np.zeros((24, 2, 2, 3), np.uint8)
    chunk = Chunk(0, frames, np.zeros((1, 1, 3, 1, 1), np.float32), np.zeros((24, 4, 4)), {"denoise": 0.2, "decode": 0.1}, waited_s=0.05)
    one.count(chunk, latency_s=0.4, nbytes=1000, behind=True)
    text = one.text().decode()
    for line in (
        "sanawm_chunks_total 1.0",
        "sanawm_frames_total 24.0",
        "sanawm_sent_bytes_total 1000.0",
        "sanawm_chunks_behind_total 1.0",
        'sanawm_stage_seconds_sum{stage="denoise"} 0.2',
        "sanawm_latency_seconds_count 1.0",
        'sanawm_latency_seconds_bucket{le="0.4"} 1.0',
        "sanawm_wait_seconds_sum 0.05",
    ):
        assert line in text.splitlines(), line
    assert "sanawm_chunks_total 0.0" in other.text().decode()


def test_gauges_read_their_values_when_asked():
    metrics, values = Metrics(), [1.0, 5.0]
    metrics.watch(lambda: values[0], lambda: values[1])
    assert "sanawm_sessions 1.0" in metrics.text().decode()
    values[0] = 2.0
    text = metrics.text().decode()
    assert "sanawm_sessions 2.0" in text and "sanawm_engine_waiting 5.0" in text
