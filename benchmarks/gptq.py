"""Seconds a matrix (4096 x 4096): rtn, gptq and eora of lrc beside GPTQ in torch, in one run, on the same matrix.

    cargo build --release --example quantize_speed
    python benchmarks/gptq.py [SIZE]

Needs torch and safetensors. Both sides have two threads: lrc works on two matrices at a time with one thread each, torch on
one matrix with two. torch's GPTQ is the paper's algorithm in blocks of 128 columns, act-order with static groups, f32, with
the scales of `absmax`.
"""

import json
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

size = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
GROUP, BITS, BLOCK = 128, 4, 128
torch.set_num_threads(2)
torch.manual_seed(0)


def problem():
    weight = 0.02 * torch.randn(size, size)
    # Inputs with a decaying spectrum and a few large features, as activations have.
    inputs = torch.randn(2 * size, size) * torch.logspace(0, -2, size)
    inputs = inputs @ torch.linalg.qr(torch.randn(size, size)).Q
    inputs[:, ::500] *= 20
    return weight, inputs.T @ inputs / len(inputs)


def gptq(weight, gram):
    middle = 2 ** (BITS - 1)
    groups = weight.view(size, -1, GROUP)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = (-extreme / middle).half().float()
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    left = weight[:, order].clone()
    damped = gram[order][:, order] + 0.01 * gram.diagonal().mean() * torch.eye(size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    done = torch.zeros_like(weight)
    for first in range(0, size, BLOCK):
        block = left[:, first : first + BLOCK].clone()
        errors = torch.zeros_like(block)
        factor = upper[first : first + BLOCK, first : first + BLOCK]
        for j in range(BLOCK):
            column = order[first + j]
            scale = scales[:, column // GROUP]
            value = (torch.clamp(torch.round(block[:, j] / scale) + middle, 0, 2 * middle - 1) - middle) * scale
            done[:, column] = value
            error = (block[:, j] - value) / factor[j, j]
            block[:, j:] -= error.unsqueeze(1) @ factor[j, j:].unsqueeze(0)
            errors[:, j] = error
        left[:, first + BLOCK :] -= errors @ upper[first : first + BLOCK, first + BLOCK :]
    return done


weight, gram = problem()
with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/model.safetensors"
    save_file({"weight": weight, "gram": gram}, path)
    done = subprocess.run(["target/release/examples/quantize_speed", path], check=True, capture_output=True, text=True)
print(f"{size} x {size}\n\n| | s a matrix | relative squared error |\n|---|---:|---:|")
for name, found in json.loads(done.stdout).items():
    print(f"| lrc {name} | {found['seconds_a_matrix']:.2f} | {found['relative_squared_error']:.3e} |")
start = time.perf_counter()
found = gptq(weight, gram)
seconds = time.perf_counter() - start
wide = gram.double()
squared = lambda matrix: float(((matrix.double() @ wide) * matrix.double()).sum())
print(f"| torch gptq-int4-g128-absmax | {seconds:.2f} | {squared(weight - found) / squared(weight):.3e} |")
