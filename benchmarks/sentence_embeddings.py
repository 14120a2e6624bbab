"""How close the embeddings of compressed sentence encoders are to those of the source, by sentence-transformers itself.

    python benchmarks/sentence_embeddings.py MODEL TEXT OUT [OUT ...]          needs sentence-transformers

120 sentences of TEXT (one paragraph a line, as WikiText has them) and 40 paragraphs of 100 words and more are embedded by
`SentenceTransformer(folder, trust_remote_code=True).encode`. Printed are mean and least cosine between the embeddings of
MODEL and of each OUT, and of how many of the sentences the nearest other sentence stays the same. With LRC set to the binary,
`lrc eval --reference` measures the same sentences, and must agree to 1e-4.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile

import numpy as np
from sentence_transformers import SentenceTransformer

N_SENTENCES, N_PARAGRAPHS = 120, 40


def texts(path):
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
    return sentences[:N_SENTENCES], paragraphs[:N_PARAGRAPHS]


def embed(folder, texts):
    vectors = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts, batch_size=8)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors):
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1.0)
    return similar.argmax(1)


def by_lrc(lrc, model, out, texts):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        file.flush()
        command = [lrc, "eval", out, "--text", file.name, "--reference", model, "--json", "-q"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["pooled"]["cosine_mean"]


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


main()
