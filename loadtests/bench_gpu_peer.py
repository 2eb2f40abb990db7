"""One peer in a process of its own: what it does with random weights in bf16, as JSON on the last line.

``titans-pytorch``: its MemoryAsContextTransformer with heads of 64, segments of 512, memory chunks of 64
whose weights are taken anew every 512 tokens, expansion 4, momentum, one residual stream; its call that
carries a state embeds all tokens so far and takes one more. ``llama``: transformers' LlamaForCausalLM over
PyTorch's attention, the faster of its flash and cuDNN kernels; decoding eager, and one captured step with a
static cache. The number of layers is the one that brings the parameters nearest to what was asked for. Knows
nothing of Mnemosyne; ``bench_gpu_peers`` starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

HEAD = 64
REPETITIONS = 3
GRAPH_STEPS = 16
Step = Callable[[], Tensor]


def layers_for(build: Callable[[int], nn.Module], parameters: int, device: torch.device) -> int:
    """Whose model has the number of parameters nearest to ``parameters``; each layer after the second has as
    many as the third."""
    with device:
        two, three = (sum(p.numel() for p in build(n).parameters()) for n in (2, 3))
    return max(2, round((parameters - two) / (three - two)) + 2)


class Peer(ABC):
    """What is measured of one."""

    package: str

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.dim, self.vocab = options.dim, options.vocab
        self.toy = self.device.type == "cpu"
        self.layers = layers_for(self.build, options.parameters, self.device)
        torch.manual_seed(0)
        with self.device:
            model = self.build(self.layers)
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.note = ""

    @abstractmethod
    def build(self, layers: int) -> nn.Module: ...

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last of ``ids`` `[1, T]`."""

    def prepare(self, ids: Tensor) -> None:
        """Choose what is fastest here, where there is a choice."""
        return

    @abstractmethod
    def decoder(self, batch: int, context: int) -> Step:
        """A step of ``batch`` sessions after ``context`` tokens; logits of the newest."""

    def captured(self, batch: int, context: int) -> Step | None:
        """The same as one CUDA graph; None where there isn't one."""
        return None

    def ids(self, batch: int, count: int) -> Tensor:
        return torch.randint(1, self.vocab, (batch, count), device=self.device)

    def wait(self) -> None:
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began


class TitansPytorch(Peer):
    package = "titans-pytorch"

    def build(self, layers: int) -> nn.Module:
        library, heads = importlib.import_module("titans_pytorch"), self.dim // HEAD
        segment, chunk = (64, 16) if self.toy else (512, 64)
        model: nn.Module = library.MemoryAsContextTransformer(
            num_tokens=self.vocab,
            dim=self.dim,
            depth=layers,
            segment_len=segment,
            heads=heads,
            dim_head=HEAD,
            num_persist_mem_tokens=4,
            num_longterm_mem_tokens=0,
            neural_memory_segment_len=chunk,
            neural_memory_batch_size=segment,
            num_residual_streams=1,
            neural_memory_model=library.MemoryMLP(HEAD, depth=2, expansion_factor=4.0),
            neural_memory_kwargs={"dim_head": HEAD, "heads": heads, "momentum": True, "qk_rmsnorm": True},
        )
        # The logits of the last position are all that anybody needs of a prefill.
        logits = model.get_submodule("to_logits")
        logits.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
        return model

    def prefill(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.model(ids, disable_flex_attn=True, return_cache=True)[0])

    def decoder(self, batch: int, context: int) -> Step:
        tokens, new = self.ids(batch, context), self.ids(batch, 1)
        _, cache = self.model(tokens, disable_flex_attn=True, return_cache=True)

        def step() -> Tensor:
            nonlocal tokens, cache
            tokens = torch.cat([tokens, new], 1)
            logits, cache = self.model(tokens, disable_flex_attn=True, cache=cache, return_cache=True)
            return logits

        return step


