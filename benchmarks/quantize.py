"""Quantizers and compensations beside the same bytes without factors: tables of docs/results.md, section 9. Needs nothing but
Python and the binary.

    python benchmarks/quantize.py MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN table|sizes [LRC [WINDOWS]]

`table`: every base at 8, 4, 3 and 2 bits with every compensation at ranks 8 and 16. `sizes`: five sizes of a menu of bases.
Errors are relative and squared, in the metric of the inputs (`--method svd-llm`), mean over linears. WINDOWS: evaluate on that many windows from the start.
"""

import json
import subprocess
import sys
import tempfile

model, calibration, text, seq_len, what = sys.argv[1:6]
lrc = sys.argv[6] if len(sys.argv) > 6 else "target/release/lrc"
windows = ["--max-windows", sys.argv[7]] if len(sys.argv) > 7 else []
work = tempfile.TemporaryDirectory()
statistics = f"{work.name}/statistics.safetensors"
out = f"{work.name}/out"
COMPENSATIONS = ["lorc", "lqer", "qera-approx", "eora", "kfac", "loftq", "lq-lora"]


def run(*args):
    return subprocess.run([lrc, *args, "-q"], check=True, capture_output=True, text=True).stdout


def measure(*flags):
    """Bits, weighted error, perplexity, KL, and the report."""
    report = json.loads(run("compress", model, "-o", out, "--force", "--json", "--statistics", statistics, *flags))
    found = json.loads(run("eval", out, "--text", text, "--seq-len", seq_len, "--reference", model, "--json", *windows))
    errors = [linear["relative_error"] ** 2 for linear in report["linears"]]
    error = sum(errors) / len(errors)
    return report["sizes"]["bits_per_weight_after"], error, found["ppl"], found["kl"]["mean"], report


def cells(measured):
    bits, error, ppl, kl, _ = measured
    return f"{bits:.3f} | {error:.2e} | {ppl:.4f} | {kl:.2e}"


def table():
    dense = json.loads(run("eval", model, "--text", text, "--seq-len", seq_len, "--json", *windows))["ppl"]
    print(f"dense {dense:.5f}\n")
    header = "| bits | weighted error | ppl | KL | bits | weighted error | ppl | KL |"
    for bits in [8, 4, 3, 2]:
        for method in ["rtn", "gptq"]:
            quant = f"{method}-int{bits}-g32"
            base = ["--method", "svd-llm", "--quant", quant]
            print(f"\n`{quant}`, factors in int8; rank 8, then rank 16:\n")
            print(f"| compensation {header}\n|---|" + "---:|" * 8)
            alone = cells(measure(*base))
            print(f"| none | {alone} | | | | |", flush=True)
            baselines = {}
            for name in COMPENSATIONS:
                row = []
                for rank in ["8", "16"]:
                    pair = ["--compensate", name, "--compensate-rank", rank, "--quant-factors", "int8"]
                    measured = measure(*base, *pair)
                    baselines[rank] = measured[4]["equal_bytes_baseline"]
                    row.append(cells(measured))
                print(f"| {name} | {' | '.join(row)} |", flush=True)
            row = []
            for rank, baseline in baselines.items():
                menu = sorted({quant for quant in baseline["quant"].values() if quant != "dense"})
                budget = ["--bits", str(baseline["bits_per_weight"] + 1e-6)]
                flags = ["--method", "svd-llm", "--sensitivity", "energy", "--quant", ",".join(menu)]
                row.append(cells(measure(*flags, *budget)))
            print(f"| **equal-bytes baseline** | {' | '.join(row)} |", flush=True)


def sizes():
    menu = "rtn-int2-g32,rtn-int3-g32,rtn-int4-g32,rtn-int4-g64,rtn-int8-g32"
    print("| asked | met | below | bits in bases | in factors | ppl | KL |\n|---:|---:|---:|---:|---:|---:|---:|")
    for target in SIZES:
        flags = ["--quant", menu, "--compensate", "eora", "--quant-factors", "int8", "--target-size", f"{target}B"]
        _, _, ppl, kl, report = measure(*flags)
        size = report["sizes"]
        met = size["file_bytes_after"]
        bits = f"{size['bits_per_weight_base']:.3f} | {size['bits_per_weight_factors']:.3f}"
        print(f"| {target} | {met} | {1 - met / target:.5%} | {bits} | {ppl:.5f} | {kl:.2e} |", flush=True)


run("calibrate", model, "--text", calibration, "--samples", "64", "--seq-len", seq_len, "-o", statistics)
# From just above what the smallest bases take to where 8 bits suffice.
least = json.loads(run("compress", model, "-o", out, "--force", "--json", "--dry-run", "--quant", "rtn-int2-g32"))
most = json.loads(run("compress", model, "-o", out, "--force", "--json", "--dry-run", "--quant", "rtn-int8-g32"))
low, high = least["sizes"]["file_bytes_after"], most["sizes"]["file_bytes_after"]
SIZES = [round(low + (high - low) * share, -3) for share in [0.1, 0.25, 0.45, 0.7, 0.95]]
SIZES = [int(size) for size in SIZES]
{"table": table, "sizes": sizes}[what]()
