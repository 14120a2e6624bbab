"""HQQ's codes of a model, scored as those of `benchmarks/codes.py`: docs/results.md, section 26. Needs hqq, torch and safetensors.

    python benchmarks/hqq_codes.py MODEL EVALUATION_TEXT SEQ_LEN WINDOWS WORK LRC ROW...

A ROW is `BITS-gGROUP`: `3-g64`. All linears of the blocks are quantized by HQQ (its defaults: groups along the inputs, half-quadratic
optimization of the zeros) on the CPU, scales and zeros rounded to the 16 bits in which it keeps them. They are dequantized into a checkpoint,
which `lrc eval` scores. Bits count codes, scales and zeros.
"""

import pathlib
import shutil
import sys
import time

import torch
from hqq.core.quantize import Quantizer
from safetensors import safe_open
from safetensors.torch import save_file
from scoring import columns, once, score

model, text, seq_len, windows, work, lrc, *rows = sys.argv[1:]
model, work = pathlib.Path(model), pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)


def quantized(weight, bits, group):
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float16)
    scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
    return ((codes.float() - zero) * scale).reshape(weight.shape)


def measure(bits, group):
    out = work / "hqq"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"), copy_function=shutil.copyfile)
    started, tensors = time.time(), {}
    with safe_open(model / "model.safetensors", "pt") as source:
        for name in source.keys():
            value = source.get_tensor(name)
            is_linear = ".layers." in name and name.endswith("_proj.weight")
            tensors[name] = quantized(value.float(), bits, group) if is_linear else value.float()
    seconds = time.time() - started
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = score(lrc, out, model, text, seq_len, windows)
    shutil.rmtree(out)
    return {"bits": bits + 32 / group, "seconds": seconds} | found


print("| HQQ | bits per weight | perplexity | KL | s |\n|---|---:|---:|---:|---:|")
for row in rows:
    numbers = [int(number) for number in row.split("-g")]
    print(f"| `{row}` | {columns(once(work / f'hqq-{row}.json', lambda: measure(*numbers)))}", flush=True)
