"""llama.cpp's types with an importance matrix, scored as those of `benchmarks/codes.py`: docs/results.md, section 26. Needs
llama-cpp-python, gguf and numpy.

    python benchmarks/llama_codes.py MODEL STATISTICS EVALUATION_TEXT SEQ_LEN WINDOWS WORK LRC TYPE...

A TYPE is one of llama.cpp's: `Q3_K_M`, `IQ2_XS`. The importance matrix is what `llama-imatrix` measures, mean squares of the inputs, but for
their number, which is the same for all: the diagonals of the Grams in STATISTICS, of the same windows as the rows of `lrc`. Embeddings stay in bf16, and bits are those of the linears
of all blocks, in the types that llama.cpp falls back to where its blocks do not fit. Seconds are those of `llama_model_quantize`.
"""

import ctypes
import pathlib
import re
import subprocess
import sys
import time

import gguf
import llama_cpp
import numpy
from safetensors.numpy import load_file
from scoring import columns, once, score

model, statistics, text, seq_len, windows, work, lrc, *types = sys.argv[1:]
work = pathlib.Path(work)
work.mkdir(parents=True, exist_ok=True)
SITES = {
    "attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "attn_output": "o",
    "ffn_gate": "gate_up", "ffn_up": "gate_up", "ffn_down": "down",
}  # fmt: skip
BF16 = gguf.GGMLQuantizationType.BF16


def importance():
    """The array of structures that llama.cpp takes, ended by one without a name, and what it points to."""
    grams, entries, kept = load_file(statistics), [], []
    for block in range(sum(name.endswith(".down.input_gram") for name in grams)):
        for tensor, site in SITES.items():
            packed = grams[f"{block}.{site}.input_gram"]
            n = int(numpy.sqrt(2 * packed.size))
            # A triangle by rows, so that the diagonal ends each of them.
            rows = numpy.arange(1, n + 1)
            values = numpy.ascontiguousarray(packed[rows * (rows + 1) // 2 - 1], numpy.float32)
            name = f"blk.{block}.{tensor}.weight".encode()
            kept += [values, name]
            data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries.append(llama_cpp.llama_model_imatrix_data(name, data, n))
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries), kept


def measure(kind):
    path = work / "llama.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.token_embedding_type, params.output_tensor_type = BF16, BF16
    params.imatrix = table
    started = time.time()
    failed = llama_cpp.llama_model_quantize(str(dense / "model.gguf").encode(), str(path).encode(), ctypes.byref(params))
    if failed:
        sys.exit(f"llama.cpp did not write {kind}")
    seconds = time.time() - started
    linears = [t for t in gguf.GGUFReader(path).tensors if re.fullmatch(r"blk\.\d+\.(attn|ffn)_(?!norm).*\.weight", t.name)]
    mix = sorted({t.tensor_type.name.lower() for t in linears})
    bits = 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)
    found = score(lrc, path, model, text, seq_len, windows)
    path.unlink()
    return {"bits": bits, "seconds": seconds, "types": ", ".join(mix)} | found


dense = work / "dense"
if not dense.exists():
    subprocess.run([lrc, "export", model, "--format", "gguf", "-o", dense, "-q"], check=True)
table, kept = importance()
print("| llama.cpp | types | bits per weight | perplexity | KL | s |\n|---|---|---:|---:|---:|---:|")
for kind in types:
    r = once(work / f"llama-{kind}.json", lambda: measure(kind))
    print(f"| `{kind}` | {r['types']} | {columns(r)}", flush=True)
