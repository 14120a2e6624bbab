"""A prototype of refits of a narrower Llama block after block: `o_proj` and `down_proj` learn, by ridge regression, what the halves of the source
give and those of the narrower model do not yet, on the inputs that the narrower model has there.

    python benchmarks/anchored_narrow_torch.py SOURCE NARROW TEXT OUT WINDOWS [SHARE]

Over WINDOWS windows of 512 tokens; the ridge is 1 % of the mean diagonal, and SHARE of the step is taken (default 1). Needs torch and transformers.
"""

import shutil
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RIDGE, LENGTH = 1e-2, 512

source, narrow, text, out, n_windows = sys.argv[1:6]
share = float(sys.argv[6]) if len(sys.argv) > 6 else 1.0
torch.set_grad_enabled(False)
ids = AutoTokenizer.from_pretrained(source)(open(text, encoding="utf-8").read(), return_tensors="pt").input_ids[0]
stride = (len(ids) - LENGTH) // int(n_windows)
windows = [ids[None, i * stride : i * stride + LENGTH] for i in range(int(n_windows))]
models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, narrow)]
positions = torch.arange(LENGTH)[None]


def half(model, layer, x, is_attention):
    """The output of half a block, and the input of its last linear."""
    inputs = []
    last = layer.self_attn.o_proj if is_attention else layer.mlp.down_proj
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    if is_attention:
        rotary = model.model.rotary_emb(x, positions)
        y = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
    else:
        y = layer.mlp(layer.post_attention_layernorm(x))
    hook.remove()
    return y, inputs[0], last


states = [[model.model.embed_tokens(window) for window in windows] for model in models]
for block, layers in enumerate(zip(*(model.model.layers for model in models))):
    for is_attention in (True, False):
        gram = cross = 0.0
        outputs = []
        for x, shifted in zip(*states):
            target, _, _ = half(models[0], layers[0], x, is_attention)
            given, inputs, last = half(models[1], layers[1], shifted, is_attention)
            inputs64 = inputs.double()
            gram = gram + inputs64.T @ inputs64
            cross = cross + (target - given)[0].double().T @ inputs64
            outputs.append((target, inputs))
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        last.weight += share * torch.linalg.solve(gram, cross.T).T.float()
        for i, (target, inputs) in enumerate(outputs):
            states[0][i] = states[0][i] + target
            states[1][i] = states[1][i] + inputs @ last.weight.T
    print(f"block {block}", flush=True)

shutil.copytree(narrow, out, dirs_exist_ok=True)
file = f"{out}/model.safetensors"
with safe_open(file, "pt") as opened:
    metadata = opened.metadata()
values = models[1].state_dict()
save_file({name: values[name].to(old.dtype).contiguous() for name, old in load_file(file).items()}, file, metadata=metadata)
