"""The commands against a real server: what a person types, and what a script reads from ``--json``."""

from __future__ import annotations

import io
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

from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.cli.main import app
from mnemosyne.server.cli.surprise import _texts
from mnemosyne.server.cli.terminal import print_table
from mnemosyne.server.settings import Settings
from tests.server.http.running import RunningServer
from tests.server.http.scripted import write_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("cli")
    running = RunningServer(write_checkpoint(folder / "scripted"), folder / "data")
    yield running
    running.stop()


def mnemosyne(server: RunningServer, *arguments: str, status: int = 0, columns: int = 160) -> str:
    command = [sys.executable, "-c", "from mnemosyne.server.cli.main import app; app()", *arguments]
    environment = os.environ | {"MNEMOSYNE_URL": server.url, "COLUMNS": str(columns), "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def read_json(server: RunningServer, *arguments: str) -> Any:
    return json.loads(mnemosyne(server, *arguments, "--json"))


def test_models(server: RunningServer) -> None:
    assert [model["id"] for model in read_json(server, "models")] == ["scripted"]
    assert str(server.settings.checkpoint) in mnemosyne(server, "models", columns=40)


def test_ingest_ask_export_import(server: RunningServer, tmp_path: Path) -> None:
    book, notes = tmp_path / "book.txt", tmp_path / "notes.txt"
    book.write_text("a long story " * 50, encoding="utf-8")
    notes.write_text("é", encoding="utf-8")
    read = read_json(server, "ingest", str(book), str(notes))
    session = read["session"]["id"]
    assert [document["status"] for document in read["documents"]] == ["absorbed", "absorbed"]
    assert read["session"]["tokens_seen"] == 50 * 13 + 2

    answer = read_json(server, "ask", "Which colour?", "--session", session)
    assert answer["answer"].strip() == "blue"
    assert answer["finish_reason"] == "stop"
    assert answer["session"]["version"] == read["session"]["version"]
    assert mnemosyne(server, "ask", "Which colour?", "--session", session).strip() == "blue"
    assert (
        read_json(server, "ask", "?", "-s", session, "--learn")["session"]["version"]
        > read["session"]["version"]
    )

    exported = tmp_path / "state.bin"
    size = read_json(server, "export", str(exported), "--session", session)["bytes"]
    assert exported.stat().st_size == size
    listed = next(s for s in read_json(server, "sessions") if s["id"] == session)
    copy = read_json(server, "import", str(exported))
    assert copy["id"] != session
    assert copy["tokens_seen"] == listed["tokens_seen"]
    row = next(
        line for line in mnemosyne(server, "sessions", columns=40).splitlines() if line.startswith(session)
    )
    assert row.split()[:4] == [
        session,
        "scripted",
        str(listed["version"]),
        f"{listed['tokens_seen']:,}",
    ]


def test_surprise(server: RunningServer, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    # A byte's surprise is its number here: the run of z is what stands out.
    book.write_text("a" * 80 + "z" * 16 + "a" * 48, encoding="utf-8")
    session = read_json(server, "ingest", str(book))["session"]["id"]
    assert mnemosyne(server, "surprise", session, "--from", "144").startswith("nothing is known")
    found = read_json(server, "surprise", session, "--to", "100")
    assert [point["surprise"] for point in found["points"]] == [97.0] * 10 + [122.0] * 2 + [97.0]
    said = mnemosyne(server, "surprise", session)
    assert "tokens 0 to 136: 97 to 122" in said
    assert "▁" * 10 + "██" + "▁" * 5 in said
    assert "122" in said and "what surprised most" in said
    assert re.search(r"^ *80 +88 +122 +122 +122 +122 +z{8}$", said, re.M), "with its text"
    long = mnemosyne(server, "surprise", session, "--resolution", "128")
    assert re.search(r" a{59}…$", long, re.M), "the beginning of a long one"
    with Client(server.url) as client:
        bare = client.create_session(retain_input=False)["id"]
    mnemosyne(server, "ingest", str(book), "--session", bare)
    without = mnemosyne(server, "surprise", bare)
    assert "what surprised most" in without and "zzz" not in without
    most = mnemosyne(server, "surprise", session, "--from", "78", "--to", "82", "--resolution", "2")
    assert re.search(r"^ *80 +82 .* zz *$", most, re.M)
    tokens = read_json(server, "surprise", session, "--from", "78", "--to", "82", "--resolution", "1")
    assert [point["surprise"] for point in tokens["points"]] == [97.0, 97.0, 122.0, 122.0]
    assert "resolution" in mnemosyne(server, "surprise", session, "--resolution", "0", status=1)


def test_an_upload_goes_on_where_the_server_says(server: RunningServer) -> None:
    data = bytes(range(97, 123)) * 40
    with Client(server.url) as client:
        session = client.create_session()["id"]
        document = client.create_document(session, "letters", len(data))["id"]
        path = f"/v1/sessions/{session}/documents/{document}"
        client.call("PATCH", path, content=data[:300], headers={"Upload-Offset": "0"})
        offsets: list[int] = []
        client.upload(session, document, io.BytesIO(data), len(data), offsets.append, piece_bytes=400)
        assert offsets == [300, 700, 1040]
        assert server.finished(session, document)["tokens_absorbed"] == len(data)


def test_an_error_of_the_server_keeps_its_code(server: RunningServer, tmp_path: Path) -> None:
    unknown = "sess_" + "0" * 32
    with Client(server.url) as client, pytest.raises(ApiError) as caught:
        client.session(unknown)
    assert caught.value.status == 404
    assert "Traceback" not in mnemosyne(server, "ask", "?", "--session", unknown, status=1)
    target = tmp_path / "state.bin"
    mnemosyne(server, "export", str(target), "--session", unknown, status=1)
    assert list(tmp_path.iterdir()) == []


def test_a_document_that_is_not_text_is_an_error(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "picture.bin"
    file.write_bytes(b"good so far \xff\xfe")
    good = tmp_path / "text.txt"
    good.write_text("A text that can be read.")
    with Client(server.url) as client:
        before = len(list(client.sessions()))
        said = mnemosyne(server, "ingest", str(file), status=1)
        assert "12" in said and "read nothing and is deleted" in said
        assert len(list(client.sessions())) == before
        said = mnemosyne(server, "ingest", str(good), str(file), status=1)
        assert "12" in said and "deleted" not in said
        assert len(list(client.sessions())) == before + 1


def test_a_flag_of_serve_is_the_setting_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("mnemosyne.server.serve.serve", served.append)
    flags = {
        "host": "10.0.0.1",
        "port": 1234,
        "device": "cuda:0",
        "threads": 3,
        "device_state_bytes": 4096,
        "host_state_bytes": 0,
        "log_level": "error",
    }
    arguments = [
        part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    assert {name: getattr(served[0], name) for name in flags} == flags


def test_text_in_a_table_is_harmless_and_what_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Answers:
        def surprise(self, session: str, **params: Any) -> dict[str, Any]:
            assert params["text"] == "true"
            if params["from"] == 64:
                raise ApiError(429, "quota_exceeded", "too many tokens")
            return {"points": [{"from": 128 if params["from"] == 128 else 0, "text": "x" * 100}]}

    points = [{"from": 0, "to": 64, "text": "a\x1b[2Jb :smile: \\"}]
    points += [{"from": at, "to": at + 64} for at in (64, 128, 192)]
    texts = _texts(Answers(), "s", points)  # type: ignore[arg-type]
    assert texts == {0: "a [2Jb :smile: \\", 64: "", 128: "x" * 59 + "…", 192: ""}
    assert "note: without text: too many tokens" in capsys.readouterr().err
    print_table(["text"], [[texts[0]]], "a [title]")
    out = capsys.readouterr().out
    assert "a [2Jb :smile: \\" in out and "a [title]" in out
