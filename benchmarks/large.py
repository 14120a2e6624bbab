"""One block of an 8B Llama's shapes: seconds of each stage, peak memory and peak disk. Needs nothing but Python and the binary.

    cargo run --release --example random_checkpoint -- FOLDER --shapes llama-8b --blocks 1
    cp TOKENIZER_FOLDER/tokenizer* FOLDER
    python benchmarks/large.py FOLDER TEXT WORK [LRC [MEMORY]]

Every row is one run of `lrc compress` (keep 0.8, one shot) or `lrc eval`. Memory is the largest resident set; disk is the largest size of
the unfinished output in samples half a second apart. Processor time counts all threads: where the machine is shared, it says
more than seconds.
"""

import json
import pathlib
import resource
import subprocess
import sys
import threading
import time

model, text, work = sys.argv[1:4]
lrc = sys.argv[4] if len(sys.argv) > 4 else "target/release/lrc"
memory = sys.argv[5] if len(sys.argv) > 5 else "1GiB"
work = pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)
STAGES = ["calibrate_forward", "calibrate_backward", "decompose", "allocate", "write"]


def folder_bytes(folder):
    files = (path for path in folder.rglob("*") if path.is_file()) if folder.exists() else ()
    total = 0
    for path in files:
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            pass
    return total


def run(args, partial):
    """Output, seconds, processor seconds, peak memory and peak disk of a process."""
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.5):
            peak[0] = max(peak[0], folder_bytes(partial))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    process = subprocess.Popen([lrc, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The peak of this process, and not of the largest child so far.
    highest = [0]

    def memory_of():
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                highest[0] = max(highest[0], int(status.split("VmHWM:")[1].split()[0]) * 1024)
            except (FileNotFoundError, IndexError, ProcessLookupError):
                return
            time.sleep(0.2)

    looker = threading.Thread(target=memory_of)
    looker.start()
    out, err = process.communicate()
    looker.join()
    seconds = time.time() - started
    stop.set()
    watcher.join()
    if process.returncode:
        sys.exit(err)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return out, seconds, cpu, highest[0], peak[0]


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


row("run", *STAGES, "all, s", "processor, s", "memory, GB", "disk, GB")
print("|---" * (len(STAGES) + 5) + "|")
calibration = ["--calibration", text, "--samples", "4", "--seq-len", "512", "--sequential=false"]
for method, flags in {"svd": [], "svd-llm": calibration, "kfac": calibration}.items():
    out = work / "out"
    args = ["compress", model, "-o", str(out), "--keep", "0.8", "--method", method, "--memory", memory, "--force", "--json", "-q", *flags]
    printed, seconds, cpu, peak, disk = run(args, work / "out.partial")
    timings = json.loads(printed)["timings"]
    cells = [f"{timings.get(stage) or 0:.1f}" for stage in STAGES]
    row(method, *cells, f"{seconds:.0f}", f"{cpu:.0f}", f"{peak / 1e9:.2f}", f"{disk / 1e9:.2f}")
printed, seconds, cpu, peak, _ = run(["eval", model, "--text", text, "--seq-len", "1024", "--max-windows", "4", "--memory", memory, "--json", "-q"], work)
row("eval, 4 × 1024 tokens", *["" for _ in STAGES], f"{seconds:.0f}", f"{cpu:.0f}", f"{peak / 1e9:.2f}", "")
