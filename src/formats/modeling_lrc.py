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
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


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
    """A linear whose weight is `scales * (codes - zeros)`; `scheme` reads `int4-g128-asym` or `nf4-g64`."""
    def __init__(self, name, shape, scheme, bias, like):
        super().__init__(name)
        (out_features, in_features), (levels, group, *asym) = shape, scheme.split("-")
        self.in_features, self.out_features, self.levels = in_features, out_features, levels
        self.bits = 4 if levels == "nf4" else int(levels[3:])
        self.group = in_features if group == "channel" else min(int(group[1:]), in_features)
        groups = -(-in_features // self.group)
        buffer = lambda width, dtype: _unfilled((out_features, width), dtype)
        self.register_buffer("codes", buffer((in_features * self.bits + 7) // 8, torch.uint8))
        self.register_buffer("scales", buffer(groups, torch.float16))
        self.register_buffer("zeros", buffer((groups * self.bits + 7) // 8, torch.uint8) if asym else None)
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None

    def checks(self, cheap):
        checks = {"codes": _is_filled(self.codes), "scales": self.scales.isfinite().all()}
        return checks if self.zeros is None else checks | {"zeros": _is_filled(self.zeros)}

    def weight(self):
        codes, scales = _unpack(self.codes, self.bits, self.in_features), self.scales.float()
        spread = lambda per_group: per_group.repeat_interleave(self.group, dim=1)[:, : self.in_features]
        if self.levels == "nf4":
            return torch.tensor(_NF4, device=codes.device)[codes.long()] * spread(scales)
        zeros = 2 ** (self.bits - 1) if self.zeros is None else spread(_unpack(self.zeros, self.bits, scales.shape[1]))
        return (codes - zeros) * spread(scales)

    def forward(self, x):
        if not self.is_filled:
            self.check(x)
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)


class LowRankLinear(nn.Module):
    """`y = lr_b(lr_a(x))`: lr_a is (rank, in), lr_b is (out, rank) and has the bias."""
    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        self.out_features, self.in_features = shape
        self.lr_a = make(".lr_a", (entry["rank"], self.in_features), False)
        self.lr_b = make(".lr_b", (self.out_features, entry["rank"]), bias is not None)

    def forward(self, x):
        return self.lr_b(self.lr_a(x))


class BorrowingLinear(nn.Module):
    """`y = lr_b(owner.lr_a(x))`: another linear with the same input owns and stores lr_a."""
    def __init__(self, name, make, shape, bias, entry):
        super().__init__()
        self.out_features, self.in_features = shape
        self.owner = ()  # a tuple, so that its modules are not registered a second time
        self.lr_b = make(".lr_b", (self.out_features, entry["rank"]), bias is not None)

    def forward(self, x):
        return self.lr_b(self.owner[0].lr_a(x))


class CompensatedLinear(nn.Module):
    """`y = base(x) + lr_b(lr_a(x))`; the base has the bias. vLLM multiplies by base and lr_a at once, by this very line."""
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


_LAYOUTS = {"factors": LowRankLinear, "pivot": PivotLinear, "monarch": MonarchLinear}


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


def _unstack(model, modules):
    """Unstacks all experts if any was compressed, because files are read by one set of names. Returns whether it did."""
    compressed = [name.rsplit(".", 1)[1] for name in modules if ".experts." in name]
    stacked = [name for name, module in model.named_modules() if hasattr(module, "gate_up_proj") and name.endswith(".experts")]
    if not compressed or not stacked:
        return False
    names = ("w1", "w3", "w2") if compressed[0] in ("w1", "w2", "w3") else ("gate_proj", "up_proj", "down_proj")
    for name in stacked:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(model.get_submodule(name), names))
    return True


def _renamed(model, name):
    """The name in memory of a module in a multimodal model's files, by the table that transformers 5 loads them with."""
    for rename in _renames.get_model_conversion_mapping(model) if _renames else ():
        if isinstance(rename, _renames.WeightRenaming):
            name, _ = rename.rename_source_key(name)
    return name


def _find(model, name):
    """The module for a name in the checkpoint; base models are saved with and without their prefix."""
    prefix = model.base_model_prefix + "."
    for known in (name, name.replace(".block_sparse_moe.", ".mlp."), _renamed(model, name)):
        for candidate in (known, prefix + known, known.removeprefix(prefix)):
            with contextlib.suppress(AttributeError):
                return candidate, model.get_submodule(candidate)
    return None, None


def _replacement(name, linear, entry, quantized, shared):
    shape, bias = _shape(linear), linear.bias is not None
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device}

    def make(part, shape, bias):
        """The linear that the checkpoint stores under the name and `part`."""
        if name + part in quantized:
            return QuantizedLinear(name + part, shape, quantized[name + part]["scheme"], bias, like)
        return nn.Linear(shape[1], shape[0], bias=bias, **like)

    if "rank" not in entry:
        return make("", shape, bias)
    layout = CompensatedLinear if entry.get("base") else _LAYOUTS[entry.get("layout", "factors")]
    if f"{name}.lr_a.weight" in shared:
        layout = BorrowingLinear
    return layout(name, make, shape, linear.bias, entry)


@functools.cache
def _variant(cls, pattern):
    """A class like `cls`, for its instances whose linears have the kinds in `pattern`."""
    reduce = lambda module: (_new_variant, (cls, pattern), module.__dict__)
    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce__": reduce, "lrc_pattern": pattern}
    return type(cls.__name__, (cls,), own)


def _new_variant(cls, pattern):
    variant = _variant(cls, pattern)
    return variant.__new__(variant)


def _tell_apart(model):
    """Gives parents of replaced linears one class per pattern: vLLM rewrites all modules of a class like the first."""
    own = (QuantizedLinear, BorrowingLinear, CompensatedLinear, SplitLinear, *_LAYOUTS.values())
    kind = lambda cls: (cls.__name__, getattr(cls, "lrc_pattern", ()))
    for module in reversed(list(model.modules())):  # children before their parents
        pattern = tuple((name, *kind(type(child))) for name, child in module.named_children() if isinstance(child, own))
        if pattern and not isinstance(module, transformers.PreTrainedModel):
            module.__class__ = _variant(type(module), pattern)


def _unfill(model):
    """Marks the buffers that transformers 5 did not find in the files, which otherwise keep whatever was in memory."""
    checked = (module for module in model.modules() if isinstance(module, CheckedModule))
    buffers = [buffer for module in checked for buffer in module.buffers(recurse=False)]
    missing = [buffer for buffer in buffers if not getattr(buffer, "_is_hf_initialized", False)]
    if len(missing) < len(buffers):  # transformers 4 sets no flags, and leaves buffers as they were made
        for buffer in missing:
            buffer.copy_(_unfilled(buffer.shape, buffer.dtype))


# A style that transformers does not have, so that it refuses these models: its rules for tensor parallelism are the same for all blocks.
_NOT_IN_TRANSFORMERS = "lrc_not_split_by_transformers"


def _style(plan, name):
    """The style of a dense linear in a plan."""
    matches = lambda rule: re.fullmatch(re.escape(rule).replace(r"\*", r"\d+"), name)
    return next((style for rule, style in plan.items() if matches(rule)), "replicate")


def _rules(name, module, style):
    """The styles of the parts of a module that replaced a linear of this style."""
    first, last = (style if style.startswith(way) else "replicate" for way in ("rowwise", "colwise"))
    parts = {"base": style, "lr_a": first, "lr_b": last, "lr_p": first, "lr_t": "replicate", "lr_r": "replicate", "lr_l": "replicate"}
    return {f"{name}.{part}": parts.get(part, "replicate") for part, _ in module.named_children()}


def _tensor_parallel():
    """The rank of this device and the number of devices, if vLLM or SGLang splits linears across devices."""
    for name in ("vllm.distributed.parallel_state", "sglang.srt.distributed.parallel_state"):
        state = sys.modules.get(name)
        if state is not None and state.model_parallel_is_initialized():
            return state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
    return 0, 1


def _split(model, replaced):
    """Plans the tensor parallelism of replaced linears, and refuses those that would then compute something else."""
    plan, rules = model._tp_plan or {}, {}
    for name, module in replaced.items():
        rules |= _rules(name, module, _style(plan, name))
    # vLLM takes the first rule that a name begins with, so the rules of parts precede the rule of the whole.
    model._tp_plan = rules | plan | dict.fromkeys(replaced, _NOT_IN_TRANSFORMERS)
    rank, size = _tensor_parallel()
    if size == 1:
        return
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", None) or size
    if heads % size:
        raise ValueError(f"{heads} heads of keys and values cannot be split across {size} devices")
    for name, module in replaced.items():
        is_quantized = any(isinstance(child, QuantizedLinear) for child in module.modules())
        if is_quantized or not isinstance(module, (LowRankLinear, PivotLinear)):
            raise ValueError(
                f"`{name}` cannot be split across {size} devices, which factors and pivots that are not quantized can be: "
                "run it on one, or write it with `lrc export FOLDER --format dense -o OUT`"
            )
        if isinstance(module, PivotLinear) and _style(plan, name) == "colwise":
            module.share = (rank, size)


def _compress(model):
    lrc = model.config.lrc
    for stack in lrc.get("stacks") or ():
        raise ValueError(
            f"the experts of `{stack}` are stored one by one, which transformers has no modules for: "
            "`lrc export FOLDER --format dense -o OUT` stacks them again"
        )
    _inherit_renames(keep_stacks=not _unstack(model, lrc["modules"]))
    quantized, shared = lrc.get("quantized", {}), lrc.get("shared", {})
    replaced, by_name = {}, {}
    for name, entry in [*lrc.get("split", {}).items(), *lrc["modules"].items()]:  # modules may be parts of a split linear
        found, linear = _find(model, name)
        if found is None:
            continue  # a head, in a model loaded without one
        module = SplitLinear(linear, entry) if "parts" in entry else _replacement(name, linear, entry, quantized, shared)
        parent, _, child = found.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
        replaced[found] = by_name[name] = module
    for part, owner in shared.items():
        if (borrower := by_name.get(part.removesuffix(".lr_a.weight"))) is not None:
            borrower.owner = (by_name[owner.removesuffix(".lr_a.weight")],)
    _split(model, replaced)
    _tell_apart(model)


class LrcConfig(_BaseConfig):
    model_type = "lrc_" + _BaseConfig.model_type


class _Compressed:
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _compress(self)

    def _initialize_missing_keys(self, *args, **kwargs):
        super()._initialize_missing_keys(*args, **kwargs)
        _unfill(self)


class LrcModel(_Compressed, _BaseModel):
    config_class = LrcConfig


class LrcForCausalLM(_Compressed, _Base):
    config_class = LrcConfig


def _inherit_renames(keep_stacks):
    """transformers 5 renames the tensors of some families when it loads them, by class and by model type, and stacks experts."""
    if _renames is None:
        return
    names = [(LrcForCausalLM.__name__, _Base.__name__), (LrcModel.__name__, _BaseModel.__name__)]
    for own, base in [*names, (LrcConfig.model_type, _BaseConfig.model_type)]:
        found = _renames.get_checkpoint_conversion_mapping(base)
        if found is None:
            # An entry without renames would hide the entry of the model type, and so would the entry of a model loaded earlier.
            (getattr(_renames, "_checkpoint_conversion_mapping_cache", None) or {}).pop(own, None)
            continue
        if not keep_stacks:
            found = [r for r in found if not any(".experts" in target for target in r.target_patterns)]
        _renames.register_checkpoint_conversion_mapping(own, found, overwrite=True)
