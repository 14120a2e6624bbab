"""Adapters of `lrc delta` in peft, against lrc's own reading of them.

    python tests/interop/adapter.py BASE FINE-TUNED [--lrc target/release/lrc]

An adapter of full rank must give the logits of the fine-tuned model in peft; one of a budget, truncated or not, the logits of what
`lrc export BASE --adapter ADAPTER --format dense` writes. The model is run in f32. Prints a line each; the exit code is 1 if one fails.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from peft import PeftModel

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("tuned")
parser.add_argument("--lrc", default="target/release/lrc")
args = parser.parse_args()
transformers.utils.logging.set_verbosity_error()


def lrc(*words):
    subprocess.run([args.lrc, *map(str, words), "-q"], check=True)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 64), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_peft(adapter):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(args.base), adapter).eval()
    missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not missing, missing
    return logits(model)


worst = 0
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    tuned = logits(load(args.tuned))
    scale = tuned.abs().max().item()
    cases = [
        ("full", ["--ranks", "full"]),
        ("rank 4", ["--ranks", "fixed:4"]),
        ("knapsack", ["--keep", "0.1"]),
        ("8-bit floats", ["--keep", "0.1", "--quant-factors", "float8"]),
        ("without others", ["--keep", "0.1", "--others", "leave-out"]),
    ]
    made = []
    for name, flags in cases:
        lrc("delta", args.base, args.tuned, "-o", folder / name, *flags)
        made.append((name, folder / name))
    for name in ["rank 4", "8-bit floats"]:
        lrc("truncate", folder / name, "-o", folder / f"{name}, truncated", "--rank", "2")
        made.append((f"{name}, truncated", folder / f"{name}, truncated"))
    for name, adapter in made:
        dense = folder / f"{name}-dense"
        lrc("export", args.base, "--adapter", adapter, "--format", "dense", "-o", dense)
        found = in_peft(adapter)
        expected = tuned if name == "full" else logits(load(dense))
        error = (found - expected).abs().max().item() / scale
        distance = (found - tuned).abs().max().item() / scale
        is_ok = error < 1e-4
        worst |= not is_ok
        print(f"- {name}: {'ok' if is_ok else 'FAILED'}, relative error {error:.1e}, from the fine-tuned model {distance:.1e}")
sys.exit(worst)
