"""What the benchmarks of codes share: the score of a checkpoint, and rows that are kept."""

import json
import subprocess


def score(lrc, path, model, text, seq_len, windows):
    """Perplexity, and KL from MODEL, of `lrc eval` on the first windows of a text."""
    scope = ["--text", text, "--seq-len", seq_len, "--max-windows", windows, "--reference", model, "--json", "-q"]
    done = subprocess.run([lrc, "eval", path, *scope], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return {"ppl": found["ppl"], "kl": found["kl"]["mean"]}


def once(file, measure):
    """The record that `file` keeps, measured if there is none."""
    if not file.exists():
        file.write_text(json.dumps(measure()))
    return json.loads(file.read_text())


def columns(record):
    """The columns that all tables end with."""
    return f"{record['bits']:.3f} | {record['ppl']:.3f} | {record['kl']:.4f} | {record['seconds']:.0f} |"
