"""Measurements that decide the defaults, on a real model and held-out text: docs/results.md 23. Needs nothing but Python and the binary.

    python benchmarks/defaults.py tokens|gradients|mixture|ablation|sensitivity|sequential MODEL FOLDER_OF_TEXTS WORK [LRC]

`tokens`: perplexity by the number of calibration tokens. `gradients`: output Grams of fewer windows
than input Grams. `mixture`: calibration on WikiText-2, on TinyStories and on both,
evaluated on both. `ablation`: one setting changed at a time, in one shot; `sensitivity`: its slow rows, with fewer windows. `sequential`: the sequential mode beside one shot.
Statistics are kept in WORK and measured once. Every row is printed when it is known.
"""

import json
import pathlib
import subprocess
import sys
import time

what, model, texts, work = sys.argv[1:5]
lrc = sys.argv[5] if len(sys.argv) > 5 else "target/release/lrc"
texts, work = pathlib.Path(texts), pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)
WIKI, STORIES = texts / "wikitext2-calibrate.txt", texts / "tinystories-train.txt"
EVALUATED = {"WikiText-2": texts / "wikitext2-evaluate.txt", "TinyStories": texts / "tinystories-eval-small.txt"}
# Windows of 1024 tokens that are scored, and windows of 512 tokens that are calibrated on where that is not what changes.
WINDOWS, SAMPLES = 8, 16


def run(*args):
    return subprocess.run([lrc, *map(str, args)], check=True, capture_output=True, text=True).stdout


def statistics(samples, parts=(WIKI,), flags=()):
    """The statistics file of `samples` windows of 512 tokens, evenly from `parts`."""
    name = "-".join([str(samples), *(part.stem for part in parts), *(flag.strip("-") for flag in flags)])
    files = []
    for part in parts:
        file = work / (f"{name}.safetensors" if len(parts) == 1 else f"{name}-of-{part.stem}.safetensors")
        if not file.exists():
            run("calibrate", model, "--text", part, "--method", "kfac", "--samples", samples // len(parts), "--seq-len", 512,
                "-o", file, "-q", *flags)
        files.append(file)
    if len(files) == 1:
        return files[0]
    merged = work / f"{name}.safetensors"
    if not merged.exists():
        run("calibrate", "--merge", *files, "-o", merged, "-q")
    return merged


def sweep(saved, flags=(), keeps=("0.9", "0.8", "0.6"), text="WikiText-2"):
    report = json.loads(run("sweep", model, "--text", EVALUATED[text], "--eval-seq-len", 1024, "--max-windows", WINDOWS,
                            "--statistics", saved, "--keep", ",".join(keeps), "--json", "-q", *flags))
    return [f"{point['ppl']:.3f}" for point in report["points"]]


def compressed(saved, keep, flags):
    """Perplexity and seconds of a run of `lrc compress`."""
    out = work / "out"
    started = time.time()
    run("compress", model, "-o", out, "--keep", keep, "--statistics", saved, "-q", "--force", *flags)
    seconds = time.time() - started
    report = run("eval", out, "--text", EVALUATED["WikiText-2"], "--seq-len", 1024, "--max-windows", WINDOWS, "--json", "-q")
    return f"{json.loads(report)['ppl']:.3f} ({seconds:.0f} s)"


def row(name, values):
    print(f"| {name} | " + " | ".join(values) + " |", flush=True)


def head(name, columns):
    row(name, columns)
    print("|---" * (len(columns) + 1) + "|")


def tokens():
    head("windows of 512 tokens", ["keep 0.9", "keep 0.8", "keep 0.6"])
    for samples in [8, 16, 32, 64, 128]:
        row(samples, sweep(statistics(samples)))


