"""Time and parity of a device: the same statistics and evaluation on it and on the CPU. docs/performance.md, "A GPU".

    cargo build --release --features cuda
    python benchmarks/device.py MODEL TEXT WORK [LRC [DEVICE [WINDOWS SEQ_LEN METHOD]]]

Defaults: target/release/lrc, cuda, 16 windows, 512 tokens, kfac. Prints the seconds of every process, and of every kind of statistics the
largest ‖device − cpu‖ / ‖cpu‖ of a matrix. Exits with 1 if one is above 1e-4. Needs numpy. The first process on a machine also
compiles the kernels for its GPU, so that its seconds are not those of a run.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np

model, text, work = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
given = dict(enumerate(sys.argv[4:]))
lrc, device = given.get(0, "target/release/lrc"), given.get(1, "cuda")
windows, seq_len, method = given.get(2, "16"), given.get(3, "512"), given.get(4, "kfac")
work.mkdir(parents=True, exist_ok=True)
BOUND = 1e-4


def run(name, *args):
    started = time.time()
    out = subprocess.run([lrc, *map(str, args)], check=True, capture_output=True, text=True).stdout
    print(f"{name}: {time.time() - started:.1f} s", flush=True)
    return out


def arrays(path):
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, info in json.loads(data[8:begin]).items():
        if name != "__metadata__" and info["dtype"] == "F32":
            first, last = info["data_offsets"]
            found[name] = np.frombuffer(data[begin + first : begin + last], np.float32).astype(np.float64)
    return found


files, perplexities = [], []
for place in (device, "cpu"):
    files.append(work / f"{place.replace(':', '')}.safetensors")
    shape = ["--seq-len", seq_len, "--device", place, "-q"]
    run(f"calibrate, {place}", "calibrate", model, "--text", text, "--method", method, "--samples", windows, "-o", files[-1], "--force", *shape)
    report = json.loads(run(f"eval, {place}", "eval", model, "--text", text, "--max-windows", windows, "--json", *shape))
    perplexities.append(report.get("ppl", report.get("pseudo_ppl")))
found, expected = map(arrays, files)
assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
worst = {}
for name, values in expected.items():
    norm = np.linalg.norm(values)
    distance = np.linalg.norm(found[name] - values) / norm if norm > 0 else np.linalg.norm(found[name])
    kind = name.rsplit(".", 1)[-1]
    worst[kind] = max(worst.get(kind, (0.0, "")), (distance, name))
for kind, (distance, name) in sorted(worst.items()):
    print(f"{kind}: at most {distance:.1e} ({name})")
print("perplexities:", *perplexities)
sys.exit(any(distance > BOUND for distance, _ in worst.values()))
