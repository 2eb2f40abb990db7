"""A device that is lost ends the engine, whose client starts another; any other error is one request's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mnemosyne.engine import device
from mnemosyne.engine.messages import INITIAL, Failed, Finished, Load
from tests.engine.fakes import FakeModel, dump, fake_engine
from tests.engine.test_engine import answer, drain, ids, read

torch.set_num_threads(1)
FAULT = RuntimeError("an illegal memory access was encountered")
REQUESTS = {
    "prefill": read("r", INITIAL, "x", ids(9)),
    "open_chunk": answer("r", INITIAL, None, ids(3), max_tokens=20),
    "decode": answer("r", INITIAL, None, ids(3), max_tokens=20),
    "begin": answer("r", INITIAL, None, ids(3), max_tokens=20),
    "load": Load(request_id="r", handle="x", data=dump(FakeModel().initial_state())),
}


def broken(*_: object) -> None:
    raise FAULT


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What a device in use does when it is waited for; the last of these."""
    calls: list[Callable[[], None]] = [lambda: None]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls[-1]())
    return calls


def raising(call: str, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    model = FakeModel()
    engine = fake_engine(model)
    if call == "load":
        monkeypatch.setattr(engine._transfers, "_load", broken)
    else:
        monkeypatch.setattr(model, call, broken)
    return engine


@pytest.mark.parametrize("call", REQUESTS)
def test_a_lost_device_ends_the_engine(
    call: str, monkeypatch: pytest.MonkeyPatch, synchronized: list[Callable[[], None]]
) -> None:
    synchronized.append(broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        drain(raising(call, monkeypatch), REQUESTS[call])


@pytest.mark.parametrize("call", REQUESTS)
@pytest.mark.usefixtures("synchronized")
def test_an_error_that_it_survives_is_the_requests(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = drain(raising(call, monkeypatch), REQUESTS[call])[-1]
    if call in ("decode", "begin"):  # what these make is made by opening the chunk, with the same tokens
        calm = drain(fake_engine(), REQUESTS[call])[-1]
        assert isinstance(end, Finished) and isinstance(calm, Finished) and end.tokens == calm.tokens
    else:
        assert isinstance(end, Failed) and end.error == "EngineError"


def test_a_device_that_was_never_used_is_not_lost() -> None:
    assert not device.lost()
