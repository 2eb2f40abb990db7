"""The server's settings. Owns their names, defaults and checks; knows no route, engine or store.

A flag beats the environment (``MNEMOSYNE_<NAME>``), and the environment beats the file named by
``config_file``. ``docs/environment.md`` has one line for each; a test compares.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.scheduler import Limits

ENV_PREFIX = "MNEMOSYNE_"
SHIPPED_CHECKPOINT = "mnemosyne-1"
_DEVICES = re.compile(r"cpu(,cpu)*|cuda(:\d+)?(,cuda:\d+)*|cuda:all")


def shipped_checkpoint() -> Path:
    """The checkpoint that comes with the package."""
    import mnemosyne.checkpoints

    return Path(next(iter(mnemosyne.checkpoints.__path__))) / SHIPPED_CHECKPOINT


def user_state_folder() -> Path:
    """Where this user's programs keep state that outlives them (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base) if base else Path.home() / ".local" / "state"


class Settings(BaseSettings):
    """Every setting of the server; make it with ``Settings.load``."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    config_file: Path | None = Field(None, description="A TOML file with any of these settings.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    checkpoint: Path = Field(default_factory=shipped_checkpoint, description="Folder of the model to serve.")
    model_name: str | None = Field(
        None, description="Name the model is served under; the folder's name if not set."
    )
    data_dir: Path = Field(
        default_factory=lambda: user_state_folder() / "mnemosyne",
        description="Folder for sessions, used unless a Redis is set.",
    )
    redis_url: str | None = Field(None, description="Keep sessions in this Redis, shared by several servers.")
    keys_file: Path | None = Field(
        None,
        description="JSON file: SHA-256 of an API key (hex) to its tenant. Without one, no key is asked for.",
    )
    device: str = Field(
        "cpu",
        description="Where engines compute, one for each device: cpu, cuda, cuda:0,cuda:1 or cuda:all.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the dense products; auto measures for a moment at start."
    )
    threads: int | None = Field(
        None, ge=1, description="Threads of each engine; what the machine has if not set."
    )
    max_request_bytes: int = Field(16 * 2**20, ge=1, description="Largest JSON body.")
    max_upload_bytes: int = Field(2**30, ge=1, description="Largest body of an upload or an imported state.")
    max_document_bytes: int = Field(4 * 2**30, ge=1, description="Largest document, over all its uploads.")
    max_request_tokens: int = Field(
        131_072, ge=1, description="Most tokens that one request may bring and ask for, together."
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=1,
        description="Queued tokens of a device above which work is refused; what suits it if not set.",
    )
    device_state_bytes: int | None = Field(
        None, ge=1, description="States on each GPU; three quarters of what the model leaves if not set."
    )
    host_state_bytes: int | None = Field(
        None,
        ge=0,
        description="States of each GPU in pinned host memory; half of the free memory for all if not set.",
    )
    default_max_tokens: int = Field(256, ge=1, description="Length limit of a chat answer that names none.")
    sse_ping_interval: float = Field(
        10.0, description="Seconds of silence in a stream before a blank line is sent; 0 or less sends none."
    )
    drain_seconds: float = Field(20.0, ge=0, description="How long running requests may go on after SIGTERM.")
    quota_sessions: int | None = Field(None, ge=1, description="Most sessions of one tenant.")
    quota_stored_bytes: int | None = Field(None, ge=1, description="Most stored bytes of one tenant.")
    quota_tokens_per_minute: int | None = Field(None, ge=1, description="Most tokens a minute of one tenant.")
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="Least important log lines that are written."
    )

    @field_validator("checkpoint", "data_dir", "keys_file", "config_file")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value is not None else None

    @field_validator("device")
    @classmethod
    def _one_kind(cls, value: str) -> str:
        if not _DEVICES.fullmatch(value):
            raise ValueError(f"{value!r} is none; cpu, cuda, several as cuda:0,cuda:1, or cuda:all are")
        return value

    @model_validator(mode="after")
    def _fit(self) -> Settings:
        limits = Limits.for_device(
            "cuda" if self.device.startswith("cuda") else "cpu", self.max_queued_tokens
        )
        if self.max_request_tokens > limits.max_queued_tokens:
            raise ValueError("max_request_tokens can't be more than max_queued_tokens")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        flags = getattr(init_settings, "init_kwargs", {})
        path = flags.get("config_file") or os.environ.get(f"{ENV_PREFIX}CONFIG_FILE")
        if path is None:
            return init_settings, env_settings
        if not Path(path).expanduser().is_file():
            raise ConfigError(f"the settings file {path} doesn't exist")
        return (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, toml_file=Path(path).expanduser()),
        )

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """Settings from flags (None: not given), environment and file. Raises ConfigError naming what is
        wrong."""
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise ConfigError(f"settings: {'; '.join(map(_wrong, error.errors()))}") from error
        except ValueError as error:
            raise ConfigError(f"settings: {error}") from error

    @property
    def served_model(self) -> str:
        """The name that requests give as ``model``."""
        return self.model_name or self.checkpoint.name


def _wrong(error: ErrorDetails) -> str:
    """Which setting, where it is one, and why: pydantic puts words of its own before a validator's."""
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return ": ".join(filter(None, (".".join(map(str, error["loc"])), reason)))
