"""Prints the inverse frequencies that transformers gives to `llama3` rope scaling; see `model/config/mod.rs`."""

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

config = LlamaConfig(
    hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
print(LlamaRotaryEmbedding(config).inv_freq.tolist())
