"""Some streams of the HTTP bench in a process of their own, so that many clients don't wait for one another.

Reads what to do as JSON from its input and writes the samples as JSON. Knows the HTTP interface alone;
``bench_gpu_server`` starts it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx
from bench_gpu_streams import Sample, sample


async def ask(http: httpx.AsyncClient, session: str, todo: dict[str, Any]) -> Sample:
    """One streamed answer that leaves no trace. Raises RuntimeError where it isn't whole."""
    body = {
        "prompt": todo["prompt"],
        "max_tokens": todo["answer"],
        "session_id": session,
        "learn": False,
        "temperature": 0,
        "logit_bias": {str(todo["token"]): 100},
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, arrivals, tokens, whole = time.perf_counter(), [], 0, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                whole = True
            elif line.startswith("data: "):
                message = json.loads(line.removeprefix("data: "))
                if "error" in message:
                    raise RuntimeError(message["error"]["message"])
                if any(choice.get("text") for choice in message["choices"]):
                    arrivals.append(time.perf_counter())
                tokens = (message.get("usage") or {}).get("completion_tokens", tokens)
    if not whole or tokens != todo["answer"] or len(arrivals) < 2:
        raise RuntimeError(f"an answer of {tokens} tokens in {len(arrivals)} pieces isn't whole")
    first, _ = sample(began, arrivals)
    # Several tokens in one piece don't make it faster.
    return first, (arrivals[-1] - arrivals[0]) / (tokens - 1)


async def run(todo: dict[str, Any]) -> list[Sample]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=todo["url"], timeout=600.0, limits=limits, trust_env=False) as http:
        await asyncio.gather(*(ask(http, session, todo) for session in todo["sessions"]))
        await wait_for_start()

        async def stream(session: str) -> list[Sample]:
            return [await ask(http, session, todo) for _ in range(todo["rounds"])]

        samples = await asyncio.gather(*(stream(session) for session in todo["sessions"]))
    return [each for stream_samples in samples for each in stream_samples]


async def wait_for_start() -> None:
    """Say that the first round is over, and go on with the others at their word."""
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


def main() -> None:
    todo = json.loads(sys.stdin.readline())
    print(json.dumps(asyncio.run(run(todo))), flush=True)


if __name__ == "__main__":
    main()
