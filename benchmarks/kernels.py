"""Cycles and utilization of the kernel library on the gates; writes the table of
docs/kernel-library.md, and the cycles of the kernels of docs/tutorial.md.

    python benchmarks/kernels.py [--device rtl-fast] [--config small] [--only NAME] [--print]

Part of ``make bench``. `rtl-fast` has the cycles of `rtl`. Every result is compared with the golden
model's, bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import systolith
from systolith import kernels
from systolith.kernel.function import Kernel
from systolith.program import Program
from systolith_hdl.formats import FORMATS, DType
from systolith_hdl.isa import DRAM_READERS, DRAM_WRITERS, decode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernel-library.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"

Case = tuple[Kernel, dict[str, Any], tuple[np.ndarray, ...]]


def cases() -> dict[str, Case]:
    """What is measured: text -> kernel, static arguments, arrays."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    x, g, gain = array(64, 64), array(64, 64), array(64)
    q, k, v = (array(64, 16) for _ in range(3))
    labels = np.eye(64, dtype=np.float32)
    state = *(array(4096) for _ in range(3)), np.abs(array(4096))
    rates = np.array([0.01, 2.0, 3.0], np.float32)
    image = array(1, 16, 16, 8)
    index = rng.integers(0, 64, 64, dtype=np.int32)
    found: dict[str, Case] = {}
    for left in (False, True):
        for right in (False, True):
            name = "matmul " + ("t" if left else "n") + ("t" if right else "n")
            options = {"transpose_a": left, "transpose_b": right}
            found[f"{name} 64 x 64 x 64"] = kernels.matmul, options, (x, g)
    wide = array(128, 128)
    return found | {
        "matmul nn 128 x 128 x 128": (kernels.matmul, {}, (wide, wide)),
        "transpose 64 x 64": (kernels.transpose, {}, (x,)),
        "softmax 64 x 64": (kernels.softmax, {}, (x,)),
        "softmax_grad 64 x 64": (kernels.softmax_grad, {}, (np.abs(x), g)),
        "cumsum 64 x 64": (kernels.cumsum, {}, (x,)),
        "top_k 64 x 64, 8": (kernels.top_k, {"k": 8}, (x,)),
        "cross_entropy 64 x 64": (kernels.cross_entropy, {}, (x, labels)),
        "cross_entropy_forward 64 x 64": (kernels.cross_entropy_forward, {}, (x, labels)),
        "cross_entropy_grad 64 x 64": (kernels.cross_entropy_grad, {}, (x, labels, gain, gain)),
        "layernorm 64 x 64": (kernels.layernorm, {}, (x, gain, gain)),
        "layernorm_grad 64 x 64": (kernels.layernorm_grad, {}, (x, gain, g)),
        "batch_norm 64 x 64": (kernels.batch_norm, {}, (x, gain, gain)),
        "batch_norm_grad 64 x 64": (kernels.batch_norm_grad, {}, (x, gain, g)),
        "rmsnorm 64 x 64": (kernels.rmsnorm, {}, (x, gain)),
        "rmsnorm_grad 64 x 64": (kernels.rmsnorm_grad, {}, (x, gain, g)),
        "attention 64 x 64 x 16": (kernels.attention, {}, (q, k, v)),
        "attention causal 64 x 64 x 16": (kernels.attention, {"causal": True}, (q, k, v)),
        "attention_forward 64 x 64 x 16": (kernels.attention_forward, {}, (q, k, v)),
        "attention_grad 64 x 64 x 16": (kernels.attention_grad, {}, (q, k, v, q, gain, q)),
        "gelu_mlp 64 x 32 x 64 x 32": (
            kernels.gelu_mlp,
            {},
            (array(64, 32), array(32, 64), array(64), array(64, 32), array(32)),
        ),
        "swiglu_mlp 64 x 32 x 64 x 32": (
            kernels.swiglu_mlp,
            {},
            (array(64, 32), array(32, 64), array(32, 64), array(64, 32)),
        ),
        "embedding 64 of 64 x 64": (kernels.embedding, {}, (x, index)),
        "embedding_grad 64 of 64 x 64": (kernels.embedding_grad, {"rows": 64}, (g, index)),
        "scatter_add 64 of 64 x 64": (kernels.scatter_add, {}, (x, index, g)),
        "adamw 4096": (kernels.adamw, {}, (*state, rates)),
        "conv2d 16 x 16 x 8, 3 x 3 x 8": (
            kernels.conv2d,
            {"window": (3, 3), "padding": 1},
            (image, array(72, 8)),
        ),
        "conv2d_grad 16 x 16 x 8, 3 x 3 x 8": (
            kernels.conv2d_grad,
            {"window": (3, 3), "padding": 1},
            (image, array(72, 8), image),
        ),
        "max_pool 16 x 16 x 8, 2 x 2": (kernels.max_pool, {"window": (2, 2)}, (image,)),
        "avg_pool 16 x 16 x 8, 2 x 2": (kernels.avg_pool, {"window": (2, 2)}, (image,)),
        "max_pool_grad 16 x 16 x 8, 2 x 2": (
            kernels.max_pool_grad,
            {"window": (2, 2)},
            (image, array(1, 8, 8, 8)),
        ),
        "avg_pool_grad 16 x 16 x 8, 2 x 2": (
            kernels.avg_pool_grad,
            {"window": (2, 2)},
            (image, array(1, 8, 8, 8)),
        ),
    }


