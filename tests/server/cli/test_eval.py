"""``mnemosyne eval`` as a person types it: against a scripted server whose every answer is known, and with
the shipped checkpoint behind a server of its own."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of who runs the tests, a wide terminal, and no pause before an attempt is repeated."""
    for name in os.environ:
        if name.startswith("MNEMOSYNE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "60")  # narrower than a row, of which nothing may be cut
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(run, "FIRST_DELAY", 0.01)


def evaluate(*arguments: str, status: int = 0) -> tuple[str, str]:
    """What it printed, and what it said on the side, every run of white space a space."""
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == status, done.output
    return done.stdout, " ".join(done.stderr.split())


def babilong(data: Path, checkpoint: Path, *arguments: str, status: int = 0) -> tuple[str, str]:
    files = ["--babi", str(data), "--books", str(data / "book.txt"), "--checkpoint", str(checkpoint)]
    return evaluate("babilong", *files, "--tasks", "1", *arguments, status=status)


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
    assert "33 (14-61)" in table and "300" in table and "1k" in table


def test_runs_side_by_side_are_reported_together(
    data: Path, checkpoint: Path, server: RunningServer, tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("one", "two", "other")]
    for out, options in zip(
        outs, (["--lengths", "300"], ["--lengths", "300,1k"], ["--seed", "1"]), strict=True
    ):
        given = ["--lengths", "300", "--samples", "3", *options, "--url", server.url, "--out", str(out)]
        babilong(data, checkpoint, *given)
    one, two, other = map(str, outs)
    with (outs[1] / "samples.jsonl").open("a", encoding="utf-8") as under_way:
        under_way.write('{"key": ["qa1", 10')
    said, _ = evaluate("report", one, two, "--out", str(tmp_path / "all"), "--json")
    found = json.loads(said)
    assert found == json.loads((tmp_path / "all" / "babilong.json").read_text(encoding="utf-8"))
    assert [(e["length"], e["samples"]) for e in found["results"]] == [(300, 3), (1000, 3)]
    (outs[0] / "babilong.json").unlink()
    table, _ = evaluate("report", one)
    assert "qa1" in table and (outs[0] / "babilong.json").is_file()
    _, why = evaluate("report", one, other, status=1)
    assert f"was made with another seed than {one}" in why
    _, why = evaluate("report", str(tmp_path), status=1)
    assert "isn't there or is empty: name folders that eval babilong wrote to" in why


def test_what_a_server_never_answers_counts_nowhere(
    data: Path, checkpoint: Path, server: RunningServer, tmp_path: Path
) -> None:
    server.model.broken = True
    options = ["--samples", "2", "--lengths", "300", "--url", server.url, "--json"]
    said, why = babilong(data, checkpoint, *options, "--out", str(tmp_path / "out"), status=1)
    found = json.loads(said)
    assert found["results"] == [] and sorted(f["sample"][2] for f in found["failed"]) == [0, 1]
    assert "rejected" in found["failed"][0]["error"] and "(4 attempts)" in found["failed"][0]["error"]
    assert "2 samples have no answer and count nowhere" in why


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
    assert re.search(said, why)


def test_another_tokenizer_than_the_servers_is_refused(
    data: Path, server: RunningServer, tmp_path: Path
) -> None:
    shipped = Path(__file__).resolve().parents[3] / "checkpoints" / "mnemosyne-1"
    options = ["--url", server.url, "--samples", "1", "--out", str(tmp_path / "out")]
    _, why = babilong(data, shipped, *options, status=1)
    assert "tokenizer isn't that of scripted" in why


def test_perplexity_of_the_shipped_checkpoint(data: Path, tmp_path: Path) -> None:
    out, book = tmp_path / "out", str(data / "book.txt")
    said, _ = evaluate("perplexity", "--books", book, "--length", "4k", "--out", str(out), "--json")
    found = json.loads(said)
    assert found == json.loads((out / "perplexity.json").read_text(encoding="utf-8"))
    (one,) = found["results"]
    assert (one["checkpoint"], one["variant"], one["segment"], one["length"]) == (
        "mnemosyne-1",
        "mag",
        64,
        3968,
    )
    assert [(r["from"], r["to"]) for r in one["curve"]] == [(0, 2000), (2000, 3968)]
    # Better than guessing among 4,096, and at the start, where nothing is there to forget, the same.
    assert all(row["on"] < 8 for row in one["curve"]) and (out / "perplexity.svg").is_file()
    _, why = evaluate("perplexity", "--books", book, "--checkpoint", str(data), "--out", str(out), status=1)
    assert "is not a checkpoint: config.json is missing" in why


def test_the_shipped_checkpoint_answers_over_a_server_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts of the kind that it was trained to remember, in bAbI's format."""
    facts = make_facts(seed=11, count=6)
    babi = tmp_path / "babi"
    babi.mkdir()
    told = [f"1 {f.sentence}\n2 {f.question}\t{f.answer}\t1\n" for f in facts]
    (babi / "qa1_facts.txt").write_text("".join(told), encoding="utf-8")
    (tmp_path / "book.txt").write_text(demo_text(60_000), encoding="utf-8")
    files = ["--babi", str(babi), "--books", str(tmp_path / "book.txt"), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("MNEMOSYNE_THREADS", "1")
    options = ["--tasks", "1", "--lengths", "2k", "--samples", "6", "--json"]
    said, _ = evaluate("babilong", *files, *options)
    (found,) = json.loads(said)["results"]
    assert found["samples"] == 6 and found["right"] >= 5
    assert 1980 < found["tokens"] <= 2000 and found["bytes_per_token"] > 2.5
