"""Perplexities of fixtures/tiny-llama by the tools that the conventions of `lrc eval` are named after.

    python tests/oracles/conventions.py > tests/oracles/conventions.json

Makes fixtures/text/documents.jsonl and .parquet where they are absent. Needs torch, transformers, lm_eval and pyarrow;
llama.cpp's number is that of its own `llama-perplexity`, named by LLAMA_PERPLEXITY, over the GGUF that `lrc export` makes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, HELD_OUT = "fixtures/tiny-llama", "fixtures/text/held-out.txt"
JSONL, PARQUET = "fixtures/text/documents.jsonl", "fixtures/text/documents.parquet"
CONTEXT, STRIDE, LLAMA_WINDOW = 128, 50, 64

if not os.path.exists(JSONL):
    lines = open(HELD_OUT).read().split("\n")[:60]
    sizes = [1, 2, 9, 3, 20, 5, 12, 8]
    docs, at = [], 0
    for size in sizes:
        docs.append("\n".join(lines[at : at + size]) + "\n")
        at += size
    # White space that counts, and letters of several bytes.
    docs[1] = "  " + docs[1].replace("green", "gr\u00fcn")
    with open(JSONL, "w") as f:
        f.writelines(json.dumps({"id": i, "text": doc}, ensure_ascii=False) + "\n" for i, doc in enumerate(docs))
    pq.write_table(pa.table({"id": list(range(len(docs))), "text": docs}), PARQUET, compression="zstd")

documents = [json.loads(line)["text"] for line in open(JSONL)]
assert pq.read_table(PARQUET)["text"].to_pylist() == documents
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
ids = torch.tensor([tokenizer("\n\n".join(documents))["input_ids"]])


def gptq():
    """The loop of GPTQ's `opt_eval`: disjoint windows, mean loss of each times its length, over all lengths."""
    nlls, n = [], ids.shape[1] // CONTEXT
    for i in range(n):
        batch = ids[:, i * CONTEXT : (i + 1) * CONTEXT]
        logits = model(batch).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        nlls.append(loss * CONTEXT)
    return {"ppl": torch.exp(torch.stack(nlls).sum() / (n * CONTEXT)).item(), "tokens": n * (CONTEXT - 1)}


def hf_strided():
    """The loop of transformers' guide "Perplexity of fixed-length models", and its number with exact weights."""
    guide, guide_tokens, nll_sum, n_scored, previous = 0.0, 0, 0.0, 0, 0
    for begin in range(0, ids.shape[1], STRIDE):
        end = min(begin + CONTEXT, ids.shape[1])
        length = end - previous
        batch = ids[:, begin:end]
        target = batch.clone()
        target[:, :-length] = -100
        loss = model(batch, labels=target).loss.item()
        valid = int((target != -100).sum())
        guide += loss * (valid - 1)
        guide_tokens += valid - 1
        scored = int((target[:, 1:] != -100).sum())
        nll_sum += loss * scored
        n_scored += scored
        previous = end
        if end == ids.shape[1]:
            break
    exp = lambda x: torch.tensor(x, dtype=torch.float64).exp().item()
    return {"ppl": exp(nll_sum / n_scored), "tokens": n_scored, "guide_ppl": exp(guide / guide_tokens)}


def lm_eval(add_bos_token):
    """The harness' own rolling log-likelihood, and the words and bytes that its WikiText task counts."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT, add_bos_token=add_bos_token)
    requests = [Instance("loglikelihood_rolling", {}, (doc,), i) for i, doc in enumerate(documents)]
    total = sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
    words = sum(len(re.split(r"\s+", doc)) for doc in documents)
    n_bytes = sum(len(doc.encode()) for doc in documents)
    exp = lambda x: torch.tensor(x, dtype=torch.float64).exp().item()
    return {
        "ppl": exp(-total / words),
        "bits_per_byte": -total / n_bytes / torch.log(torch.tensor(2.0, dtype=torch.float64)).item(),
        "words": words,
        "bytes": n_bytes,
    }


def llamacpp(binary):
    """`llama-perplexity` over held-out.txt, windows of LLAMA_WINDOW."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "gguf")
        lrc = os.environ.get("LRC", "target/release/lrc")
        subprocess.run([lrc, "export", MODEL, "--format", "gguf", "-o", out, "-q"], check=True)
        command = [binary, "-m", f"{out}/model.gguf", "-f", HELD_OUT, "-c", str(LLAMA_WINDOW), "-b", str(LLAMA_WINDOW)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", run.stdout + run.stderr)
    return {"ppl": float(found[1]), "standard_error": float(found[2]), "seq_len": LLAMA_WINDOW}


with torch.no_grad():
    values = {
        "seq_len": CONTEXT,
        "stride": STRIDE,
        "gptq": gptq(),
        "hf-strided": hf_strided(),
        "lm-eval": lm_eval(None),
        "lm-eval without BOS": lm_eval(False),
    }
path = "tests/oracles/conventions.json"
if "LLAMA_PERPLEXITY" in os.environ:
    values["llamacpp"] = llamacpp(os.environ["LLAMA_PERPLEXITY"])
elif os.path.exists(path) and os.path.getsize(path):
    values["llamacpp"] = json.load(open(path)).get("llamacpp")
json.dump(values, sys.stdout, indent=1)
print()
