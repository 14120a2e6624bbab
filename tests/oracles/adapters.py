"""LoRA adapters as PEFT writes them, with the logits of base and adapter by PEFT, for `tests/adapters.rs`.

    python tests/oracles/adapters.py

Writes `tests/oracles/adapters/NAME/` with the adapter, and `tests/oracles/adapters.json`. All weights are random, `B` too, so that every
tensor and every scale counts. Needs torch, transformers and peft.
"""

import json
import pathlib

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

root = pathlib.Path(__file__).resolve().parent.parent.parent
out = root / "tests/oracles/adapters"
CASES = {
    # Scales by module, and ranks that differ.
    "patterns": ("fixtures/pico-llama", dict(
        target_modules=["q_proj", "v_proj", "down_proj"], r=3, lora_alpha=5,
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 4},
    )),
    # Everything that is not a factor of a linear: a table, whole modules, biases.
    "whole": ("fixtures/pico-llama", dict(
        target_modules=["gate_proj", "embed_tokens"], r=4, lora_alpha=6, use_rslora=True,
        modules_to_save=["lm_head", "model.norm"], bias="lora_only",
    )),
    # Matrices (in, out).
    "conv1d": ("fixtures/pico/gpt2", dict(
        target_modules=["c_attn", "c_fc", "mlp.c_proj"], r=2, lora_alpha=3, fan_in_fan_out=True,
    )),
    # A table that is also the head: the head stays as it was.
    "tied": ("fixtures/pico/gpt2", dict(
        target_modules=["c_fc"], r=2, lora_alpha=2, fan_in_fan_out=True, modules_to_save=["wte"],
    )),
    "tied-table": ("fixtures/pico/gpt2", dict(
        target_modules=["c_fc", "wte"], r=2, lora_alpha=2, fan_in_fan_out=True,
    )),
    # Factors of 8-bit floats, which PEFT widens as it loads them.
    "float8": ("fixtures/pico-llama", dict(target_modules=["q_proj", "up_proj"], r=3, lora_alpha=2)),
}

expected = {}
for name, (base, settings) in CASES.items():
    torch.manual_seed(len(expected))
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(root / base, dtype=torch.float32).eval()
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink()
    if name == "float8":
        file = out / name / "adapter_model.safetensors"
        save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}, file)
    config = json.loads((out / name / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (out / name / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    # What is expected is what PEFT makes of the files.
    model = PeftModel.from_pretrained(load(), out / name).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, 10))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, [0, 4, 9]]
    expected[name] = {"base": base, "ids": ids.tolist(), "positions": [0, 4, 9],
                      "logits": [[round(v, 6) for v in row] for row in logits.tolist()]}
    print(name, model.config.tie_word_embeddings, sum(f.stat().st_size for f in (out / name).iterdir()))
with open(root / "tests/oracles/adapters.json", "w") as file:
    json.dump(expected, file)
