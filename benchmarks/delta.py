"""Adapters of a fine-tune at equal bytes: one rank for all matrices, as mergekit and kohya extract them, beside `lrc delta`.

    python benchmarks/fine_tune.py BASE other-text.txt TUNED
    python benchmarks/delta.py BASE TUNED calibration.txt held-out.txt [--ranks 1 2 4 8] [--others store] [--lrc target/release/lrc]

For every rank r: plain SVD with `--ranks fixed:r`, then the same number of bytes for the same share of energy in every matrix (the default
without a text) and for the knapsack, in plain SVD, svd-llm and kfac (its default), whose statistics are those of the fine-tuned model on the
calibration text, measured once by `lrc calibrate`. What is no linear is treated alike in all of them, by `--others`. Each is scored as base and adapter against the fine-tuned model, on the held-out text of the fine-tune.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("tuned")
parser.add_argument("calibration")
parser.add_argument("held_out")
parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
parser.add_argument("--lrc", default="target/release/lrc")
parser.add_argument("--seq-len", default="512")
parser.add_argument("--max-windows", default="64")
parser.add_argument("--samples", default="64")
parser.add_argument("--others", default="store")
args = parser.parse_args()


def lrc(*words):
    command = [args.lrc, *map(str, words), "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


scored = ["--text", args.held_out, "--seq-len", args.seq_len, "--max-windows", args.max_windows]


def score(*model):
    report = lrc("eval", *model, *scored, "--reference", args.tuned)
    return report["ppl"], report["kl"]["mean"]


def made(*flags):
    out = folder / "adapter"
    report = lrc("delta", args.base, args.tuned, "-o", out, "--force", "--others", args.others, *flags)
    ppl, kl = score(args.base, "--adapter", out)
    return report["size_bytes"], f"{ppl:.4f} / {kl:.5f}"


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    statistics = folder / "statistics.safetensors"
    lrc("calibrate", args.tuned, "--text", args.calibration, "--seq-len", args.seq_len, "--samples", args.samples, "-o", statistics)
    base, base_kl = score(args.base)
    tuned, _ = score(args.tuned)
    print(f"perplexity of the base {base:.4f}, of the fine-tuned model {tuned:.4f}; KL of the base {base_kl:.5f}\n")
    columns = [("svd", "energy"), ("svd", "knapsack"), ("svd-llm", "energy"), ("svd-llm", "knapsack"), ("kfac", "knapsack")]
    print("| rank | bytes | svd, one rank | " + " | ".join(f"{method}, {ranks}" for method, ranks in columns) + " | kfac, knapsack, float8 |")
    print("|---:|---:|---:|" + "---:|" * (len(columns) + 1))
    for rank in args.ranks:
        size, found = made("--ranks", f"fixed:{rank}")
        row = [found]
        for method, ranks in columns:
            data = [] if method == "svd" else ["--statistics", statistics]
            row.append(made("--target-size", f"{size}B", "--method", method, "--ranks", ranks, *data)[1])
        row.append(made("--target-size", f"{size}B", "--statistics", statistics, "--quant-factors", "float8")[1])
        print(f"| {rank} | {size} | " + " | ".join(row) + " |", flush=True)
