"""What the sessions of training rows have read before: background, for up to millions of tokens.

A row is short, but the memory that it begins with is that of a session which goes on reading background from
step to step, until it restarts. So the gates and reads of a memory full of whatever was stored by mistake are
trained, which a fresh one never shows them. Owns those states; knows no loss and no text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnemosyne.engine.memory import State
from mnemosyne.engine.model import Titans

KEPT = ("memory.", "momentum.")
"""Of a state, what the past of a row is; what attention and convolutions see begins with the row."""


class History:
    def __init__(self, model: Titans, rows: int) -> None:
        self._model, self._rows = model, rows
        with torch.no_grad():
            self._layers = [
                {name: tensor.clone() for name, tensor in layer.items() if name.startswith(KEPT)}
                for layer in model.initial_layers(rows)
            ]

    def read(self, tokens: Tensor, restarts: Tensor) -> None:
        """The sessions read ``tokens`` `[B, n chunk]`, those that restart as their first.

        No gradient is taken, but with gradients off the kernels of a GPU would be those that serve, which
        are made for other sizes."""
        after = self._model(tokens, self.layers(restarts)).layers
        for kept, layer in zip(self._layers, after, strict=True):
            for name, tensor in kept.items():
                tensor.copy_(layer[name].detach())

    def layers(self, begins: Tensor) -> list[State]:
        """What rows begin with: the sessions' states, or fresh ones where ``begins`` `[B]`, and where a
        state isn't finite any more: it would take every gradient with it until its session restarts."""
        kept = [tensor for layer in self._layers for tensor in layer.values()]
        finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in kept]).all(0)
        own = (begins | ~finite).view(-1, 1, 1, 1)
        made = self._model.initial_layers(self._rows)
        for read, layer in zip(self._layers, made, strict=True):
            for name, tensor in read.items():
                layer[name] = torch.where(own, layer[name], tensor)
                if f"segment_{name}" in layer:
                    layer[f"segment_{name}"] = layer[name]
        return made
