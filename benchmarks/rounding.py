"""The cost of storing parts in the dtype of a checkpoint: errors of rounding and of truncation, matrix by matrix, both in the
metric of the method and relative to the weight, in per cent.

usage: rounding.py MODEL [ARGUMENTS OF lrc compress]
LRC names the binary (target/release/lrc). A model of random weights in the shapes of an 8B Llama comes from
  cargo run --release --example random_checkpoint -- out/llama-8b --shapes llama-8b --blocks 1
"""
import json
import os
import subprocess
import sys
import tempfile

lrc = os.environ.get("LRC", "target/release/lrc")
model, arguments = sys.argv[1], sys.argv[2:]
with tempfile.TemporaryDirectory() as folder:
    command = [lrc, "compress", model, "-o", os.path.join(folder, "out"), "--json", "-q", *arguments]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
print("| module | shape | rank | layout | truncation | rounding | seconds |")
print("|---|---|---:|---|---:|---:|---:|")
for linear in report["linears"]:
    if linear.get("storage_error") is not None:
        errors = [f"{100 * linear[name]:.3f}" for name in ("relative_error", "storage_error")]
        shape = "×".join(map(str, linear["shape"]))
        row = [linear["module"], shape, str(linear["rank"]), linear["layout"], *errors, f"{linear['seconds']:.1f}"]
        print("| " + " | ".join(row) + " |")
stored = sorted(100 * linear["storage_error"] for linear in report["linears"] if linear.get("storage_error") is not None)
if stored:
    print(f"\nrounding: median {stored[len(stored) // 2]:.3f}, largest {stored[-1]:.3f}; {report['elapsed_seconds']:.0f} s in all")
