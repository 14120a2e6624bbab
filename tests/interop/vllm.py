"""Runs factored outputs of lrc in vLLM, on the CPU, beside transformers and lrc. Prints the section on vLLM of docs/interop.md.

    cargo build --release --bin lrc --example logits && python tests/interop/vllm.py [MODEL...] [--compile] [--cases 0 1]

Run by `tests/interop/run.sh` in an environment of its own, for vLLM wants its own versions of torch and transformers. A MODEL is a
folder of a family that vLLM's transformers backend takes, with heads of a width that its kernels for CPUs know (64, 128), which those
of the fixtures have not; without any, a Llama with random weights is made.
Every case has to give the greedy tokens of transformers, and the log-probabilities of the tokens of the prompt that lrc gives.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an error keeps its text
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "HF_HUB_OFFLINE": "1",
}
OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.pop(0)  # this file has the name of the package

import numpy as np
import torch
import transformers
import vllm
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PROMPT, NEW, LIMIT = 48, 20, 1e-3

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*")
parser.add_argument("--compile", action="store_true", help="let vLLM compile what it runs")
parser.add_argument("--cases", type=int, nargs="+", help="numbers of some cases, from 0")
args = parser.parse_args()

UNIFORM = ["--keep", "0.8", "--ranks", "uniform"]
LORC = ["--compensate", "lorc", "--compensate-rank", "8"]
CASES = [
    ["--keep", "0.8", "--layout", "factors", "--ranks", "uniform"],
    UNIFORM,
    [*UNIFORM, "--exclude", "*.layers.0.*"],
    [*UNIFORM, "--exclude", "*.1.*.v_proj", "--exclude", "*.2.*.up_proj", "--exclude", "*.3.*.q_proj", "--exclude", "*.3.*.gate_proj"],
    ["--keep", "0.8"],
    [*UNIFORM, "--quant-factors", "int8"],
    ["--quant", "rtn-int8-channel"],
    ["--quant", "rtn-int4-g32-asym", *LORC],
    ["--quant", "rtn-int8-channel", *LORC, "--exclude", "*.layers.0.*"],
]


INT8 = ["--quant", "rtn-int8-channel"]
DAMAGED = [(UNIFORM, ".lr_order"), (INT8, ".codes"), (INT8, ".scales")]


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def log_probabilities(logits, ids):
    logits = torch.from_numpy(logits.astype(np.float64))
    return logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].numpy()


def in_transformers(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return found[0, len(ids) :].tolist()


def in_lrc(folder, ids, work):
    (work / "ids.json").write_text(json.dumps(ids))
    run(ROOT / "target/release/examples/logits", folder, work / "ids.json", work / "logits.safetensors")
    return load_file(work / "logits.safetensors")["logits"]


def load(folder):
    return vllm.LLM(
        str(folder), trust_remote_code=True, dtype="float32", max_model_len=128, max_num_seqs=1,
        max_num_batched_tokens=128, enforce_eager=not args.compile, skip_tokenizer_init=True,
    )  # fmt: skip


def in_vllm(folder, ids):
    llm = load(folder)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
    began = time.time()
    found = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0]
    rate = NEW / (time.time() - began)
    given = [place[token].logprob for place, token in zip(found.prompt_logprobs[1:], ids[1:])]
    del llm
    gc.collect()
    return list(found.outputs[0].token_ids), np.array(given), rate


def check(model, flags, work, ids):
    out = work / "out"
    run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--force", "-q", *flags)
    tokens, given, rate = in_vllm(out, ids)
    expected = in_transformers(out, ids)
    of_prompt = in_lrc(out, ids, work)
    own = in_lrc(out, ids + expected, work)
    error = np.abs(log_probabilities(of_prompt, ids) - given).max()
    top = own[len(ids) - 1 : -1].argmax(-1).tolist()
    same = [sum(a == b for a, b in zip(tokens, other)) for other in (expected, top)]
    return same, error, rate, same == [NEW, NEW] and error <= LIMIT


def refused(work, ids, tensor):
    """An output without one of its tensors is no model, and may not run as one: the words with which it is refused."""
    out = work / "out"
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(tensor))
    save_file({key: value for key, value in tensors.items() if key != name}, out / "model.safetensors", {"format": "pt"})
    try:
        in_vllm(out, ids)
    except Exception as e:
        return str(e).splitlines()[0] if f"`{name}`" in str(e) else None
    return None


def random_llama(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def section(model, work):
    """Prints the section of a model: how many rows of it failed."""
    say = lambda line="": print(line, file=OUT, flush=True)
    mode = "compiled" if args.compile else "eager"
    say(f"### {'random Llama' if model.parent == work else model.name}, {mode}\n")
    say(f"| flags | of {NEW} greedy tokens: transformers' | lrc's | largest error of a log-probability | limit | tokens/s | |")
    say("|---|---:|---:|---:|---:|---:|---|")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = [int(i) for i in np.random.default_rng(1).integers(3, size, PROMPT)]
    failures = 0
    for flags in CASES if args.cases is None else [CASES[i] for i in args.cases]:
        row = f"| `{' '.join(flags)}` |"
        try:
            same, error, rate, passed = check(model, flags, work, ids)
            row += f" {same[0]} | {same[1]} | {error:.1e} | {LIMIT:.0e} | {rate:.1f} | {'ok' if passed else '**FAILED**'} |"
        except Exception as e:
            passed, row = False, f"{row} | | | | | **FAILED**: {str(e).splitlines()[0]} |"
        failures += not passed
        say(row)
    say()
    for flags, tensor in DAMAGED:
        run(ROOT / "target/release/lrc", "compress", model, "-o", work / "out", "--force", "-q", *flags)
        said = refused(work, ids, tensor)
        failures += said is None
        say(f"- without a `{tensor[1:]}`: {said or '**NOT REFUSED**'}")
    say()
    return failures


def main():
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    print("## vLLM\n\nMade by `tests/interop/vllm.py`, on a CPU, in f32; random tokens as the prompt.\n", file=OUT)
    print(f"Versions: {versions}.\n", file=OUT, flush=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        models = [Path(model) for model in args.models] or [random_llama(work / "random")]
        raise SystemExit(1 if sum(section(model, work) for model in models) else 0)


if __name__ == "__main__":
    main()
