"""Loads factored outputs in mlx-lm with the file that lies beside them, and compares logits with lrc's own. Prints a section of docs/interop.md.

    python tests/interop/in_mlx.py [MODEL...]

Run by `tests/interop/run.sh` in an environment of its own. Every layout and kind of codes is made of `fixtures/tiny-llama`, and low rank and codes of
every family that the file is written for; a MODEL is compressed to 0.8, with a text: errors of the plain metric blow up differences.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

ROOT = Path(__file__).resolve().parents[2]
RELEASE, FIXTURE, TEXT = ROOT / "target/release", ROOT / "fixtures/tiny-llama", ROOT / "fixtures/text/train.txt"
# Largest difference of a logit over the largest logit.
LIMIT = 1e-5
CALIBRATED = ["--calibration", TEXT, "--samples", "8"]

CASES = {
    "pivot": ["--keep", "0.6"],
    "factors": ["--keep", "0.6", "--layout", "factors"],
    "monarch": ["--keep", "0.6", "--layout", "monarch"],
    "blast": ["--keep", "0.6", "--layout", "blast"],
    "factors of one input shared": ["--keep", "0.5", "--layout", "factors", "--share", "--ranks", "knapsack", *CALIBRATED],
    "int4 in groups of 32, factors over it": ["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "4"],
    "int3 in groups of 32 with zeros": ["--quant", "rtn-int3-g32-asym"],
    "int4 in groups of 64, two of four": ["--quant", "rtn-int4-g64-2of4"],
    "nf4, factors in int8": ["--quant", "nf4-g32", "--compensate", "lorc", "--compensate-rank", "4", "--quant-factors", "int8"],
    "widths by block": ["--keep", "0.7", "--structure", "narrow", "--uniform-width=false", *CALIBRATED],
    "widths by block, low rank": ["--keep", "0.6", "--structure", "narrow,low-rank", *CALIBRATED],
    "embeddings as factors": ["--keep", "0.7", "--embeddings", "factor", *CALIBRATED],
    "embeddings in int8": ["--quant", "rtn-int8-g32", "--embeddings", "quantize"],
}
# Sliding windows and their lengths in these fixtures: mlx-lm has none for them, so that only tokens before are the same.
FAMILIES = {"llama": None, "mistral": 5, "qwen2": None, "qwen3": None, "gemma2": 4, "gemma3_text": None, "olmo2": None, "phi3": 6, "smollm3": None}
OF_FAMILY = {"low rank": ["--keep", "0.7"], "split": ["--keep", "0.7", "--fused", "split"], "codes": ["--quant", "rtn-int8-channel"]}


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def difference(model, flags, ids):
    """The largest difference of logits over these tokens, and the largest logit."""
    with tempfile.TemporaryDirectory() as work:
        out, tokens, values = (Path(work) / name for name in ("out", "ids.json", "logits.safetensors"))
        tokens.write_text(json.dumps(ids))
        run(RELEASE / "lrc", "compress", model, "-o", out, "-q", *flags)
        run(RELEASE / "examples/logits", out, tokens, values)
        ours = np.array(mx.load(str(values))["logits"])
        network, _ = load_model(out, trust_remote_code=True)
        network.set_dtype(mx.float32)
        theirs = np.array(network(mx.array([ids])).astype(mx.float32)[0])
    return np.abs(ours - theirs).max(axis=1), np.abs(ours).max()


def row(name, found, limit):
    errors, largest = found
    ok = errors[:limit].max() < LIMIT * largest
    kept = f", the first {limit} tokens" if limit else ""
    print(f"| {name} | {errors[:limit].max():.1e} of {largest:.1f}{kept} | {'ok' if ok else '**FAILED**'} |", flush=True)
    return ok


rng = np.random.default_rng(1)
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx-cpu", "mlx-lm", "transformers")]
print(f"## MLX\n\n{', '.join(versions)}. Largest difference of logits from lrc's, in f32; ok below {LIMIT:.0e} of the largest logit.\n")
print("| output | difference | |\n|---|---|---|")
ids = rng.integers(3, 380, 64).tolist()
oks = [row(name, difference(FIXTURE, flags, ids), None) for name, flags in CASES.items()]
for family, window in FAMILIES.items():
    ids = rng.integers(3, 48, 12).tolist()
    for kind, flags in OF_FAMILY.items():
        if kind == "split" and family != "phi3":
            continue
        name = f"{family}, {kind}" if window is None else f"{family}, {kind}, a sliding window of {window}"
        oks.append(row(name, difference(ROOT / "fixtures/pico" / family, flags, ids), window))
for model in sys.argv[1:]:
    ids = rng.integers(3, 30000, 64).tolist()
    oks.append(row(f"{Path(model).name}, low rank", difference(model, ["--keep", "0.8", *CALIBRATED], ids), None))
print()
sys.exit(not all(oks))
