"""Runs a checkpoint whose linears were compressed by lrc: `W x` becomes `B (A x)`, everything else is the base model's.

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. The modules listed under `lrc` in
`config.json` are swapped for pairs of plain `nn.Linear`s, so that casts, device maps, tying and saving work as usual.
"""

import torch
import transformers
from torch import nn

_Base = getattr(transformers, "@BASE@")
_BaseConfig = _Base.config_class
_BaseModel = transformers.AutoModel._model_mapping[_BaseConfig]


def _shape(linear):
    rows, columns = linear.weight.shape
    # nn.Linear stores (out, in), GPT-2's Conv1D (in, out).
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


class LowRankLinear(nn.Module):
    """`y = lr_b(lr_a(x))`: lr_a is (rank, in), lr_b is (out, rank) and has the bias."""

    def __init__(self, linear, rank):
        super().__init__()
        out_features, in_features = _shape(linear)
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lr_a = nn.Linear(in_features, rank, bias=False, **like)
        self.lr_b = nn.Linear(rank, out_features, bias=linear.bias is not None, **like)

    def forward(self, x):
        return self.lr_b(self.lr_a(x))


class PivotLinear(nn.Module):
    """`y = concat(p, lr_t(p))[lr_order] + bias` with `p = lr_p(x)`: some rows of the matrix, and the others in terms of them.

    lr_p is (rank, in), lr_t is (out - rank, rank), lr_order (out) holds the place of each output.
    """

    def __init__(self, linear, rank):
        super().__init__()
        out_features, in_features = _shape(linear)
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lr_p = nn.Linear(in_features, rank, bias=False, **like)
        self.lr_t = nn.Linear(rank, out_features - rank, bias=False, **like)
        self.register_buffer("lr_order", torch.zeros(out_features, dtype=torch.int32, device=linear.weight.device))
        self.bias = linear.bias

    def forward(self, x):
        p = self.lr_p(x)
        y = torch.cat([p, self.lr_t(p)], dim=-1).index_select(-1, self.lr_order)
        return y if self.bias is None else y + self.bias


_LAYOUTS = {"factors": LowRankLinear, "pivot": PivotLinear}


def _find(model, name):
    """The module of a checkpoint's name; base models are saved with and without their prefix."""
    prefix = model.base_model_prefix + "."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    return None, None


def _compress(model):
    for name, entry in model.config.lrc["modules"].items():
        found, linear = _find(model, name)
        if found is None:
            continue  # a head, in a model loaded without one
        parent, _, child = found.rpartition(".")
        layout = _LAYOUTS[entry.get("layout", "factors")]
        setattr(model.get_submodule(parent), child, layout(linear, entry["rank"]))


class LrcConfig(_BaseConfig):
    model_type = "lrc_" + _BaseConfig.model_type


class LrcModel(_BaseModel):
    config_class = LrcConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _compress(self)


class LrcForCausalLM(_Base):
    config_class = LrcConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _compress(self)


def _inherit_renames():
    """transformers 5 renames the tensors of some families when it loads them, by class and by model type."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4 has no such table
        return
    names = [(LrcForCausalLM.__name__, _Base.__name__), (LrcModel.__name__, _BaseModel.__name__)]
    for own, base in [*names, (LrcConfig.model_type, _BaseConfig.model_type)]:
        renames = conversion_mapping.get_checkpoint_conversion_mapping(base) or []
        conversion_mapping.register_checkpoint_conversion_mapping(own, renames, overwrite=True)


_inherit_renames()
