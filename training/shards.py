"""What a training run leaves behind: fp32 weights, Adam's averages in bf16, and one JSON file, all below 16
MB each. Knows no training loop; the served checkpoint is made from it by ``training.export``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LIMIT = 15_000_000


def _write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size + tensor.nbytes > LIMIT and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"{name}-{i}.safetensors")


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        tensors |= load_file(path)
    return tensors


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write all of it; ``facts`` is what ``run.json`` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(model.named_parameters())
    state = {name: optimizer.state[p] for name, p in named.items() if p in optimizer.state}
    for key in ("exp_avg", "exp_avg_sq"):
        _write(folder, key, {name: s[key].to(torch.bfloat16) for name, s in state.items()})
    save_weights(folder, dict(named), facts)


def save_weights(folder: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Without averages, which then begin anew where a run goes on from here."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, "weights", weights)
    (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill the model (and the optimizer) in place; what ``run.json`` holds. Raises FileNotFoundError, or
    RuntimeError where the weights are of another model."""
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    model.load_state_dict(_read(folder, "weights"))
    if optimizer is not None:
        averages = {key: _read(folder, key) for key in ("exp_avg", "exp_avg_sq")}
        for name, p in model.named_parameters():
            if name in averages["exp_avg"]:
                step = torch.tensor(float(facts["step"]))
                own = {key: tensors[name].to(p.device, torch.float32) for key, tensors in averages.items()}
                capturable = bool(optimizer.defaults["capturable"])
                optimizer.state[p] = {"step": step.to(p.device) if capturable else step, **own}
    return facts
