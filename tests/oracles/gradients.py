"""Statistics of output gradients, and of the vocabulary, by torch's autograd, for `tests/calibrate.rs`.

    python tests/oracles/gradients.py fixtures/pico-llama > tests/oracles/pico-llama-gradients.json

The loss of a sequence is the sum of its next-token losses; every sequence is sent back by itself.
"""

import json
import sys

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, model.config.vocab_size, (2, 96), generator=generator)
linears = {name.split(".")[-1]: m for name, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
outputs, statistics, vocabulary = {}, {}, {}
for name, linear in linears.items():
    def hook(_, __, output, name=name):
        output.retain_grad()
        outputs[name] = output
    linear.register_forward_hook(hook)
read = []
model.model.embed_tokens.register_forward_hook(lambda _, __, output: (output.retain_grad(), read.append(output))[0])
model.lm_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))


def add(sums, key, value):
    sums.setdefault(key, torch.zeros_like(value)).add_(value)


for sequence in ids:
    model.zero_grad()
    read.clear()
    logits = model(input_ids=sequence[None]).logits[0]
    logits.retain_grad()
    F.cross_entropy(logits[:-1], sequence[1:], reduction="sum").backward()
    for name, linear in linears.items():
        g, square = outputs[name].grad[0], linear.weight.grad**2
        sums = {"output_gram": g.T @ g, "squared_gradient_input": square.sum(0), "squared_gradient_output": square.sum(1)}
        for key, value in sums.items():
            add(statistics.setdefault(name, {}), key, value)
    embeddings, inputs = read
    rows, states = embeddings.grad[0], inputs[0, :-1].detach()
    add(vocabulary, "token_counts", torch.bincount(sequence, minlength=model.config.vocab_size).double())
    add(vocabulary, "table.output_gram", rows.T @ rows)
    add(vocabulary, "head.input_gram", states.T @ states)
    add(vocabulary, "head.squared_gradient", (logits.grad[:-1] ** 2).sum(0))


def packed(value):
    """Vectors as they are, matrices as their lower triangle."""
    rows = [value] if value.dim() == 1 else [row[: i + 1] for i, row in enumerate(value)]
    return [float(f"{v:.7g}") for row in rows for v in row.tolist()]


found = {"ids": ids.tolist(), "block_0": {n: {k: packed(v) for k, v in s.items()} for n, s in statistics.items()}}
print(json.dumps(found | {"vocabulary": {k: packed(v) for k, v in vocabulary.items()}}))
