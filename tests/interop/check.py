"""Loads every format that lrc writes in its real runtime, and compares logits with lrc's own. Prints docs/interop.md.

Run by `tests/interop/run.sh`, which makes the environment. Limits are those of f32 where the runtime computes in f32, and of
f16 kernels or 8-bit activations where it does not.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from sentences import TEXTS

# Loaders log to stdout: what they say goes where errors go.
OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.stdout = sys.stderr

ROOT = Path(__file__).resolve().parents[2]
EXACT, HALF, KL_8BIT = 1e-4, 1e-2, 2e-3

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*", default=[str(ROOT / "fixtures/tiny-llama")])
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--calibration", help="a text, with which sentence encoders are compressed too")
parser.add_argument("--llama-cpp", action="store_true", help="of sentence encoders, the table of llama.cpp alone")
args = parser.parse_args()


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def causal(folder, **options):
    """A loaded model; a load report that is not clean is an error."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    dirty = {key: value for key, value in info.items() if value}
    if dirty:
        raise RuntimeError(f"load report: {dirty}")
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def trusted(folder, ids):
    return logits(causal(folder, trust_remote_code=True), ids)


def plain(folder, ids):
    return logits(causal(folder), ids)


def dequantized(folder):
    from transformers.utils.quantization_config import CompressedTensorsConfig

    return causal(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


def sentence_transformers(folder):
    """Embeddings of some texts, and the tokens that they were of."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    return [model.tokenizer(text)["input_ids"] for text in TEXTS], model.encode(TEXTS, batch_size=1)


def with_adapter(model, folder, ids):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(model, folder / "adapter").eval(), ids)


def adapter(folder, ids):
    return with_adapter(causal(folder), folder, ids)


def dequantized_adapter(folder, ids):
    return with_adapter(dequantized(folder), folder, ids)


def half(folder, ids):
    """Kernels of gptqmodel compute in 16 bits; the rest of the model in f32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return logits(model.eval(), ids)


def gguf(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    return logits(model.eval(), ids)


def llama_cpp(folder, ids):
    import llama_cpp

    lora = folder / "model-lora.gguf"
    model = llama_cpp.Llama(
        str(folder / "model.gguf"), lora_path=str(lora) if lora.exists() else None, logits_all=True, n_ctx=512, verbose=False
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def onnx_runtime(folder, ids):
    import onnx
    import onnxruntime

    path = str(folder / "onnx/model.onnx")
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)})[0][0]