def combined(inputs, gradients):
    """A file with the sums of inputs of one file of statistics and the sums of gradients of another."""
    out = work / f"inputs-{inputs.stem}-gradients-{gradients.stem}.safetensors"
    headers, files = [], [inputs.open("rb"), gradients.open("rb")]
    for file in files:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        headers.append((tensors, 8 + length))

    def read(which, name):
        tensors, first = headers[which]
        begin, end = tensors[name]["data_offsets"]
        files[which].seek(first + begin)
        return files[which].read(end - begin)

    described, other = json.loads(read(0, "header")), json.loads(read(1, "header"))
    described["parts"][0]["gradients"] = {key: other["parts"][0][key] for key in ("windows", "tokens")}
    text = json.dumps(described).encode()
    tensors, offset = {}, 0
    for name, info in headers[0][0].items():
        size = len(text) if name == "header" else info["data_offsets"][1] - info["data_offsets"][0]
        shape = [size] if name == "header" else info["shape"]
        tensors[name] = {"dtype": info["dtype"], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(tensors).encode()
    head += b" " * (-len(head) % 8)
    with out.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in tensors:
            file.write(text if name == "header" else read(int(".output_gram" in name), name))
    return out


def gradients():
    head("windows with gradients", ["keep 0.9", "keep 0.8", "keep 0.6"])
    for samples in [8, 16, 32]:
        row(f"{samples} others", sweep(combined(statistics(64), statistics(samples))))
    row("64, the same", sweep(statistics(64)))
    row("32 of the same", sweep(statistics(64, flags=("--gradient-samples=32",))))


def mixture():
    head(f"{SAMPLES} windows of", [f"{text}, keep {keep}" for text in EVALUATED for keep in ("0.8", "0.6")])
    for name, parts in {"WikiText-2": (WIKI,), "TinyStories": (STORIES,), "both, half each": (WIKI, STORIES)}.items():
        saved = statistics(SAMPLES, parts)
        row(name, [ppl for text in EVALUATED for ppl in sweep(saved, keeps=("0.8", "0.6"), text=text)])


def sensitivity():
    saved = statistics(SAMPLES)
    # Each of 210 matrices takes a pass over these windows from its block on.
    text = ["--calibration", WIKI, "--samples", 4, "--seq-len", 512]
    head(f"change, {SAMPLES} windows", ["keep 0.9", "keep 0.8", "keep 0.6"])
    row("none", sweep(saved))
    row("gradients clipped", sweep(statistics(SAMPLES, flags=("--clip-gradients",))))
    row("sensitivity energy", sweep(saved, ["--sensitivity", "energy"]))
    row("sensitivity measured", sweep(saved, ["--sensitivity", "measured", *text]))


def ablation():
    saved = statistics(64)
    head("change", ["keep 0.9", "keep 0.8", "keep 0.6"])
    row("none (kfac, knapsack, pivot, one shot)", sweep(saved))
    changes = {
        "depth weight 0.25": ["--depth-weight", "0.25"],
        "rank floor 0.3": ["--rank-floor", "0.3"],
        "factors that may be shared": ["--layout", "factors", "--share"],
        "factors": ["--layout", "factors"],
    }
    changes |= {f"damping of {side} {d}": [f"--damping-{side}", d] for side in ("input", "output") for d in ("0.003", "0.03")}
    for name, flags in changes.items():
        row(name, sweep(saved, flags))


def sequential():
    saved = statistics(SAMPLES)
    text = ["--calibration", WIKI, "--samples", SAMPLES, "--seq-len", 512]
    modes = {"one shot": ["--sequential=false"]}
    modes |= {f"sequential, μ = {mu}": ["--sequential", "--anchor", mu, *text] for mu in ["0.5"]}
    head("mode", ["keep 0.9", "keep 0.8", "keep 0.6"])
    for name, flags in modes.items():
        row(name, [compressed(saved, keep, flags) for keep in ("0.9", "0.8", "0.6")])


{"tokens": tokens, "gradients": gradients, "mixture": mixture, "ablation": ablation, "sensitivity": sensitivity, "sequential": sequential}[what]()
