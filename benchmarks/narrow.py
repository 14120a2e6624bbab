"""Narrower models beside low rank at equal parameters: perplexity and divergence. Needs nothing but Python, the program and the texts.

    python benchmarks/narrow.py MODEL CALIBRATION_TEXT EVALUATION_TEXT WORK LRC [SEQ_LEN WINDOWS [KEEPS [KINDS]]]

Statistics are of 64 windows of 512 tokens, measured once into WORK. Scored are the first WINDOWS windows of SEQ_LEN tokens (16 of 1024), without
BOS, with MODEL as reference. In a cell are perplexity, KL from the source in nats per token, and the share of the parameters of the
linears that is left. What is in WORK already is not made again.
"""

import json
import pathlib
import subprocess
import sys

model, calibration, evaluation, work, lrc = sys.argv[1:6]
seq_len, windows = sys.argv[6:8] if len(sys.argv) > 7 else ("1024", "16")
keeps = (sys.argv[8] if len(sys.argv) > 8 else "0.9,0.8,0.7,0.6,0.5").split(",")
work = pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)
KINDS = {
    "low rank": ["--sequential=false"],
    "narrow, one width": ["--structure", "narrow"],
    "narrow by block": ["--structure", "narrow", "--uniform-width=false"],
    "MoDeGPT's rule": ["--structure", "narrow", "--uniform-width=false", "--selection", "leverage", "--method", "svd-llm"],
    "narrow and low rank": ["--structure", "narrow,low-rank"],
    "auto": ["--structure", "auto"],
}
kinds = sys.argv[9].split(";") if len(sys.argv) > 9 else list(KINDS)


def run(*command):
    return subprocess.run(list(map(str, [lrc, *command])), check=True, capture_output=True, text=True).stdout


statistics = work / "statistics.safetensors"
if not statistics.exists():
    run("calibrate", model, "--text", calibration, "--method", "kfac", "--samples", 64, "--seq-len", 512, "-o", statistics, "-q")
SCORED = ["--text", evaluation, "--seq-len", seq_len, "--max-windows", windows, "--bos", "never", "--json", "-q"]


def cell(kind, keep):
    name = f"{kind}-{keep}".replace(", ", "-").replace(" ", "-")
    found = work / f"{name}.json"
    if not found.exists():
        folder = work / name
        run("compress", model, "-o", folder, "--keep", keep, "--statistics", statistics, *KINDS[kind], "-q", "--force")
        report = json.loads(run("eval", folder, "--reference", model, *SCORED))
        kept = json.loads((folder / "lrc-report.json").read_text())["keep"]
        found.write_text(json.dumps([report["ppl"], report["kl"]["mean"], kept]))
    ppl, kl, kept = json.loads(found.read_text())
    return f"{ppl:.3f} ({kl:.3f}; {kept:.3f})"


print(f"the source: {json.loads(run('eval', model, *SCORED))['ppl']:.3f}\n")
print("| keep | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
for keep in keeps:
    print(f"| {keep} | " + " | ".join(cell(kind, keep) for kind in kinds) + " |", flush=True)
