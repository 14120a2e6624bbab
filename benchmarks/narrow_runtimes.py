"""Narrower models in other programs: perplexity in llama.cpp beside lrc's, and the speed of the forward pass in transformers and llama.cpp
beside dense and low-rank models.

    python benchmarks/narrow_runtimes.py MODEL STATISTICS TEXT WORK LRC LLAMA_CPP [KIND]...

MODEL is a model of the llama family in Hugging Face form, STATISTICS a file of `lrc calibrate MODEL --method kfac`, LLAMA_CPP the folder with
`llama-bench`, `llama-perplexity` and `llama-quantize`. KINDs are some of the table below, all by default. Needs torch and transformers. Models
are made in WORK, once. In transformers they run in f32 on two threads: prefill of 512 tokens, and 32 tokens decoded one by one after 128, with a cache;
the best of several rounds, in which the models take turns. `FLOPs` is the share of the multiplications of a token, those of the head included.
"""

import json
import pathlib
import re
import subprocess
import sys
import time

import torch
import transformers

model, statistics, text, work, lrc, llama = sys.argv[1:7]
work, llama = pathlib.Path(work), pathlib.Path(llama)
work.mkdir(parents=True, exist_ok=True)
THREADS, ROUNDS, PREFILL, CONTEXT, DECODED = 2, 5, 512, 128, 32

KINDS = {
    "narrow": ["--structure", "narrow"],
    "narrow by block": ["--structure", "narrow", "--uniform-width=false"],
    "narrow, low rank": ["--structure", "narrow,low-rank"],
    "pivot": ["--sequential=false"],
    "factors": ["--sequential=false", "--layout", "factors"],
}


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def compressed(kind, keep):
    folder = work / f"{kind}-{keep}".replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        run(lrc, "compress", model, "-o", folder, "--keep", keep, "--statistics", statistics, *KINDS[kind], "-q")
    return folder


folders = {"dense": pathlib.Path(model)}
folders |= {f"{kind}, {keep}": compressed(kind, keep) for keep in ("0.8", "0.6") for kind in sys.argv[7:] or KINDS}


def gguf(name):
    """The files of a model for llama.cpp, by type."""
    plain = work / f"{folders[name].name}-gguf"
    if not plain.exists():
        run(lrc, "export", folders[name], "--format", "gguf", "-o", plain, "-q")
    files = {}
    for kind in ("F16", "Q4_K_M"):
        files[kind] = work / f"{folders[name].name}-{kind}.gguf"
        if not files[kind].exists():
            run(llama / "llama-quantize", plain / "model.gguf", files[kind], kind, THREADS)
    return files


def by_llama_cpp(name):
    for kind, file in gguf(name).items():
        flags = ["-c", 512, "-b", 512, "--chunks", 4, "-t", THREADS, "-f", text]
        both = subprocess.run(list(map(str, [llama / "llama-perplexity", "-m", file, *flags])), check=True, capture_output=True, text=True)
        theirs = float(re.search(r"Final estimate: PPL = ([0-9.]+)", both.stdout + both.stderr)[1])
        ours = json.loads(run(lrc, "eval", file, "--text", text, "--convention", "llamacpp", "--max-windows", 4, "--json", "-q"))["ppl"]
        bench = json.loads(run(llama / "llama-bench", "-m", file, "-p", PREFILL, "-n", DECODED, "-t", THREADS, "-r", ROUNDS, "-o", "json"))
        prefill, decode = (max(row["samples_ts"]) for row in bench)
        yield name, kind, file.stat().st_size, theirs, ours, prefill, decode


def flops(network):
    """Multiplications of a token in all matrices but the table, which is read at one row; tied, it is the head."""
    matrices = [p.numel() for name, p in network.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    tied = network.get_input_embeddings().weight.numel() if network.config.tie_word_embeddings else 0
    return sum(matrices) + tied


@torch.no_grad()
def timed(network):
    ids = torch.arange(PREFILL)[None] % network.config.vocab_size
    started = time.perf_counter()
    network(input_ids=ids, logits_to_keep=1)
    prefill = PREFILL / (time.perf_counter() - started)
    past = network(input_ids=ids[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
    started = time.perf_counter()
    for step in range(DECODED):
        past = network(input_ids=ids[:, step : step + 1], past_key_values=past, use_cache=True).past_key_values
    return prefill, DECODED / (time.perf_counter() - started)


def in_transformers():
    torch.set_num_threads(THREADS)
    networks = {}
    for name, folder in folders.items():
        trusted = {} if name == "dense" or name.startswith("narrow, 0") else {"trust_remote_code": True}
        networks[name] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusted).eval()
    best = {name: (0.0, 0.0) for name in networks}
    for _ in range(ROUNDS + 1):
        for name, network in networks.items():
            best[name] = tuple(max(pair) for pair in zip(best[name], timed(network)))
    print("| transformers | FLOPs | prefill, tokens/s | speed | of the FLOPs | decode, tokens/s | speed |\n|---|" + "---:|" * 6)
    dense, whole = best["dense"], flops(networks["dense"])
    for name, (prefill, decode) in best.items():
        share, gain = flops(networks[name]) / whole, prefill / dense[0]
        print(f"| {name} | {share:.3f} | {prefill:.0f} | {gain:.2f} x | {gain * share:.2f} | {decode:.1f} | {decode / dense[1]:.2f} x |")


transformers.utils.logging.set_verbosity_error()
in_transformers()
print("\n| llama.cpp | type | bytes | its perplexity | lrc's | prefill, tokens/s | decode, tokens/s |\n|---|---|" + "---:|" * 5)
for name in [name for name in folders if name == "dense" or name.split(",")[0] in ("narrow", "narrow by block") and name.count(",") == 1]:
    for name, kind, size, theirs, ours, prefill, decode in by_llama_cpp(name):
        print(f"| {name} | {kind} | {size:,} | {theirs:.4f} | {ours:.4f} | {prefill:.0f} | {decode:.0f} |", flush=True)
