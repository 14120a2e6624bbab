"""Weights as other tools quantize them, with the values that those tools compute from them.

gptqmodel (7.7), AutoAWQ (0.2.9), compressed-tensors, bitsandbytes and transformers compute the values themselves. gptqmodel and AutoAWQ
install only beside a GPU toolkit, but their sources run without one: unpack them, and name their folders in `PYTHONPATH` (AutoAWQ's
`awq/utils`, whose `packing_utils` imports nothing but torch). Two cases have the formula written out: a group size that gptqmodel refuses, and
the 3-bit zeros of gptqmodel before it subtracted one from every code.

Writes `quantized.safetensors` beside itself, with tensors `CASE/NAME` and every seventh value `CASE//NAME` of the weights, and `quantized.json`
with the `quantization_config` of every case.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
GENERATOR = torch.Generator().manual_seed(20)
tensors, settings = {}, {}


def case(name, config, stored, values):
    settings[name] = config
    for key, tensor in stored.items():
        tensors[f"{name}/{key}"] = tensor.contiguous().clone()
    for key, tensor in values.items():
        tensors[f"{name}//{key}"] = tensor.to(torch.float32).reshape(-1)[::7].clone()


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=GENERATOR)


def packed(codes, bits):
    """Rows of codes as streams of bits, low bits first, in words of 32 bits."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (at * bits) for at, code in enumerate(row))
        rows.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).astype(np.int64).astype(np.uint32).view(np.int32))


