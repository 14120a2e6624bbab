"""`lrc generate` beside transformers on the CPU, in turn: tokens per second after the prompt, and whether the tokens are the same.

    python benchmarks/generate.py MODEL PROMPT NEW_TOKENS [LRC [ROUNDS]]

needs torch and transformers. Both compute in f32, greedily, with a cache; loading is not counted.
"""

import json
import subprocess
import sys
import time

import torch
import transformers

model, prompt, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
lrc = sys.argv[4] if len(sys.argv) > 4 else "target/release/lrc"
rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 3

tokenizer = transformers.AutoTokenizer.from_pretrained(model)
theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True).eval()
ids = tokenizer(prompt, return_tensors="pt")


def generated(count):
    """Tokens of transformers, and the seconds that they took."""
    started = time.time()
    with torch.no_grad():
        found = theirs.generate(**ids, max_new_tokens=count, do_sample=False)
    return found[0][ids.input_ids.shape[1] :].tolist(), time.time() - started


print("| round | lrc, tokens/s | transformers, tokens/s | the same tokens |\n|---|---:|---:|---|")
for i in range(rounds):
    run = subprocess.run(
        [lrc, "generate", model, "--prompt", prompt, "--max-new-tokens", str(n), "--json", "-q"],
        check=True, capture_output=True, text=True,
    )
    own = json.loads(run.stdout)
    (_, first), (tokens, seconds) = generated(1), generated(n)
    speed = (len(tokens) - 1) / (seconds - first)
    same = own["tokens"] == tokens[: len(own["tokens"])]
    print(f"| {i + 1} | {(len(own['tokens']) - 1) / own['seconds']:.1f} | {speed:.1f} | {'yes' if same else 'no'} |", flush=True)
