"""Runs a checkpoint whose linears were compressed by lrc in mlx-lm: they take their places in the model that it has for the source.

Load with `mlx_lm.load(folder, trust_remote_code=True)`, or run `mlx_lm.generate --trust-remote-code --model folder`.
"""

import importlib

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING
from transformers import CONFIG_MAPPING, AutoConfig

_TYPE = "@TYPE@"
_base = importlib.import_module("mlx_lm.models." + MODEL_REMAPPING.get(_TYPE, _TYPE))

_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def _linear(shape, bias):
    """A linear without values, which the files have; its sides may be 0."""
    rows, columns = shape
    linear = nn.Linear(1, 1, bias=bias)
    linear.weight = mx.zeros((rows, columns))
    if bias:
        linear.bias = mx.zeros((rows,))
    return linear


class Codes:
    """The codes of a matrix: `scales * (codes - zeros)`, by a scheme such as `int4-g128-asym`, `nf4-g64` or `int4-g64-2of4`."""
    def __init__(self, entry):
        (self.rows, self.columns), (levels, group, *rest) = entry["shape"], entry["scheme"].split("-")
        self.dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}.get(entry["dtype"], mx.float32)
        self.is_nf4, self.sparse = levels == "nf4", "2of4" in rest
        self.bits = 4 if self.is_nf4 else int(levels[3:])
        self.group = self.columns if group == "channel" else min(int(group[1:]), self.columns)
        whole = self.columns % self.group == 0 and self.columns * self.bits % 32 == 0
        plain = not self.is_nf4 and not self.sparse and self.bits in (2, 3, 4, 8)
        self.is_native = plain and whole and self.group in (32, 64, 128)

    def linear(self, bias):
        if not self.is_native:
            return _linear((self.rows, self.columns), bias)
        return nn.QuantizedLinear(self.columns, self.rows, bias=bias, group_size=self.group, bits=self.bits)

    def embedding(self):
        if not self.is_native:
            return nn.Embedding(self.rows, self.columns)
        return nn.QuantizedEmbedding(self.rows, self.columns, group_size=self.group, bits=self.bits)

    def weights(self, codes, scales, zeros):
        """Codes of mlx, or a matrix of floats where it has none like these."""
        scales = scales.astype(mx.float32)
        zeros = 2.0 ** (self.bits - 1) if zeros is None else _unpack(zeros, self.bits, scales.shape[1]).astype(mx.float32)
        if self.is_native:
            biases = -scales * zeros
            return {"weight": codes.view(mx.uint32), "scales": scales.astype(self.dtype), "biases": biases.astype(self.dtype)}
        spread = lambda per_group: mx.repeat(per_group, self.group, axis=1)[:, : self.columns]
        kept = self.columns // 4 * 2 + min(self.columns % 4, 2) if self.sparse else self.columns
        width = (kept * self.bits + 7) // 8
        values = _unpack(codes[:, :width], self.bits, kept)
        if self.sparse:
            # A row has the codes of two in every four columns, then a bit for each column.
            mask = _unpack(codes[:, width:], 1, self.columns)
            places = mx.maximum(mx.cumsum(mask.astype(mx.int32), axis=1) - 1, 0)
            spaced = mx.take_along_axis(values, places, axis=1)
            values = mx.where(mask == 1, spaced, mx.array(2 ** (self.bits - 1), dtype=values.dtype))
        if self.is_nf4:
            return {"weight": (mx.array(_NF4)[values] * spread(scales)).astype(self.dtype)}
        zeros = zeros if isinstance(zeros, float) else spread(zeros)
        return {"weight": ((values.astype(mx.float32) - zeros) * spread(scales)).astype(self.dtype)}


def _unpack(packed, bits, columns):
    """Codes (rows, columns) from rows of bytes, low bits first; a code may run across bytes."""
    stream = ((packed[..., None] >> mx.arange(8, dtype=mx.uint8)) & 1).reshape(len(packed), -1)[:, : columns * bits]
    return (stream.reshape(len(packed), columns, bits).astype(mx.uint32) << mx.arange(bits, dtype=mx.uint32)).sum(-1)


def _matrix(linear):
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    return mx.dequantize(linear.weight, linear.scales, linear.biases, group_size=linear.group_size, bits=linear.bits)


class LowRankLinear(nn.Module):
    """`y = lr_b(lr_a(x))`: lr_a is (rank, in), lr_b is (out, rank) and has the bias."""
    def __init__(self, make, shape, bias, entry):
        super().__init__()
        self.lr_a = make(".lr_a", (entry["rank"], shape[1]), False)
        self.lr_b = make(".lr_b", (shape[0], entry["rank"]), bias)

    def __call__(self, x):
        return self.lr_b(self.lr_a(x))


