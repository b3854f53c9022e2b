"""Decode attention as compiled for an H200: instructions of the loop over tiles, beside the cycles of their bytes.

Needs ``ptxas`` and ``nvdisasm``, of CUDA or by ``pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm``.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from compile_tpu import shape
from targets import DEVICES
from targets_gpu import CORES, compile_for_h200

from jaxkv.policies import LeanKV
from models.shapes import SHAPES
from pallas_kernels import use_implementation
from pallas_kernels.paged_attention import RawKVs, TieredKVs, paged_attention
from pallas_kernels.quantised_block.layout import Segments

CLOCK = 1.98e9
REGISTERS, SHARED, THREADS, RESERVED = 65_536, 233_472, 2048, 1024
"""Of a multiprocessor: registers, bytes of shared memory, threads; and bytes that each program takes beside its own."""
ROWS = 64
"""KVs that the tensor cores take at once."""
BLOCK_SIZE, BATCH, ENTRIES = 32, 8, 256
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Of a kernel, over its tiles."""

    case: str
    kvs: int
    """That the tensor cores take in one turn of the loop."""
    instructions: float
    """Of a warp, for 64 KVs, with all branches of the loop, and turns for the rest of a block: a scheduler issues one a
    cycle, and each of a program's four warps has its own."""
    needed: float
    """Cycles that the bytes of 64 KVs take at the published bandwidth."""
    registers: int
    spilled: int
    """Bytes."""
    shared: int
    """Bytes."""
    programs: int
    """That fit a multiprocessor."""

    @property
    def share(self) -> float:
        """Of the bandwidth, at most."""
        return self.needed / max(self.needed, self.instructions)


def steady_loop(sass: str) -> tuple[int, int]:
    """Instructions, and those of the tensor cores among them, of the shortest loop with any of these."""
    labels: dict[str, int] = {}
    code: list[str] = []
    found: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif match := INSTRUCTION.match(line):
            code.append(match[1])
            target = re.search(r"`\((\.L\w+)\)", match[2]) if match[1] == "BRA" else None
            if target and target[1] in labels:
                body = code[labels[target[1]] :]
                found.append((len(body), sum(name.startswith("HGMMA") for name in body)))
    loops = [loop for loop in found if loop[1]]
    if not loops:
        raise ValueError("no loop that uses the tensor cores in the machine code")
    return min(loops)


def fitting(registers: int, shared: int, threads: int) -> int:
    """Programs a multiprocessor."""
    of_program = -(-registers // 8) * 8 * threads
    return min(REGISTERS // of_program, SHARED // (shared + RESERVED), THREADS // threads)


def _dumped(directory: Path) -> tuple[str, str, int, int]:
    """Machine code, what ptxas says, threads and bytes of shared memory of the kernel that uses the tensor cores."""
    for ptx in sorted(directory.glob("*.ptx")):
        text = ptx.read_text()
        if "wgmma" in text:
            cubin = ptx.with_suffix(".cubin")
            assemble = ["ptxas", "-arch", "sm_90a", "-v", str(ptx), "-o", str(cubin)]
            said = subprocess.run(assemble, check=True, capture_output=True, text=True).stderr
            sass = subprocess.run(["nvdisasm", "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
            threads = re.search(r"\.(?:req|max)ntid (\d+)", text)
            shared = re.search(r"smem_scratch_bytes=(\d+)", ptx.with_suffix(".resources.txt").read_text())
            if threads and shared:
                return sass, said, int(threads[1]), int(shared[1])
    raise ValueError("no kernel that uses the tensor cores was compiled")


def _raw(name: str) -> tuple[Any, Any, float]:
    """Function, arguments, and bytes of a KV."""
    model = SHAPES[name]
    row = 2 * model.head_dim
    pool = shape((2**16, BLOCK_SIZE, row), jnp.bfloat16)
    table = shape((BATCH, model.num_kv_heads, ENTRIES), jnp.int32)
    raw = RawKVs(pool, table, shape(table.shape[:2], jnp.int32))
    return paged_attention, (shape((BATCH, model.num_heads, model.head_dim), jnp.bfloat16), raw), row * 2


def _tier(name: str, is_low: bool) -> tuple[Any, Any, Segments]:
    """Function, arguments, and the tier that it attends to alone: both of the layout's are this one."""
    model = SHAPES[name]
    with use_implementation("mosaic_gpu"):
        layout = LeanKV().placement.layout(model.head_dim)
    assert layout is not None
    tier = layout.tiers[is_low]
    layout.__dict__["tiers"] = tier, tier
    table = shape((BATCH, model.num_kv_heads, ENTRIES), jnp.int32)
    pool, lengths = shape((2**16, layout.rows, 128), jnp.uint32), shape((*table.shape[:2], 2), jnp.int32)

    def attend(query: Any, pool: Any, table: Any, lengths: Any) -> Any:
        held = TieredKVs(pool=pool, block_table=table, lengths=lengths, layout=layout)
        return paged_attention(query, None, tiers=held)

    query = shape((BATCH, model.num_heads, model.head_dim), jnp.bfloat16)
    return attend, (query, pool, table, lengths), tier


CASES = {
    f"{code}, {name}": (name, code)
    for code in ("bfloat16", "K8V4", "K4V2")
    for name in ("llama-3.1-8b", "smollm2-135m")
}


def why_not() -> str | None:
    missing = [tool for tool in ("ptxas", "nvdisasm") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found; pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm" if missing else None


def count(case: str, directory: Path) -> Loop:
    name, code = CASES[case]
    if code == "bfloat16":
        function, arguments, a_kv = _raw(name)
        tokens = ROWS
    else:
        function, arguments, tier = _tier(name, code == "K4V2")
        a_kv, tokens = 4 * tier.scores / tier.tokens, tier.tokens
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(directory)}
    with use_implementation("mosaic_gpu"):
        compile_for_h200(function, *arguments)
    sass, said, threads, shared = _dumped(directory)
    instructions, products = steady_loop(sass)
    # Of 64 KVs 8 columns of queries take head_dim / 16 products for the logits, and as many for the values.
    kvs, rest = divmod(products * ROWS, SHAPES[name].head_dim // 8)
    if rest or kvs % 16:
        raise ValueError(f"{case}: {products} products a turn of the loop are no whole number of KVs")
    [registers], [spilled] = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    turns = -(-tokens // kvs) if tokens > kvs else tokens / kvs
    return Loop(
        case=case,
        kvs=kvs,
        instructions=instructions * turns / tokens * ROWS,
        needed=a_kv * ROWS * CORES * CLOCK / DEVICES["h200"].bandwidth,
        registers=int(registers),
        spilled=int(spilled),
        shared=shared,
        programs=fitting(int(registers), shared, threads),
    )


def table(loops: list[Loop]) -> Iterator[str]:
    names = (
        *("kernel", "KVs a turn", "instructions for 64 KVs", "cycles of their bytes", "share at most"),
        *("registers", "spilled, bytes", "shared memory, bytes", "programs a multiprocessor"),
    )
    yield "| " + " | ".join(names) + " |\n|" + " --- |" * len(names)
    for loop in loops:
        numbers = loop.kvs, round(loop.instructions), round(loop.needed)
        rest = loop.registers, loop.spilled, loop.shared, loop.programs
        cells = (*(f"{n:,}" for n in numbers), f"{loop.share:.0%}", *(f"{n:,}" for n in rest))
        yield "| " + " | ".join((loop.case, *cells)) + " |"
