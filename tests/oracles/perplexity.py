"""Perplexity by transformers in the `gptq` convention, to be compared with `lrc eval`.

    python tests/oracles/perplexity.py TEXT SEQ_LEN MODEL...

Loads outputs of lrc through their own modeling file. Needs torch and transformers.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, seq_len, folders = open(sys.argv[1]).read(), int(sys.argv[2]), sys.argv[3:]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    dirty = {key: value for key, value in info.items() if value}
    ids = tokenizer(text)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(16):
            logits = model.eval()(input_ids=batch).logits[:, :-1].flatten(0, 1).float()
            total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").double().item()
    ppl = float(torch.tensor(total / (windows.shape[0] * (seq_len - 1)), dtype=torch.float64).exp())
    print(f"{folder}: {type(model).__name__}, perplexity {ppl:.6f}, load report {dirty or 'clean'}")
