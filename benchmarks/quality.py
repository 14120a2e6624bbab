"""Quality of a causal language model at a share of its parameters: perplexity, divergence, text, seconds, memory.

    python benchmarks/quality.py MODEL FOLDER_OF_TEXTS WORK [LRC]

Calibration: 64 windows of 512 tokens, measured once a text into WORK. Evaluation: 16 windows of 1024 tokens of the held-out
text, beside the source. Compared: `--method svd-llm` with uniform ranks in factors, as the published tool has it, and
the default in one shot, each from the same file of statistics. The texts are continued greedily by transformers, which loads
the outputs with their own modeling file, so that this needs torch and transformers. Rows are printed when they are known.
"""

import json
import pathlib
import subprocess
import sys

MODEL, TEXTS, WORK = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
LRC = sys.argv[4] if len(sys.argv) > 4 else "target/release/lrc"
WORK.mkdir(parents=True, exist_ok=True)
# Calibration and evaluation, held out.
PAIRS = {
    "WikiText-2": ("wikitext2-calibrate.txt", "wikitext2-evaluate.txt"),
    "TinyStories": ("tinystories-train.txt", "tinystories-eval-small.txt"),
}
METHODS = {
    "svd-llm, uniform, factors": ["--method", "svd-llm", "--ranks", "uniform", "--layout", "factors"],
    "lrc's default, one shot": [],
}
KEEPS = ["0.9", "0.8", "0.6"]
PROMPTS = ["The history of the city begins", "Once upon a time there was a little", "The most important property of water is"]
NEW_TOKENS = 60


def measured(*args):
    """The output of lrc, its seconds and its peak memory in GB."""
    log = WORK / "time"
    out = subprocess.run(["/usr/bin/time", "-f", "%e %M", "-o", log, LRC, *map(str, args)], check=True, capture_output=True, text=True)
    seconds, kilobytes = log.read_text().split()
    return out.stdout, float(seconds), int(kilobytes) * 1024 / 1e9


def cost(seconds, memory):
    return f"{seconds:.0f} s, {memory:.2f} GB"


def evaluated(folder, text):
    reference = [] if folder == MODEL else ["--reference", MODEL]
    out, *spent = measured("eval", folder, *reference, "--text", TEXTS / text, "--seq-len", 1024, "--max-windows", 16, "--json", "-q")
    report = json.loads(out)
    return f"{report['ppl']:.3f}", f"{report['kl']['mean']:.4f}" if reference else "", cost(*spent)


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def continued(folder):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
        print(f"- *{prompt}*{' '.join(text.splitlines())}")


samples = {"dense": MODEL}
for name, (calibration, evaluation) in PAIRS.items():
    statistics = WORK / f"{name}.safetensors"
    if not statistics.exists():
        part = WORK / "part.safetensors"
        flags = ["--method", "kfac", "--samples", 64, "--seq-len", 512, "--force", "-q", "-o", part]
        _, *spent = measured("calibrate", MODEL, "--text", TEXTS / calibration, *flags)
        part.rename(statistics)
        print(f"\n{name}: statistics {cost(*spent)}\n")
    row(f"{name}, 64 × 512", "keep", "perplexity", "KL", "compression", "evaluation")
    row(*["---"] * 6)
    ppl, _, spent = evaluated(MODEL, evaluation)
    row("dense", "", ppl, "", "", spent)
    for method, flags in METHODS.items():
        for keep in KEEPS:
            folder = WORK / "-".join([name, method.split(",")[0].replace(" ", "-").replace("'", ""), keep])
            options = ["--keep", keep, "--statistics", statistics, "--sequential=false", "--force", "-q", *flags]
            _, *spent = measured("compress", MODEL, "-o", folder, *options)
            ppl, divergence, seconds = evaluated(folder, evaluation)
            row(method, keep, ppl, divergence, cost(*spent), seconds)
            if not flags and name == "WikiText-2" and keep != "0.6":
                samples[f"keep {keep}"] = folder
for name, folder in samples.items():
    print(f"\n{name}:\n")
    continued(folder)
