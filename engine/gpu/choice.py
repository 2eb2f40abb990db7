"""Which model serves a checkpoint on a device: the kernels', or the reference. Needs no triton to decide."""

from __future__ import annotations

import logging

import torch

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.schedule import cell_rows
from mnemosyne.engine.model import Titans
from mnemosyne.engine.runner import Model
from mnemosyne.kernels.triton import support

log = logging.getLogger(__name__)


def served(model: Titans) -> Model:
    """The fastest there is for a prepared model where it is: on a Hopper GPU the kernels', for what they
    take, else ``model`` itself, with one warning on a GPU."""
    if model.device.type != "cuda":
        return model
    reason = unserved(model.config, model.compute, model.device)
    if reason is None:
        from mnemosyne.engine.gpu.model import GpuTitans

        return GpuTitans(model)
    log.warning("no kernels for %s: the reference runs, many times slower", reason)
    return model


def unserved(config: ModelConfig, compute: torch.dtype, device: torch.device) -> str | None:
    """What keeps a model of ``config`` on a GPU from the kernels; None: nothing."""
    c = config
    width = c.memory_shapes[-1][1]
    shape = support.Shape(c.dim, c.head_dim, c.ffn, c.memory.depth, width, c.chunk, cell_rows(c))
    return support.unserved(c.memory.make_rule(), shape, compute, device)
