"""Checkpoints with quantised weights, written and read by their formats' formulas alone: numpy, no code of ours.

Each format makes of a matrix ``f32[out, in]`` its tensors by suffix, and of those, value by value, the matrix again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}
BLOCK, GROUP = (48, 40), 32
AWQ_SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        more = tensor.tobytes()
        offsets = [len(data), len(data) + len(more)]
        header[name] = {"dtype": NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        data += more
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@dataclass(frozen=True, kw_only=True)
class Format:
    config: dict[str, Any]
    """The quantization_config."""
    write: Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]]
    read: Callable[[dict[str, np.ndarray]], np.ndarray]
    key: str = "quantization_config"


def indices(shape):
    return np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")


# 8-bit floats and integers


def write_tensor(w, rng, *, shape=(1,), dtype=BF16, name="weight_scale"):
    scale = np.array(np.abs(w).max() / 448 * 1.01, dtype)
    codes = (w / np.float32(scale)).astype(F8)
    return {"weight": codes, name: scale.reshape(shape), "input_scale": np.ones(1, BF16)}


def write_channel(w, rng, *, flat=False, dtype=np.float32, codes=F8):
    largest = 448 if codes == F8 else 127
    scale = (np.abs(w).max(1, keepdims=True) / largest * 1.01).astype(dtype)
    made = w / scale.astype(np.float32)
    made = made.astype(F8) if codes == F8 else np.rint(made).astype(np.int8)
    return {"weight": made, "weight_scale": scale[:, 0] if flat else scale}


def write_block(w, rng, *, name="weight_scale_inv", dtype=np.float32):
    rows, columns = (-(-n // b) for n, b in zip(w.shape, BLOCK, strict=True))
    scale = np.ones((rows, columns), dtype)
    codes = np.zeros(w.shape, F8)
    for r in range(rows):
        for c in range(columns):
            part = np.s_[r * BLOCK[0] : (r + 1) * BLOCK[0], c * BLOCK[1] : (c + 1) * BLOCK[1]]
            s = np.abs(w[part]).max() / 448
            scale[r, c] = 2.0 ** np.ceil(np.log2(s)) if dtype == ml_dtypes.float8_e8m0fnu else s * 1.01
            codes[part] = (w[part] / np.float32(scale[r, c])).astype(F8)
    return {"weight": codes, name: scale}


def read_scaled(t):
    scale = t["weight_scale"].astype(np.float32)
    return t["weight"].astype(np.float32) * (scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(()))


def read_block(t, name="weight_scale_inv"):
    i, k = indices(t["weight"].shape)
    return t["weight"].astype(np.float32) * t[name].astype(np.float32)[i // BLOCK[0], k // BLOCK[1]]


def write_int8(w, rng, *, asymmetric=False):
    if not asymmetric:
        return write_channel(w, rng, codes=np.int8, dtype=BF16)
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale = ((high - low) / 255 * 1.01).astype(np.float32)
    zero = np.clip(np.rint(-128 - low / scale), -128, 127).astype(np.int8)
    codes = np.clip(np.rint(w / scale) + zero, -128, 127).astype(np.int8)
    return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}


def read_int8(t):
    zero = t.get("weight_zero_point", np.int8(0))
    return (t["weight"].astype(np.float32) - np.float32(zero)) * t["weight_scale"].astype(np.float32)


# Packed integers


def pack(codes, bits, axis):
    """32 / bits codes in a word along the axis, the first in its lowest bits."""
    n = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % n)])
    words = sum(codes[..., j::n] << np.uint64(bits * j) for j in range(n))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def grouped(w, groups, bits, *, asymmetric):
    """Codes, scales ``[out, groups]`` and zero points, where ``groups[k]`` is input k's."""
    count, top = groups.max() + 1, 2**bits - 1
    scale, zero, codes = np.ones((len(w), count), np.float32), np.zeros((len(w), count), int), np.zeros(w.shape, int)
    for g in range(count):
        part = w[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if asymmetric:
            scale[:, g] = ((high - low) / top * 1.01).astype(np.float16)
            zero[:, g] = np.clip(np.rint(-low / scale[:, g]), 0, top - 1)
        else:
            scale[:, g], zero[:, g] = (np.maximum(high, -low) / (top // 2) * 1.01).astype(np.float16), top // 2 + 1
        codes[:, groups == g] = np.clip(np.rint(part / scale[:, [g]]) + zero[:, [g]], 0, top)
    return codes, scale, zero


def write_packed(w, rng, *, bits=4, asymmetric=False, order=False, group=GROUP):
    groups = np.arange(w.shape[1]) // (group or w.shape[1])
    groups = rng.permutation(groups) if order else groups
    codes, scale, zero = grouped(w, groups, bits, asymmetric=asymmetric)
    made = {
        "weight_packed": pack(codes, bits, 1),
        "weight_scale": scale.astype(BF16),
        "weight_shape": np.array(w.shape, np.int64),
    }
    made |= {"weight_zero_point": pack(zero, bits, 0)} if asymmetric else {}
    return made | ({"weight_g_idx": groups.astype(np.int32)} if order else {})


def read_packed(t, *, bits=4, group=GROUP):
    n, mask, middle = 32 // bits, (1 << bits) - 1, 1 << (bits - 1)
    i, k = indices(t["weight_shape"])
    groups = t.get("weight_g_idx", np.arange(len(k[0])) // (group or len(k[0])))[k]
    word = t["weight_packed"].view(np.uint32)[i, k // n]
    q = (word >> (bits * (k % n)).astype(np.uint32) & mask).astype(np.int64) - middle
    z = 0
    if "weight_zero_point" in t:
        word = t["weight_zero_point"].view(np.uint32)[i // n, groups]
        z = (word >> (bits * (i % n)).astype(np.uint32) & mask).astype(np.int64) - middle
    return (q - z).astype(np.float32) * t["weight_scale"].astype(np.float32)[i, groups]


def write_gptq(w, rng, *, bits=4, order=False, group=GROUP, older=True):
    groups = np.arange(w.shape[1]) // (group or w.shape[1])
    groups = rng.permutation(groups) if order else groups
    codes, scale, zero = grouped(w, groups, bits, asymmetric=True)
    zero = np.maximum(zero, int(older))
    return {
        "qweight": pack(codes.T, bits, 0),
        "qzeros": pack(zero.T - int(older), bits, 1),
        "scales": np.ascontiguousarray(scale.T).astype(np.float16),
        "g_idx": groups.astype(np.int32),
        "bias": np.zeros(len(w), np.float16),
    }


def read_gptq(t, *, bits=4, older=True):
    n, mask = 32 // bits, (1 << bits) - 1
    i, k = indices((t["qweight"].shape[1], t["qweight"].shape[0] * n))
    g = t["g_idx"][k]
    q = t["qweight"].view(np.uint32)[k // n, i] >> (bits * (k % n)).astype(np.uint32) & mask
    z = (t["qzeros"].view(np.uint32)[g, i // n] >> (bits * (i % n)).astype(np.uint32) & mask) + int(older)
    return (q.astype(np.float32) - z.astype(np.float32)) * t["scales"].astype(np.float32)[g, i]


def write_awq(w, rng):
    codes, scale, zero = grouped(w, np.arange(w.shape[1]) // GROUP, 4, asymmetric=True)

    def words(values):
        values = values.astype(np.uint64)
        made = sum(values[:, c::8] << np.uint64(AWQ_SHIFTS[c]) for c in range(8))
        return np.ascontiguousarray(made.astype(np.uint32).view(np.int32))

    return {
        "qweight": words(codes.T),
        "qzeros": words(zero.T),
        "scales": np.ascontiguousarray(scale.T).astype(np.float16),
    }


def read_awq(t):
    i, k = indices((t["qweight"].shape[1] * 8, t["qweight"].shape[0]))
    shift, g = np.array(AWQ_SHIFTS, np.uint32)[i % 8], k // GROUP
    q = t["qweight"].view(np.uint32)[k, i // 8] >> shift & 15
    z = t["qzeros"].view(np.uint32)[g, i // 8] >> shift & 15
    return (q.astype(np.float32) - z.astype(np.float32)) * t["scales"].astype(np.float32)[g, i]


# Configs


def compressed(form, strategy, *, name="group_0", target="Linear", kind="float", bits=8, **weights):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {name: {"targets": [target], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def made(function, **options):
    return lambda *given: function(*given, **options)


def packed(**options):
    weights = {"group_size": options.get("group", GROUP) or None}
    weights |= {"symmetric": False} if options.get("asymmetric") else {}
    weights |= {"actorder": "group"} if options.get("order") else {}
    strategy = "channel" if options.get("group", GROUP) is None else "group"
    read = {name: options[name] for name in ("bits", "group") if name in options}
    config = compressed("pack-quantized", strategy, kind="int", bits=options.get("bits", 4), **weights)
    return Format(config=config, write=made(write_packed, **options), read=made(read_packed, **read))


def gptq(*, form="gptq", bits=4, order=False, group=GROUP):
    older = form == "gptq"
    config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": order, "sym": False}
    write = made(write_gptq, bits=bits, order=order, group=group, older=older)
    return Format(
        config=config | {"checkpoint_format": form}, write=write, read=made(read_gptq, bits=bits, older=older)
    )


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = FP8 | {"weight_block_size": list(BLOCK)}
FORMATS = {
    "float-quantized, tensor [1]": Format(
        config=compressed("float-quantized", "tensor"), write=write_tensor, read=read_scaled
    ),
    "naive-quantized, tensor ()": Format(
        config=compressed("naive-quantized", "tensor", name="mine"),
        write=made(write_tensor, shape=()),
        read=read_scaled,
    ),
    "compression_config, tensor [1,1]": Format(
        config={k: v for k, v in compressed("float-quantized", "tensor").items() if k != "quant_method"},
        write=made(write_tensor, shape=(1, 1), dtype=np.float32),
        read=read_scaled,
        key="compression_config",
    ),
    "float-quantized, channel [out,1]": Format(
        config=compressed("float-quantized", "channel", target="re:.*(proj)$"), write=write_channel, read=read_scaled
    ),
    "float-quantized, channel [out]": Format(
        config=compressed("float-quantized", "channel"),
        write=made(write_channel, flat=True, dtype=BF16),
        read=read_scaled,
    ),
    "float-quantized, block": Format(
        config=compressed("float-quantized", "block", block_structure=list(BLOCK)),
        write=made(write_block, name="weight_scale"),
        read=made(read_block, name="weight_scale"),
    ),
    "fp8, blocks": Format(config=BLOCKS, write=write_block, read=read_block),
    "fp8, blocks, bfloat16": Format(config=BLOCKS, write=made(write_block, dtype=BF16), read=read_block),
    "fp8, blocks, ue8m0": Format(
        config=BLOCKS | {"scale_fmt": "ue8m0"},
        write=made(write_block, dtype=ml_dtypes.float8_e8m0fnu),
        read=read_block,
    ),
    "fp8, tensor": Format(config=FP8, write=made(write_tensor, shape=(), dtype=np.float32), read=read_scaled),
    "fbgemm_fp8": Format(
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        write=write_channel,
        read=read_scaled,
    ),
    "modelopt": Format(
        config={"quant_method": "modelopt", "quant_algo": "FP8"},
        write=made(write_tensor, shape=(), dtype=np.float32),
        read=read_scaled,
    ),
    "int-quantized": Format(
        config=compressed("int-quantized", "channel", kind="int"), write=write_int8, read=read_int8
    ),
    "int-quantized, asymmetric": Format(
        config=compressed("int-quantized", "channel", kind="int", symmetric=False),
        write=made(write_int8, asymmetric=True),
        read=read_int8,
    ),
    "pack-quantized": packed(),
    "pack-quantized, zeros": packed(asymmetric=True),
    "pack-quantized, order": packed(order=True),
    "pack-quantized, zeros and order": packed(asymmetric=True, order=True),
    "pack-quantized, channel": packed(group=None),
    "pack-quantized, 8 bits": packed(bits=8, asymmetric=True),
    "gptq": gptq(),
    "gptq_v2": gptq(form="gptq_v2"),
    "gptq, order": gptq(order=True),
    "gptq, 8 bits, one group": gptq(bits=8, group=None),
    "awq": Format(
        config={"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        write=write_awq,
        read=read_awq,
    ),
}
