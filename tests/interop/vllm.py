"""Runs factored outputs of lrc in vLLM, on the CPU, beside transformers and lrc. Prints a section of docs/interop.md.

    cargo build --release --bin lrc --example logits
    python tests/interop/vllm.py [MODEL...] [--cases 0 1] [--dtype bfloat16] [--compile] [--tensor-parallel 2]

Run by `tests/interop/run.sh` in an environment of its own, for vLLM wants its own versions of torch and transformers. A MODEL is a
folder of a family that vLLM's transformers backend takes, with heads of a width that its kernels for CPUs know (64, 128), which those
of the fixtures have not; or `random`, the default, a Llama with random weights. Prompts are texts where the folder has a tokenizer.
Every case has to give the greedy tokens of transformers in the same dtype, and in f32 the log-probabilities of the tokens of the prompt
that lrc gives. In bf16, where two tokens may tie, logits of the first that differ are compared in f32. What tensor parallelism has no
way to split must be refused there.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import re
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
TEXTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a little dog that",
    "def fibonacci(n):\n    ",
]

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*", default=["random"])
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
parser.add_argument("--tensor-parallel", type=int, default=1, help="number of cores, one for each rank")
parser.add_argument("--compile", action="store_true", help="let vLLM compile what it runs")
parser.add_argument("--cases", type=int, nargs="+", help="numbers of some cases, from 0")
args = parser.parse_args()
if args.tensor_parallel > 1:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(args.tensor_parallel))

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
    ["--structure", "narrow", "--keep", "0.7"],
]


SPLIT = """Factors and pivots in floating point are split, each rank a process on one core. Where the dense linear is split by its
outputs, `lr_a` and `lr_p` are whole on every rank, and `lr_b` is split; pivots compute all outputs and keep those of the rank. Where
it is split by its inputs (`o_proj`, `down_proj`), `lr_a` and `lr_p` are, and the ranks add up r numbers instead of all outputs. What
is quantized, fused parts apart, and heads of keys and values that the number of ranks does not divide are refused when the model is
made. transformers' own tensor parallelism is refused when it loads.
"""
INT8 = ["--quant", "rtn-int8-channel"]
DAMAGED = [(UNIFORM, ".lr_order"), (INT8, ".codes"), (INT8, ".scales")]


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def log_probabilities(logits, ids):
    logits = torch.from_numpy(logits.astype(np.float64))
    return logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].numpy()


def in_transformers(folder, prompts):
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        found = [model.generate(torch.tensor([ids]), generation_config=settings) for ids in prompts]
    return [tokens[0, len(ids) :].tolist() for tokens, ids in zip(found, prompts)]


def in_lrc(folder, ids, work):
    (work / "ids.json").write_text(json.dumps(ids))
    run(ROOT / "target/release/examples/logits", folder, work / "ids.json", work / "logits.safetensors")
    return load_file(work / "logits.safetensors")["logits"]


def load(folder):
    return vllm.LLM(
        str(folder), trust_remote_code=True, dtype=args.dtype, max_model_len=128, max_num_seqs=1, max_num_batched_tokens=128,
        enforce_eager=not args.compile, skip_tokenizer_init=True, tensor_parallel_size=args.tensor_parallel,
    )  # fmt: skip


def in_vllm(folder, prompts):
    llm = load(folder)
    settings = {"temperature": 0, "ignore_eos": True, "prompt_logprobs": 0, "detokenize": False}
    sampling = vllm.SamplingParams(max_tokens=NEW, **settings)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(inputs[0], vllm.SamplingParams(max_tokens=1, **settings), use_tqdm=False)
    began = time.time()
    found = llm.generate(inputs, sampling, use_tqdm=False)
    rate = NEW * len(prompts) / (time.time() - began)
    given = [
        np.array([place[token].logprob for place, token in zip(of.prompt_logprobs[1:], ids[1:])]) for of, ids in zip(found, prompts)
    ]
    del llm
    gc.collect()
    return [list(of.outputs[0].token_ids) for of in found], given, rate


def alike(a, b):
    """How many tokens are the same, up to the first that is not."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))


