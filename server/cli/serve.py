"""``mnemosyne serve``: the server in this process, configured by flags over environment over file.

The application is imported only when it runs: the other commands are clients and start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemosyne.server.cli.terminal import failures_as_one_line


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not set.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 8000 if not set.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the model; the shipped one if not set.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder for sessions; ~/.local/state/mnemosyne if not set.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="Keep sessions in this Redis instead.")] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="JSON file of API key hashes and their tenants.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:0,cuda:1 or cuda:all; cpu if not set.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each engine.")] = None,
    device_state_bytes: Annotated[int | None, typer.Option(min=1, help="States on each GPU.")] = None,
    host_state_bytes: Annotated[
        int | None, typer.Option(min=0, help="States of each GPU in pinned host memory.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="critical, error, warning, info or debug.")] = None,
    config_file: Annotated[Path | None, typer.Option(help="TOML file with any setting.")] = None,
) -> None:
    """Start the server; docs/environment.md lists every setting."""
    with failures_as_one_line():
        from mnemosyne.server.settings import Settings

        settings = Settings.load(
            host=host,
            port=port,
            checkpoint=checkpoint,
            data_dir=data_dir,
            redis_url=redis_url,
            keys_file=keys_file,
            device=device,
            threads=threads,
            device_state_bytes=device_state_bytes,
            host_state_bytes=host_state_bytes,
            log_level=log_level,
            config_file=config_file,
        )

        from mnemosyne.server.serve import serve as serve_until_signal

        serve_until_signal(settings)
