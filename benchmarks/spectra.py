"""Seconds and figures of `lrc inspect` beside WeightWatcher's on the same matrices: table 14 of docs/results.md.

    python benchmarks/spectra.py SIZE        needs numpy, torch, safetensors, weightwatcher

Two SIZE x SIZE matrices whose spectra have a power law's tail: Gaussian matrices with rows scaled by Pareto numbers.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy
import torch
import weightwatcher
from safetensors.numpy import save_file

LRC = os.environ.get("LRC", "target/release/lrc")


def matrices(size):
    random = numpy.random.default_rng(0)
    for _ in range(2):
        scales = (1.0 + random.pareto(3.0, size=(size, 1))) / numpy.sqrt(size)
        yield (random.standard_normal((size, size)) * scales).astype(numpy.float32)


def of_lrc(named, folder, threads):
    path = folder / "model.safetensors"
    save_file(named, path)
    started = time.perf_counter()
    run = subprocess.run([LRC, "inspect", path, "--json", "-q"], capture_output=True, check=True, text=True,
                         env=os.environ | {"RAYON_NUM_THREADS": str(threads)})
    seconds = time.perf_counter() - started
    return seconds, json.loads(run.stdout)["linears"]


def of_weightwatcher(named):
    model = torch.nn.Sequential(*[torch.nn.Linear(*w.shape[::-1], bias=False) for w in named.values()])
    for layer, w in zip(model, named.values()):
        layer.weight.data = torch.from_numpy(w)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        details = weightwatcher.WeightWatcher(model=model).analyze(plot=False)
    return time.perf_counter() - started, details


def main():
    size = int(sys.argv[1])
    named = {f"model.layers.{i}.mlp.up_proj.weight": w for i, w in enumerate(matrices(size))}
    first = dict(list(named.items())[:1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for _ in range(2):
            one, _ = of_lrc(first, folder, 2)
            both, ours = of_lrc(named, folder, 2)
            theirs_one, _ = of_weightwatcher(first)
            theirs_both, theirs = of_weightwatcher(named)
            print(f"lrc: one matrix {one:.2f} s, two {both:.2f} s, {both / 2:.2f} s a matrix")
            print(f"WeightWatcher {weightwatcher.__version__}: one matrix {theirs_one:.2f} s, two {theirs_both:.2f} s, "
                  f"{theirs_both / 2:.2f} s a matrix")
    print("| | lrc | WeightWatcher |\n|---|---:|---:|")
    for i, record in enumerate(ours):
        row = theirs.iloc[i]
        fit = record["power_law"]
        for name, mine, other in [
            ("alpha", fit["alpha"], row.alpha),
            ("x_min", fit["xmin"], row.xmin),
            ("D", fit["distance"], row.D),
            ("stable rank", record["stable_rank"], row.stable_rank),
            ("spectral norm squared", record["spectral_norm"] ** 2, row.spectral_norm),
        ]:
            print(f"| {name} of matrix {i} | {mine:.6g} | {other:.6g} |")


main()
