"""``mnemosyne eval``: what a checkpoint can do, measured. Owns options and output; what is measured is
training's.

The one module of the server's side that imports ``training``, and only when it runs: the other commands start
without torch.
"""

from __future__ import annotations

import contextlib
import json as json_module
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.cli.client import ApiError, Client
from mnemosyne.server.cli.own_server import own_server
from mnemosyne.server.cli.sample_reader import check_tokenizer, fingerprint, read_and_ask
from mnemosyne.server.cli.terminal import (
    Json,
    Key,
    errors,
    failures_as_one_line,
    output,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from mnemosyne.training.babilong.run import Answer, Failure, Outcome
    from mnemosyne.training.babilong.samples import Asked, Sample
    from mnemosyne.training.babilong.tasks import Task
    from mnemosyne.training.experiments.report import Result

app = typer.Typer(help="Measure what a checkpoint remembers.", no_args_is_help=True)

JOURNAL = "samples.jsonl"
"""What eval babilong keeps in its folder while it runs."""
Books = Annotated[Path, typer.Option(help="Book text: a file, or a folder of .txt and .txt.xz files.")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or one of several as cuda:1.")]


@app.command()
def babilong(
    babi: Annotated[Path, typer.Option(help="Folder with bAbI's files, qa1_....txt or .txt.xz.")],
    books: Books,
    tasks: Annotated[str, typer.Option(help="Numbers of the tasks: 1-5, or 1,2,7.")] = "1-5",
    lengths: Annotated[str, typer.Option(help="Tokens a sample: 1k,128k,1M.")] = "1k,2k,4k,8k,16k",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="A task and length; if not set 100 up to 128k, 50 up to 1M, 20 beyond."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Sessions at once.")] = 8,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            envvar="MNEMOSYNE_CHECKPOINT",
            file_okay=False,
            help="Folder of the model; the shipped one if not set. With --url its tokenizer counts.",
        ),
    ] = None,
    out: Out = Path("build/babilong"),
    url: Annotated[
        str | None,
        typer.Option(envvar="MNEMOSYNE_URL", help="A server that runs; one is started if not set."),
    ] = None,
    key: Key = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Facts of the bAbI tasks hidden in book text, asked for at its end (BABILong's construction)."""
    from mnemosyne.server.settings import shipped_checkpoint
    from mnemosyne.training.babilong import haystack, run
    from mnemosyne.training.babilong import samples as making
    from mnemosyne.training.babilong import tasks as babi_tasks
    from mnemosyne.training.books import read_books
    from mnemosyne.training.lengths import parse_length

    with failures_as_one_line():
        if url is not None and device is not None:
            raise ConfigError("--device is for the server that eval starts, and --url names one that runs")
        asked_lengths = sorted({parse_length(length) for length in lengths.split(",")})
        loaded = [babi_tasks.load_task(babi, number) for number in babi_tasks.parse_numbers(tasks)]
        checkpoint = checkpoint or shipped_checkpoint()
        tokenizer, tokenizer_hash = _tokenizer(checkpoint)
        hay = haystack.make_haystack(read_books(books), tokenizer)
        maker = making.Maker(hay, tokenizer, seed)
        counts = {length: samples or making.samples_at(length) for length in asked_lengths}
        asked = making.plan(maker, loaded, asked_lengths, counts)
        with _server(url, checkpoint, out / "server.log", device) as place, Client(place, key) as client:
            model = str(client.models()[0]["id"])
            probe = (
                f"{asked[0].question.question} {bytes(next(hay.views(0, 20)))[:4000].decode(errors='ignore')}"
            )
            check_tokenizer(client, model, probe, tokenizer.encode(probe, add_special_tokens=False).ids)
            facts = {
                "seed": seed,
                "model": model,
                "fingerprint": fingerprint(client, model),
                "tokenizer": tokenizer_hash,
                "books": hay.sha256,
                "books_tokens": hay.tokens,
                "bytes_per_token": hay.bytes_per_token,
                **{task.name: _task_facts(task) for task in loaded},
            }
            journal = run.Journal(out / JOURNAL, facts)

            def read(sample: Sample, stopping: threading.Event) -> Answer | Failure:
                began = time.monotonic()
                try:
                    text = read_and_ask(client, model, sample, stopping)
                except ApiError as error:
                    return run.Failure(f"{error.code or error.status}: {error.message}")
                return run.Answer(text, time.monotonic() - began)

            with contextlib.closing(journal), _progress(asked, len(journal.rows)) as on_done:
                outcome = run.run(asked, maker, read, journal, parallel, on_done)
        _report(journal.facts, outcome, out, json)
    if outcome.failed:
        example = next(iter(outcome.failed.values()))
        errors.print(
            f"{len(outcome.failed)} samples have no answer and count nowhere; the same command asks them "
            f"again. One of them: {example}",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(1)


@app.command(name="report")
def report_of(
    runs: Annotated[list[Path], typer.Argument(file_okay=False, help="Folders that eval babilong wrote to.")],
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the results; the first run's if not set.")
    ] = None,
    json: Json = False,
) -> None:
    """What runs of eval babilong found so far, together: runs under way, stopped, or of other tasks."""
    from mnemosyne.training.babilong import run

    with failures_as_one_line():
        facts, rows = run.together([folder / JOURNAL for folder in runs])
        _report(facts, run.Outcome(rows), out or runs[0], json)


@app.command()
def perplexity(
    books: Books,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            file_okay=False, help="Folder of a model, given once or more; the shipped one if not set."
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help="Tokens of a stream: 64k, 1M; what the books have, up to 1M, if not set."),
    ] = None,
    streams: Annotated[
        int, typer.Option(min=1, help="Stretches of the books read side by side, at most.")
    ] = 8,
    out: Out = Path("build/perplexity"),
    device: Device = None,
    json: Json = False,
) -> None:
    """Loss on books by how much was read before: memory on against memory reset at every segment."""
    from mnemosyne.server.settings import shipped_checkpoint
    from mnemosyne.training import perplexity as measured
    from mnemosyne.training.books import read_books
    from mnemosyne.training.lengths import parse_length

    results = []
    with failures_as_one_line():
        tokens = parse_length(length) if length is not None else None
        texts = read_books(books)
        folders = checkpoint or [shipped_checkpoint()]
        subjects = [measured.load_subject(folder, device or "cpu") for folder in folders]
        for subject in subjects:
            read = measured.cut(texts, subject, tokens, streams)
            segment = subject.model.config.segment
            with _bar(subject.name, (read.tokens.shape[1] - 1) // segment) as advance:
                on, reset = measured.measure(subject.model, read.tokens, advance)
            results.append(measured.entry(subject, read, measured.curve(on, reset, segment)))
        found = {"books": [book.name for book in texts], "device": device or "cpu", "results": results}
        _keep(out, "perplexity", found, measured.figure(results))
    _show(found, [measured.table(one) for one in results], [], json)


def _report(facts: Mapping[str, Any], outcome: Outcome, out: Path, json: bool) -> None:
    from mnemosyne.training.babilong import report

    found = report.summary(facts, outcome.rows, outcome.failed)
    _keep(out, "babilong", found, report.figure(found) if outcome.rows else None)
    _show(found, report.tables(found) if outcome.rows else [], report.warnings(found), json)


def _task_facts(task: Task) -> dict[str, Any]:
    return {"file": task.file, "sha256": task.sha256, "most_frequent": task.most_frequent}


def _tokenizer(checkpoint: Path) -> tuple[Any, str]:
    import hashlib

    from tokenizers import Tokenizer

    path = checkpoint / "tokenizer.json"
    try:
        data = path.read_bytes()
        return Tokenizer.from_str(data.decode("utf-8")), hashlib.sha256(data).hexdigest()
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"can't read the tokenizer {path}: {error}") from error


