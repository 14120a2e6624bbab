"""Perplexity by transformers of the fixture with an `lm_head.weight` that differs from its embeddings, in the `gptq` convention.

    python tests/oracles/untied.py      # transformers 5, torch 2

Prints the figures that `tests/model.rs` holds: as the config says it (`tie_word_embeddings: true`), untied, and without the head.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from safetensors.torch import load_file, save_file

root = pathlib.Path(__file__).parents[2]
with tempfile.TemporaryDirectory() as folder:
    for name, tie, has_head in [("says-tied", True, True), ("untied", False, True), ("tied", True, False)]:
        model = pathlib.Path(folder) / name
        shutil.copytree(root / "fixtures/tiny-llama", model)
        tensors = load_file(model / "model.safetensors")
        table = tensors["model.embed_tokens.weight"]
        if has_head:
            tensors["lm_head.weight"] = (0.9 * table.flatten() + 0.1 * table.flatten().roll(-96)).view_as(table)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tie}))
    models = [str(pathlib.Path(folder) / name) for name in ("says-tied", "untied", "tied")]
    text = root / "fixtures/text/held-out.txt"
    subprocess.run([sys.executable, root / "tests/oracles/perplexity.py", text, "128", *models], check=True)
