"""Compiles a kernel for Hopper without a GPU, from the arguments that its own caller launches it with."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


class Resources(NamedTuple):
    """Of one program."""

    shared: int
    """Bytes of shared memory."""
    registers: int
    """A thread."""
    spilled: int
    """Bytes that a thread stores because its registers didn't hold them."""
    wgmma: int
    """Instructions of Hopper's tensor cores."""
    mma: int
    """Instructions of the older form, which is slower."""
    wide: int
    """Loads and copies of 16 bytes at once, past the descriptors'."""
    narrow: int
    """Those of less."""


class Launch(NamedTuple):
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(module: Any, kernel: str, call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` launches ``module.kernel`` with, without running it."""
    recorded: list[Launch] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: recorded.append(Launch(arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel, Recorder())
        call()
    return recorded


Recorded = dict[str, list[tuple[Any, Launch]]]
"""Name of a kernel -> itself and each of its launches."""


def recorded(patch: pytest.MonkeyPatch, modules: Sequence[ModuleType]) -> Recorded:
    """What is launched of ``modules`` from now on, as it comes, without running it."""
    found: Recorded = defaultdict(list)

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*arguments: Any, **options: Any) -> None:
                found[self.kernel.__name__].append((self.kernel, Launch(arguments, options)))

            return record

    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                patch.setattr(module, name, Recorder(kernel))
    return found


def resources(kernel: Any, launch: Launch) -> Resources:
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    options = dict(launch.options)
    constants = {name: options.pop(name) for name in names if name in options}
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        value = given.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if signature[name] == "i32" and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    form = GluonASTSource if kernel.is_gluon() else ASTSource
    source = form(kernel, signature, places, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assembler = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        compiled.metadata.shared,
        int(re.search(r"Used (\d+) registers", said)[1]),
        int(re.search(r"(\d+) bytes spill stores", said)[1]),
        ptx.count("wgmma.mma_async"),
        ptx.count("mma.sync"),
        len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\S+ \[[^]]+\], \[[^]]+\], 0x10", ptx)),
        len(re.findall(r"ld\.global(?!\S*\.v4\.b32)|cp\.async\.c[ag]\S+ \[[^]]+\], \[[^]]+\], 0x[48]", ptx)),
    )
