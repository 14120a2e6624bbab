"""Logits of transformers, for `tests/model.rs`.

    python tests/oracles/logits.py fixtures/tiny-llama > tests/oracles/tiny-llama-logits.json
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, model.config.vocab_size, (2, 96), generator=generator)
with torch.no_grad():
    output = model(input_ids=ids, labels=ids)
positions = [0, 1, 31, 63, 64, 95]
logits = output.logits[:, positions, :].float()
print(json.dumps({"ids": ids.tolist(), "positions": positions, "loss": output.loss.item(),
                  "logits": [[round(v, 6) for v in row] for row in logits.flatten(0, 1).tolist()]}))
