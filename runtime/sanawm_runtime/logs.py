"""Structured logs: one event with its facts a line, for people or as JSON."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback
from typing import IO, Any

# What logging itself puts on a record; everything else came as `extra` and is a fact.
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beyond its event."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "event", …} a line, in ASCII, so that nothing a client sent can forge a line or move a cursor."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **facts(record),
        }
        if record.exc_info and record.exc_info[0]:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


class Lines(logging.Formatter):
    """time level event name=value …, values quoted where they are more than a word."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record)[11:23], f"{record.levelname.lower():7}", _plain(record.getMessage())]
        words += [f"{name}={_plain(value)}" for name, value in facts(record).items()]
        text = " ".join(words)
        if record.exc_info and record.exc_info[0]:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return text


def _time(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _plain(value: Any) -> str:
    text = str(value)
    return text if text and all(letter.isalnum() or letter in "._-+:/" for letter in text) and text.isascii() else json.dumps(text)


def set_up(as_json: bool = False, level: str = "info", stream: IO[str] | None = None) -> logging.Handler:
    """Send the logs of everything named `sanawm` to `stream` (stderr); call again to replace what was set up before."""
    logger = logging.getLogger("sanawm")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, JsonLines | Lines):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else Lines())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler
