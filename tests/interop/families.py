"""Prints the table of docs/families.md: every family of `fixtures/pico`, by lrc and by transformers.

    cargo build --release --bin lrc --example logits && python tests/interop/families.py [--gguf] [FAMILY ...]

With `--gguf` the last column alone is made.

needs what `tests/interop/run.sh` installs, and llama.cpp's `llama-perplexity`, whose path LLAMA_PERPLEXITY has: without it GGUF is
written, and not run. Numbers are largest
differences of a logit, over the largest logit; for GGUF, the difference of perplexities over the perplexity, and of encoders 1 less
the cosine of an embedding in llama-cpp-python. The limit is 1e-4 (GGUF: 2e-4, for llama.cpp keeps keys and values in f16).
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4
# The text has some more: the logger of llama-perplexity is a thread that the program does not wait for, and loses its last lines.
CHUNKS = 80
TEXT = "once upon a time there was a little dog. it liked to run! " * 40
COMPENSATED = ["--quant", "rtn-int8-channel", "--compensate", "lorc", "--compensate-rank", "2"]
CALIBRATED = ["--samples", "4", "--seq-len", "24"]
COLUMNS = [
    ("factors", "factored", ["--keep", "0.8", "--layout", "factors", "--ranks", "uniform"]),
    ("pivot", "factored", ["--keep", "0.8"]),
    ("split", "factored", ["--keep", "0.8", "--fused", "split"]),
    ("tables", "factored", ["--quant", "rtn-int8-g16", "--embeddings", "quantize"]),
    ("dense", "dense", ["--keep", "0.8"]),
    ("narrow", "dense", ["--structure", "narrow", "--keep", "0.7", "--width-multiple", "4"]),
    ("compressed-tensors", "compressed-tensors", ["--quant", "rtn-int8-channel"]),
    ("peft", "peft", COMPENSATED),
]


class NotRun(Exception):
    """A runtime is not at hand."""


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def theirs(folder, form, ids):
    # `BertForMaskedLM` is loaded by `AutoModelForMaskedLM`.
    kind = "For" + json.loads((folder / "config.json").read_text())["architectures"][0].split("For")[-1]
    kind = kind.replace("ForConditionalGeneration", "ForImageTextToText")
    auto = getattr(transformers, "AutoModel" + kind, transformers.AutoModelForCausalLM)
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=form == "factored",
        attn_implementation="eager",
    )
    dirty = {key: value for key, value in info.items() if value}
    if dirty:
        raise RuntimeError(f"load report: {dirty}")
    if form == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter")
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor([ids]))
    return (found.prediction_logits if "prediction_logits" in found else found.logits)[0].float().numpy()


def ours(folder, ids, work):
    (work / "ids.json").write_text(json.dumps(ids))
    run(ROOT / "target/release/examples/logits", folder, work / "ids.json", work / "logits.safetensors")
    return load_file(work / "logits.safetensors")["logits"]


def apart(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def in_llama_cpp(model, work):
    """Without sliding windows, which llama.cpp's graphs of these families do not have; of letters, which every tokenizer splits alike."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] == "gemma2":  # whose windows llama.cpp has, but no other scale than the width of a head
        config["query_pre_attn_scalar"] = config["head_dim"]
    else:
        config["sliding_window"] = None
    (model / "config.json").write_text(json.dumps(config))
    draw = random.Random(0)
    text, out = work / "letters.txt", work / "gguf"
    text.write_text("".join(draw.choice("abcdefghijklmnopqrstuvwxyz0123456789.,!?") for _ in range(3000)))
    lrc = ROOT / "target/release/lrc"
    run(lrc, "compress", model, "-o", out, "-q", "--format", "gguf", "--quant", "rtn-int8-channel", "--exclude", "*att*")
    runtime = os.environ.get("LLAMA_PERPLEXITY")
    if not runtime:
        raise NotRun("LLAMA_PERPLEXITY names no program")
    windows = ["--convention", "llamacpp", "--seq-len", "32", "--max-windows", CHUNKS]
    report = json.loads(run(lrc, "eval", out, "--text", text, *windows, "--json", "-q"))
    said = subprocess.run([runtime, "-m", out / "model.gguf", "-f", text, "-c", "32", "-b", "32"], capture_output=True, text=True)
    found = re.search(rf"\[{CHUNKS}\]([0-9.]+)", said.stdout)
    if not found:
        raise RuntimeError(f"llama-perplexity ended with {said.returncode}: " + " | ".join(said.stderr.splitlines()[-4:]))
    return abs(float(found[1]) / report["ppl"] - 1.0)


