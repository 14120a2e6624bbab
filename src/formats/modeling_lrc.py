"""Runs a checkpoint whose linears were factored by lrc: `W x` becomes `B (A x)`, everything else is the base model's.

Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. The modules listed under `lrc` in
`config.json` are swapped for a pair of plain `nn.Linear`s, so that casts, device maps, tying and saving work as usual.
"""

import transformers
from torch import nn

_Base = getattr(transformers, "@BASE@")
_BaseConfig = _Base.config_class
_BaseModel = transformers.AutoModel._model_mapping[_BaseConfig]


class LowRankLinear(nn.Module):
    """`y = lr_b(lr_a(x))`: lr_a is (rank, in), lr_b is (out, rank) and has the bias."""

    def __init__(self, linear, rank):
        super().__init__()
        rows, columns = linear.weight.shape
        # nn.Linear stores (out, in), GPT-2's Conv1D (in, out).
        out_features, in_features = (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lr_a = nn.Linear(in_features, rank, bias=False, **like)
        self.lr_b = nn.Linear(rank, out_features, bias=linear.bias is not None, **like)

    def forward(self, x):
        return self.lr_b(self.lr_a(x))


def _find(model, name):
    """The module of a checkpoint's name; base models are saved with and without their prefix."""
    prefix = model.base_model_prefix + "."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    return None, None


def _factor(model):
    for name, entry in model.config.lrc["modules"].items():
        found, linear = _find(model, name)
        if found is None:
            continue  # a head, in a model loaded without one
        parent, _, child = found.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRankLinear(linear, entry["rank"]))


class LrcConfig(_BaseConfig):
    model_type = "lrc_" + _BaseConfig.model_type


class LrcModel(_BaseModel):
    config_class = LrcConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _factor(self)


class LrcForCausalLM(_Base):
    config_class = LrcConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _factor(self)


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
