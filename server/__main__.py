"""``python -m mnemosyne.server``: the server with the settings of the environment alone."""

from __future__ import annotations

import sys

from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.server.serve import serve
from mnemosyne.server.settings import Settings

if __name__ == "__main__":
    try:
        serve(Settings.load())
    except MnemosyneError as error:
        sys.exit(f"mnemosyne: {error.message}")