NARROW = ["--structure", "narrow", "--keep", "0.7"]
# Widths that differ by block, and ranks beside them, in the metric of a text of the fixture.
BY_BLOCK = [*NARROW, "--uniform-width=false", "--width-multiple", "16"]
TRAIN = ["--calibration", str(ROOT / "fixtures/text/train.txt"), "--samples", "16", "--seq-len", "64"]
JOINT = ["--structure", "narrow,low-rank", "--keep", "0.6", "--width-multiple", "16", *TRAIN]
LORC = ["--compensate", "lorc", "--compensate-rank", "8"]
# format, flags, runtime, package beside torch, largest logit error (or KL) that is allowed, whether it is a KL
CASES = [
    ("factored", ["--keep", "0.8"], trusted, "transformers", EXACT),
    ("factored", ["--keep", "0.8", "--layout", "factors", "--ranks", "uniform"], trusted, "transformers", EXACT),
    ("factored", ["--keep", "0.8", "--layout", "blast"], trusted, "transformers", EXACT),
    ("factored", ["--keep", "0.8", "--quant-factors", "int8"], trusted, "transformers", EXACT),
    ("factored", ["--keep", "0.8", "--layout", "factors", "--quant-factors", "int4"], trusted, "transformers", EXACT),
    ("factored", ["--quant", "rtn-int8-channel"], trusted, "transformers", EXACT),
    ("factored", ["--quant", "rtn-int4-g128-asym"], trusted, "transformers", EXACT),
    ("factored", ["--quant", "rtn-int3-g32-asym"], trusted, "transformers", EXACT),
    ("factored", ["--quant", "rtn-int4-g32,rtn-int8-g32", "--bits", "6"], trusted, "transformers", EXACT),
    ("factored", ["--quant", "nf4", *LORC], trusted, "transformers", EXACT),
    ("factored", ["--quant", "rtn-int2-g32", *LORC, "--quant-factors", "int8"], trusted, "transformers", EXACT),
    ("dense", ["--quant", "rtn-int3-g32", *LORC], plain, "transformers", EXACT),
    ("dense", NARROW, plain, "transformers", EXACT),
    ("compressed-tensors", [*NARROW, "--quant", "rtn-int4-g32"], plain, "compressed-tensors", EXACT),
    ("gguf", [*NARROW, "--quant", "q8_0"], gguf, "gguf", EXACT),
    ("gguf", NARROW, llama_cpp, "llama_cpp", KL_8BIT),
    ("factored", BY_BLOCK, trusted, "transformers", EXACT),
    ("gguf", BY_BLOCK, llama_cpp, "llama_cpp", KL_8BIT),
    ("factored", JOINT, trusted, "transformers", EXACT),
    ("compressed-tensors", ["--quant", "rtn-int4-g32"], plain, "compressed-tensors", EXACT),
    ("compressed-tensors", ["--quant", "rtn-int8-channel"], plain, "compressed-tensors", EXACT),
    ("compressed-tensors", ["--quant", "rtn-int4-g32,rtn-int8-g32", "--bits", "6"], plain, "compressed-tensors", EXACT),
    ("compressed-tensors", ["--quant", "rtn-int4-g32", *LORC], dequantized_adapter, "peft", EXACT),
    ("gptq", ["--quant", "rtn-int4-g32"], half, "gptqmodel", HALF),
    ("gptq", ["--quant", "rtn-int8-g32"], half, "gptqmodel", HALF),
    ("gptq", ["--quant", "rtn-int4-g32", "--exclude", "*.1.mlp.*"], half, "gptqmodel", HALF),
    ("peft", ["--quant", "rtn-int4-g32", *LORC], adapter, "peft", EXACT),
    ("peft", ["--quant", "rtn-int2,rtn-int4", "--compensate", "lorc", "--bits", "5"], adapter, "peft", EXACT),
    ("gguf", ["--quant", "q8_0"], gguf, "gguf", EXACT),
    ("gguf", ["--quant", "rtn-int4-g32"], gguf, "gguf", EXACT),
    ("gguf", ["--quant", "q4_k"], gguf, "gguf", EXACT),
    ("gguf", ["--quant", "q8_0"], llama_cpp, "llama_cpp", KL_8BIT),
    ("gguf", ["--quant", "rtn-int4-g32"], llama_cpp, "llama_cpp", KL_8BIT),
    ("gguf", ["--quant", "rtn-int8-g32", *LORC], llama_cpp, "llama_cpp", KL_8BIT),
    ("gguf", ["--quant", "rtn-int2-g32", *LORC], llama_cpp, "llama_cpp", KL_8BIT),
    ("onnx", ["--keep", "0.8"], onnx_runtime, "onnxruntime", EXACT),
    ("onnx", ["--keep", "0.8", "--layout", "blast"], onnx_runtime, "onnxruntime", EXACT),
    ("onnx", ["--quant", "rtn-int4-g32"], onnx_runtime, "onnxruntime", EXACT),
    ("onnx", ["--quant", "rtn-int8-channel"], onnx_runtime, "onnxruntime", EXACT),
    ("onnx", BY_BLOCK, onnx_runtime, "onnxruntime", EXACT),
]
# Encoders in folders of sentence-transformers: format and flags. Embeddings have length 1.
EMBEDDING = 1e-5
SENTENCES = [
    ("factored", ["--keep", "0.8"]),
    ("factored", ["--keep", "0.8", "--layout", "factors"]),
    ("factored", ["--keep", "0.8", "--quant-factors", "int8"]),
    ("factored", ["--quant", "rtn-int8-channel"]),
    ("dense", ["--keep", "0.8"]),
]
# The same in llama.cpp, where activations meet codes in 8 bits: flags (none: exported as it is) and the largest 1 - cosine.
IN_LLAMA_CPP = [
    (None, 1e-4),
    (["--structure", "narrow", "--keep", "0.7"], 1e-4),
    (["--quant", "q8_0"], 3e-3),
    (["--quant", "q8_0", "--embeddings", "quantize"], 3e-3),
    (["--quant", "iq4_nl"], 3e-3),
    (["--quant", "rtn-int4-g32", *LORC], 3e-3),
]