class LowRankEmbedding(LowRankLinear):
    """Looks up rows of a table of low rank, which projects as a linear where the head is tied to it."""
    def __call__(self, ids):
        return _matrix(self.lr_b)[ids] @ _matrix(self.lr_a)

    def as_linear(self, x):
        return LowRankLinear.__call__(self, x)


class BorrowingLinear(nn.Module):
    """`y = lr_b(owner.lr_a(x))`: another linear with the same input owns and stores lr_a."""
    OWNED = ".lr_a.weight"

    def __init__(self, make, shape, bias, entry):
        super().__init__()
        self.lr_b = make(".lr_b", (shape[0], entry["rank"]), bias)
        self.owner = None  # a function, so that its modules are not registered a second time

    def __call__(self, x):
        return self.lr_b(self.owner().lr_a(x))


class CompensatedLinear(nn.Module):
    """`y = base(x) + lr_b(lr_a(x))`; the base has the bias."""
    def __init__(self, make, shape, bias, entry):
        super().__init__()
        self.base = make(".base", shape, bias)
        self.lr_a = make(".lr_a", (entry["rank"], shape[1]), False)
        self.lr_b = make(".lr_b", (shape[0], entry["rank"]), False)

    def __call__(self, x):
        return self.base(x) + self.lr_b(self.lr_a(x))


class PivotLinear(nn.Module):
    """`y = concat(p, lr_t(p))[lr_order] + bias` with `p = lr_p(x)`: some rows of the matrix, and the others in terms of them."""
    def __init__(self, make, shape, bias, entry):
        super().__init__()
        rank = entry["rank"]
        self.lr_p = make(".lr_p", (rank, shape[1]), False)
        self.lr_t = make(".lr_t", (shape[0] - rank, rank), False)
        self.lr_order = mx.zeros((shape[0],), dtype=mx.int32)
        if bias:
            self.bias = mx.zeros((shape[0],))

    def __call__(self, x):
        p = self.lr_p(x)
        y = mx.take(mx.concatenate([p, self.lr_t(p)], axis=-1), self.lr_order, axis=-1)
        return y + self.bias if "bias" in self else y


