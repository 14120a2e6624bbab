"""Seconds a matrix: `lrc compress --method svd` beside `torch.linalg.svd`, in one run, on the same matrices.

    cargo run --release --example random_checkpoint -- out/random-tinyllama
    python benchmarks/svd.py out/random-tinyllama

Needs torch and safetensors. Both sides use two threads: lrc factors two matrices at a time with one thread each, torch one
matrix with two. torch's time is the decomposition alone; lrc's is everything from reading to the finished factors.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time
import resource

import torch
from safetensors import safe_open

model = pathlib.Path(sys.argv[1])
out = model.with_name(model.name + "-compressed")
shutil.rmtree(out, ignore_errors=True)
torch.set_num_threads(2)


def torch_seconds(weights):
    seconds = {}
    for name, weight in weights.items():
        start = time.perf_counter()
        torch.linalg.svd(weight, full_matrices=False)
        seconds[name] = time.perf_counter() - start
    return seconds


files = sorted(model.glob("*.safetensors"))
weights = {}
for file in files:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            if ".layers.0." in name and "proj" in name:
                weights[name.removesuffix(".weight")] = tensors.get_tensor(name).float()
torch_before = torch_seconds(weights)

recipe = ["--method", "svd", "--ranks", "uniform", "--layout", "factors", "--keep", "0.8"]
command = ["target/release/lrc", "compress", str(model), "-o", str(out), *recipe, "--json", "-q"]
start = time.perf_counter()
report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
wall = time.perf_counter() - start
# A child's peak is told apart from ours: torch does not count.
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
torch_after = torch_seconds(weights)

linears = {linear["module"]: linear for linear in report["linears"]}
blocks = len({linear["block"] for linear in report["linears"]})
print("| matrix | shape | rank | lrc, mean over blocks (s, 1 thread) | lrc, wall share (s) | torch f32 (s, 2 threads) |")
print("|---|---|---|---|---|---|")
total = sum(linear["seconds"] for linear in report["linears"])
for name in weights:
    role = name.split(".layers.0.")[1]
    mean = sum(l["seconds"] for m, l in linears.items() if m.endswith(role)) / blocks
    linear = linears[name]
    torch_mean = (torch_before[name] + torch_after[name]) / 2
    rows, columns = linear["shape"]
    print(f"| {role} | {rows} × {columns} | {linear['rank']} | {mean:.2f} | {mean * wall / total:.2f} | {torch_mean:.2f} |")
torch_block = (sum(torch_before.values()) + sum(torch_after.values())) / 2
print(f"\nlrc: {wall:.1f} s for {len(linears)} matrices, {wall / blocks:.2f} s a block of 7, reading and writing included; peak memory "
      f"{peak / 1e9:.2f} GB (by itself {report['peak_memory_bytes'] / 1e9:.2f} GB)")
print(f"torch.linalg.svd: {torch_block:.2f} s a block of 7 (before {sum(torch_before.values()):.2f}, after {sum(torch_after.values()):.2f})")
shutil.rmtree(out)
