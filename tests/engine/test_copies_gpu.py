"""Copies between a CUDA device and pinned memory: the bits, beside a busy device, and a whole engine's."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.engine.config import Variant
from mnemosyne.engine.copies import CudaCopier
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.gpu.blob import BlobLayout
from mnemosyne.engine.holdings import tensor_bytes
from mnemosyne.engine.messages import Export, Exported
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.tiers import Budgets
from tests.engine.fakes import INFO
from tests.engine.gpu.test_waves import usual
from tests.engine.models import random_tokens
from tests.engine.test_engine import INITIAL, answer, drain, read, stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_out_and_back_while_the_device_is_busy() -> None:
    device = torch.device("cuda")
    copier = CudaCopier(device)
    layout = BlobLayout({"a": ((4, 1 << 22), torch.float32), "b": ((4, 1 << 20), torch.bfloat16)})
    work = torch.randn(4096, 4096, device=device)
    for round_ in range(4):
        blob = layout.empty(device)
        for _ in range(20):
            work = torch.tanh(work @ work)  # the source is made behind this, and the copy waits for it
        blob.copy_(torch.arange(layout.nbytes, device=device) % (251 - round_))
        out = copier.out(layout.views(blob))
        out.wait()
        host = layout.blob_of(out.tensors)
        assert host is not None and host.is_pinned() and out.ended() and out.seconds > 0
        wanted = (torch.arange(layout.nbytes) % (251 - round_)).to(torch.uint8)
        assert torch.equal(host, wanted)
        del blob
        back = copier.back(out.tensors)
        back.wait()
        there = layout.blob_of(back.tensors)
        assert there is not None and there.device.type == "cuda" and torch.equal(there.cpu(), wanted)


def test_a_copy_does_not_wait_for_what_is_computed_after_it() -> None:
    device = torch.device("cuda")
    copier = CudaCopier(device)
    tensors = {"a": torch.zeros(4, 1 << 22, device=device)}
    copier.out(tensors).wait()  # the memory is pinned now
    work = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    copy = copier.out(tensors)
    for _ in range(30):
        work = torch.tanh(work @ work)
    busy = torch.cuda.Event()
    busy.record()
    copy.wait()
    assert not busy.query(), "the computation was over first"


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_an_engine_with_two_tiers_ends_in_the_same_bits(variant: Variant) -> None:
    """The model that is served on a GPU: the modules' products there depend on where a tensor begins."""
    model = usual(variant)
    dump = partial(dump_state, model_fingerprint="m", numerics={})

    def load(data: bytes):  # type: ignore[no-untyped-def]
        return load_state(
            data, config=model.config, dtype=torch.bfloat16, model_fingerprint="m", device="cuda"
        )[0]

    nbytes = tensor_bytes(model.initial_state().tensors)
    found = []
    for budgets in (None, Budgets(device=4 * nbytes, host=60 * nbytes)):
        engine = Engine(model, INFO, Limits(max_ingest_tokens=128), dump, load, budgets)
        for i in range(6):
            drain(engine, read(f"r{i}", INITIAL, f"a{i}", random_tokens(260, i, 127)))
        for i in range(6):
            drain(engine, answer(f"g{i}", f"a{i}", f"b{i}", random_tokens(50, 9, 127), max_tokens=20, seed=i))
        found.append([drain(engine, Export(request_id="e", handle=f"b{i}"))[-1] for i in range(6)])
        assert (stats(engine)["states_moved_in_total"] > 3) == (budgets is not None)
    assert all(isinstance(event, Exported) for event in found[0]) and found[0] == found[1]
