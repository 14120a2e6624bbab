"""A GGUF file of an encoder by llama.cpp's converter, and what llama.cpp computes of it:

- `fixtures/pico/tokenizer-wordpiece.json`: a WordPiece vocabulary as large as the table of `fixtures/pico/bert`.
- `encoder.gguf`, beside this script: that model with this vocabulary, as a folder of sentence-transformers that takes the mean, in f32.
- `encoder.json`: texts, with their ids and embeddings of length 1 in llama.cpp.

Needs gguf, torch, transformers, llama-cpp-python, and the sources of llama.cpp. usage: encoder_gguf.py LLAMA_CPP
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
PICO = HERE.parents[1] / "fixtures/pico"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTINUED = ["##a", "##e", "##i", "##o", "##s", "##t", "##r", "##n", "##l", "##d", "##ed", "##ing"]
WORDS = ["dog", "the", "once", "time", ".", ",", "!", "?"]
TEXTS = [
    "The dog listens, once!",
    "a  teased\tdog\nand Los Lèos?",
    "dogs 東 dog\u0301 the.",
    "once once time...",
    "i",
]
MODULES = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
           for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])]  # fmt: skip


def tokenizer():
    words = SPECIAL + list("abcdefghijklmnopqrstuvwxyz") + CONTINUED + WORDS
    own = tokenizers.Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    own.add_special_tokens(SPECIAL)
    own.normalizer = normalizers.BertNormalizer(lowercase=True)
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.decoder = decoders.WordPiece()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    own.save(str(PICO / "tokenizer-wordpiece.json"))


def main():
    tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        (model / "1_Pooling").mkdir(parents=True)
        shutil.copy(PICO / "bert/model.safetensors", model)
        shutil.copy(PICO / "tokenizer-wordpiece.json", model / "tokenizer.json")
        config = json.loads((PICO / "bert/config.json").read_text())
        # The converter knows no other class with a head; it takes ids of special tokens from a config if the tokenizer has none.
        config |= {"architectures": ["BertForMaskedLM"], "bos_token_id": None, "eos_token_id": None}
        settings = {"tokenizer_class": "BertTokenizerFast"}
        settings |= {f"{name}_token": f"[{name.upper()}]" for name in ["pad", "unk", "cls", "sep", "mask"]}
        for name, content in [
            ("config.json", config), ("tokenizer_config.json", settings), ("modules.json", MODULES),
            ("1_Pooling/config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}),
        ]:  # fmt: skip
            (model / name).write_text(json.dumps(content))
        file = HERE / "encoder.gguf"
        # The converter names ways to split by the ids of a text, and stops at an unknown name, which llama.cpp ignores with WordPiece.
        patched = "import sys, runpy; sys.path.insert(0, sys.argv[1]); from conversion.base import TextModel\n" \
            "TextModel.get_vocab_base_pre = lambda *_: 'jina-v2-en'\n" \
            "program = sys.argv[1] + '/convert_hf_to_gguf.py'; sys.argv[:2] = [program]; runpy.run_path(program, run_name='__main__')"
        flags = [model, "--outtype", "f32", "--outfile", file, "--model-name", "encoder"]
        subprocess.run([sys.executable, "-c", patched, sys.argv[1], *flags], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    theirs = llama_cpp.Llama(str(file), embedding=True, n_ctx=64, verbose=False)
    cases = []
    for text in TEXTS:
        found = np.array(theirs.embed(text))
        found = (found / np.linalg.norm(found)).astype(np.float32)
        cases.append({"text": text, "ids": theirs.tokenize(text.encode(), special=True), "embedding": [float(f"{x:.7g}") for x in found]})
    (HERE / "encoder.json").write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":")) + "\n")


main()