@contextlib.contextmanager
def _server(url: str | None, checkpoint: Path, log: Path, device: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with own_server(checkpoint, log, device) as started:
        yield started


@contextlib.contextmanager
def _progress(asked: Sequence[Asked], kept: int) -> Iterator[Any]:
    """What to call with every finished sample."""
    tokens = sum(one.length for one in asked)
    errors.print(
        f"{len(asked)} samples, {tokens:,} tokens in all; {kept} answered in earlier runs", highlight=False
    )
    with _bar("samples", len(asked)) as advance:
        yield lambda _: advance()


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """What to call with each of ``total`` steps."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _keep(out: Path, name: str, found: Mapping[str, Any], figure: Result | None) -> None:
    """``NAME.json`` and, where matplotlib is there, ``NAME.svg``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json_module.dumps(found, indent=1) + "\n", encoding="utf-8")
    errors.print(f"results are in {out}", markup=False, highlight=False)
    if figure is None:
        return
    try:
        from mnemosyne.training.experiments import figures
    except ImportError:
        errors.print(
            "no plot: matplotlib isn't installed (pip install 'mnemosyne[experiments]')", markup=False
        )
        return
    figures.draw(figure, out)


def _show(found: Mapping[str, Any], tables: Sequence[Any], notes: Sequence[str], json: bool) -> None:
    for note in notes:
        errors.print(f"note: {note}", markup=False, highlight=False)
    if json:
        print_json(found)
        return
    for given in tables:
        print_table(given.columns, given.rows, given.title, numbers=given.columns)
        output.print()
