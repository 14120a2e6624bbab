"""Runs a checkpoint whose linears were compressed by lrc: `W x` becomes `base x + B (A x)`; the rest is the base model.

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. The modules listed under `lrc` in
`config.json` are swapped for plain `nn.Linear`s and `QuantizedLinear`s, so that casts, device maps and saving work as usual.
"""

import contextlib
import functools
import re
import sys

import torch
import transformers
from torch import nn

_Base = getattr(transformers, "@BASE@")
_BaseConfig = _Base.config_class
_BaseModel = transformers.AutoModel._model_mapping[_BaseConfig]

try:
    from transformers import conversion_mapping as _renames
except ImportError:  # transformers 4 has no such table
    _renames = None


def _shape(linear):
    rows, columns = linear.weight.shape
    # nn.Linear stores (out, in), GPT-2's Conv1D (in, out).
    return (rows, columns) if isinstance(linear, (nn.Linear, nn.Embedding)) else (columns, rows)


_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def _unpack(packed, bits, columns):
    """Codes (rows, columns) from rows of bytes, low bits first; a code may run across bytes."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :columns].int()
    bit = torch.arange(8, device=packed.device)
    stream = ((packed.to(torch.int32).unsqueeze(-1) >> bit) & 1).flatten(1)[:, : columns * bits]
    return (stream.view(packed.shape[0], columns, bits) << bit[:bits]).sum(-1)


class CheckedModule(nn.Module):
    """A module that refuses to run before its buffers are filled from a checkpoint.

    Loaders account for parameters, not for buffers. So buffers are made on the default device, never on a parameter's, which may
    stay `meta`, and with values that lrc never writes. The first call checks them; a graph compiled before it has cheap checks.
    """
    is_filled = False

    def __init__(self, name):
        super().__init__()
        self.name = name

    def check(self, x):
        text = "`{}.{}` was not loaded, or is damaged: load the whole folder, as lrc wrote it".format
        if torch.compiler.is_compiling():
            for buffer, is_filled in self.checks(cheap=True).items():
                torch._assert_async(is_filled, text(self.name, buffer))
        elif isinstance(x, torch.Tensor) and not x.is_meta:  # else no result is computed
            missing = [buffer for buffer, values in self.named_buffers(recurse=False) if values.is_meta]
            missing = missing or [buffer for buffer, is_filled in self.checks(cheap=False).items() if not is_filled]
            if missing:
                raise RuntimeError(text(self.name, missing[0]))
            self.is_filled = True


# Sixteen bytes that never begin packed codes.
_UNFILLED = list(b"\x9e\x37\x79\xb9\x7f\x4a\x7c\x15\xf3\x9c\xc0\x60\x5c\xed\xc8\x34")


def _unfilled(shape, dtype):
    """Values that lrc never writes: scales that are NaN, negative positions, codes that begin with a mark."""
    if dtype != torch.uint8:
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)
    codes = torch.zeros(shape, dtype=dtype)
    if codes.numel() >= len(_UNFILLED):
        codes.view(-1)[: len(_UNFILLED)] = torch.tensor(_UNFILLED, dtype=dtype)
    return codes


def _is_filled(codes):
    if codes.numel() < len(_UNFILLED):
        return torch.ones((), dtype=torch.bool)
    return (codes.flatten()[: len(_UNFILLED)] != torch.tensor(_UNFILLED, dtype=torch.uint8, device=codes.device)).any()


class QuantizedLinear(CheckedModule):
    """A linear whose weight is `scales * (codes - zeros)`; `scheme` reads `int4-g128-asym`, `nf4-g64` or `int4-g64-2of4`."""
    def __init__(self, name, shape, scheme, bias, like):
        super().__init__(name)
        (out_features, in_features), (levels, group, *rest) = shape, scheme.split("-")
        self.in_features, self.out_features, self.levels = in_features, out_features, levels
        self.bits = 4 if levels == "nf4" else int(levels[3:])
        self.group = in_features if group == "channel" else min(int(group[1:]), in_features)
        groups = -(-in_features // self.group)
        buffer = lambda width, dtype: _unfilled((out_features, width), dtype)
        # With 2of4, a row has the codes of two in every four columns, then a bit for each column.
        self.sparse = "2of4" in rest
        self.kept = in_features // 4 * 2 + min(in_features % 4, 2) if self.sparse else in_features
        self.width = (self.kept * self.bits + 7) // 8
        self.register_buffer("codes", buffer(self.width + ((in_features + 7) // 8 if self.sparse else 0), torch.uint8))
        self.register_buffer("scales", buffer(groups, torch.float16))
        self.register_buffer("zeros", buffer((groups * self.bits + 7) // 8, torch.uint8) if "asym" in rest else None)
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None

    def checks(self, cheap):
        checks = {"codes": _is_filled(self.codes), "scales": self.scales.isfinite().all()}
        return checks if self.zeros is None else checks | {"zeros": _is_filled(self.zeros)}

    def weight(self, rows=slice(None)):
        packed, scales = self.codes[rows], self.scales[rows].float()
        codes = _unpack(packed[:, : self.width], self.bits, self.kept)
        if self.sparse:
            mask = _unpack(packed[:, self.width :], 1, self.in_features).bool()
            zeros = torch.full(mask.shape, 2 ** (self.bits - 1), dtype=codes.dtype, device=codes.device)
            codes = zeros.masked_scatter(mask, codes)
        spread = lambda per_group: per_group.repeat_interleave(self.group, dim=1)[:, : self.in_features]
        if self.levels == "nf4":
            return torch.tensor(_NF4, device=codes.device)[codes.long()] * spread(scales)
        zeros = 2 ** (self.bits - 1) if self.zeros is None else spread(_unpack(self.zeros[rows], self.bits, scales.shape[1]))
        return (codes - zeros) * spread(scales)

    def forward(self, x):
        if not self.is_filled:
            self.check(x)
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)


class LowRankLinear(nn.Module):
    """`y = lr_b(lr_a(x))`: lr_a is (rank, in), lr_b is (out, rank) and has the bias."""
    SPLIT = {"lr_a": "rowwise", "lr_b": "colwise"}

    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        self.out_features, self.in_features = shape
        self.lr_a = make(".lr_a", (entry["rank"], self.in_features), False)
        self.lr_b = make(".lr_b", (self.out_features, entry["rank"]), bias is not None)

    def forward(self, x):
        return self.lr_b(self.lr_a(x))


class Embedding:
    """Looks up rows of a compressed table, which projects as a linear where the head is tied to it."""
    def like(self, embedding):
        self.dtype, scale = embedding.weight.dtype, getattr(embedding, "embed_scale", None)
        # Gemma scales inside its own class, by a buffer that no file fills: it is the root of the width.
        if isinstance(scale, torch.Tensor):
            scale = getattr(embedding, "scalar_embed_scale", embedding.embedding_dim**0.5)
        self.embed_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype, device="cpu").item()
        return self

    def forward(self, ids):
        rows = self.rows(ids.flatten()).to(self.dtype).unflatten(0, ids.shape)
        return rows if self.embed_scale is None else rows * self.embed_scale


class QuantizedEmbedding(Embedding, QuantizedLinear):
    def rows(self, ids):
        if not self.is_filled:
            self.check(ids)
        return self.weight(ids)

    def project(self, x):
        return QuantizedLinear.forward(self, x)


class LowRankEmbedding(Embedding, LowRankLinear):
    def rows(self, ids):
        some = lambda part, rows=slice(None): part.weight(rows) if isinstance(part, QuantizedLinear) else part.weight[rows]
        return some(self.lr_b, ids).to(self.dtype) @ some(self.lr_a).to(self.dtype)

    def project(self, x):
        return LowRankLinear.forward(self, x)


class TiedHead(nn.Module):
    """The head of a model whose compressed table serves it too; a bias is its own."""
    def __init__(self, table, bias):
        super().__init__()
        self.table, self.bias = (table,), bias  # no second registration of the table's parameters

    def forward(self, x):
        y = self.table[0].project(x)
        return y if self.bias is None else y + self.bias


class BorrowingLinear(nn.Module):
    """`y = lr_b(owner.lr_a(x))`: another linear with the same input owns and stores lr_a."""
    SPLIT, OWNED = {"lr_b": "colwise"}, ".lr_a.weight"

    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        self.out_features, self.in_features = shape
        self.owner = ()  # a tuple, so that its modules are not registered a second time
        self.lr_b = make(".lr_b", (self.out_features, entry["rank"]), bias is not None)

    def forward(self, x):
        return self.lr_b(self.owner[0].lr_a(x))


class CompensatedLinear(nn.Module):
    """`y = base(x) + lr_b(lr_a(x))`; the base has the bias. vLLM multiplies by base and lr_a at once, by this very line."""
    SPLIT = {"base": "", "lr_a": "rowwise", "lr_b": "colwise"}

    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        self.out_features, self.in_features = shape
        self.base = make(".base", shape, bias is not None)
        self.lr_a = make(".lr_a", (entry["rank"], self.in_features), False)
        self.lr_b = make(".lr_b", (self.out_features, entry["rank"]), False)

    def forward(self, x):
        return self.base(x) + self.lr_b(self.lr_a(x))


class PivotLinear(CheckedModule):
    """`y = concat(p, lr_t(p))[lr_order] + bias` with `p = lr_p(x)`: some rows of the matrix, and the others in terms of them.

    lr_p is (rank, in), lr_t is (out - rank, rank), lr_order (out) has the position of each output. `share` is None, or the
    rank of this device and the number of devices; each computes all outputs and keeps its own.
    """
    SPLIT = {"lr_p": "rowwise"}

    def __init__(self, name, make, shape, bias, entry):
        super().__init__(name)
        self.share = None
        (self.out_features, self.in_features), rank = shape, entry["rank"]
        self.lr_p = make(".lr_p", (rank, self.in_features), False)
        self.lr_t = make(".lr_t", (self.out_features - rank, rank), False)
        self.register_buffer("lr_order", _unfilled((self.out_features,), torch.int32))
        self.bias = bias

    def checks(self, cheap):
        if cheap:
            return {"lr_order": self.lr_order.amax() == self.out_features - 1}
        return {"lr_order": (self.lr_order.sort().values == torch.arange(len(self.lr_order), device=self.lr_order.device)).all()}

    def forward(self, x):
        if not self.is_filled:
            self.check(x)
        p, order, bias = self.lr_p(x), self.lr_order, self.bias
        if self.share is not None:
            rank, size = self.share
            order, bias = (None if whole is None else whole.chunk(size)[rank] for whole in (order, bias))
        y = torch.cat([p, self.lr_t(p)], dim=-1).index_select(-1, order)
        return y if bias is None else y + bias


class MonarchLinear(nn.Module):
    """A matrix of `blocks` by `blocks` blocks of one rank, as two block-diagonal ones with a permutation between them.

    lr_r is (blocks * blocks * rank, in / blocks), rows in the order (input slice, output slice, rank); lr_l is
    (out, blocks * rank), columns in the order (input slice, rank).
    """
    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        (self.out_features, self.in_features), self.blocks, rank = shape, entry["blocks"], entry["rank"]
        self.lr_r = make(".lr_r", (self.blocks**2 * rank, self.in_features // self.blocks), False)
        self.lr_l = make(".lr_l", (self.out_features, self.blocks * rank), False)
        self.bias = bias

    def forward(self, x):
        weights = (part.weight() if isinstance(part, QuantizedLinear) else part.weight for part in (self.lr_r, self.lr_l))
        right, left = (weight.to(x.dtype).unflatten(0, (self.blocks, -1)) for weight in weights)
        p = torch.einsum("...in,irn->...ir", x.unflatten(-1, (self.blocks, -1)), right)
        p = p.unflatten(-1, (self.blocks, -1)).transpose(-3, -2).flatten(-2)
        y = torch.einsum("...jr,jmr->...jm", p, left).flatten(-2)
        return y if self.bias is None else y + self.bias


class BlastLinear(nn.Module):
    """A matrix of `blocks` by `blocks` blocks `U_i diag(s_ij) V_j^T`: a row of blocks shares `U_i`, a column `V_j`.

    lr_v is (blocks * rank, in / blocks), rows in the order (input slice, rank); lr_s is (blocks * blocks, rank), rows in the order
    (output slice, input slice); lr_u is (out, rank).
    """
    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        (self.out_features, self.in_features), self.blocks, rank = shape, entry["blocks"], entry["rank"]
        self.lr_v = make(".lr_v", (self.blocks * rank, self.in_features // self.blocks), False)
        self.lr_s = make(".lr_s", (self.blocks**2, rank), False)
        self.lr_u = make(".lr_u", (self.out_features, rank), False)
        self.bias = bias

    def forward(self, x):
        parts = (part.weight() if isinstance(part, QuantizedLinear) else part.weight for part in (self.lr_v, self.lr_s, self.lr_u))
        right, scales, left = (weight.to(x.dtype).unflatten(0, (self.blocks, -1)) for weight in parts)
        p = torch.einsum("...jn,jrn->...jr", x.unflatten(-1, (self.blocks, -1)), right)
        y = torch.einsum("...ir,imr->...im", torch.einsum("...jr,ijr->...ir", p, scales), left).flatten(-2)
        return y if self.bias is None else y + self.bias


# Each class may say in SPLIT which of its parts are split across devices, if the linear that it replaced is split in that way: the first
# part along the inputs, the last along the outputs. All devices have the others.
_LAYOUTS = {"factors": LowRankLinear, "pivot": PivotLinear, "monarch": MonarchLinear, "blast": BlastLinear}


class SplitLinear(nn.ModuleDict):
    """A linear that is stored as parts, whose rows are concatenated or alternate in runs of `run` rows."""
    def __init__(self, linear, entry):
        (out_features, in_features), weight = _shape(linear), linear.weight
        like = {"dtype": weight.dtype, "device": weight.device}
        super().__init__({name: nn.Linear(in_features, rows, bias=False, **like) for name, rows in entry["parts"].items()})
        self.in_features, self.out_features = in_features, out_features
        self.run, self.bias = entry["run"], linear.bias

    def forward(self, x):
        y = [part(x) for part in self.values()]
        if self.run:
            y = torch.stack([part.unflatten(-1, (-1, self.run)) for part in y], dim=-2).flatten(-3)
        else:
            y = torch.cat(y, dim=-1)
        return y if self.bias is None else y + self.bias


class Experts(nn.ModuleList):
    """The experts of a block as separate modules; transformers 5 stacks their weights, but some now have other linears."""
    def __init__(self, stacked, names):
        super().__init__()
        (count, out, hidden), like = stacked.gate_up_proj.shape, {"dtype": stacked.gate_up_proj.dtype}
        like["device"] = stacked.gate_up_proj.device
        shapes = dict(zip(names, [(hidden, out // 2), (hidden, out // 2), (out // 2, hidden)]))
        for _ in range(count):
            self.append(nn.ModuleDict({name: nn.Linear(*shapes[name], bias=False, **like) for name in names}))
        self.names, self.act_fn = names, stacked.act_fn

    def forward(self, x, experts, weights):
        y = torch.zeros_like(x)
        for index in experts.unique().tolist():
            token, rank = torch.where(experts == index)
            gate, up, down = (self[index][name] for name in self.names)
            out = down(self.act_fn(gate(x[token])) * up(x[token]))
            y.index_add_(0, token, (out * weights[token, rank, None]).to(y.dtype))
        return y