def check(model, flags, work, prompts):
    out = work / "out"
    run(ROOT / "target/release/lrc", "compress", model, "-o", out, "--force", "-q", *flags)
    tokens, given, rate = in_vllm(out, prompts)
    expected = in_transformers(out, prompts)
    same, error, gap = np.zeros(2, int), 0.0, 0.0
    for ids, new, probabilities, theirs in zip(prompts, tokens, given, expected):
        own = in_lrc(out, ids + theirs, work)
        error = max(error, np.abs(log_probabilities(own[: len(ids)], ids) - probabilities).max())
        place = alike(new, theirs)
        same += [place, alike(new, own[len(ids) - 1 : -1].argmax(-1).tolist())]
        if place < NEW:
            logits = own[len(ids) - 1 + place]
            gap = max(gap, float(abs(logits[new[place]] - logits[theirs[place]]) / np.abs(logits).max()))
    if args.dtype == "float32":
        passed = (same == NEW * len(prompts)).all() and error <= LIMIT
    else:  # two logits that lie within two steps of bf16
        passed = gap <= 2 * 2.0**-8
    return same, error, gap, rate, passed


def refused(work, prompts, tensor):
    """An output without one of its tensors is not a model, and may not run as one: the words with which it is refused."""
    out = work / "out"
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(tensor))
    save_file({key: value for key, value in tensors.items() if key != name}, out / "model.safetensors", {"format": "pt"})
    try:
        in_vllm(out, prompts)
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


def cannot_be_split(make):
    """The words with which it is refused, which a process of vLLM's leaves in the log."""
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            make()
            found = None
        except Exception:
            log.seek(0)
            found = re.search(r"`[^`]*` cannot be split across \d+ devices", log.read().decode(errors="replace"))
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    if found is None:
        raise RuntimeError("not refused, or in other words")
    return found[0]


def prompts_for(model):
    if (model / "tokenizer.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    return [[int(i) for i in np.random.default_rng(1).integers(3, size, PROMPT)]]


def say(line=""):
    print(line, file=OUT, flush=True)


def section(name, work):
    """Prints the table of a model: how many rows of it failed."""
    is_random = name == "random"
    model = random_llama(work / "random") if is_random else Path(name)
    prompts = prompts_for(model)
    say(f"### {'random Llama' if is_random else model.resolve().name}\n")
    of = f"of {NEW * len(prompts)} greedy tokens" + (f" ({len(prompts)} prompts)" if len(prompts) > 1 else "")
    in_bf16 = args.dtype == "bfloat16"
    apart = " first other token's logit apart, of the largest |" if in_bf16 else ""
    say(f"| flags | {of}: transformers' | lrc's | largest error of a log-probability |{apart} tokens/s | |")
    say("|---|" + "---:|" * (5 if in_bf16 else 4) + "---|")
    empty = " |" * (5 if in_bf16 else 4)
    failures = 0
    for flags in CASES if args.cases is None else [CASES[i] for i in args.cases]:
        row = f"| `{' '.join(flags)}` |"
        try:
            if args.tensor_parallel > 1 and any(flag.startswith("--quant") for flag in flags):
                row += f"{empty} refused: {cannot_be_split(lambda: check(model, flags, work, prompts))} |"
                passed = True
            else:
                same, error, gap, rate, passed = check(model, flags, work, prompts)
                row += f" {same[0]} | {same[1]} | {error:.1e} |" + (f" {gap:.1e} |" if in_bf16 else "")
                row += f" {rate:.1f} | {'ok' if passed else '**FAILED**'} |"
        except Exception as e:
            passed, row = False, f"{row}{empty} **FAILED**: {str(e).splitlines()[0]} |"
        failures += not passed
        say(row)
    say()
    for flags, tensor in DAMAGED if is_random and args.cases is None and args.tensor_parallel == 1 else []:
        run(ROOT / "target/release/lrc", "compress", model, "-o", work / "out", "--force", "-q", *flags)
        said = refused(work, prompts, tensor)
        failures += said is None
        say(f"- without a `{tensor[1:]}`: {said or '**NOT REFUSED**'}")
    say()
    return failures


def main():
    mode = [args.dtype, "compiled" if args.compile else "eager"]
    mode += [f"tensor-parallel on {args.tensor_parallel} ranks"] if args.tensor_parallel > 1 else []
    say(f"## vLLM, {', '.join(mode)}\n")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    say(f"Made by `{' '.join(['tests/interop/vllm.py', *(Path(a).name if '/' in a else a for a in sys.argv[1:])])}`, on a CPU. ")
    say(f"Log-probabilities of the prompt are compared with lrc's, in f32, with a limit of {LIMIT:.0e}.\n")
    say(f"Versions: {versions}.\n")
    if args.tensor_parallel > 1:
        say(SPLIT)
    with tempfile.TemporaryDirectory() as work:
        raise SystemExit(1 if sum(section(name, Path(work)) for name in args.models) else 0)


if __name__ == "__main__":
    main()
