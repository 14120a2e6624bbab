"""GPTQModel's codes of a model, scored as those of `benchmarks/codes.py`: docs/results.md, section 26. Needs gptqmodel.

    python benchmarks/gptqmodel_codes.py MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN WINDOWS WORK LRC ROW...

A ROW is `BITS-gGROUP`: `3-g64`. All linears of the blocks are quantized on the CPU by GPTQModel's GPTQ with its
defaults, but in 32 bits, calibrated on the first 64 windows of 512 tokens. `lrc eval` scores the checkpoint that it
saves. Bits count codes, scales and zeros, as that checkpoint has them; the codes are symmetric and could do without
the zeros.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores, 1, is refused

import torch
from scoring import columns, once, score
from transformers import AutoTokenizer

with contextlib.redirect_stdout(sys.stderr):
    from gptqmodel import GPTQModel, QuantizeConfig

model, calibration, text, seq_len, windows, work, lrc, *rows = sys.argv[1:]
model, work = pathlib.Path(model).resolve(), pathlib.Path(work).resolve()
work.mkdir(parents=True, exist_ok=True)


def calibration_windows(count=64, length=512):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(pathlib.Path(calibration).read_text(), add_special_tokens=False)["input_ids"]
    starts = range(0, count * length, length)
    return [{"input_ids": tokens[at : at + length], "attention_mask": [1] * length} for at in starts]


def measure(bits, group):
    out, samples = work / "gptqmodel", calibration_windows()
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr), contextlib.chdir(work):  # where it writes its logs
        config = QuantizeConfig(bits=bits, group_size=group)
        source = GPTQModel.load(str(model), config, device="cpu", dtype=torch.float32)
        started = time.time()
        source.quantize(samples)
        source.save(str(out))
    seconds = time.time() - started
    found = score(lrc, out, model, text, seq_len, windows)
    shutil.rmtree(out)
    return {"bits": bits + (16 + bits) / group, "seconds": seconds} | found


print("| GPTQModel | bits per weight | perplexity | KL | s |\n|---|---:|---:|---:|---:|")
for row in rows:
    numbers = [int(number) for number in row.split("-g")]
    print(f"| `{row}` | {columns(once(work / f'gptqmodel-{row}.json', lambda: measure(*numbers)))}", flush=True)