def tokens(model, folder, text=ROOT / "fixtures/text/held-out.txt"):
    """How many lines of a text llama.cpp tokenises otherwise than the model's own tokenizer, from the vocabulary in the file."""
    import llama_cpp
    import tokenizers

    out = folder / "vocabulary"
    run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--format", "gguf", "--quant", "q8_0", "-q")
    theirs = llama_cpp.Llama(str(out / "model.gguf"), vocab_only=True, verbose=False)
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    ours.no_padding()
    ours.no_truncation()
    lines = [line for line in Path(text).read_text().splitlines() if line]
    different = sum(theirs.tokenize(line.encode()) != ours.encode(line).ids for line in lines)
    return len(lines), different


def softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def check(model, case, folder, index):
    form, flags, runtime, package, limit = case
    out = folder / str(index)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, json.load(open(Path(model) / "config.json"))["vocab_size"], args.tokens)]
    (folder / "ids.json").write_text(json.dumps(ids))
    run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--format", form, *flags, "-q")
    reference = out
    if form == "onnx":
        # lrc does not read graphs.
        reference = folder / f"{index}-factored"
        run(ROOT / "target/release/lrc", "compress", model, "-o", reference, *flags, "-q")
    run(ROOT / "target/release/examples/logits", reference, folder / "ids.json", folder / "logits.safetensors")
    own = load_file(folder / "logits.safetensors")["logits"]
    found = runtime(out, ids)
    error = float(np.abs(own - found).max())
    p, q = softmax(own.astype(np.float64)), softmax(found.astype(np.float64))
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    # transformers dequantizes to the dtype of the scales: those of a 16-bit source round the weights.
    if runtime is dequantized_adapter and json.load(open(Path(model) / "config.json")).get("torch_dtype") != "float32":
        limit = HALF
    passed = (kl if runtime is llama_cpp else error) <= limit
    return error, kl, limit, passed


def show(line=""):
    print(line, file=OUT, flush=True)


def shown(flags):
    """Flags without the folders of files."""
    return " ".join(Path(flag).name if "/" in flag else flag for flag in flags)


