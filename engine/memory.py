"""The neural memory of one layer as a module: projections, gates, and the calls into the kernels.

Owns the parameters of the memory (M_0 among them). Knows no attention and no block, and of the state only
its own tensors: ``memory.i``, ``momentum.i``, ``tails``. Source: Titans 3.1 and 4.4, spec/memory.md 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.layers import Dense, RMSNorm, dense
from mnemosyne.kernels import chunk as chunk_form
from mnemosyne.kernels import decode, elementwise, network
from mnemosyne.kernels.gates import Decays, decays, gate
from mnemosyne.kernels.positions import causal_conv

State = dict[str, Tensor]
"""One layer's tensors of the session state, sessions first; replaced entry by entry as the layer advances."""

NORM_EPSILON = 1e-6


class Learned(NamedTuple):
    """What a stretch of whole chunks did, for traces, for training and for opening a chunk."""

    gates: Tensor
    """theta, eta, alpha `[3, B, H, D, n, L]`."""
    decay: Decays
    scan: chunk_form.Scan


class NeuralMemory(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, H, depth = config.dim, config.heads, config.memory.depth
        separate_query = config.variant == "mac"
        self.query = Dense(d, d) if separate_query else None
        self.project = Dense(d, 3 * d)
        self.conv = nn.Parameter(torch.zeros(config.conv, (4 if separate_query else 3) * d))
        self.gate_weight = nn.Parameter(torch.randn(3 * H * depth, d) * 0.1 / d**0.5)
        self.gate_bias = nn.Parameter(self._initial_bias())
        self.initial = nn.ParameterList(
            [nn.Parameter(torch.randn(H, out, inn) / inn**0.5) for out, inn in config.memory_shapes]
        )
        self.norm = RMSNorm(config.head_dim, config.norm_epsilon)
        self.output_gate = Dense(d, d)
        self.output = Dense(d, d)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Start where recall almost works: keys and queries alike, each of the last few tokens, values of the
        token itself. From independent projections the way to a first match is long."""
        d = self.config.dim
        keys = self.project.weight[:d] if self.query else self.project.weight[d : 2 * d]
        queries = (
            [self.project.weight[d : 2 * d], self.query.weight] if self.query else [self.project.weight[:d]]
        )
        for query in queries:
            query.copy_(keys)
        # Streams are q, k, v; for MAC q, k, q', v: the value is the last.
        self.conv[:, :-d] = self.config.conv**-0.5
        self.conv[-1, -d:] = 1.0
        if self.config.memory.depth > 1:
            # Keys have unit norm, so a plain fan-in scale leaves the hidden layer nearly silent and a token
            # could hardly be written in one step; and a memory that has read nothing should say little.
            self.initial[0] *= 2.0
            self.initial[-1] *= 0.1

    def _initial_bias(self) -> Tensor:
        """Biases at which sum over a chunk of theta / (1 - eta) is 0.35, eta 0.3 and alpha 1e-3 (spec 2)."""
        m = self.config.memory
        cells = self.config.heads * m.depth

        def inverse(value: float, maximum: float) -> Tensor:
            share = min(max(value / maximum, 1e-5), 0.99) if maximum > 0 else 0.5
            return torch.logit(torch.tensor(share * (1 - m.gate_epsilon) + m.gate_epsilon)).repeat(cells)

        theta = 0.35 * (1 - 0.3) / self.config.chunk
        return torch.cat([inverse(theta, m.theta_max), inverse(0.3, m.eta_max), inverse(1e-3, m.alpha_max)])

    @property
    def rule(self) -> dict[str, bool]:
        return {"residual": self.config.memory.residual, "norm": self.config.memory.norm}

    def features(
        self, streams: Tensor, weight: Tensor, tail: Tensor, keys: int
    ) -> tuple[list[Tensor], Tensor]:
        """Convolve projected streams `[B, T, S d]` after their tail; S tensors `[B, H, T, head_dim]`, and the
        rows `[B, K - 1 + T, S d]` that a later tail is cut from. The first ``keys`` tensors are queries or
        keys, of unit norm; what follows is a value."""
        c = self.config
        rows = torch.cat([tail.to(streams.dtype), streams], 1)
        mixed = elementwise.silu(causal_conv(rows.to(weight.dtype), weight))
        B, T, _ = mixed.shape
        split = mixed.view(B, T, -1, c.heads, c.head_dim).permute(2, 0, 3, 1, 4).contiguous()
        parts = list(split.unbind(0))
        return [network.unit(x) for x in parts[:keys]] + parts[keys:], rows

    def gates(self, u: Tensor) -> Tensor:
        """theta, eta, alpha of tokens ``u`` `[B, T, dim]` in fp32: `[3, B, H, D, T]`."""
        c, m = self.config, self.config.memory
        B, T, _ = u.shape
        # 64 outputs: fewer change their bits with the number of rows on a CPU (docs/architecture.md).
        weight = F.pad(self.gate_weight, (0, 0, 0, -len(self.gate_weight) % 64))
        z = dense(u.to(weight.dtype), weight)[..., : len(self.gate_weight)] + self.gate_bias
        z = z.view(B, T, 3, c.heads, m.depth).permute(2, 0, 3, 4, 1).contiguous()
        return torch.stack(
            [gate(z[i], top, m.gate_epsilon) for i, top in enumerate((m.theta_max, m.eta_max, m.alpha_max))]
        )

    def weights(self, state: State, name: str = "memory") -> list[Tensor]:
        return [state[f"{name}.{i}"] for i in range(self.config.memory.depth)]

    def learn(self, k: Tensor, v: Tensor, u: Tensor, state: State) -> Learned:
        """Store whole chunks, k and v `[B, H, T, head_dim]`; replaces memory and momentum in ``state``."""
        B, H, T, d = k.shape
        n, L = T // self.config.chunk, self.config.chunk
        gates = self.gates(u).view(3, B, H, self.config.memory.depth, n, L)
        decay = decays(*gates)
        scanned = chunk_form.scan(
            k.view(B, H, n, L, d),
            v.view(B, H, n, L, d),
            decay,
            self.weights(state),
            self.weights(state, "momentum"),
            clip=self.config.memory.clip,
            **self.rule,
        )
        for i in range(self.config.memory.depth):
            state[f"memory.{i}"], state[f"momentum.{i}"] = scanned.memory[i], scanned.momentum[i]
        return Learned(gates, decay, scanned)

    def read(self, q: Tensor, learned: Learned) -> Tensor:
        """M_t(q_t) for the tokens just stored; `[B, H, T, head_dim]`."""
        B, H, T, d = q.shape
        chunks = q.view(B, H, -1, self.config.chunk, d)
        return chunk_form.read(chunks, learned.decay, learned.scan, **self.rule).view(B, H, T, d)

    def recall(self, q: Tensor, state: State) -> Tensor:
        """MAC: M*(q) `[B, H, T, head_dim]`, the memory as at the segment's start, normed per head."""
        B, H, T, d = q.shape
        weights = [w.reshape(B * H, *w.shape[2:]) for w in self.weights(state, "segment_memory")]
        return self.norm(network.retrieve(weights, q.reshape(B * H, T, d), **self.rule).view(B, H, T, d))

    def emit(self, y: Tensor, u: Tensor) -> Tensor:
        """What was read `[B, H, T, head_dim]` to the output `[B, T, dim]`: per-head norm, gate, product."""
        B, H, T, d = y.shape
        merged = self.norm(y).transpose(1, 2).reshape(B, T, H * d)
        return self.output(elementwise.sigmoid(self.output_gate(u)).to(merged.dtype) * merged)

    def sequence(self, u: Tensor, state: State) -> tuple[Tensor, Learned, Tensor]:
        """MAG, MAL, LMM: read and store whole chunks ``u`` `[B, T, dim]`; output, what was learned, rows."""
        (q, k, v), rows = self.features(self.project(u), self.conv, state["tails"], keys=2)
        state["tails"] = rows[:, -(self.config.conv - 1) :]
        learned = self.learn(k, v, u, state)
        return self.emit(self.read(q, learned), u), learned, rows

    def open(self, learned: Learned | None, rows: Tensor, length: Tensor, state: State) -> State:
        """The decode cache after the first ``length[b]`` tokens of a chunk; ``learned`` None: of no token at
        all.

        ``rows`` are the conv rows of the chunk, ``state`` the committed tensors at its start (kept).
        """
        B, K = length.shape[0], self.config.conv
        cache = {name: state[name] for name in state if name.split(".")[0] in ("memory", "momentum")}
        taken = length[:, None] + torch.arange(K - 1, device=length.device)
        cache["tails"] = rows.gather(1, taken[..., None].expand(B, K - 1, rows.shape[2]))
        shapes = decode.cache_shapes(self.config.heads, self.config.chunk, self.config.memory_shapes)
        if learned is None:
            master = self.initial[0].dtype
            for name, shape in shapes.items():
                cache[name] = torch.zeros(B, *shape, dtype=master, device=length.device)
            cache["decay"][:, 0] = 1
            cache["decay"][:, 2] = 1
            return cache
        for i in range(self.config.memory.depth):
            cache[f"inputs.{i}"] = learned.scan.inputs[i][:, :, 0].contiguous()
            cache[f"deltas.{i}"] = learned.scan.deltas[i][:, :, 0].contiguous()
        last = (length - 1).view(B, 1, 1, 1)
        whole = [x[:, :, :, 0] for x in (learned.decay.A, learned.decay.F, learned.decay.E)]
        shape = (*whole[0].shape[:3], 1)
        cache["decay"] = torch.stack([x.gather(3, last.expand(shape)).squeeze(3) for x in whole], 1)
        square = [x[:, :, :, 0] for x in (learned.decay.G, learned.decay.P)]
        shape = (*square[0].shape[:3], 1, square[0].shape[-1])
        cache["rows"] = torch.stack(
            [x.gather(3, last.unsqueeze(-1).expand(shape)).squeeze(3) for x in square], 1
        )
        return cache

    def step(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, cache: State, index: Tensor) -> Tensor:
        """One generated token a session: q, k, v `[B, H, 1, head_dim]`; what was read, of the same shape."""
        gates = self.gates(u)[..., 0]
        return decode.step(
            q[:, :, 0],
            k[:, :, 0],
            v[:, :, 0],
            gates,
            self.weights(cache),
            self.weights(cache, "momentum"),
            cache,
            index,
            clip=self.config.memory.clip,
            **self.rule,
        ).unsqueeze(2)

    def sequence_step(self, u: Tensor, cache: State, index: Tensor) -> Tensor:
        """MAG, MAL, LMM: ``sequence`` for one token, ``u`` `[B, 1, dim]`."""
        (q, k, v), rows = self.features(self.project(u), self.conv, cache["tails"], keys=2)
        cache["tails"].copy_(rows[:, 1:])
        return self.emit(self.step(q, k, v, u, cache, index), u)
