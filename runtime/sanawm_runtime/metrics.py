"""Counters of a server in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sanawm_runtime.chunk import Chunk

# A chunk plays for 1.5 s; the buckets are fine around that.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class Metrics:
    """What one server counts, in a registry of its own, so that two servers in a process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.connections = Gauge("sanawm_connections", "Open WebSockets.", registry=registry)
        self.sessions = Gauge("sanawm_sessions", "Sessions, those waiting for their client included.", registry=registry)
        self.engine_waiting = Gauge("sanawm_engine_waiting", "Chunks and starts that wait for the engine.", registry=registry)
        self.ended = Counter("sanawm_sessions_ended", "Sessions that are over, by reason.", ["reason"], registry=registry)
        self.refused = Counter("sanawm_refused", "Connections, messages and sessions refused, by reason.", ["reason"], registry=registry)
        self.chunks = Counter("sanawm_chunks", "Chunks sent.", registry=registry)
        self.frames = Counter("sanawm_frames", "Frames sent.", registry=registry)
        self.dropped = Counter("sanawm_chunks_dropped", "Chunks thrown away because their client was slow.", registry=registry)
        self.behind = Counter("sanawm_chunks_behind", "Chunks that came later than the playback of those before lasted.", registry=registry)
        self.sent = Counter("sanawm_sent_bytes", "Bytes of frames and recordings sent.", registry=registry)
        self.stage = Histogram("sanawm_stage_seconds", "Time of a chunk's stages.", ["stage"], buckets=_SECONDS, registry=registry)
        self.waited = Histogram("sanawm_wait_seconds", "Time a chunk waited for the engine.", buckets=_SECONDS, registry=registry)
        self.latency = Histogram("sanawm_latency_seconds", "From a chunk's request to its last frame sent.", buckets=_SECONDS, registry=registry)

    def watch(self, sessions: Callable[[], float], engine_waiting: Callable[[], float]) -> None:
        """Where the gauges read their values when they are asked."""
        self.sessions.set_function(sessions)
        self.engine_waiting.set_function(engine_waiting)

    def count(self, chunk: Chunk, latency_s: float, nbytes: int, behind: bool) -> None:
        """A chunk was sent."""
        self.chunks.inc()
        self.frames.inc(len(chunk.frames))
        self.sent.inc(nbytes)
        self.behind.inc(behind)
        self.waited.observe(chunk.waited_s)
        self.latency.observe(latency_s)
        for stage, seconds in chunk.seconds.items():
            self.stage.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Everything, as a scrape reads it."""
        return generate_latest(self._registry)
