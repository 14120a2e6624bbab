"""Perplexity by method, allocator and budget: tables 1 and 2 of docs/results.md. Needs nothing but Python and the binary.

    python benchmarks/allocation.py MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN table|ablation [LRC]

`table`: every method with every allocator in both layouts. `ablation`: the default recipe with one thing changed at a time,
and the anchored sequential mode.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

model, calibration, text, seq_len, what = sys.argv[1:6]
lrc = sys.argv[6] if len(sys.argv) > 6 else "target/release/lrc"
work = tempfile.TemporaryDirectory()
statistics = f"{work.name}/statistics.safetensors"
KEEPS = ["0.9", "0.8", "0.6"]


def run(*args):
    return subprocess.run([lrc, *args], check=True, capture_output=True, text=True).stdout


def observe(path, *flags):
    run("calibrate", model, "--text", calibration, "--samples", "64", "--seq-len", seq_len, "-o", path, "-q", *flags)


def sweep(*flags, calibrated=(), keeps=KEEPS):
    args = ["sweep", model, "--text", text, "--eval-seq-len", seq_len, "--keep", ",".join(keeps), "--json", "-q"]
    report = json.loads(run(*args, *flags, *calibrated))
    return report["dense_ppl"], [point["ppl"] for point in report["points"]]


TEXT = ["--calibration", calibration, "--samples", "64", "--seq-len", seq_len]
observe(statistics)
SAVED = ["--statistics", statistics]


def row(name, values):
    print(f"| {name} | " + " | ".join(values) + " |", flush=True)


def table():
    dense, _ = sweep("--method", "svd", "--ranks", "uniform")
    print(f"dense {dense:.5f}\n")
    allocators = {
        "uniform": ["--ranks", "uniform"],
        "welore": ["--ranks", "welore"],
        "energy": ["--ranks", "energy"],
        "effective-rank": ["--ranks", "effective-rank"],
        "knapsack, energy": ["--ranks", "knapsack", "--sensitivity", "energy"],
        "knapsack, second-order": ["--ranks", "knapsack", "--sensitivity", "second-order"],
        "knapsack, measured": ["--ranks", "knapsack", "--sensitivity", "measured", *TEXT],
    }
    for layout in ["factors", "pivot"]:
        print(f"\nLayout {layout}, keep {' / '.join(KEEPS)}:\n")
        row("method", allocators)
        print("|---" * (len(allocators) + 1) + "|")
        for method in ["svd", "fwsvd", "asvd", "svd-llm", "kfac"]:
            saved = [] if method == "svd" else SAVED
            cells = [sweep("--method", method, "--layout", layout, *flags, calibrated=saved)[1] for flags in allocators.values()]
            row(method, [" / ".join(f"{ppl:.3f}" if ppl < 100 else f"{ppl:.0f}" for ppl in cell) for cell in cells])


def ablation():
    clipped = f"{work.name}/clipped.safetensors"
    observe(clipped, "--method", "kfac", "--clip-gradients")
    row("change", ["keep " + keep for keep in KEEPS])
    print("|---" * (len(KEEPS) + 1) + "|")
    changes = {"none (kfac, knapsack, pivot)": []}
    for damping in ["0", "0.001", "0.003", "0.03", "0.1"]:
        changes[f"damping {damping} on both sides"] = ["--damping-input", damping, "--damping-output", damping]
    changes["damping 0 of inputs"] = ["--damping-input", "0"]
    changes["damping 0.1 of inputs, 0.3 of gradients"] = ["--damping-input", "0.1", "--damping-output", "0.3"]
    for gamma in ["0.25", "0.5", "1"]:
        changes[f"depth weight {gamma}"] = ["--depth-weight", gamma]
    for floor in ["0.3", "0.5"]:
        changes[f"rank floor {floor}"] = ["--rank-floor", floor]
    changes["ranks in multiples of 8"] = ["--rank-multiple", "8"]
    for name, flags in changes.items():
        row(name, [f"{ppl:.4f}" for ppl in sweep(*flags, calibrated=SAVED)[1]])
    row("gradients clipped", [f"{ppl:.4f}" for ppl in sweep(calibrated=["--statistics", clipped])[1]])
    for method, ranks in [("kfac", "knapsack"), ("svd-llm", "uniform")]:
        for mu in [None, "0", "0.25", "0.5", "0.75", "1"]:
            values = []
            for keep in KEEPS:
                out = pathlib.Path(work.name) / "out"
                flags = [] if mu is None else ["--sequential", "--anchor", mu, *TEXT]
                flags += ["--keep", keep, "--method", method, "--ranks", ranks, *SAVED]
                run("compress", model, "-o", str(out), "-q", "--force", *flags)
                values.append(json.loads(run("eval", str(out), "--text", text, "--seq-len", seq_len, "--json", "-q"))["ppl"])
            name = "one shot" if mu is None else f"sequential, μ = {mu}"
            row(f"{method} {ranks}, {name}", [f"{ppl:.4f}" for ppl in values])


{"table": table, "ablation": ablation}[what]()
