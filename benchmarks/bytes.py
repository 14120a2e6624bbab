"""Perplexity by the bytes of a model file, llama.cpp's `llama-quantize` beside `lrc`: docs/results.md, "Real models". Needs nothing but
Python, both programs and the texts.

    python benchmarks/bytes.py llama|gguf|factored|bases MODEL CALIBRATION_TEXT EVALUATION_TEXT WORK [LRC [LLAMA_CPP]]

`llama`: LLAMA_CPP, the folder with `llama-imatrix` and `llama-quantize`, makes an importance matrix of 64 windows of 512 tokens of
CALIBRATION_TEXT, and a file of each type with it. `gguf` and `factored`: `lrc compress --target-size` in these formats, with
statistics of as many windows, measured once. `bases`: the same in `factored` without factors.

All are evaluated by `lrc eval` on the first 16 windows of 1024 tokens of EVALUATION_TEXT, without BOS, with MODEL as reference. Bytes
are those of the weight file, GGUF with its tokenizer; bits per weight are those of its tensors. Seconds and memory are of
the command that made the file, statistics and importance matrix apart. What is in WORK already is not made again.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

what, model, calibration, evaluation, work = sys.argv[1:6]
lrc = sys.argv[6] if len(sys.argv) > 6 else "target/release/lrc"
llama = pathlib.Path(sys.argv[7]) if len(sys.argv) > 7 else None
work = pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)

SAMPLES, SEQ_LEN = 64, 512
LLAMA_TYPES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_M"]
MENUS = {
    "gguf": ["cd-q2_k", "cd-q3_k", "cd-iq4_xs", "cd-q4_k", "cd-q5_k", "cd-q6_k", "cd-int4-g32"],
    "factored": ["cd-int2-g64", "cd-int3-g64", "cd-int4-g64", "cd-int8-g64"],
}
MENUS["bases"] = MENUS["factored"]
SIZES = {"gguf": [80, 100], "factored": [40, 50, 60, 80, 100], "bases": [40, 50, 60, 80, 100]}


def run(*command):
    """Runs a command: its output, seconds, and the peak of its memory in bytes."""
    started = time.time()
    with open(work / "log", "w+b") as log, open(work / "out", "w+b") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\n{log.read().decode()}")
        out.seek(0)
        return out.read().decode(), time.time() - started, used.ru_maxrss * 1024


def once(name, make):
    """The record of `make`, kept in WORK under a name."""
    file = work / f"{name}.json"
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def row(name, path, make):
    """Makes a model at `path`, evaluates it, and prints its row."""

    def measure():
        _, seconds, memory = make(path)
        flags = ["--seq-len", 1024, "--max-windows", 16, "--bos", "never", "--reference", model, "--json", "-q"]
        found = json.loads(run(lrc, "eval", path, "--text", evaluation, *flags)[0])
        file = path if path.is_file() else next(p for p in path.iterdir() if p.suffix in (".gguf", ".safetensors"))
        bits = 8 * found["size_bytes"] / dense["parameters"]
        return {"bytes": file.stat().st_size, "bits": bits, "ppl": found["ppl"], "kl": found["kl"]["mean"],
                "seconds": seconds, "memory": memory}  # fmt: skip

    r = once(path.stem if path.suffix else path.name, measure)
    size = f"{r['bytes']:,} | {r['bytes'] / 2**20:.1f} | {r['bits']:.2f}"
    print(f"| {name} | {size} | {r['ppl']:.3f} | {r['kl']:.4f} | {r['seconds']:.0f} | {r['memory'] / 2**20:.0f} |", flush=True)


def of_llama_cpp():
    dense = work / "dense"
    if not dense.exists():
        run(lrc, "export", model, "--format", "gguf", "-o", dense, "-q")
    matrix = work / "importance.gguf"

    def measure():
        flags = ["-c", SEQ_LEN, "-b", SEQ_LEN, "--chunks", SAMPLES, "--no-ppl", "-t", os.cpu_count()]
        return run(llama / "llama-imatrix", "-m", dense / "model.gguf", "-f", calibration, "-o", matrix, *flags)[1:]

    report("importance matrix", once("importance", measure))
    for kind in LLAMA_TYPES:
        quantize = [llama / "llama-quantize", "--imatrix", matrix, dense / "model.gguf"]
        row(f"llama.cpp, {kind}", work / f"llama-{kind}.gguf", lambda path: run(*quantize, path, kind, os.cpu_count()))


def of_lrc():
    statistics = work / "statistics.safetensors"

    def measure():
        flags = ["--method", "kfac", "--samples", SAMPLES, "--seq-len", SEQ_LEN]
        return run(lrc, "calibrate", model, "--text", calibration, *flags, "-o", statistics, "-q", "--force")[1:]

    report("statistics", once("statistics", measure))
    flags = ["--quant", ",".join(MENUS[what]), "--format", "gguf" if what == "gguf" else "factored"]
    if what == "factored":
        flags += ["--compensate", "kfac", "--quant-factors", "int8", "--equal-bytes-baseline=false"]
    compress = [lrc, "compress", model, "--statistics", statistics, *flags, "-q", "--force"]
    for size in SIZES[what]:
        target = ["--target-size", f"{size}MiB"]
        row(f"lrc, {what}, {size} MiB", work / f"{what}-{size}", lambda path: run(*compress, *target, "-o", path))


def report(name, measured):
    print(f"{name}: {measured[0]:.0f} s, {measured[1] / 2**20:.0f} MiB\n")
    print("| | bytes | MiB | bits per weight | perplexity | KL | s | MiB of memory |\n|---" + "|---:" * 7 + "|")


DENSE = ["--text", evaluation, "--seq-len", 1024, "--max-windows", 16, "--bos", "never", "--json", "-q"]
dense = once("dense-evaluated", lambda: json.loads(run(lrc, "eval", model, *DENSE)[0]))
print(f"dense: {dense['size_bytes']:,} bytes of tensors, perplexity {dense['ppl']:.3f}\n")
of_llama_cpp() if what == "llama" else of_lrc()
