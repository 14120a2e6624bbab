"""Everything that transformers does with a model, done with folders that `lrc compress` wrote in the factored format.

    python tests/interop/loading.py FOLDER... [--only compiled planned]

Each folder is loaded on `meta` and elsewhere, with and without its head, saved, copied, pickled, compiled, split across devices by its
plan, and loaded without one of its tensors, which must be refused or reported. Prints a line each; the exit code is that of the worst.
"""

import argparse
import copy
import io
import pickle
import re
import sys
import tempfile
import traceback
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

IDS = torch.tensor([[5, 3, 8, 13, 21, 34, 55, 89]])
TRUST = {"trust_remote_code": True}


def causal(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **TRUST, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def equal(found, expected, tolerance=0.0):
    error = (found - expected).abs().max().item()
    assert error <= tolerance, f"logits differ by {error}"


def apart(model):
    """Modules of one class have children of the same kinds, or vLLM rewrites some as it must not."""
    kinds = {}
    for module in model.modules():
        children = [(name, type(child)) for name, child in module.named_children()]
        linears = [(name, kind) for name, kind in children if issubclass(kind, torch.nn.Linear) or "lrc" in kind.__module__]
        key = (type(module), tuple(name for name, _ in children))
        assert kinds.setdefault(key, linears) == linears, f"{key}: {linears} and {kinds[key]}"


def on_meta(folder, expected):
    config = transformers.AutoConfig.from_pretrained(folder, **TRUST)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **TRUST)
    assert all(tensor.is_meta for tensor in [*model.parameters()])
    if not transformers.__version__.startswith("4."):  # whose rotary embedding does not run there
        assert model(IDS.to("meta")).logits.shape == expected.shape
    # Models as vLLM makes them: parameters on `meta`, buffers on the device where they are filled.
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **TRUST)
    assert not any(buffer.is_meta for buffer in model.buffers())
    model.load_state_dict(causal(folder).state_dict(), assign=True)
    model.tie_weights()
    equal(logits(model.eval()), expected, 1e-4)


def round_trip(folder, expected):
    with tempfile.TemporaryDirectory() as work:
        causal(folder).save_pretrained(work)
        equal(logits(causal(work)), expected)


def copies(folder, expected):
    model = causal(folder)
    equal(logits(copy.deepcopy(model)), expected)
    equal(logits(pickle.loads(pickle.dumps(model))), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    equal(logits(torch.load(file, weights_only=False)), expected)


def generate(folder, expected):
    model = causal(folder)
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert tokens[0, IDS.shape[1]] == expected[0, -1].argmax()


def compiled(folder, expected):
    equal(torch.compile(causal(folder), fullgraph=True)(IDS).logits.detach(), expected, 1e-3)
    unfilled = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder, **TRUST), **TRUST)
    if any(True for module in unfilled.modules() if hasattr(module, "is_filled")):
        for run in (unfilled, torch.compile(unfilled, fullgraph=True)):
            try:
                run(IDS)
            except Exception as e:
                assert "was not loaded" in str(e), e
            else:
                raise AssertionError(f"ran unfilled: {run}")


def headless(folder, expected):
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **TRUST).eval()
    whole = causal(folder)
    with torch.no_grad():
        equal(model(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def placed(folder, expected):
    equal(logits(causal(folder, low_cpu_mem_usage=True)), expected)
    equal(logits(causal(folder, device_map="cpu")), expected)
    equal(logits(causal(folder, device_map="auto", max_memory={"cpu": "8GiB"})), expected)


def damaged(folder, expected):
    tensors = load_file(Path(folder) / "model.safetensors")
    for ending in (".lr_order", ".codes", ".scales", ".zeros"):
        name = next((name for name in tensors if name.endswith(ending)), None)
        if name is None:
            continue
        cases = {"absent": {key: value for key, value in tensors.items() if key != name}}
        if ending == ".lr_order":
            cases["zero"] = tensors | {name: torch.zeros_like(tensors[name])}
        for case, content in cases.items():
            with tempfile.TemporaryDirectory() as work:
                for file in Path(folder).iterdir():
                    if file.is_file() and file.name != "model.safetensors":
                        (Path(work) / file.name).write_bytes(file.read_bytes())
                save_file(content, Path(work) / "model.safetensors", {"format": "pt"})
                model, info = transformers.AutoModelForCausalLM.from_pretrained(work, output_loading_info=True, **TRUST)
                assert case == "zero" or list(info["missing_keys"]) == [name], info
                try:
                    model(IDS)
                except RuntimeError as e:
                    assert "was not loaded" in str(e) and f"`{name}`" in str(e), e
                else:
                    raise AssertionError(f"ran with {name} {case}")


def across(rank, size, make):
    """The modules for vLLM with linears split across devices; the modeling code looks at one module of vLLM only."""
    state = types.ModuleType("vllm.distributed.parallel_state")
    state.model_parallel_is_initialized = lambda: True
    state.get_tensor_model_parallel_rank = lambda: rank
    state.get_tensor_model_parallel_world_size = lambda: size
    sys.modules[state.__name__] = state
    try:
        return make()
    finally:
        del sys.modules[state.__name__]


def planned(folder, expected):
    """By the rule of vLLM, the first whose pattern a name begins with, parts get the styles that the dense linear calls for."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    model = causal(folder)
    plan = model.tp_plan
    assert not set(plan.values()) <= set(ALL_PARALLEL_STYLES), "transformers does not refuse to split it"
    dense = {f"{model.base_model_prefix}.{rule}": style for rule, style in (type(model.config).base_model_tp_plan or {}).items()}
    style_in = lambda rules, name: next((style for rule, style in rules.items() if re.match(rule, name)), "replicate")
    replaced = {name: module for name, module in model.named_modules() if type(module).__name__ in ("LowRankLinear", "PivotLinear")}
    for name, module in replaced.items():
        style = style_in(dense, name)
        first = style if style == "rowwise" else "replicate"
        last = style if style == "colwise" and hasattr(module, "lr_b") else "replicate"
        found = [style_in(plan, f"{name}.{part}") for part, _ in module.named_children()]
        assert found == [first, last], f"{name}, {style}: {found}"
    heads, is_quantized = model.config.num_key_value_heads, "quantized" in model.config.lrc
    if heads % 2 or is_quantized:
        try:
            across(0, 2, lambda: causal(folder))
        except ValueError as e:
            assert "cannot be split across 2 devices" in str(e), e
        else:
            raise AssertionError("made for two devices")
        return
    x = lambda module: torch.linspace(-1.0, 1.0, module.in_features)[None]
    ranks = [across(rank, 2, lambda: causal(folder)) for rank in range(2)]
    for name, module in replaced.items():
        if type(module).__name__ == "PivotLinear" and style_in(dense, name) == "colwise":
            parts = [rank.get_submodule(name)(x(module)) for rank in ranks]
            equal(torch.cat(parts, -1), module(x(module)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--only", nargs="+", help="names of checks")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    failures = 0
    for folder in args.folders:
        model = causal(folder)
        apart(model)
        expected = logits(model)
        for check in (on_meta, round_trip, copies, generate, headless, placed, damaged, planned, compiled):
            if args.only and check.__name__ not in args.only:
                continue
            try:
                check(folder, expected)
                print(f"{folder}: {check.__name__}: ok", flush=True)
            except Exception:
                failures += 1
                print(f"{folder}: {check.__name__}: FAILED\n{traceback.format_exc()}", flush=True)
    raise SystemExit(1 if failures else 0)


main()
