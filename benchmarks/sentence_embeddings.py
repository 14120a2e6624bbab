"""How close the embeddings of compressed sentence encoders are to those of the source, by sentence-transformers itself.

    python benchmarks/sentence_embeddings.py MODEL TEXT OUT [OUT ...]                   needs sentence-transformers
    python benchmarks/sentence_embeddings.py bytes MODEL CALIBRATION_TEXT TEXT WORK LRC  needs sentence-transformers

120 sentences of TEXT (one paragraph a line, as WikiText has them) and 40 paragraphs of 100 words and more are embedded by
`SentenceTransformer(folder, trust_remote_code=True).encode`. Printed are mean and least cosine between the embeddings of
MODEL and of each OUT, and of how many of the sentences the nearest other sentence stays the same. With LRC set to the binary,
`lrc eval --reference` measures the same sentences, and must agree to 1e-4.

`bytes` makes int8, int4, and shares of 0.8 and 0.6 of the parameters, each without and with the embeddings, by `lrc compress`
from one file of statistics, and embeds 1,000 sentences. Printed are bytes of the weights, cosines, of how many sentences the
nearest other stays the same, the mean share of the ten nearest that stay, seconds and peak memory of the command.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from sentence_transformers import SentenceTransformer

N_SENTENCES, N_PARAGRAPHS = 120, 40


def texts(path, n_sentences=N_SENTENCES):
    """Drawn by a fixed seed: sentences of 5 to 60 words, and long paragraphs; headings and WikiText's `@-@` are undone."""
    sentences, paragraphs = [], []
    for line in open(path, encoding="utf-8"):
        line = re.sub(r" @([-,.])@ ", r"\1", line).strip()
        if not line or line.startswith("="):
            continue
        if len(line.split()) >= 100:
            paragraphs.append(line)
        sentences += [s for s in re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", line) if 5 <= len(s.split()) <= 60]
    for found in (sentences, paragraphs):
        random.Random(0).shuffle(found)
    return sentences[:n_sentences], paragraphs[:N_PARAGRAPHS]


def embed(folder, texts):
    vectors = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts, batch_size=8)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors, n=1):
    """The `n` nearest others of each, the nearest first."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1.0)
    return np.argsort(-similar, axis=1, kind="stable")[:, :n]


def by_lrc(lrc, model, out, texts):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        file.flush()
        command = [lrc, "eval", out, "--text", file.name, "--reference", model, "--json", "-q"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["pooled"]["cosine_mean"]


QUANTIZED = {bits: ["--quant", f"cd-int{bits}-g64", "--method", "kfac"] for bits in (8, 4)}
KEPT = {keep: ["--keep", str(keep), "--sequential=false"] for keep in (0.8, 0.6)}


def by_bytes(model, calibration, text, work, lrc):
    os.makedirs(work, exist_ok=True)
    statistics = f"{work}/statistics.safetensors"
    flags = ["--text", calibration, "--method", "kfac", "-o", statistics, "-q", "--force"]
    seconds, memory = timed(lrc, "calibrate", model, *flags)
    print(f"statistics: {seconds:.0f} s, {memory / 2**20:.0f} MiB\n")
    print("| | bytes | cosine, mean | least | same nearest | of ten nearest | s | MiB of memory |\n|---" + "|---:" * 7 + "|")
    sentences = texts(text, 1000)[0]
    originals = embed(model, sentences)
    print(f"| source | {os.path.getsize(f'{model}/model.safetensors'):,} | | | | | | |")
    for what, flags in [(f"int{bits}", flags) for bits, flags in QUANTIZED.items()] + list(KEPT.items()):
        for tables in ["keep", "quantize" if what in ("int8", "int4") else "auto"]:
            out = f"{work}/{what}-{tables}"
            made = timed(lrc, "compress", model, "-o", out, "--statistics", statistics, *flags, "--embeddings", tables, "-q", "--force")
            vectors = embed(out, sentences)
            cosines = (originals * vectors).sum(1)
            before, after = nearest(originals, 10), nearest(vectors, 10)
            shared = np.mean([len(set(a) & set(b)) for a, b in zip(before, after)]) / 10
            same = (before[:, 0] == after[:, 0]).mean()
            quality = f"{cosines.mean():.4f} | {cosines.min():.4f} | {same:.3f} | {shared:.3f}"
            size = os.path.getsize(f"{out}/model.safetensors")
            cost = f"{made[0]:.0f} | {made[1] / 2**20:.0f}"
            print(f"| {what}{', embeddings too' if tables != 'keep' else ''} | {size:,} | {quality} | {cost} |", flush=True)


def timed(*command):
    """Seconds and peak memory in bytes of a command."""
    started = time.time()
    process = subprocess.Popen(list(command))
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return time.time() - started, used.ru_maxrss * 1024


def main():
    model, text, *outs = sys.argv[1:]
    lrc = os.environ.get("LRC")
    kinds = dict(zip(["sentences", "paragraphs"], texts(text)))
    originals = {kind: embed(model, found) for kind, found in kinds.items()}
    print("| output | texts | cosine, mean | least | same nearest |" + (" lrc eval |" if lrc else ""))
    print("|---|---|---:|---:|---:|" + ("---:|" if lrc else ""))
    for out in outs:
        for kind, found in kinds.items():
            vectors = embed(out, found)
            cosines = (originals[kind] * vectors).sum(1)
            same = (nearest(originals[kind]) == nearest(vectors)).mean()
            row = f"| {os.path.basename(out)} | {len(found)} {kind} | {cosines.mean():.4f} | {cosines.min():.4f} | {same:.3f} |"
            if lrc:
                measured = by_lrc(lrc, model, out, found)
                row += f" {measured:.4f} |"
                assert abs(measured - cosines.mean()) < 1e-4, (measured, cosines.mean())
            print(row, flush=True)


if sys.argv[1] == "bytes":
    by_bytes(*sys.argv[2:])
else:
    main()