def sentences(model, folder):
    """Prints the table of an encoder in a folder of sentence-transformers: how many rows of it failed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        show("Not run: sentence-transformers is absent.")
        return 0
    show("| format | flags | largest error in an embedding | limit | cosine with the source, mean | least | |")
    show("|---|---|---:|---:|---:|---:|---|")
    _, source = sentence_transformers(model)
    cases = list(SENTENCES)
    if args.calibration:
        cases.insert(0, ("factored", ["--keep", "0.8", "--calibration", args.calibration, "--sequential=false"]))
    failures = 0
    for index, (form, flags) in enumerate(cases):
        row = f"| {form} | `{shown(flags)}` |"
        try:
            out = folder / str(index)
            run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--format", form, *flags, "-q")
            texts, found = sentence_transformers(out)
            error = 0.0
            for ids, embedding in zip(texts, found):
                (folder / "ids.json").write_text(json.dumps(ids))
                run(ROOT / "target/release/examples/logits", out, folder / "ids.json", folder / "embedding.safetensors")
                own = load_file(folder / "embedding.safetensors")["embedding"]
                error = max(error, float(np.abs(own - embedding).max()))
            cosines = (source * found).sum(1)
            passed = error <= EMBEDDING
            row += f" {error:.1e} | {EMBEDDING:.0e} | {cosines.mean():.4f} | {cosines.min():.4f} | {'ok' if passed else '**FAILED**'} |"
        except Exception as e:
            passed, row = False, f"{row} | | | | **FAILED**: {str(e).splitlines()[0]} |"
        failures += not passed
        show(row)
    return failures


def embeddings_in_llama_cpp(model, folder):
    """Prints the table of an encoder in llama.cpp: how many rows of it failed."""
    import llama_cpp

    show("\n| format | flags | runtime | 1 - cosine with lrc, mean | largest | limit | cosine with the source, mean | |")
    show("|---|---|---|---:|---:|---:|---:|---|")
    _, source = sentence_transformers(model)
    failures = 0
    for index, (flags, limit) in enumerate(IN_LLAMA_CPP):
        out = folder / f"gguf-{index}"
        command = ["export", model] if flags is None else ["compress", model, *flags]
        row = f"| gguf | {'`lrc export`' if flags is None else f'`{shown(flags)}`'} | llama.cpp |"
        try:
            run(ROOT / "target/release/lrc", *command, "-o", out, "--format", "gguf", "-q")
            lora = out / "model-lora.gguf"
            theirs = llama_cpp.Llama(
                str(out / "model.gguf"), lora_path=str(lora) if lora.exists() else None, embedding=True, n_ctx=512, verbose=False
            )
            errors, cosines = [], []
            for text, of_source in zip(TEXTS, source):
                (folder / "ids.json").write_text(json.dumps(theirs.tokenize(text.encode())))
                run(ROOT / "target/release/examples/logits", out, folder / "ids.json", folder / "embedding.safetensors")
                own, found = load_file(folder / "embedding.safetensors")["embedding"], np.array(theirs.embed(text))
                found /= np.linalg.norm(found)
                errors.append(1 - float(own.astype(np.float64) @ found / np.linalg.norm(own)))
                cosines.append(float(of_source @ found))
            passed = max(errors) <= limit
            row += f" {np.mean(errors):.1e} | {max(errors):.1e} | {limit:.0e} | {np.mean(cosines):.4f} | {'ok' if passed else '**FAILED**'} |"
        except Exception as e:
            passed, row = False, f"{row} | | | | **FAILED**: {str(e).splitlines()[0]} |"
        failures += not passed
        show(row)
    lines, different = tokens(model, folder, args.calibration or ROOT / "fixtures/text/held-out.txt")
    show(f"\nllama.cpp's tokens of {lines} lines of text, from the vocabulary in `model.gguf`: {different} lines differ.")
    return failures


def main():
    packages = ["torch", "transformers", "peft", "compressed-tensors", "gptqmodel", "optimum", "gguf", "llama-cpp-python",
                "sentence-transformers", "onnx", "onnxruntime"]
    show("# Written formats in their runtimes\n")
    show("[families.md](families.md) has the table of every family.\n")
    show("Made by `tests/interop/run.sh`. The script compares logits of lrc (f32) and of the runtime on the same random tokens.")
    show("`limit` applies to the largest difference of a logit; for llama.cpp, which quantizes activations, to the mean KL")
    show("divergence in nats; for sentence-transformers to the largest difference in an embedding.\n")
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    show("Versions: " + ", ".join(versions) + ".\n")
    failures = 0
    for model in args.models:
        show(f"## {Path(model).parent.name}/{Path(model).name}\n")
        if (Path(model) / "modules.json").is_file():
            with tempfile.TemporaryDirectory() as folder:
                failures += 0 if args.llama_cpp else sentences(model, Path(folder))
                if importlib.util.find_spec("llama_cpp"):
                    failures += embeddings_in_llama_cpp(model, Path(folder))
            show()
            continue
        show("| format | flags | runtime | largest logit error | KL | limit | |\n|---|---|---|---:|---:|---:|---|")
        with tempfile.TemporaryDirectory() as folder:
            cases = list(CASES)
            for index, case in enumerate(cases):
                form, flags, runtime, package, limit = case
                name = {"llama_cpp": "llama.cpp", "half": "transformers, gptqmodel", "onnx_runtime": "onnxruntime"}.get(runtime.__name__, "transformers")
                name += ", peft" if "adapter" in runtime.__name__ else ""
                row = f"| {form} | `{shown(flags)}` | {name} |"
                if package != "transformers" and importlib.util.find_spec(package.replace("-", "_")) is None:
                    show(f"{row} | | | not run: {package} is absent |")
                    continue
                try:
                    error, kl, limit, passed = check(model, case, Path(folder), index)
                    failures += not passed
                    show(f"{row} {error:.1e} | {kl:.1e} | {limit:.0e} | {'ok' if passed else '**FAILED**'} |")
                except Exception as e:
                    # A refusal of lrc is shown, and tried again without the linears that do not fit; anything else is a failure.
                    refused = "cannot be stored" in str(e) or "no targeted linear" in str(e)
                    failures += not refused
                    text = str(e).splitlines()[0].removeprefix("error: ")
                    show(f"{row} | | | {'refused' if refused else '**FAILED**'}: {text} |")
                    if "cannot be stored" in str(e):
                        cases.append((form, [*flags, "--exclude", "*.mlp.*"], runtime, package, limit))
            if importlib.util.find_spec("llama_cpp"):
                lines, different = tokens(model, Path(folder))
                failures += different > 0
                show(f"\nllama.cpp's tokens of {lines} lines of text, from the vocabulary in `model.gguf`: {different} lines differ.")
        show()
    raise SystemExit(1 if failures else 0)


main()
