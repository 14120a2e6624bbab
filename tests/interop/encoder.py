"""A GGUF file of an encoder in llama.cpp, against the folder of sentence-transformers that it was made of.

    python tests/interop/encoder.py FILE.gguf FOLDER TEXT [LORA.gguf]

Prints how many lines of a text llama.cpp splits into other tokens than the tokenizer of the folder, and the cosines of embeddings of
the first hundred lines that have up to 250 tokens.
"""

import sys

import llama_cpp
import numpy as np
import tokenizers
from sentence_transformers import SentenceTransformer

file, folder, text = sys.argv[1:4]
lora = sys.argv[4] if len(sys.argv) > 4 else None
lines = [line.strip() for line in open(text, encoding="utf8") if line.strip()]
own = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
own.no_padding()
own.no_truncation()
theirs = llama_cpp.Llama(file, embedding=True, n_ctx=512, verbose=False, lora_path=lora)
different = [line for line in lines if theirs.tokenize(line.encode()) != own.encode(line).ids]
print(f"tokens: {len(different)} of {len(lines)} lines differ")
picked = [line for line in lines if len(own.encode(line).ids) <= 250][:100]
found = np.array([theirs.embed(line) for line in picked])
found /= np.linalg.norm(found, axis=1, keepdims=True)
expected = SentenceTransformer(folder, device="cpu").encode(picked, batch_size=1, normalize_embeddings=True)
cosines = (found * expected).sum(1)
print(f"cosines of {len(picked)} embeddings: mean {cosines.mean():.7f}, least {cosines.min():.7f}")
