"""Makes `fixtures/pico-llama`, random weights with what the trained fixture lacks: biases, `llama3` rope scaling, a head of
its own, and the config of transformers 5. Its logits are made by `logits.py`.

    python tests/oracles/pico_llama.py
    python tests/oracles/logits.py fixtures/pico-llama > tests/oracles/pico-llama-logits.json
"""

import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)
model = LlamaForCausalLM(config)
for parameter in model.parameters():
    noise = torch.randn_like(parameter)
    parameter.data = 0.2 * noise if parameter.dim() == 2 else parameter.data + 0.2 * noise
folder = pathlib.Path("fixtures/pico-llama")
model.save_pretrained(folder)
(folder / "generation_config.json").unlink(missing_ok=True)
