# The rest of `modeling_lrc.py`: the layers above take their places in the model of the source.


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
            name = rename.rename_source_key(name + ".weight")[0].removesuffix(".weight")  # patterns may end in a dot
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
    shape, bias = _shape(linear), getattr(linear, "bias", None) is not None
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device}

    def make(part, shape, bias):
        """The linear that the checkpoint stores under the name and `part`."""
        if name + part in quantized:
            return QuantizedLinear(name + part, shape, quantized[name + part]["scheme"], bias, like)
        return nn.Linear(shape[1], shape[0], bias=bias, **like)

    if isinstance(linear, nn.Embedding):
        if "rank" in entry:
            return LowRankEmbedding(name, make, shape, None, entry).like(linear)
        return QuantizedEmbedding(name, shape, quantized[name]["scheme"], False, like).like(linear)
    if "rank" not in entry:
        return make("", shape, bias)
    layout = CompensatedLinear if entry.get("base") else _LAYOUTS[entry.get("layout", "factors")]
    if name + BorrowingLinear.OWNED in shared:
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
    split = getattr(module, "SPLIT", {})
    parts = [part for part, _ in module.named_children()]
    return {f"{name}.{part}": style if part in split and style.startswith(split[part]) else "replicate" for part in parts}


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


def _resize(model, shapes):
    """Gives linears of blocks with widths of their own their shapes: the classes above build all blocks alike."""
    for name, (rows, columns) in shapes.items():
        found, linear = _find(model, name)
        if found is None:
            continue
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        if isinstance(linear, nn.Linear):
            resized = nn.Linear(columns, rows, bias=linear.bias is not None, **like)
        else:  # Conv1D always has a bias
            resized = type(linear)(rows, columns).to(**like)
        parent, _, child = found.rpartition(".")
        setattr(model.get_submodule(parent), child, resized)


def _compress(model):
    lrc = model.config.lrc
    for stack in lrc.get("stacks") or ():
        raise ValueError(
            f"the experts of `{stack}` are stored one by one, which transformers has no modules for: "
            "`lrc export FOLDER --format dense -o OUT` stacks them again"
        )
    _inherit_renames(keep_stacks=not _unstack(model, lrc["modules"]))
    _resize(model, lrc.get("shapes", {}))
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
    _tie(model, replaced)
    for part, owner in shared.items():
        if (borrower := by_name.get(part.removesuffix(BorrowingLinear.OWNED))) is not None:
            borrower.owner = (by_name[owner.removesuffix(BorrowingLinear.OWNED)],)
    _split(model, replaced)
    _tell_apart(model)


def _tie(model, replaced):
    """Lets a compressed table make the logits of a tied model, in place of a weight that both modules would have."""
    table = next((module for module in replaced.values() if isinstance(module, Embedding)), None)
    head = model.get_output_embeddings()
    configs = (model.config.get_text_config(), model.config)  # some multimodal models have it in the whole config alone
    is_tied = next((c.tie_word_embeddings for c in configs if hasattr(c, "tie_word_embeddings")), False)
    if table is None or head is None or not is_tied:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    # Its bias may be tied to another parameter, and stays so.
    for keys in ("_tied_weights_keys", "all_tied_weights_keys"):  # lists of transformers 4, dicts of 5
        tied = getattr(model, keys, None) or {}
        others = [key for key in tied if not re.fullmatch(key, name + ".weight")]
        setattr(model, keys, {key: tied[key] for key in others} if isinstance(tied, dict) else others)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, TiedHead(table, getattr(head, "bias", None)))


class LrcConfig(_BaseConfig):
    model_type = "lrc_" + _BaseConfig.model_type
    # The classes above read one width for all blocks, and `_resize` comes after them.
    allow_global_per_layer_attribute_access = True


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