class Llama(Peer):
    package = "transformers"

    def build(self, layers: int) -> nn.Module:
        library, heads = importlib.import_module("transformers"), self.dim // HEAD
        config = library.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.dim,
            intermediate_size=math.ceil(8 * self.dim / 3 / 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1 << 21,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        return cast(nn.Module, library.LlamaForCausalLM._from_config(config))

    def prepare(self, ids: Tensor) -> None:
        if self.toy:
            return
        from torch.nn.attention import SDPBackend, sdpa_kernel

        others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        taken = {}
        for first in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with contextlib.suppress(RuntimeError), sdpa_kernel([first, *others], set_priority=True):
                self.prefill(ids)
                taken[first] = min(self.seconds(lambda: self.prefill(ids)) for _ in range(2))
        best = min(taken, key=taken.__getitem__)
        self.note = best.name.lower()
        # Entered and kept: it holds for all that follows, and no longer than it is referred to.
        self._chosen = sdpa_kernel([best, *others], set_priority=True)
        self._chosen.__enter__()

    def prefill(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits)

    def decoder(self, batch: int, context: int) -> Step:
        new = self.ids(batch, 1)
        cache = self.model(
            input_ids=self.ids(batch, context), use_cache=True, logits_to_keep=1
        ).past_key_values

        def step() -> Tensor:
            nonlocal cache
            out = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return out.logits

        return step

    def captured(self, batch: int, context: int) -> Step | None:
        """The step stays at one place: a timing, not a text."""
        library, new = importlib.import_module("transformers"), self.ids(batch, 1)
        cache = library.StaticCache(config=self.model.config, max_cache_len=context + HEAD)
        call = partial(self.model, past_key_values=cache, use_cache=True, logits_to_keep=1)
        call(input_ids=self.ids(batch, context))

        def step() -> Tensor:
            return cast(Tensor, call(input_ids=new).logits)

        if self.toy:
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()

        def replay() -> Tensor:
            graph.replay()
            return made

        return replay


PEERS: dict[str, type[Peer]] = {"titans-pytorch": TitansPytorch, "llama": Llama}


@torch.inference_mode()
def measure(peer: Peer, options: argparse.Namespace, say: Callable[..., None]) -> None:
    """Everything, said as soon as it is known."""
    lengths = [int(text) for text in options.tokens.split(",")]
    peer.prefill(peer.ids(1, lengths[0]))
    peer.prepare(peer.ids(1, lengths[-1]))
    say(parameters=peer.parameters, layers=peer.layers, note=peer.note)
    for length in lengths:
        with _reported(say, f"prefill of {length}"):
            say(prefill={length: _prefill(peer, length)}, peak_bytes={length: _peak(peer)})
    for batch in (1, options.batch):
        with _reported(say, f"decode at batch {batch}"):
            step = peer.decoder(batch, options.context)
            say(decode={batch: _rate(peer, step, batch, options.steps)})
            del step
    # Last: a capture that fails can leave a process unusable.
    for batch in (1, options.batch):
        with _reported(say, f"captured decode at batch {batch}"):
            replay = peer.captured(batch, options.context)
            if replay is not None:
                say(captured={batch: _rate(peer, replay, batch, GRAPH_STEPS)})


def _prefill(peer: Peer, length: int) -> float:
    """Tokens a second, the median of some."""
    ids = peer.ids(1, length)
    _check(peer.prefill(ids))
    return length / statistics.median(peer.seconds(lambda: peer.prefill(ids)) for _ in range(REPETITIONS))


def _rate(peer: Peer, step: Step, batch: int, steps: int) -> float:
    """Tokens a second over all sessions."""
    _check(step())
    return batch * steps / peer.seconds(lambda: [step() for _ in range(steps)])


@contextlib.contextmanager
def _reported(say: Callable[..., None], what: str) -> Any:
    """One that fails, for want of memory for example, leaves the others."""
    try:
        yield
    except Exception as error:
        say(errors={what: f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("its logits aren't finite")


def _peak(peer: Peer) -> int:
    """Bytes of the device's memory, at most so far."""
    return 0 if peer.toy else torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--device", default="cuda")
    for name in ("dim", "parameters", "vocab", "batch", "context", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tokens", required=True, help="lengths to prefill, with commas")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    result: dict[str, Any] = {"peer": options.peer}

    def say(**facts: Any) -> None:
        """The whole so far: should this process be ended, its last line is what there is."""
        for name, value in facts.items():
            result[name] = result.get(name, {}) | value if isinstance(value, dict) else value
        print(json.dumps(result), flush=True)

    package = PEERS[options.peer].package
    say(version=importlib.metadata.version(package))
    measure(PEERS[options.peer](options), options, say)


if __name__ == "__main__":
    main()
