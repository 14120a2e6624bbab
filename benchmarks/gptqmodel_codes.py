"""GPTQModel's codes of a model, scored as those of `benchmarks/codes.py`: docs/results.md, section 26. Needs gptqmodel.

    python benchmarks/gptqmodel_codes.py MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN WINDOWS WORK LRC ROW...

A ROW is `BITS-gGROUP`: `3-g64`. All linears of the blocks are quantized on the CPU by GPTQModel's GPTQ with its
defaults, but in 32 bits, calibrated on the first 64 windows of 512 tokens. `lrc eval` scores the checkpoint that it
saves. Bits count codes, scales and zeros, as that checkpoint has them; the codes are symmetric and could do without
the zeros.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores, 1, is refused

import torch
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


print("| GPTQModel | bits per weight | perplexity | KL | s |\n|---|---:|---:|---:|---:|")
for row in rows:
    bits, group = (int(number) for number in row.split("-g"))
    file, out = work / f"gptqmodel-{row}.json", work / "gptqmodel"
    if not file.exists():
        shutil.rmtree(out, ignore_errors=True)
        samples = calibration_windows()
        with contextlib.redirect_stdout(sys.stderr), contextlib.chdir(work):  # where it writes its logs
            config = QuantizeConfig(bits=bits, group_size=group)
            source = GPTQModel.load(str(model), config, device="cpu", dtype=torch.float32)
            started = time.time()
            source.quantize(samples)
            source.save(str(out))
        seconds = time.time() - started
        scope = ["--text", text, "--seq-len", seq_len, "--max-windows", windows, "--reference", model, "--json", "-q"]
        scored = subprocess.run([lrc, "eval", out, *scope], check=True, capture_output=True, text=True)
        found = json.loads(scored.stdout)
        shutil.rmtree(out)
        file.write_text(json.dumps({"ppl": found["ppl"], "kl": found["kl"]["mean"], "seconds": seconds}))
    r = json.loads(file.read_text())
    stored = bits + (16 + bits) / group
    print(f"| `{row}` | {stored:.3f} | {r['ppl']:.3f} | {r['kl']:.4f} | {r['seconds']:.0f} |", flush=True)
