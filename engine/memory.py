"""The neural memory of one layer as a module: projections, gates, and the calls into the kernels.

Owns the parameters of the memory (M_0 among them). Knows no attention and no block, and of the state only
its own tensors: ``memory.i`` (what the rule keeps), ``momentum.i`` (where it has momentum), ``tails``; no
rule by name. Source: Titans 3.1 and 4.4, spec/memory.md 1, 2 and 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.layers import Dense, RMSNorm, dense
from mnemosyne.kernels import chunk as chunk_form
from mnemosyne.kernels import decode, elementwise, fusion, network
from mnemosyne.kernels.gates import Decays, Gates, decays, gate
from mnemosyne.kernels.positions import causal_conv
from mnemosyne.kernels.rules.rule import MemoryRule

State = dict[str, Tensor]
"""One layer's tensors of the session state, sessions first; replaced entry by entry as the layer advances."""


class Learned(NamedTuple):
    """What a stretch of whole chunks did, for traces, for training and for opening a chunk."""

    gates: Gates
    """`[B, H, D, n, L]`; threshold `[B, H, n, L]`."""
    decay: Decays
    scan: chunk_form.Scan
    rule: MemoryRule


class NeuralMemory(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, H = config.dim, config.heads
        separate_query = config.variant == "mac"
        self.query = Dense(d, d) if separate_query else None
        self.project = Dense(d, 3 * d)
        self.conv = nn.Parameter(torch.zeros(config.conv, (4 if separate_query else 3) * d))
        self.rule = config.memory.make_rule()
        self.gate_bias = nn.Parameter(self._initial_bias())
        self.gate_weight = nn.Parameter(torch.randn(len(self.gate_bias), d) * 0.1 / d**0.5)
        self.initial = nn.ParameterList(map(nn.Parameter, self.rule.initial(H, config.memory_shapes)))
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

    def _limits(self) -> list[float | None]:
        """Largest theta, eta and alpha; None where the rule has no such gate."""
        m = self.config.memory
        return [m.theta_max, m.eta_max, m.alpha_max]

    def _initial_bias(self) -> Tensor:
        """Biases at which sum over a chunk of theta / (1 - eta) is 0.35, eta 0.3 and alpha 1e-3 (spec 2),
        and a threshold is 1."""
        c, m = self.config, self.config.memory
        momentum = 0.3 if self.rule.algorithm.momentum else 0.0
        biases = []
        for value, top in zip((0.35 * (1 - momentum) / c.chunk, 0.3, 1e-3), self._limits(), strict=True):
            if top is not None:
                share = min(max(value / top, 1e-5), 0.99) if top > 0 else 0.5
                z = torch.logit(torch.tensor(share * (1 - m.gate_epsilon) + m.gate_epsilon))
                biases.append(z.repeat(c.heads * m.depth))
        if self.rule.bias.threshold:
            biases.append(torch.full((c.heads,), math.log(math.e - 1)))  # softplus of it is 1
        return torch.cat(biases)

    def features(
        self, streams: Tensor, weight: Tensor, tail: Tensor, keys: int
    ) -> tuple[list[Tensor], Tensor]:
        """Convolve projected streams `[B, T, S d]` after their tail; S tensors `[B, H, T, head_dim]`, and the
        rows `[B, K - 1 + T, S d]` that a later tail is cut from. The first ``keys`` tensors are queries or
        keys, of unit norm; what follows is a value."""
        c = self.config
        rows = torch.cat([tail.to(streams.dtype), streams], 1)
        if fusion.fuses(streams):
            from mnemosyne.kernels.triton.train_features import features

            return features(streams, tail, weight, c.heads, c.head_dim, keys), rows
        mixed = elementwise.silu(causal_conv(rows.to(weight.dtype), weight))
        B, T, _ = mixed.shape
        split = mixed.view(B, T, -1, c.heads, c.head_dim).permute(2, 0, 3, 1, 4).contiguous()
        parts = list(split.unbind(0))
        return [network.unit(x) for x in parts[:keys]] + parts[keys:], rows

    def gates(self, u: Tensor) -> Gates:
        """Of tokens ``u`` `[B, T, dim]` in fp32: `[B, H, D, T]`, the threshold `[B, H, T]`."""
        c, m = self.config, self.config.memory
        B, T, _ = u.shape
        if fusion.fuses(u) and not self.rule.bias.threshold:
            from mnemosyne.kernels.triton.train_token_gates import token_gates

            tops = [top for top in self._limits() if top is not None]
            made = token_gates(u, self.gate_weight, self.gate_bias, tops, m.gate_epsilon)
            kinds = (kind.view(B, c.heads, m.depth, T) for kind in made)
            theta, eta, alpha = (None if top is None else next(kinds) for top in self._limits())
            assert theta is not None
            return Gates(theta, eta, alpha)
        # 64 outputs: fewer change their bits with the number of rows on a CPU (docs/architecture.md).
        weight = F.pad(self.gate_weight, (0, 0, 0, -len(self.gate_weight) % 64))
        z = dense(u.to(weight.dtype), weight)[..., : len(self.gate_weight)] + self.gate_bias
        opened: list[Tensor | None] = []
        first = 0
        for top in self._limits():
            if top is None:
                opened.append(None)
                continue
            part = z[..., first : first + c.heads * m.depth].view(B, T, c.heads, m.depth)
            opened.append(gate(part.permute(0, 2, 3, 1).contiguous(), top, m.gate_epsilon))
            first += c.heads * m.depth
        theta, eta, alpha = opened
        assert theta is not None
        threshold = None
        if self.rule.bias.threshold:
            threshold = elementwise.softplus(z[..., first:].transpose(1, 2).contiguous())
        return Gates(theta, eta, alpha, threshold)

    def matrices(self, state: State, name: str = "memory") -> list[Tensor]:
        """``memory``, ``momentum`` (none without) or ``segment_memory`` of every memory layer."""
        names = (f"{name}.{i}" for i in range(self.config.memory.depth))
        return [state[name] for name in names if name in state]

    def learn(self, k: Tensor, v: Tensor, u: Tensor, state: State) -> Learned:
        """Store whole chunks, k and v `[B, H, T, head_dim]`; replaces memory and momentum in ``state``."""
        B, H, T, d = k.shape
        n, L = T // self.config.chunk, self.config.chunk
        gates = self.gates(u).chunks(L)
        decay = decays(gates)
        scanned = chunk_form.scan(
            self._operand(k).view(B, H, n, L, d),
            self._operand(v).view(B, H, n, L, d),
            gates.threshold,
            decay,
            self.matrices(state),
            self.matrices(state, "momentum"),
            self.rule,
        )
        for name, tensors in (("memory", scanned.memory), ("momentum", scanned.momentum)):
            state.update({f"{name}.{i}": tensor for i, tensor in enumerate(tensors)})
        return Learned(gates, decay, scanned, self.rule)

    def read(self, q: Tensor, learned: Learned) -> Tensor:
        """M_t(q_t) for the tokens just stored; `[B, H, T, head_dim]`."""
        B, H, T, d = q.shape
        chunks = self._operand(q).view(B, H, -1, self.config.chunk, d)
        return chunk_form.read(chunks, learned.decay, learned.scan, self.rule).view(B, H, T, d)

    def _operand(self, x: Tensor) -> Tensor:
        """Keys, values and queries as the kernels of a GPU are to multiply them: in the dense products'
        precision, sums and state in fp32. A CPU gains nothing by it, and training keeps what it has."""
        return x.to(self.project.compute) if x.is_cuda and not torch.is_grad_enabled() else x

    def recall(self, q: Tensor, state: State) -> Tensor:
        """MAC: M*(q) `[B, H, T, head_dim]`, the memory as at the segment's start, normed per head."""
        B, H, T, d = q.shape
        kept = [m.reshape(B * H, *m.shape[2:]) for m in self.matrices(state, "segment_memory")]
        read = network.retrieve(self.rule.weights(kept), q.reshape(B * H, T, d), self.rule.architecture)
        return self.norm(read.view(B, H, T, d))

    def emit(self, y: Tensor, u: Tensor) -> Tensor:
        """What was read `[B, H, T, head_dim]` to the output `[B, T, dim]`: per-head norm, gate, product."""
        B, H, T, d = y.shape
        if fusion.fuses(y):
            from mnemosyne.kernels.triton.train_emit import emit

            return self.output(emit(y, self.output_gate(u), self.norm.weight, self.norm.epsilon))
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
        cache = {name: state[name] for name in state if name.startswith(("memory.", "momentum."))}
        taken = length[:, None] + torch.arange(K - 1, device=length.device)
        cache["tails"] = rows.gather(1, taken[..., None].expand(B, K - 1, rows.shape[2]))
        c = self.config
        shapes = decode.cache_shapes(c.heads, c.chunk, c.memory_shapes, self.rule.algorithm.momentum)
        if learned is None:
            master = self.initial[0].dtype
            for name, shape in shapes.items():
                cache[name] = torch.zeros(B, *shape, dtype=master, device=length.device)
            decode.fresh(cache["decay"])
            return cache
        for i in range(c.memory.depth):
            cache[f"inputs.{i}"] = learned.scan.inputs[i][:, :, 0].contiguous()
            cache[f"deltas.{i}"] = learned.scan.deltas[i][:, :, 0].contiguous()
        return cache | decode.rows_at(learned.decay, length - 1)

    def step(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, cache: State, index: Tensor) -> Tensor:
        """One generated token a session: q, k, v `[B, H, 1, head_dim]`; what was read, of the same shape."""
        return decode.step(
            q[:, :, 0],
            k[:, :, 0],
            v[:, :, 0],
            self.gates(u).map(lambda gate: gate[..., 0]),
            self.matrices(cache),
            self.matrices(cache, "momentum"),
            cache,
            index,
            self.rule,
        ).unsqueeze(2)

    def sequence_step(self, u: Tensor, cache: State, index: Tensor) -> Tensor:
        """MAG, MAL, LMM: ``sequence`` for one token, ``u`` `[B, 1, dim]`."""
        (q, k, v), rows = self.features(self.project(u), self.conv, cache["tails"], keys=2)
        cache["tails"].copy_(rows[:, 1:])
        return self.emit(self.step(q, k, v, u, cache, index), u)
