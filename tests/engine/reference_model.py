"""The whole model token by token in float64, written from spec/memory.md and not from the engine: what its
chunk form is held to. Takes the engine's weights and none of its code; of the kernels only the per-token
reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mnemosyne.engine.model import Titans
from mnemosyne.kernels.gates import Gates
from mnemosyne.kernels.reference import memory_network
from mnemosyne.kernels.reference import reference as token_by_token


def rms(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.epsilon) * norm.weight


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        c, s = math.cos(angle), math.sin(angle)
        a, b = x[..., i], x[..., half + i]
        out[..., i], out[..., half + i] = a * c - b * s, b * c + a * s
    return out


def convolve(streams: Tensor, weight: Tensor) -> Tensor:
    """Token t sees itself and the rows before it, then SiLU."""
    width, rows = weight.shape[0], []
    for t in range(len(streams)):
        row = sum(weight[width - 1 - i] * streams[t - i] for i in range(width) if t - i >= 0)
        rows.append(row * torch.sigmoid(row))
    return torch.stack(rows)


class LayerReference:
    """One layer's mixer over a whole sequence ``u`` `[T, dim]`; leaves the last memory in ``M`` and ``S``."""

    def __init__(self, model: Titans, layer: int) -> None:
        self.c = model.config
        self.mixer = model.blocks[layer].mixer
        self.memory = self.mixer.memory
        self.M = [list(p.unbind(0)) for p in self.memory.initial]
        self.rule = self.c.memory.make_rule()
        self.surprise: list[Tensor] = []
        """Surprise and momentary surprise of the tokens of one ``learn`` after the other, `[H, 2, T]`."""
        self.S = [[torch.zeros_like(w) for w in ws] for ws in self.M if self.rule.algorithm.momentum]

    def heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.c.heads, self.c.head_dim).transpose(0, 1)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(x.shape[1], self.c.dim)

    def gates(self, u: Tensor) -> list[Gates]:
        """Of each head, `[D, T]`; the threshold `[T]`."""
        m, H = self.c.memory, self.c.heads
        z = (u @ self.memory.gate_weight.T + self.memory.gate_bias).T
        tops = {"theta": m.theta_max, "eta": m.eta_max, "alpha": m.alpha_max}
        made = {}
        for name, top in tops.items():
            if top is not None:
                part, z = z[: H * m.depth].view(H, m.depth, -1), z[H * m.depth :]
                s = torch.clamp(torch.sigmoid(part) - m.gate_epsilon, min=0) / (1 - m.gate_epsilon)
                made[name] = s * top
        if self.c.memory.rule == "yaad":
            made["threshold"], z = torch.log(1 + torch.exp(z[:H])), z[H:]
        assert len(z) == 0, "every gate that is computed has a meaning"
        return [Gates(**{name: gate[h] for name, gate in made.items()}) for h in range(H)]

    def learn(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Convolved streams `[T, dim]` whose first token starts a chunk; reads `[H, T, head_dim]`."""
        gates, reads, surprises = self.gates(u), [], []
        for h in range(self.c.heads):
            y, M, S, norms = token_by_token(
                unit(self.heads(q)[h]),
                unit(self.heads(k)[h]),
                self.heads(v)[h],
                gates[h],
                [w[h] for w in self.M],
                [s[h] for s in self.S],
                self.rule,
                chunk=self.c.chunk,
            )
            for kept, now in ((self.M, M), (self.S, S)):
                for i, matrix in enumerate(now):
                    kept[i][h] = matrix
            reads.append(y)
            square = norms.square()
            momentary = (gates[h].theta.square() * square).sum(0).sqrt()
            surprises.append(torch.stack([square.sum(0).sqrt(), momentary]))
        self.surprise.append(torch.stack(surprises))
        return torch.stack(reads)

    def emit(self, y: Tensor, u: Tensor) -> Tensor:
        merged = self.merge(rms(y, self.memory.norm))
        gated = torch.sigmoid(u @ self.memory.output_gate.weight.T) * merged
        return gated @ self.memory.output.weight.T

    def memorize(self, u: Tensor) -> Tensor:
        q, k, v = convolve(u @ self.memory.project.weight.T, self.memory.conv).chunk(3, -1)
        return self.emit(self.learn(q, k, v, u), u)

    def attend(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """One token's query `[H, d]` over lists of keys and values `[H, d]`, the persistent ones added."""
        d = self.c.dim
        p = self.mixer.attention.persistent @ self.mixer.attention.project.weight[d:].T
        pk, pv = (self.heads(x).unbind(1) for x in p.chunk(2, -1))
        K, V = torch.stack([*pk, *keys], 1), torch.stack([*pv, *values], 1)
        weights = torch.softmax((K @ queries.unsqueeze(-1)).squeeze(-1) / math.sqrt(self.c.head_dim), -1)
        return (weights.unsqueeze(-1) * V).sum(1).reshape(d) @ self.mixer.attention.output.weight.T

    def window(self, u: Tensor) -> Tensor:
        q, k, v = (u @ self.mixer.attention.project.weight.T).chunk(3, -1)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        out = []
        for t in range(len(u)):
            seen = range(max(0, t - self.c.window + 1), t + 1)
            keys = [rope(k[:, j], j, self.c.rope_theta) for j in seen]
            out.append(self.attend(rope(q[:, t], t, self.c.rope_theta), keys, [v[:, j] for j in seen]))
        return torch.stack(out)

    def gate(self, y: Tensor, m: Tensor) -> Tensor:
        y, m = rms(y, self.mixer.norm_attention), rms(m, self.mixer.norm_memory)
        return y * torch.sigmoid(m) + (0 if self.c.gate == "paper" else m)

    def context(self, u: Tensor) -> Tensor:
        """MAC, segment by segment; y's convolutions look back over the whole sequence."""
        c, memory, attention = self.c, self.memory, self.mixer.attention
        q_all = convolve(u @ memory.query.weight.T, memory.conv[:, : c.dim])
        ys, outputs = [], []
        for first in range(0, len(u), c.segment):
            frozen = [list(ws) for ws in self.M]
            keys, values = [], []
            part = range(first, min(first + c.segment, len(u)))
            for t in part:
                place = t - first
                h = []
                for head, query in enumerate(self.heads(unit(q_all[t].view(c.heads, -1)).view(1, -1))):
                    weights = self.rule.weights([w[head] for w in frozen])
                    read = memory_network(weights, query, self.rule.architecture)
                    h.append(rms(read, memory.norm))
                h_row = torch.cat(h, -1)[0]
                q, k, v = (
                    self.heads(x.unsqueeze(0))[:, 0] for x in (u[t] @ attention.project.weight.T).chunk(3)
                )
                hk, hv = (
                    self.heads(x.unsqueeze(0))[:, 0]
                    for x in (h_row @ attention.project.weight[c.dim :].T).chunk(2)
                )
                keys += [rope(hk, place, c.rope_theta), rope(k, place, c.rope_theta)]
                values += [hv, v]
                ys.append(self.attend(rope(q, place, c.rope_theta), keys, values))
            y = torch.stack(ys)
            k, q, v = convolve(y @ memory.project.weight.T, memory.conv[:, c.dim :]).chunk(3, -1)
            here = slice(first, part.stop)
            m = self.emit(self.learn(q[here], k[here], v[here], y[here]), y[here])
            outputs.append(self.gate(y[here], m))
        return torch.cat(outputs)

    def __call__(self, u: Tensor) -> Tensor:
        if self.c.variant == "lmm":
            return self.memorize(u)
        if self.c.variant == "mal":
            return self.window(rms(self.memorize(u), self.mixer.between))
        if self.c.variant == "mag":
            return self.gate(self.window(u), self.memorize(u))
        return self.context(u)


def reference(model: Titans, tokens: list[int]) -> tuple[Tensor, list[LayerReference]]:
    """Logits `[T, vocab]` after every token, and each layer with the memory it ended with."""
    x = model.embedding[torch.tensor(tokens)]
    layers = []
    for i, block in enumerate(model.blocks):
        layer = LayerReference(model, i)
        x = x + layer(rms(x, block.norm_mixer))
        value, gate = (rms(x, block.norm_ffn) @ block.ffn.up.weight.T).chunk(2, -1)
        x = x + (value * gate * torch.sigmoid(gate)) @ block.ffn.down.weight.T
        layers.append(layer)
    return rms(x, model.norm) @ model.embedding.T, layers
