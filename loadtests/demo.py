"""``make demo``: a session reads 600 KB, answers from memory, and survives ``kill -9``.

The control is a session whose memory is reset after the last fact: it reads only what follows, so attention
sees the same and memory holds nothing. A client of the real server; the last line of its output is JSON.

Exit status: 0; 1 where something promised did not hold.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo_questions import HiddenFacts, Round, answers_table, ask_all, attention_span, hidden_facts, promised
from demo_server import ServerProcess
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.cli.ingest import wait_until_read
from mnemosyne.server.settings import Settings

QUESTIONS = 40
MIN_BYTES = 600 * 1024

console = Console(soft_wrap=True)


def read_document(client: Client, session_id: str, title: str, text: str) -> tuple[dict[str, Any], float]:
    """Upload in pieces and watch the reading; the document as the server describes it, and the seconds."""
    data = text.encode()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=len(data))
        began = time.monotonic()
        document = client.create_document(session_id, "manuals.txt", len(data))
        client.upload(session_id, document["id"], io.BytesIO(data), len(data))
        document = wait_until_read(client, session_id, document["id"], progress, task)
        return document, time.monotonic() - began


def tokens_after_last_fact(client: Client, hidden: HiddenFacts) -> int:
    model = client.models()[0]["id"]
    answer = client.call("POST", "/tokenize", json={"model": model, "prompt": hidden.tail})
    return len(answer.json()["tokens"])


def failures(result: dict[str, Any], engine_gone: bool, distance: int, span: int) -> list[str]:
    """What was promised and did not hold."""
    checks = {
        "the restored session answered differently": result["identical"],
        f"fewer than {result['promised']} answers were right": result["right"] >= result["promised"],
        "the session without memory did as well": result["control_right"] < result["right"],
        "a process of the killed server lived on": engine_gone,
        f"the last fact stood within attention's reach ({distance} of {span} tokens)": distance > span,
    }
    return [message for message, holds in checks.items() if not holds]


def run(seed: int, server: ServerProcess) -> tuple[dict[str, Any], list[str]]:
    began = time.monotonic()
    checkpoint = Settings.load().checkpoint
    hidden = hidden_facts(seed, QUESTIONS, MIN_BYTES)
    size = len(hidden.text.encode())
    console.print(f"seed {seed}: {size:,} bytes of Python's manuals with {QUESTIONS} facts hidden in them")
    console.print(f"    the first one: [italic]{hidden.facts[0].sentence}[/italic]")
    console.print(f"server ready in {server.start():.1f} s, on the CPU, checkpoint {checkpoint.name}")

    with Client(server.url) as client:
        session_id = str(client.create_session()["id"])
        document, reading_seconds = read_document(client, session_id, "reading", hidden.text)
        tokens = int(document["tokens_absorbed"])
        speed = tokens / reading_seconds
        distance, span = tokens_after_last_fact(client, hidden), attention_span(checkpoint)
        asked: Round = ask_all(client, session_id, hidden.facts, "asking")
        before = client.session(session_id)
    console.print(answers_table(hidden.facts, asked), soft_wrap=False)
    state_bytes = int(before["state_bytes"])
    console.print(f"{asked.right} of {QUESTIONS} right; read {tokens:,} tokens at {speed:,.0f} tokens/s")
    console.print(
        f"the whole memory of them: {state_bytes / 1e6:.2f} MB; attention sees {span} tokens, "
        f"the last fact stands {distance} tokens back"
    )

    engine_gone = server.kill()
    console.print(
        "server stopped with [bold]kill -9[/bold]" + (", its engine went with it" if engine_gone else "")
    )
    console.print(f"started again over the same data in {server.start():.1f} s")
    with Client(server.url) as client:
        restored = ask_all(client, session_id, hidden.facts, "asking the restored session")
        after = client.session(session_id)
        control_id = str(client.create_session()["id"])
        read_document(client, control_id, "reading only what follows the last fact", hidden.tail)
        control = ask_all(client, control_id, hidden.facts, "asking the session without memory")
    first = restored.answers[0].session
    console.print(
        f"restored session: {restored.right} of {QUESTIONS} right, version {after['version']} "
        f"(before the kill {before['version']}); {first.get('reused_tokens')} tokens reused, "
        f"{first.get('recomputed_tokens')} recomputed"
    )
    console.print(f"control, with its memory reset after the last fact: {control.right} of {QUESTIONS} right")

    result = {
        "seed": seed,
        "bytes": size,
        "tokens": tokens,
        "right": asked.right,
        "right_after_restore": restored.right,
        "control_right": control.right,
        "identical": asked.texts == restored.texts and before["version"] == after["version"],
        "state_bytes": state_bytes,
        "ingest_tokens_per_second": round(speed, 1),
        "seconds": round(time.monotonic() - began, 1),
        "promised": promised(checkpoint),
    }
    return result, failures(result, engine_gone, distance, span)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="repeat a run; a new seed if not given")
    seed = parser.parse_args().seed
    # Ended by a signal, it still takes its server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    with tempfile.TemporaryDirectory(prefix="mnemosyne-demo-") as folder:
        server = ServerProcess(Path(folder))
        try:
            result, broken = run(seed, server)
        except (ApiError, RuntimeError) as error:
            print(f"the demo stopped: {error}\nthe server's log ends with:\n{server.log_end()}")
            return 1
        finally:
            server.kill()
    for message in broken:
        console.print(f"[red]not as promised:[/red] {message}")
    print(json.dumps(result), flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
