"""Whether the device still computes for this process. Knows no model and no request."""

from __future__ import annotations

import torch


def lost() -> bool:
    """Whether a CUDA device fails everything that this process asks of it, as after an access to an address
    that isn't its own. To be asked after an error that isn't understood; only a new process has the device
    again."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