class MonarchLinear(nn.Module):
    """A matrix of `blocks` by `blocks` blocks of one rank, as two block-diagonal ones with a permutation between them."""
    def __init__(self, make, shape, bias, entry):
        super().__init__()
        self.blocks, rank = entry["blocks"], entry["rank"]
        self.lr_r = make(".lr_r", (self.blocks**2 * rank, shape[1] // self.blocks), False)
        self.lr_l = make(".lr_l", (shape[0], self.blocks * rank), False)
        if bias:
            self.bias = mx.zeros((shape[0],))

    def __call__(self, x):
        right, left = (mx.unflatten(_matrix(part), 0, (self.blocks, -1)) for part in (self.lr_r, self.lr_l))
        slices = mx.unflatten(x, -1, (self.blocks, 1, -1))  # (..., input slice, 1, in / blocks)
        p = (slices @ right.swapaxes(-1, -2)).squeeze(-2)  # (..., input slice, output slice and rank)
        p = mx.unflatten(p, -1, (self.blocks, -1)).swapaxes(-3, -2).flatten(-2)
        y = (p[..., None, :] @ left.swapaxes(-1, -2)).squeeze(-2).flatten(-2)
        return y + self.bias if "bias" in self else y


class BlastLinear(nn.Module):
    """A matrix of `blocks` by `blocks` blocks `U_i diag(s_ij) V_j^T`: a row of blocks shares `U_i`, a column `V_j`."""
    def __init__(self, make, shape, bias, entry):
        super().__init__()
        self.blocks, rank = entry["blocks"], entry["rank"]
        self.lr_v = make(".lr_v", (self.blocks * rank, shape[1] // self.blocks), False)
        self.lr_s = make(".lr_s", (self.blocks**2, rank), False)
        self.lr_u = make(".lr_u", (shape[0], rank), False)
        if bias:
            self.bias = mx.zeros((shape[0],))

    def __call__(self, x):
        right, scales, left = (mx.unflatten(_matrix(part), 0, (self.blocks, -1)) for part in (self.lr_v, self.lr_s, self.lr_u))
        slices = mx.unflatten(x, -1, (self.blocks, 1, -1))  # (..., input slice, 1, in / blocks)
        p = (slices @ right.swapaxes(-1, -2)).swapaxes(-3, -2)  # (..., 1, input slice, rank)
        p = (p * scales).sum(-2)  # (..., output slice, rank)
        y = (p[..., None, :] @ left.swapaxes(-1, -2)).squeeze(-2).flatten(-2)
        return y + self.bias if "bias" in self else y


class SplitLinear(nn.Module):
    """A linear that is stored as parts, whose rows are concatenated or alternate in runs of `run` rows."""
    def __init__(self, linear, entry):
        super().__init__()
        self.names, self.run = list(entry["parts"]), entry["run"]
        for name, rows in entry["parts"].items():
            self[name] = _linear((rows, linear.weight.shape[1]), False)
        if "bias" in linear:
            self.bias = linear.bias

    def __call__(self, x):
        y = [self[name](x) for name in self.names]
        if self.run:
            y = mx.stack([mx.unflatten(part, -1, (-1, self.run)) for part in y], axis=-2).flatten(-3)
        else:
            y = mx.concatenate(y, axis=-1)
        return y + self.bias if "bias" in self else y


_LAYOUTS = {"factors": LowRankLinear, "pivot": PivotLinear, "monarch": MonarchLinear, "blast": BlastLinear}


def _find(model, name):
    """The parent of the module for a name in the checkpoint, and the name in it; base models are saved with and without their prefix."""
    for path in (name, "model." + name):
        parent, parts = model, path.split(".")
        for part in parts[:-1]:
            parent = (parent[int(part)] if part.isdigit() else parent.get(part)) if isinstance(parent, (dict, list)) else None
        if isinstance(parent, dict) and parts[-1] in parent:
            return parent, parts[-1]
    raise ValueError(
        f"`{name}` is not in mlx-lm's model `{_TYPE}` as a module of its own: write the whole matrices with "
        "`lrc export FOLDER --format dense -o OUT`"
    )


def _replacement(name, linear, entry, quantized, shared):
    shape, bias = linear.weight.shape, "bias" in linear

    def make(part, shape, bias):
        """The linear that the checkpoint stores under the name and `part`."""
        codes = quantized.get(name + part)
        return _linear(shape, bias) if codes is None else Codes(codes).linear(bias)

    if isinstance(linear, nn.Embedding):
        return LowRankEmbedding(make, shape, False, entry) if "rank" in entry else Codes(quantized[name]).embedding()
    if "rank" not in entry:
        return make("", shape, bias)
    layout = CompensatedLinear if entry.get("base") else _LAYOUTS[entry.get("layout", "factors")]
    return (BorrowingLinear if name + BorrowingLinear.OWNED in shared else layout)(make, shape, bias, entry)


# Linears whose rows are heads, and the attribute that has their number.
_HEADS = {"q_proj": "n_heads", "k_proj": "n_kv_heads"}


def _resize(model, shapes):
    """Gives linears of blocks with widths of their own their shapes: the classes of mlx-lm build all blocks alike."""
    for name, shape in shapes.items():
        parent, child = _find(model, name)
        rows = parent[child].weight.shape[0]
        if child in _HEADS:
            setattr(parent, _HEADS[child], shape[0] * getattr(parent, _HEADS[child]) // rows)
        parent[child] = _linear(shape, "bias" in parent[child])


def _compress(model, lrc):
    quantized, shared, by_name = lrc.get("quantized", {}), lrc.get("shared", {}), {}
    _resize(model, lrc.get("shapes", {}))
    for name, entry in [*lrc.get("split", {}).items(), *lrc["modules"].items()]:  # modules may be parts of a split linear
        parent, child = _find(model, name)
        linear = parent[child]
        module = SplitLinear(linear, entry) if "parts" in entry else _replacement(name, linear, entry, quantized, shared)
        parent[child] = by_name[name] = module
    for part, owner in shared.items():
        lender = by_name[owner.removesuffix(BorrowingLinear.OWNED)]
        by_name[part.removesuffix(BorrowingLinear.OWNED)].owner = lambda lender=lender: lender


class LrcConfig(CONFIG_MAPPING[_TYPE]):
    """The config as transformers reads it for the tokenizer; the one of `modeling_lrc.py` needs torch."""
    model_type = "lrc_" + _TYPE


AutoConfig.register(LrcConfig.model_type, LrcConfig, exist_ok=True)


def _settings(config):
    """Settings under the names that models of mlx-lm read, where transformers 5 only writes others."""
    rope = dict(config.get("rope_parameters") or {})
    theta, share = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    named = {"rope_theta": theta, "rotary_emb_base": theta, "partial_rotary_factor": share, "rotary_pct": share, "rope_scaling": scaling}
    named["n_ctx"] = config.get("n_positions")
    return {name: value for name, value in named.items() if value is not None} | config | {"model_type": _TYPE}


class ModelArgs:
    @staticmethod
    def from_dict(config):
        args = _base.ModelArgs.from_dict(_settings(config))
        args.lrc = config["lrc"]
        return args


class Model(_base.Model):
    def __init__(self, args):
        super().__init__(args)
        _compress(self, args.lrc)

    def sanitize(self, weights):
        for name, entry in self.args.lrc.get("quantized", {}).items():
            if name + ".codes" in weights:
                codes, scales, zeros = (weights.pop(f"{name}.{part}", None) for part in ("codes", "scales", "zeros"))
                weights |= {f"{name}.{part}": values for part, values in Codes(entry).weights(codes, scales, zeros).items()}
        return super().sanitize(weights) if hasattr(super(), "sanitize") else weights
