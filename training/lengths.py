"""Lengths in tokens as people write them: 16k is 16,000 and 1M a million, as BABILong's tables have it."""

from __future__ import annotations

import re

from mnemosyne.engine.errors import ConfigError

SIZES = {"M": 10**6, "k": 10**3, "": 1}


def parse_length(text: str) -> int:
    """``16k``, ``1M``, ``512``. Raises ConfigError for anything else, and for 0."""
    match = re.fullmatch(r"([1-9]\d*)(k|K|M|)", text.strip())
    if match is None:
        raise ConfigError(f"a length is a number of tokens such as 512, 16k or 1M, not {text!r}")
    return int(match[1]) * SIZES[match[2].replace("K", "k")]


def length_name(tokens: int) -> str:
    """16000 as ``16k``, 10000000 as ``10M``."""
    size, letter = next((size, letter) for letter, size in SIZES.items() if tokens % size == 0)
    return f"{tokens // size}{letter}" if tokens else "0"
