"""``mnemosyne eval`` as a person types it: against a scripted server whose every answer is known, and with
the shipped checkpoint behind a server of its own."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mnemosyne.server.cli.main import app
from mnemosyne.training.babilong import run
from mnemosyne.training.facts import demo_text, make_facts
from tests.server.http.running import RunningServer
from tests.server.http.scripted import ScriptedModel, write_checkpoint

QUESTIONS = 12
"""Of the colours' task; the scripted model answers blue, which is right in every third."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "scripted")


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[RunningServer]:
    running = RunningServer(checkpoint, tmp_path / "data")
    yield running
    running.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    told = ["blue", "red", "green"]
    lines = [
        f"1 Mary took the {i} book.\n2 It was {told[i % 3]}.\n3 Which colour?\t{told[i % 3]}\t2\n"
        for i in range(QUESTIONS)
    ]
    (folder / "qa1_colours_test.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "book.txt").write_text(demo_text(30_000), encoding="utf-8")
    return folder


def evaluate(*arguments: str, status: int = 0, **environment: str) -> tuple[str, str]:
    command = [sys.executable, "-c", "from mnemosyne.server.cli.main import app; app()", "eval", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MNEMOSYNE_")}
    settings = {"COLUMNS": "160", "NO_COLOR": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**clean, **settings})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def babilong(data: Path, checkpoint: Path, *arguments: str, status: int = 0, **environment: str) -> Any:
    files = ["--babi", str(data), "--books", str(data / "book.txt"), "--checkpoint", str(checkpoint)]
    return evaluate("babilong", *files, "--tasks", "1", *arguments, status=status, **environment)


def break_first_step(model: ScriptedModel) -> None:
    """What is read in the engine's first step is given up; then it works."""
    wait, steps = model._wait, itertools.count()

    def fail_once() -> None:
        model.broken = next(steps) == 0
        wait()

    model._wait = fail_once  # type: ignore[method-assign]


def test_babilong_counts_what_a_server_answers(
    data: Path, checkpoint: Path, server: RunningServer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--samples", str(QUESTIONS), "--lengths", "300,1k", "--url", server.url, "--parallel", "3"]
    break_first_step(server.model)
    said, notes = babilong(data, checkpoint, *options, "--out", str(out), "--json")
    found = json.loads(said)
    assert found == json.loads((out / "babilong.json").read_text(encoding="utf-8"))
    assert [(e["length"], e["right"], e["samples"]) for e in found["results"]] == [
        (300, 4, 12),
        (1000, 4, 12),
    ]
    assert [e["bytes_per_token"] for e in found["results"]] == [1.0, 1.0] and "1.00 bytes a token" in notes
    assert found["qa1"]["most_frequent"] == pytest.approx(1 / 3) and found["failed"] == []
    assert sum(e["failed_attempts"] for e in found["results"]) >= 1
    assert (out / "babilong.svg").stat().st_size > 1000
    assert server.http.get("/v1/sessions").json()["data"] == []
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert {row["answer"].strip() for row in rows} == {"blue"}
    # Nothing is asked again; the table has the numbers.
    made = server.model.decoded
    table, notes = babilong(data, checkpoint, *options, "--out", str(out))
    assert server.model.decoded == made and "24 answered in earlier runs" in notes
    assert "33 (14 to 61)" in table and "300" in table and "1k" in table


def test_what_a_server_never_answers_counts_nowhere(
    data: Path, checkpoint: Path, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_DELAY", 0.01)
    server.model.broken = True
    files = ["--babi", str(data), "--books", str(data / "book.txt"), "--checkpoint", str(checkpoint)]
    options = ["--tasks", "1", "--samples", "2", "--lengths", "300", "--url", server.url, "--json"]
    done = CliRunner().invoke(app, ["eval", "babilong", *files, *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["results"] == [] and [f["sample"][2] for f in found["failed"]] == [0, 1]
    assert "rejected" in found["failed"][0]["error"] and "(4 attempts)" in found["failed"][0]["error"]
    assert "2 samples have no answer and count nowhere" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "2"], r"no bAbI task 2 in .*put the files"),
        (["--books", "nowhere.txt"], r"no book text at nowhere\.txt: put plain"),
        (["--lengths", "10"], r"qa1 can't be asked at 10 tokens"),
        (["--lengths", "ten"], r"a length is a number of tokens"),
        (["--lengths", "300"], r"has 12 questions .* 100 samples were asked for"),
        (["--checkpoint", "nowhere"], r"can't read the tokenizer nowhere/tokenizer\.json"),
        (["--url", "http://127.0.0.1:9", "--device", "cpu"], r"--device is for the server that eval starts"),
        (["--url", "http://127.0.0.1:9", "--samples", "1"], r"no answer from http://127\.0\.0\.1:9"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], said: str, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    _, why = babilong(data, checkpoint, *options, "--out", str(tmp_path / "out"), status=1)
    assert re.search(said, " ".join(why.split()))


def test_another_tokenizer_than_the_servers_is_refused(
    data: Path, server: RunningServer, tmp_path: Path
) -> None:
    shipped = Path(__file__).resolve().parents[3] / "checkpoints" / "mnemosyne-1"
    options = ["--url", server.url, "--samples", "1", "--out", str(tmp_path / "out")]
    _, why = babilong(data, shipped, *options, status=1)
    assert "tokenizer isn't that of scripted" in " ".join(why.split())


def test_the_shipped_checkpoint_answers_over_a_server_of_its_own(tmp_path: Path) -> None:
    """Facts of the kind that it was trained to remember, in bAbI's format."""
    facts = make_facts(seed=11, count=6)
    babi = tmp_path / "babi"
    babi.mkdir()
    told = [f"1 {f.sentence}\n2 {f.question}\t{f.answer}\t1\n" for f in facts]
    (babi / "qa1_facts.txt").write_text("".join(told), encoding="utf-8")
    (tmp_path / "book.txt").write_text(demo_text(60_000), encoding="utf-8")
    files = ["--babi", str(babi), "--books", str(tmp_path / "book.txt"), "--out", str(tmp_path / "out")]
    said, _ = evaluate(
        "babilong",
        *files,
        "--tasks",
        "1",
        "--lengths",
        "2k",
        "--samples",
        "6",
        "--json",
        MNEMOSYNE_THREADS="1",
    )
    (found,) = json.loads(said)["results"]
    assert found["samples"] == 6 and found["right"] >= 5
    assert 1980 < found["tokens"] <= 2000 and found["bytes_per_token"] > 2.5