def dram_bytes(program: Program) -> tuple[int, int]:
    """Bytes that a program loads and stores."""
    loaded = stored = 0
    for _, _, raw in program.instructions():
        opcode, fields = decode(raw)
        if opcode in DRAM_READERS | DRAM_WRITERS:
            # A load with a lane stride of 0 fetches one lane.
            lanes = fields["lanes"] if fields["lane_stride"] else 1
            count = math.prod(fields[f"counts.{i}"] for i in range(4))
            moved = lanes * count * FORMATS[DType(fields["dram_dtype"])].bytes
            store = opcode in DRAM_WRITERS
            stored += moved * store
            loaded += moved * (not store or fields["accumulate"])  # what is added to is read
    return loaded, stored


def measure(kind: str, config: str, only: str | None) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    with (
        systolith.Device(kind, config=config, progress=print) as device,
        systolith.Device("golden", config=config) as golden,
    ):
        peak = device.config.axi_bytes
        for name, (kernel, static, arrays) in cases().items():
            if only is not None and only not in name:
                continue
            run = kernel.on(device, **static)
            results = jax.tree.leaves(run(*arrays))
            wanted = jax.tree.leaves(kernel.on(golden, **static)(*arrays))
            for mine, theirs in zip(results, wanted, strict=True):
                if np.asarray(mine).tobytes() != np.asarray(theirs).tobytes():
                    raise SystemExit(f"{name}: the results differ from the golden model's")
            stats = run.stats()
            cycles, busy = stats["cycles"], stats["busy"]
            loaded, stored = dram_bytes(run.program)
            queues = max(busy[engine] for engine in busy if engine.startswith("dma"))
            shares = [busy["tensor"], busy["vector"], busy["scalar"], queues]
            share = [f"{100 * value / cycles:.0f} %" for value in shares]
            macs = f"{100 * stats['tensor_utilization']:.1f} %" if stats["macs"] else ""
            dram = f"{100 * max(loaded, stored) / (cycles * peak):.0f} %"
            rows.append([f"`{name.split()[0]}`{name[len(name.split()[0]) :]}", f"{cycles:,}", macs,
                         *share, dram])  # fmt: skip
            print("  ".join(rows[-1]), flush=True)
    return rows


def compare(kind: str, config: str) -> list[list[str]]:
    """Cycles of the same functions compiled and by kernels, alone and with all gradients."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def attention(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.where(np.tri(64, dtype=bool), q @ k.T / 4.0, -np.inf)
        return jax.nn.softmax(scores, axis=-1) @ v

    def layernorm(x: Any, gain: Any, bias: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + bias

    def mlp(x: Any, up: Any, a: Any, down: Any, b: Any) -> Any:
        return systolith.nn.gelu(x @ up + a) @ down + b

    x, gain = array(64, 64), array(64)
    causal = functools.partial(kernels.attention, causal=True)
    functions = {
        "attention causal 64 x 64 x 16": (attention, causal, [array(64, 16) for _ in range(3)]),
        "softmax 64 x 64": (functools.partial(jax.nn.softmax, axis=-1), kernels.softmax, [x]),
        "layernorm 64 x 64": (layernorm, kernels.layernorm, [x, gain, gain]),
        "gelu_mlp 64 x 32 x 64 x 32": (
            mlp,
            kernels.gelu_mlp,
            [array(64, 32), array(32, 64), array(64), array(64, 32), array(32)],
        ),
        "matmul 64 x 64 x 64": (jnp.matmul, kernels.matmul, [x, x]),
    }
    rows = []
    with systolith.Device(kind, config=config, progress=print) as device:
        for name, (compiled, kernel, arrays) in functions.items():
            cycles = []
            for function in (compiled, kernel):

                def loss(*arrays: Any, function: Any = function) -> Any:
                    return jnp.sum(function(*arrays) ** 2)

                gradient = jax.grad(loss, argnums=tuple(range(len(arrays))))
                for run in (function, gradient):
                    # A partial has no name of its own.
                    step = systolith.jit(lambda *a, run=run: run(*a), device=device)
                    step(*arrays)
                    cycles.append(f"{step.stats()['cycles']:,}")
            first, rest = name.split(" ", 1)
            rows.append([f"`{first}` {rest}", *cycles])
            print("  ".join(rows[-1]), flush=True)
    return rows


def write(begin: str, end: str, head: list[str], rows: list[list[str]]) -> None:
    """Puts a table between two marks of the page."""
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, rest = PAGE.read_text().split(begin)
    _, after = rest.split(end)
    PAGE.write_text(before + begin + table + end + after)


def measure_tutorial(kind: str) -> dict[str, int]:
    """Cycles of the tutorial's kernels, at nano."""
    path = ROOT / "examples" / "tutorial.py"
    steps: dict[str, int] = {}
    with systolith.Device(kind, config="nano", progress=print) as device:
        steps = runpy.run_path(str(path))["measure"](device)
    for name, cycles in steps.items():
        print(f"tutorial: {name}  {cycles:,}", flush=True)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="rtl", choices=("rtl", "rtl-fast"))
    parser.add_argument("--config", default="small")
    parser.add_argument("--only", help="measure only what has this in its name")
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    rows = measure(options.device, options.config, options.only)
    compared = [] if options.only else compare(options.device, options.config)
    steps = {} if options.only else measure_tutorial(options.device)
    if options.print or options.only:
        return
    text = TUTORIAL.read_text()
    for name, cycles in steps.items():
        text = re.sub(rf"<!-- {name} -->[\d,]+", f"<!-- {name} -->{cycles:,}", text)
    TUTORIAL.write_text(text)
    head = ["kernel", "cycles", "MACs", "tensor", "vector", "scalar", "DMA queue", "DRAM"]
    write("<!-- kernels -->\n", "<!-- end of kernels -->\n", head, rows)
    head = ["function", "compiled", "with gradients", "kernel", "with gradients"]
    write("<!-- compared -->\n", "<!-- end of compared -->\n", head, compared)


if __name__ == "__main__":
    main()
