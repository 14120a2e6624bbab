"""Makes `tests/oracles/sentence.json`: embeddings that sentence-transformers makes with the weights of `fixtures/pico/bert`, under
every mode of pooling, one by one and concatenated, as today's files name them and as older ones do; normalized, cut at
`max_seq_length`, and behind a `Dense` module. Each case has the files that make it so. Of one case also by linear the sums
over tokens of the squared gradients of its outputs, of `signs · e / ‖e‖`, in f64.

    python tests/oracles/sentence.py          needs torch, transformers 5 and sentence-transformers 5
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

ROOT = Path(__file__).resolve().parents[2]
PICO = ROOT / "fixtures/pico"
TEXTS = ["once upon a time there was a little dog.", "it liked to run!", "7 birds sat in a tree, and sang until the sun set."]
# The signs that lrc draws for `SEED`; others would give other gradients.
SEED, SIGNS = 7, "-++----++-+---+-"
TYPE = "sentence_transformers.models."
DENSE = {"in_features": 16, "out_features": 5, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def files(pooling, *behind, **transformer):
    """The files of a folder by name: what follows the pooling is a list of classes."""
    classes = ["Transformer", "Pooling", *behind]
    paths = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(classes)]
    modules = [{"idx": i, "name": str(i), "path": path, "type": TYPE + kind} for i, (path, kind) in enumerate(zip(paths, classes))]
    found = {"modules.json": modules, "1_Pooling/config.json": {"word_embedding_dimension": 16} | pooling,
             "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False} | transformer}
    return found | {f"{path}/config.json": DENSE for path, kind in zip(paths, classes) if kind == "Dense"}


def old(*flags):
    names = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    return {f"pooling_mode_{name}": name in flags for name in names}


MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
CASES = [
    *[files({"pooling_mode": mode}) for mode in MODES],
    *[files(old(flag), "Normalize") for flag in ["cls_token", "max_tokens", "mean_tokens"]],
    files(old("lasttoken", "weightedmean_tokens", "mean_sqrt_len_tokens", "mean_tokens", "max_tokens", "cls_token")),
    files(old()),
    files({"pooling_mode": ["lasttoken", "cls"], "embedding_dimension": 16}, "Normalize"),
    files({"pooling_mode": "mean"}, "Normalize", max_seq_length=12),
    files({"pooling_mode": "mean"}, "Dense", "Normalize"),
    files({"pooling_mode": "mean"}, "Dropout", "Normalize"),
]


def rounded(values):
    return [float(f"{x:.7g}") for x in values]


def embeddings(files, dense):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ["config.json", "model.safetensors"]:
            shutil.copy(PICO / "bert" / name, folder / name)
        shutil.copy(PICO / "tokenizer-encoder.json", folder / "tokenizer.json")
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))
            if content == DENSE:
                save_file(dense, (folder / name).parent / "model.safetensors")
        for module in files["modules.json"]:
            (folder / module["path"]).mkdir(exist_ok=True)
            if module["type"].endswith("Dropout"):
                (folder / module["path"] / "config.json").write_text(json.dumps({"dropout": 0.1}))
        model = SentenceTransformer(str(folder), device="cpu")
        return [rounded(model.encode(text).tolist()) for text in TEXTS]


def squared_gradients(ids):
    """Squared gradients for the mean of the states, scaled to length 1."""
    model = AutoModel.from_pretrained(PICO / "bert", attn_implementation="eager").double().eval()
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", name):
            def hook(_, __, y, name=f"bert.{name}"):
                y.retain_grad()
                outputs[name] = y
            module.register_forward_hook(hook)
    e = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    signs = torch.tensor([1.0 if sign == "+" else -1.0 for sign in SIGNS], dtype=torch.float64)
    (signs @ e / e.norm()).backward()
    return {name: rounded((y.grad[0] ** 2).sum(0).tolist()) for name, y in outputs.items()}


def main():
    torch.manual_seed(0)
    dense = {"linear.weight": 0.3 * torch.randn(5, 16), "linear.bias": 0.2 * torch.randn(5)}
    ids = json.loads((PICO / "bert/expected.json").read_text())["ids"]
    found = {
        "texts": TEXTS,
        "dense": {name: rounded(tensor.flatten().tolist()) for name, tensor in dense.items()},
        "cases": [{"files": files, "embeddings": embeddings(files, dense)} for files in CASES],
        "seed": SEED,
        "signs": SIGNS,
        "ids": ids,
        "squared_gradients": squared_gradients(ids),
    }
    (ROOT / "tests/oracles/sentence.json").write_text(json.dumps(found) + "\n")


main()
