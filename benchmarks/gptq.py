"""Seconds a matrix: rtn, gptq, cd and eora of lrc beside GPTQ in torch, in one run, on the same matrix: docs/results.md, section 13.

    cargo build --release --example quantize_speed
    python benchmarks/gptq.py OUTPUTS INPUTS [NAME...]

Needs torch and safetensors. Both sides have two threads: lrc works on two matrices at a time with one thread each, torch on
one matrix with two. torch's GPTQ is the paper's algorithm in blocks of 128 columns, act-order with static groups, f32, with
the scales of `absmax`. The names of quantizers are those of `examples/quantize_speed.rs`.
"""

import json
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

rows, size = int(sys.argv[1]), int(sys.argv[2])
names = sys.argv[3:] or [
    "rtn-int4-g128-absmax", "rtn-int4-g128", "gptq-int4-g128-absmax", "gptq-int4-g128", "cd-int4-g128", "cd-int4-g128@kfac",
]  # fmt: skip
GROUP, BITS, BLOCK = 128, 4, 128
torch.set_num_threads(2)
torch.manual_seed(0)


def gram_of(n):
    """A decaying spectrum in a dense basis, the Kronecker product of two orthogonal matrices, and a few large features."""
    large = max(k for k in range(1, n) if n % k == 0 and k * k <= n)
    one, other = (torch.linalg.qr(torch.randn(k, k)).Q for k in (large, n // large))

    def turn(x):
        x = torch.einsum("ai,ijm->ajm", one, x.reshape(large, n // large, -1))
        return torch.einsum("bj,ajm->abm", other, x).reshape(n, -1)

    gram = turn(turn(torch.diag(torch.logspace(0, -4, n))).T.contiguous())
    gram[:, ::500] *= 20
    gram[::500] *= 20
    return (gram + gram.T) / 2


def gptq(weight, gram):
    middle = 2 ** (BITS - 1)
    groups = weight.view(rows, -1, GROUP)
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


weight, gram = 0.02 * torch.randn(rows, size), gram_of(size)
print(f"{rows} x {size}\n\n| | s a matrix | error | error in both metrics |\n|---|---:|---:|---:|")
with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/model.safetensors"
    save_file({"weight": weight, "gram": gram, "output_gram": gram_of(rows)}, path)
    run = subprocess.Popen(["target/release/examples/quantize_speed", path, *names], stdout=subprocess.PIPE, text=True)
    for found in map(json.loads, run.stdout):
        print(f"| lrc {found['name']} | {found['seconds']:.2f} | {found['inputs']:.3e} | {found['both']:.3e} |", flush=True)
    if run.wait():
        sys.exit(run.returncode)
start = time.perf_counter()
found = gptq(weight, gram)
seconds = time.perf_counter() - start
wide = gram.double()
squared = lambda matrix: float(((matrix.double() @ wide) * matrix.double()).sum())
print(f"| torch gptq-int4-g128-absmax | {seconds:.2f} | {squared(weight - found) / squared(weight):.3e} | |")
