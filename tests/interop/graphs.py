"""Graphs of `--format onnx` in ONNX Runtime: checked by onnx, against lrc's own values, and their speed beside the dense graph.

    tests/interop/graphs.py MODEL... [--calibration TEXT] [--threads 2]

A MODEL in a folder of sentence-transformers is also loaded with `backend="onnx"`, where optimum-onnx is installed. The
binary and the example `logits` are in target/release. Prints a section of docs/interop.md for each model.
"""

import argparse
import importlib.metadata
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file
from sentences import TEXTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4
LORC = ["--compensate", "lorc", "--compensate-rank", "8"]
CASES = [
    [],
    ["--keep", "0.8"],
    ["--keep", "0.8", "--layout", "factors", "--ranks", "uniform"],
    ["--keep", "0.8", "--layout", "monarch"],
    ["--keep", "0.8", "--layout", "blast"],
    ["--keep", "0.6"],
    ["--keep", "0.8", "--quant-factors", "int8"],
    ["--quant", "rtn-int8-channel"],
    ["--quant", "rtn-int4-g32"],
    ["--quant", "rtn-int4-g32-asym"],
    ["--quant", "rtn-int3-g32", *LORC],
    ["--structure", "narrow", "--keep", "0.7"],
]

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="+")
parser.add_argument("--calibration", help="a text, with which the second case is compressed too")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--tokens", type=int, default=64)
args = parser.parse_args()


def version(package):
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def feeds(session, ids):
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {i.name: given[i.name] for i in session.get_inputs()}


def values(out, ids, folder):
    """lrc's logits, or its embedding of a folder of sentence-transformers."""
    (folder / "ids.json").write_text(json.dumps([int(i) for i in ids]))
    run(ROOT / "target/release/examples/logits", out, folder / "ids.json", folder / "values.safetensors")
    return next(iter(load_file(folder / "values.safetensors").values()))


def session(out):
    path = out / "onnx/model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(session, ids):
    """The least time of a run, of ten after two."""
    given, times = feeds(session, ids), []
    for _ in range(12):
        begin = time.perf_counter()
        session.run(None, given)
        times.append(time.perf_counter() - begin)
    return min(times[2:])


def pooled(session, ids):
    """The mean of the last states, of length 1."""
    states = session.run(None, feeds(session, ids[None]))[0][0]
    mean = states.mean(0)
    return mean / np.linalg.norm(mean)


def sentence_transformers(folder):
    """Embeddings and tokens of the texts, loaded as a user does."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), backend="onnx", device="cpu")
    return [model.tokenizer(text)["input_ids"] for text in TEXTS], model.encode(TEXTS, batch_size=len(TEXTS))


def check(model, flags, folder, index):
    """The row of a case: bytes of weights, errors, seconds."""
    reference, out = folder / f"{index}-factored", folder / f"{index}-onnx"
    if flags:
        run(ROOT / "target/release/lrc", "compress", model, "-o", reference, *flags, "-q")
    else:
        reference = model
    run(ROOT / "target/release/lrc", "export", reference, "-o", out, "--format", "onnx", "-q")
    size = sum(file.stat().st_size for file in (out / "onnx").iterdir())
    graph = session(out)
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(1).integers(3, vocab_size, (8, args.tokens))
    own = values(reference, ids[0], folder)
    is_sentence = (Path(model) / "modules.json").is_file()
    found = pooled(graph, ids[0]) if is_sentence else graph.run(None, feeds(graph, ids[:1]))[0][0]
    error, loaded = float(np.abs(own - found).max()), None
    if is_sentence and version("optimum-onnx") is not None:
        texts, embeddings = sentence_transformers(out)
        of_texts = [np.abs(values(reference, ids, folder) - e).max() for ids, e in zip(texts, embeddings)]
        loaded = float(max(of_texts))
    return size, error, loaded, seconds(graph, ids), seconds(graph, ids[:1])


def main():
    packages = ["onnx", "onnxruntime", "sentence-transformers", "optimum-onnx", "transformers"]
    print("Versions: " + ", ".join(f"{name} {version(name) or 'absent'}" for name in packages) + f"; {args.threads} threads.\n")
    failures = 0
    for model in args.models:
        print(f"### {Path(model).name}\n")
        print('| flags | MB | largest error | by `backend="onnx"` | limit | ms, 8 × %d | ms, 1 × %d | |' % (args.tokens, args.tokens))
        print("|---|---:|---:|---:|---:|---:|---:|---|")
        with tempfile.TemporaryDirectory() as folder:
            cases = list(CASES)
            if args.calibration:
                cases.insert(2, ["--keep", "0.8", "--calibration", args.calibration, "--sequential=false"])
            for index, flags in enumerate(cases):
                shown = " ".join(Path(flag).name if "/" in flag else flag for flag in flags) or "dense"
                try:
                    size, error, loaded, batch, one = check(model, flags, Path(folder), index)
                    passed = max(error, loaded or 0.0) <= LIMIT
                    of_loaded = "" if loaded is None else f"{loaded:.1e}"
                    print(f"| `{shown}` | {size / 1e6:.2f} | {error:.1e} | {of_loaded} | {LIMIT:.0e} | {1e3 * batch:.1f} | "
                          f"{1e3 * one:.1f} | {'ok' if passed else '**FAILED**'} |", flush=True)
                except Exception as e:
                    passed = False
                    print(f"| `{shown}` | | | | | | | **FAILED**: {str(e).splitlines()[0]} |", flush=True)
                failures += not passed
        print()
    raise SystemExit(1 if failures else 0)


main()
