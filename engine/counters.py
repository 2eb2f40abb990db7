"""What an engine counts, for metrics. Owns the names; knows no metrics library."""

from __future__ import annotations

NAMES = {
    "steps_total": "scheduling steps that computed something",
    "busy_seconds_total": "seconds spent in those steps",
    "ingest_seconds_total": "of these, seconds in which chunks of input were committed",
    "decode_seconds_total": "of these, seconds in which tokens were emitted",
    "transfer_seconds_total": "seconds spent turning states into bytes and back",
    "out_of_memory_total": "times that a step ran out of the device's memory",
    "states_moved_out_total": "states moved from the device to host memory",
    "states_moved_in_total": "states moved back to the device",
    "state_bytes_moved_out_total": "bytes of the states moved out",
    "state_bytes_moved_in_total": "bytes of the states moved back",
    "state_move_out_seconds_total": "seconds that copying states out took, beside the steps",
    "state_move_in_seconds_total": "seconds that copying states back took, beside the steps",
    "tokens_ingested_total": "tokens committed from prompts and documents",
    "tokens_recommitted_total": "tokens of answers whose chunk was committed",
    "tokens_generated_total": "tokens emitted",
    "chunks_written_total": "committed chunks that changed the memory",
    "chunks_skipped_total": "committed chunks that left the memory as it was",
    "requests_finished_total": "requests that ended well",
    "requests_failed_total": "requests that failed for another reason than the two below",
    "requests_cancelled_total": "requests that were cancelled, and those that waited for their results",
    "requests_rejected_total": "requests refused because the queue, or the room for states, was full",
    "requests_running": "requests that ingest or decode now",
    "requests_waiting": "requests that wait for another's result, or for their state, now",
    "requests_ingesting": "requests that ingest now",
    "requests_decoding": "requests that decode now",
    "queued_tokens": "tokens accepted and not read yet",
    "handles": "states that are held",
    "state_bytes": "bytes of these states",
    "device_states": "of these states, those on the device",
    "device_state_bytes": "bytes that they take there",
    "host_states": "of these states, those in host memory",
    "host_state_bytes": "bytes that they take there",
}
"""Name -> meaning. What ends in ``_total`` only rises, the rest are gauges."""


class Counters:
    """The counters that only rise."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {n: 0.0 for n in NAMES if n.endswith("_total")}

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[name] += amount
