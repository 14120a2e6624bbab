"""Codes at the same bytes, quantizer by quantizer: docs/results.md, section 26. Needs nothing but Python and the binary.

    python benchmarks/codes.py MODEL STATISTICS EVALUATION_TEXT SEQ_LEN WINDOWS WORK LRC ROW...

A ROW is a quantizer, or a menu with commas and a budget, then perhaps a method: `gptq-int3-g64`, `cd-int3-g64@svd-llm`,
`cd-int2-g64,cd-int3-g64:2.75`, `cd-int3-g64+eora8`; and the linears that it is for: `cd-iq2_xs%*.down_proj`. Without a
method, `cd` has `kfac`, which uses the gradients too, and all others have `svd-llm`. `+eora8` adds factors of this rank in int8.

KL and perplexity are those of `lrc eval --reference MODEL` on the first WINDOWS windows of SEQ_LEN tokens; bits per weight are those of
the linears of all blocks. Seconds are those of `lrc compress`. Rows that are in WORK already are not made again.
"""

import json
import pathlib
import re
import subprocess
import sys
import time

from scoring import columns, once, score

model, statistics, text, seq_len, windows, work, lrc, *rows = sys.argv[1:]
work = pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)


def run(*args):
    return json.loads(subprocess.run([lrc, *args, "-q", "--json"], check=True, capture_output=True, text=True).stdout)


def measure(row):
    pattern = r"([^:+@%]+)(?::([\d.]+))?(?:\+(\w+))?(?:@([^%\s]+))?(?:%(\S+))?"
    menu, budget, pair, method, targets = re.fullmatch(pattern, row).groups()
    method = method or ("kfac" if menu.startswith("cd-") else "svd-llm")
    flags = ["--quant", menu, "--method", method, "--statistics", statistics, "--embeddings", "keep", "--force"]
    if targets:
        flags += ["--targets", targets]
    if budget:
        flags += ["--bits", budget]
    if pair:
        name, rank = re.fullmatch(r"([a-z-]+)(\d+)", pair).groups()
        flags += ["--compensate", name, "--compensate-rank", rank, "--quant-factors", "int8", "--equal-bytes-baseline=false"]
    if any(re.fullmatch(r"(cd-|imatrix-)?i?q\d.*", quant) for quant in menu.split(",")):
        flags += ["--format", "gguf"]
    out, started = work / "out", time.time()
    report = run("compress", model, "-o", out, *flags)
    seconds = time.time() - started
    found = score(lrc, out, model, text, seq_len, windows)
    return {"bits": report["sizes"]["bits_per_weight_after"], "method": method, "seconds": seconds} | found


print("| quantizer | method | bits per weight | perplexity | KL | s |\n|---|---|---:|---:|---:|---:|")
for row in rows:
    r = once(work / f"{row.replace('/', '_')}.json", lambda: measure(row))
    print(f"| `{row.split('@')[0]}` | {r['method']} | {columns(r)}", flush=True)
