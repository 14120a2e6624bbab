"""GGUF files by another writer (the `gguf` package of llama.cpp), beside this script:

- `blocks.gguf`: random blocks of every type that lrc reads, `x.TYPE`, each with the values that they encode, `x.TYPE.values`. The values
  are those of the package, but for q8_k, which it does not decode: there they are d · q, as ggml defines these blocks.
- `sentencepiece.gguf`: a Llama of random weights with a SentencePiece vocabulary of 400 tokens, and `sentencepiece.json`: texts with the
  ids that the SentencePiece library gives.

Needs gguf, numpy, sentencepiece. usage: gguf_files.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType, dequantize, quants

HERE = Path(__file__).parent
TEXT = HERE.parents[1] / "fixtures/text/train.txt"
TEXTS = [
    "Once upon a time, there was a little girl.",
    "  two spaces, then   three",
    " one space",
    "line\nbreaks\n\nand\ttabs ",
    "naïve café, 東京 and \U0001f600!",
    "<0x41> is not a byte",
    "12345.678",
]


def f16(random, n):
    return random.uniform(0.01, 0.3, n).astype(np.float16).view(np.uint8).reshape(n, 2)


def raw(random, kind, n):
    """Random bytes of n blocks; their scales are ordinary numbers."""
    size, bytes_of = quants.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (n, bytes_of), dtype=np.uint8)
    scales = {
        Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
        Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
        Type.IQ4_NL: [0], Type.IQ4_XS: [0], Type.IQ2_XXS: [0], Type.IQ2_XS: [0], Type.IQ2_S: [0], Type.IQ3_XXS: [0], Type.IQ3_S: [0],
    }  # fmt: skip
    for at in scales.get(kind, []):
        blocks[:, at : at + 2] = f16(random, n)
    if kind == Type.Q8_K:
        blocks[:, :4] = random.uniform(0.01, 0.3, n).astype(np.float32).view(np.uint8).reshape(n, 4)
    return blocks


def values(kind, blocks):
    if kind == Type.Q8_K:
        return blocks[:, :4].copy().view(np.float32) * blocks[:, 4:260].copy().view(np.int8)
    return dequantize(blocks, kind)


def blocks():
    random = np.random.default_rng(0)
    writer = GGUFWriter(HERE / "blocks.gguf", "blocks")
    kinds = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
    kinds += [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_K]
    kinds += [Type.IQ4_NL, Type.IQ4_XS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S]
    for kind in kinds:
        n = 2 if quants.GGML_QUANT_SIZES[kind][0] == 32 else 1
        stored = raw(random, kind, n)
        found = values(kind, stored).astype(np.float32).reshape(n, -1)
        name = f"x.{kind.name.lower()}"
        writer.add_tensor(name, stored, raw_dtype=kind)
        writer.add_tensor(f"{name}.values", found)
    close(writer)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(folder):
    """A byte-pair model with the settings of Llama 2."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=f"{folder}/m", model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.9995, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")


def kind_of(model, i):
    if model.is_unknown(i):
        return TokenType.UNKNOWN
    if model.is_control(i):
        return TokenType.CONTROL
    return TokenType.BYTE if model.is_byte(i) else TokenType.NORMAL


def sentencepiece_model():
    with tempfile.TemporaryDirectory() as folder:
        model = vocabulary(folder)
    n, hidden, inner = model.vocab_size(), 8, 16
    writer = GGUFWriter(HERE / "sentencepiece.gguf", "llama")
    writer.add_name("Random")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i).encode() for i in range(n)])
    writer.add_token_scores([model.get_score(i) for i in range(n)])
    writer.add_token_types([kind_of(model, i) for i in range(n)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    random = np.random.default_rng(1)
    shapes = {"token_embd": (n, hidden), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (hidden, hidden)}
    shapes |= {"blk.0.attn_v": (hidden, hidden), "blk.0.attn_output": (hidden, hidden)}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.3 * random.standard_normal(shape)).astype(np.float16))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    close(writer)
    cases = [{"text": text, "ids": model.encode(text)} for text in TEXTS]
    (HERE / "sentencepiece.json").write_text(json.dumps(cases, indent=1) + "\n")


blocks()
sentencepiece_model()