def encoder_in_llama_cpp(model, work):
    """With a WordPiece vocabulary, and with modules of sentence-transformers, which take the mean."""
    (model / "tokenizer.json").write_bytes((ROOT / "fixtures/pico/tokenizer-wordpiece.json").read_bytes())
    names = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (model / "modules.json").write_text(json.dumps([{"path": path, "type": f"models.{name}"} for path, name in names]))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    out, text = work / "gguf", "the dog teased a dog, and once more the dog listens!"
    lrc = ROOT / "target/release/lrc"
    run(lrc, "compress", model, "-o", out, "-q", "--format", "gguf", "--quant", "rtn-int8-channel", "--exclude", "*att*")
    try:
        import llama_cpp
    except ImportError:
        raise NotRun("llama-cpp-python is absent")
    theirs = llama_cpp.Llama(str(out / "model.gguf"), embedding=True, n_ctx=64, verbose=False)
    (work / "ids.json").write_text(json.dumps(theirs.tokenize(text.encode())))
    run(ROOT / "target/release/examples/logits", out, work / "ids.json", work / "embedding.safetensors")
    own, found = load_file(work / "embedding.safetensors")["embedding"], np.array(theirs.embed(text))
    return 1.0 - float(own @ found / np.linalg.norm(own) / np.linalg.norm(found))


def cell(make, limit=LIMIT):
    try:
        error = make()
        return f"{error:.1e}", error <= limit
    except NotRun as e:
        print(e, file=sys.stderr)
        return "not run", True
    except Exception as e:
        lines = str(e).splitlines()
        text = next((line for line in lines if line.startswith("error: ")), lines[0])
        refused = "cannot be stored" in text or "cannot be written as" in text
        print(e, file=sys.stderr)
        return ("refused" if refused else "**failed**"), refused


def main():
    arguments = sys.argv[1:]
    only_gguf = "--gguf" in arguments
    names = ["family", "parity", "compressed with `--keep 0.8`, evaluated"] + [name for name, _, _ in COLUMNS] + ["gguf"]
    print("| " + " | ".join(names) + " |\n|---" + "|---:" * (len(names) - 1) + "|", file=OUT)
    passed = True
    families = [name for name in arguments if name != "--gguf"] or sorted(p.parent.name for p in (ROOT / "fixtures/pico").glob("*/expected.json"))
    for family in families:
        source = ROOT / "fixtures/pico" / family
        expected = json.loads((source / "expected.json").read_text())
        ids = expected["ids"]
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            model, text = work / "model", work / "text.txt"
            model.mkdir()
            text.write_text(TEXT)
            for name in ["config.json", "model.safetensors"]:
                (model / name).write_bytes((source / name).read_bytes())
            is_encoder = "pooled" in expected
            tokenizer = "tokenizer-encoder.json" if is_encoder else "tokenizer.json"
            (model / "tokenizer.json").write_bytes((ROOT / "fixtures/pico" / tokenizer).read_bytes())
            parity = lambda: apart(ours(model, ids, work), np.array(expected["cases"][0]["logits"]))

            def evaluated():
                out = work / "evaluated"
                lrc = ROOT / "target/release/lrc"
                run(lrc, "compress", model, "-o", out, "--keep", "0.8", "--calibration", text, "-q", *CALIBRATED)
                report = json.loads(run(lrc, "eval", out, "--text", text, "--seq-len", "24", "--reference", model, "--json"))
                if is_encoder:
                    return f"states off by {report['states']['relative_error']:.2f}"
                return f"{report['reference_ppl']:.2f} → {report['ppl']:.2f}"

            def written(name, form, flags):
                out = work / name
                calibration = ["--calibration", text, *CALIBRATED] if "--keep" in flags else []
                # PEFT does not find the targets of a dense block beside blocks with experts.
                left = ["--exclude", "*.0.mlp.*_proj"] if (family, form) == ("qwen3_moe", "peft") else []
                run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--format", form, "-q", *flags, *left, *calibration)
                return apart(ours(out, ids, work), theirs(out, form, ids))

            cells = [("", True)] * 2 if only_gguf else [cell(parity)]
            try:
                cells += [] if only_gguf else [(evaluated(), True)]
            except Exception as e:
                print(e, file=sys.stderr)
                cells.append(("**failed**", False))
            nothing_fused = family not in ("gpt2", "gpt_neox", "phi3")
            for name, form, flags in COLUMNS:
                is_empty = only_gguf or name == "split" and nothing_fused
                cells.append(("", True) if is_empty else cell(lambda: written(name, form, flags)))
            in_runtime = encoder_in_llama_cpp if is_encoder else in_llama_cpp
            cells.append(cell(lambda: in_runtime(model, work), 2e-4))
        print(f"| {family} | " + " | ".join(text for text, _ in cells) + " |", file=OUT, flush=True)
        passed = passed and all(ok for _, ok in cells)
    raise SystemExit(0 if passed else 1)


main()