def gptq(name, bits, group, zeros, version, order=None, stored_zeros=None):
    """`stored_zeros`: what an older version stores for `zeros`, of which today's gptqmodel is not asked."""
    rows, cols = 32 if bits == 3 else 16, 64
    groups = -(-cols // group)
    index = torch.tensor([i // group for i in range(cols)] if order is None else order, dtype=torch.int32)
    codes, scales = integers(2**bits, cols, rows), normal(groups, rows).abs().to(torch.float16) / 8
    zeros = zeros(groups, rows)
    # Version 1 is what the library's own conversion gives, zeros that wrap around included.
    qzeros = packed(zeros if stored_zeros is None else stored_zeros(groups, rows), bits)
    module = gptq_module(bits, group, order is not None, packed(codes.T, bits).T.contiguous(), qzeros, scales, index)
    if version == "gptq" and stored_zeros is None:
        qzeros = to_version_1(module, bits)
    stored = {"m.qweight": module.qweight, "m.qzeros": qzeros, "m.scales": scales, "m.g_idx": index}
    if stored_zeros is None and group in module.SUPPORTS_GROUP_SIZE:
        values = gptq_values(bits, group, order is not None, stored, version)
    else:
        long = index.long()
        values = ((codes - zeros[long]).to(torch.float32) * scales[long].to(torch.float32)).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order is not None}
    case(name, config | {"checkpoint_format": version}, stored, {"m.weight": values})


def gptq_module(bits, group, desc_act, qweight, qzeros, scales, index):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    named = group if group in TorchLinear.SUPPORTS_GROUP_SIZE else -1
    shape = {"in_features": index.numel(), "out_features": scales.shape[1]}
    module = TorchLinear(bits=bits, group_size=named, sym=False, desc_act=desc_act, **shape, bias=False, register_buffers=True)
    module.qweight, module.qzeros = qweight.clone(), qzeros.clone()
    # The factors of a product in f32, so that its rounding to f16 is not what is compared.
    module.scales, module.g_idx = scales.to(torch.float32), index.clone()
    return module


def to_version_1(module, bits):
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
    from gptqmodel.quantization import QuantizeConfig

    convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
    return module.qzeros


def gptq_values(bits, group, desc_act, stored, version):
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    names = ("m.qweight", "m.qzeros", "m.scales", "m.g_idx")
    module = gptq_module(bits, group, desc_act, *(stored[name] for name in names))
    if version == "gptq":
        module.qzero_format(format=1)
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module._init_wf_unsqueeze_buffers()
    return module.dequantize_weight().T


def all_gptq():
    def middle(bits):
        return lambda *shape: torch.full(shape, 2 ** (bits - 1))

    def any_of(bits):
        # Zero itself borrows from its neighbor in version 1, but for 3 bits.
        return lambda *shape: integers(2**bits, *shape)

    for bits in (2, 3, 4, 8):
        gptq(f"gptq-{bits}-v1-symmetric", bits, 32, middle(bits), "gptq")
        gptq(f"gptq-{bits}-v1", bits, 32, any_of(bits), "gptq")
        gptq(f"gptq-{bits}-v2", bits, 32, any_of(bits), "gptq_v2")
    gptq("gptq-3-v1-of-old", 3, 32, middle(3), "gptq", stored_zeros=lambda *shape: torch.zeros(shape, dtype=torch.int64))
    gptq("gptq-4-channel", 4, 64, any_of(4), "gptq_v2")
    gptq("gptq-4-uneven", 4, 24, any_of(4), "gptq_v2")
    order = [int(g) for g in torch.randperm(64, generator=GENERATOR) // 16]
    gptq("gptq-4-desc_act", 4, 16, any_of(4), "gptq", order)


def awq():
    from packing_utils import dequantize_gemm

    rows, cols, group = 16, 64, 32
    codes, zeros = integers(16, cols, rows), integers(16, cols // group, rows)
    scales = (normal(cols // group, rows).abs() / 8).to(torch.float16)

    def words(matrix):
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        picked = matrix.reshape(matrix.shape[0], -1, 8)[:, :, order].reshape(matrix.shape)
        return packed(picked, 4)

    stored = {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": scales}
    values = dequantize_gemm(stored["m.qweight"], stored["m.qzeros"], scales.to(torch.float32), 4, group).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    case("awq", config, stored, {"m.weight": values})


def compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def of(name, form, weight, shape, **args):
        args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        low, high = shape(weight)
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        exact = {key: t.to(torch.float32) if key == "weight_scale" else t for key, t in stored.items()}
        values = compressor.decompress(exact, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": args.model_dump(mode="json", exclude_none=True), "format": form}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        case(f"compressed-{name}", config, {f"m.{k}": t for k, t in stored.items()}, {"m.weight": values})

    def spread(*dims):
        return lambda weight: (weight.amin(dims), weight.amax(dims))

    def rows(weight):
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)

    def groups(weight):
        weight = weight.reshape(weight.shape[0], -1, 16)
        return weight.amin(-1), weight.amax(-1)

    def blocks(weight):
        weight = weight.reshape(2, weight.shape[0] // 2, 3, weight.shape[1] // 3)
        return weight.amin((1, 3)), weight.amax((1, 3))

    weight = (normal(10, 48) / 8 + 0.05).to(torch.bfloat16)
    for bits in (4, 8):
        for symmetric in (True, False):
            kind = f"int{bits}" + ("" if symmetric else "-asym")
            common = {"num_bits": bits, "type": "int", "symmetric": symmetric}
            of(f"{kind}-g16", "pack-quantized", weight, groups, strategy="group", group_size=16, **common)
            of(f"{kind}-channel", "pack-quantized", weight, rows, strategy="channel", **common)
    eight = {"num_bits": 8, "type": "int"}
    of("plain-int8", "int-quantized", weight, rows, strategy="channel", symmetric=True, **eight)
    of("plain-int8-asym", "int-quantized", weight, rows, strategy="channel", symmetric=False, **eight)
    floats = {"num_bits": 8, "type": "float", "symmetric": True}
    of("fp8-tensor", "float-quantized", weight, spread(0, 1), strategy="tensor", **floats)
    of("fp8-channel", "float-quantized", weight, rows, strategy="channel", **floats)
    of("fp8-block", "float-quantized", weight, blocks, strategy="block", block_structure=[5, 16], **floats)


def fp8():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scales = (normal(16, 48) * 99).to(torch.float8_e4m3fn), normal(2, 3).abs()
    values = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
    case("fp8-block", config, {"m.weight": weight, "m.weight_scale_inv": scales}, {"m.weight": values})
    rows = normal(16, 1).abs()
    values = Fp8Dequantize(None)._dequantize_one(weight, rows, torch.float32)
    case("fbgemm", {"quant_method": "fbgemm_fp8"}, {"m.weight": weight, "m.weight_scale": rows}, {"m.weight": values})


def bitsandbytes():
    from bitsandbytes import functional as bnb

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            weight = normal(6, 64).to(torch.bfloat16)
            codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
            stored = {f"m.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            state.dtype = torch.float32
            name = f"bnb-{kind}" + ("-nested" if nested else "")
            values = bnb.dequantize_4bit(codes, state)
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
            case(name, config, stored | {"m.weight": codes}, {"m.weight": values})
    codes, scales, _ = bnb.int8_vectorwise_quant(normal(6, 64).to(torch.float16))
    stored = {"m.weight": codes, "m.SCB": scales, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    values = bnb.int8_vectorwise_dequant(codes, scales)
    case("bnb-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, {"m.weight": values})


def mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = integers(256, 2, 6, 2, 16).to(torch.uint8)
    scales = (integers(16, 2, 6, 2) + 118).to(torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    stored = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    case("mxfp4", {"quant_method": "mxfp4"}, stored, {"experts.down_proj": values})


for make in (all_gptq, awq, compressed_tensors, fp8, bitsandbytes, mxfp4):
    make()
save_file(tensors, HERE / "quantized.safetensors")
(HERE / "quantized.json").write_text(json.dumps(settings, indent=1) + "\n")
