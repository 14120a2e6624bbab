"""lm-evaluation-harness on compressed models, with a task of its user's: word perplexity beside `lrc eval --convention lm-eval`.

    python tests/interop/harness.py [MODEL TEXT]...

Each MODEL is compressed by `lrc` in several ways; the documents are the first 20 paragraphs of TEXT with more than 100 characters. The default is
the fixture with its held-out text.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import lm_eval
from lm_eval.tasks import TaskManager

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LRC = ROOT / "target/release/lrc"
KINDS = ["--keep 0.8", "--keep 0.8 --layout factors", "--structure narrow --keep 0.7", "--quant rtn-int4-g32 --compensate lorc --compensate-rank 8"]
LIMIT = 1e-4


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def main():
    given = sys.argv[1:] or [ROOT / "fixtures/tiny-llama", ROOT / "fixtures/text/held-out.txt"]
    print(f"\n## lm-evaluation-harness\n\nlm_eval {lm_eval.__version__}, `--model hf`, the task `tests/interop/harness/local_text.yaml`, in f32 on the CPU.\n")
    print("| model | flags | word perplexity | lrc's | bits per byte | lrc's | |\n|---|---|---:|---:|---:|---:|---|")
    is_right, start = True, os.getcwd()
    for model, text in zip(map(os.path.abspath, given[::2]), given[1::2]):
        paragraphs = [line for line in pathlib.Path(text).read_text().splitlines() if len(line) > 100][:20]
        with tempfile.TemporaryDirectory() as work:
            documents = pathlib.Path(work, "documents.jsonl")
            documents.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs))
            os.chdir(work)
            for at, flags in enumerate(KINDS):
                out = pathlib.Path(work, str(at))
                run(LRC, "compress", model, "-o", out, "-q", *flags.split())
                found = lm_eval.simple_evaluate(
                    model="hf",
                    model_args=f"pretrained={out},trust_remote_code=True,dtype=float32",
                    tasks=["local_text"],
                    task_manager=TaskManager(include_path=str(HERE / "harness")),
                    device="cpu",
                    batch_size=1,
                )["results"]["local_text"]
                own = json.loads(run(LRC, "eval", out, "--text", documents, "--convention", "lm-eval", "--json", "-q"))
                pairs = [(found["word_perplexity,none"], own["ppl"]), (found["bits_per_byte,none"], own["bits_per_byte"])]
                is_close = all(abs(theirs / ours - 1) < LIMIT for theirs, ours in pairs)
                is_right &= is_close
                cells = " | ".join(f"{theirs:.4f} | {ours:.4f}" for theirs, ours in pairs)
                print(f"| {"/".join(pathlib.Path(model).parts[-2:])} | `{flags}` | {cells} | {'ok' if is_close else '**DIFFERS**'} |", flush=True)
            os.chdir(start)
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
