"""Speed beside torch, both sides in one run: statistics, decompositions, evaluation, and one thread beside two.

    python benchmarks/speed.py MODEL CALIBRATION_TEXT EVALUATION_TEXT [LRC [ROUNDS]]

Needs torch and transformers; every figure is the fastest of ROUNDS (3). For lrc a figure is the whole process, start and
files included; for torch it is the work alone, after the model is loaded. Statistics are the Grams of the inputs of every
linear (`forward`), and those of the output gradients too (`kfac`), 6 windows of 512 tokens; evaluation is 8 windows of 1024.
`svd` is the time of the decompositions of `lrc compress --method svd-llm`, as in its report, beside torch's Cholesky factors
and SVDs of the same 7 matrices a block.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, CALIBRATION, EVALUATION = sys.argv[1:4]
LRC = sys.argv[4] if len(sys.argv) > 4 else "target/release/lrc"
ROUNDS = int(sys.argv[5]) if len(sys.argv) > 5 else 3
THREADS = os.cpu_count()


def windows(path, count, length):
    text = open(path, encoding="utf8", newline="").read()[:400_000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)[:count]


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lrc(*arguments, threads=THREADS):
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    subprocess.run([LRC, *arguments, "--quiet"], check=True, env=environment, stdout=subprocess.DEVNULL)


def statistics(model, samples, gradients):
    """Sums of `x xᵀ` at the inputs of linears, once for each input, and of `g gᵀ` at their outputs."""
    inputs, outputs, hooks = {}, {}, []
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or "lm_head" in name:
            continue

        def see(module, args, y, name=name):
            if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
                x = args[0].detach()[0]
                inputs[name] = inputs.get(name, 0) + x.T @ x
            if y.requires_grad:
                y.register_hook(lambda g: outputs.__setitem__(name, outputs.get(name, 0) + g[0].T @ g[0]))

        hooks.append(linear.register_forward_hook(see))
    for x in samples:
        if gradients:
            embedded = model.get_input_embeddings()(x[None]).requires_grad_(True)
            logits = model(inputs_embeds=embedded).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, x[1:], reduction="sum").backward()
        else:
            with torch.no_grad():
                model.model(x[None])
    for hook in hooks:
        hook.remove()
    return inputs


def decompose(model, grams):
    sources = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or "lm_head" in name:
            continue
        parent, role = name.rsplit(".", 1)
        gram = grams[f"{parent}.{sources.get(role, role)}"].double()
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        torch.linalg.svd(linear.weight.float() @ torch.linalg.cholesky(gram).float(), full_matrices=False)


def evaluate(model, samples):
    with torch.no_grad():
        for x in samples:
            torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:])


def main():
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    calibration, evaluation = windows(CALIBRATION, 6, 512), windows(EVALUATION, 8, 1024)
    grams = statistics(model, calibration, False)
    with tempfile.TemporaryDirectory() as folder:
        stats, out = f"{folder}/stats.safetensors", f"{folder}/out"
        text = ["--text", CALIBRATION, "--samples", "6", "--seq-len", "512"]

        def measure(method, **options):
            return lambda: lrc("calibrate", MODEL, *text, "--method", method, "-o", stats, "--force", **options)

        def perplexity(**options):
            return lambda: lrc("eval", MODEL, "--text", EVALUATION, "--seq-len", "1024", "--max-windows", "8", **options)

        def decompositions():
            options = ["--method", "svd-llm", "--keep", "0.8", "--sequential=false", "--force", "-o", out]
            lrc("compress", MODEL, *options, "--calibration", CALIBRATION, "--samples", "6", "--seq-len", "512")
            return json.load(open(f"{out}/lrc-report.json"))["timings"]["decompose"]

        rows = {
            "forward statistics": (measure("svd-llm"), lambda: statistics(model, calibration, False), 6 * 512),
            "kfac statistics": (measure("kfac"), lambda: statistics(model, calibration, True), 6 * 512),
            "evaluation": (perplexity(), lambda: evaluate(model, evaluation), 8 * 1024),
        }
        best = {name: [float("inf")] * 2 for name in [*rows, "decompositions"]}
        single = {name: float("inf") for name in rows}
        alone = {"forward statistics": measure("svd-llm", threads=1), "kfac statistics": measure("kfac", threads=1)}
        alone["evaluation"] = perplexity(threads=1)
        for _ in range(ROUNDS):
            for name, (own, other, _) in rows.items():
                best[name] = [min(best[name][0], timed(own)), min(best[name][1], timed(other))]
                single[name] = min(single[name], timed(alone[name]))
            both = [decompositions(), timed(lambda: decompose(model, grams))]
            best["decompositions"] = [min(pair) for pair in zip(best["decompositions"], both)]
    print(f"| | lrc, s | torch, s | ratio | lrc on one thread, s | {THREADS} threads : 1 |\n|---|---|---|---|---|---|")
    for name, (own, other) in best.items():
        alone = f"{single[name]:.1f} | {single[name] / own:.2f}" if name in single else " | "
        print(f"| {name} | {own:.1f} | {other:.1f} | {other / own:.2f} | {alone} |")


main()
