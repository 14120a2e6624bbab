"""Makes `fixtures/pico/FAMILY`: random weights of every family that lrc runs, in two blocks (gemma3_text: six, smollm3: four, so
that every kind of block is there), and `expected.json`: transformers' logits of them in f32, under the config as it is and under
others that change no weight (kinds of rope scaling, windows); and by linear the sums over tokens of the squared gradients of
its outputs, of the summed next-token loss, in f64. `fixtures/pico/tokenizer.json` has a token for each of 45 characters.

    python tests/oracles/pico.py [FAMILY ...]          needs torch and transformers 5.23
"""

import json
import pathlib
import re
import sys

import tokenizers
import torch
import transformers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM,
                          AutoModelForPreTraining)

SHARED = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2)
UNGROUPED = {k: v for k, v in SHARED.items() if k != "num_key_value_heads"}


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=4096)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0], "partial_rotary_factor": 0.5}

# By family: fields of the config, then the fields of further configs of the same weights.
FAMILIES = {
    "llama": (dict(SHARED, head_dim=8), [
        LLAMA3, rope("linear", factor=2.0), rope("dynamic", factor=2.0) | {"max_position_embeddings": 8}, YARN,
        rope("yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0, truncate=False),
        rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9),
    ]),
    "mistral": (dict(SHARED, head_dim=6, sliding_window=5), [{"sliding_window": None}]),
    "qwen2": (dict(SHARED, tie_word_embeddings=True), [YARN, {"use_sliding_window": True, "sliding_window": 4,
                                                           "max_window_layers": 1, "layer_types": None}]),
    "qwen3": (dict(SHARED, head_dim=8), [{"attention_bias": False}]),
    "gemma2": (dict(SHARED, head_dim=8, query_pre_attn_scalar=12, sliding_window=4, attn_logit_softcapping=2.0,
                    final_logit_softcapping=3.0), []),
    "gemma3_text": (dict(SHARED, num_hidden_layers=6, head_dim=8, query_pre_attn_scalar=12, sliding_window=4), []),
    "phi3": (dict(SHARED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                  sliding_window=6), [
        {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "short_factor": [1.5], "long_factor": [3.0], "partial_rotary_factor": 0.5}},
        {"original_max_position_embeddings": 8, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8,
            "short_factor": [1.5], "long_factor": [3.0], "partial_rotary_factor": 0.5}},
    ]),
    "olmo2": (dict(SHARED), []),
    "smollm3": (dict(SHARED, num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1]), []),
    "gpt2": (dict(vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
             [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]),
    "gpt_neox": (dict(UNGROUPED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                               "partial_rotary_factor": 0.5}), [{"use_parallel_residual": False}]),
    "opt": (dict(UNGROUPED, ffn_dim=24, word_embed_proj_dim=16), []),
    "opt-350m": (dict(UNGROUPED, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False), []),
    "mixtral": (dict(SHARED, num_local_experts=4, num_experts_per_tok=2), [{"num_experts_per_tok": 1}]),
    "qwen3_moe": (dict(SHARED, head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12,
                       mlp_only_layers=[0], norm_topk_prob=True),
                  [{"norm_topk_prob": False}]),
    "bert": (dict(UNGROUPED, vocab_size=51), []),
    "roberta": (dict(UNGROUPED, vocab_size=51, max_position_embeddings=66, pad_token_id=1, bos_token_id=48, eos_token_id=49,
                     type_vocab_size=1, layer_norm_eps=1e-5), [{"hidden_act": "relu"}]),
    "distilbert": (dict(vocab_size=51, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=64), []),
}
# Multimodal models are run on text alone. By `model_type`: the fields, and the prefixes of the text model's modules in memory and
# in files.
TOWER = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
WRAPPERS = {
    "gemma3": (dict(text_config=dict(FAMILIES["gemma3_text"][0], rope_scaling={"factor": 8.0, "type": "linear", "rope_type": "linear"}),
                    vision_config=TOWER, mm_tokens_per_image=1), "model.language_model.", "language_model.model."),
    "llava": (dict(text_config=dict(SHARED, model_type="llama", head_dim=8), vision_config=dict(TOWER, model_type="clip_vision_model",
                   projection_dim=8)), "model.language_model.", "language_model.model."),
    "qwen2_5_vl": (dict(text_config=dict(SHARED, rope_parameters={"rope_type": "mrope", "type": "mrope", "mrope_section": [1, 1, 0]}),
                        vision_config=dict(depth=1, hidden_size=8, num_heads=2, intermediate_size=12, out_hidden_size=16,
                                           patch_size=4, window_size=8, fullatt_block_indexes=[0])),
                   "model.language_model.", "model."),
    "smolvlm": (dict(text_config=dict(SHARED, model_type="llama"), vision_config=TOWER, scale_factor=2),
                "model.text_model.", "model.text_model."),
}
FAMILIES |= {name: (fields, []) for name, (fields, *_) in WRAPPERS.items()}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
LINEARS = tuple(("_proj c_attn c_fc query_key_value dense dense_h_to_4h dense_4h_to_h fc1 fc2 query key value "
                 "_lin lin1 lin2").split())
# Between the tokens that encoders get at both ends; RoBERTa counts positions past those of padding, which is 1.
ENDS = {"decoder": (1, 4), "encoder": (48, 49)}


def ids_of(model):
    first, last = ENDS["encoder" if model.config.model_type in ENCODERS else "decoder"]
    return torch.tensor([[first, 5, 9, 33, 47, 2, 2, 17, 40, 8, 21, 30, last]])


def forward(model):
    found = model.eval()(ids_of(model))
    return found.prediction_logits[0] if hasattr(found, "prediction_logits") else found.logits[0]


def logits(model):
    with torch.no_grad():
        return forward(model)


TEXT = "once upon a time there was a little dog."


def pseudo(model):
    """Σ nll of the tokens of TEXT, each hidden in turn (Salazar et al. 2020)."""
    tokenizer = tokenizers.Tokenizer.from_file("fixtures/pico/tokenizer-encoder.json")
    ids, total = tokenizer.encode(TEXT).ids, 0.0
    for place in range(1, len(ids) - 1):
        hidden = [tokenizer.token_to_id("[MASK]") if i == place else id for i, id in enumerate(ids)]
        with torch.no_grad():
            found = model.eval()(torch.tensor([hidden]))
        rows = found.prediction_logits[0] if hasattr(found, "prediction_logits") else found.logits[0]
        total -= rows[place].double().log_softmax(-1)[ids[place]].item()
    return total


def pooled(model):
    """The last states of an encoder, and its pooled vector: that of its pooler, or else the mean."""
    found = model.base_model.eval()(ids_of(model))
    states = found.last_hidden_state[0]
    vector = getattr(found, "pooler_output", None)
    return states, states.mean(0) if vector is None else vector[0]


# Encoders: the class that is saved, and which of their tokens are asked for, hidden or not.
ENCODERS = {"bert": AutoModelForPreTraining, "roberta": AutoModelForMaskedLM, "distilbert": AutoModelForMaskedLM}
ASKED = [1, 4, 9]
# How the files of a family name the linears of experts, which transformers 5 stacks.
EXPERTS = {"mixtral": ("block_sparse_moe.experts", "w1 w3 w2"), "qwen3_moe": ("mlp.experts", "gate_proj up_proj down_proj")}


def watch_experts(model, outputs):
    """Runs the experts one by one, so that the outputs of their linears can be seen."""
    place, names = EXPERTS[model.config.model_type]
    for i, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue

        def forward(x, picked, weights, experts=experts, prefix=f"model.layers.{i}.{place}"):
            y = torch.zeros_like(x)
            for e in range(experts.num_experts):
                token, rank = torch.where(picked == e)
                gate, up = (x[token] @ half.T for half in experts.gate_up_proj[e].chunk(2))
                down = (experts.act_fn(gate) * up) @ experts.down_proj[e].T
                for name, output in zip(names.split(), (gate, up, down)):
                    output.retain_grad()
                    outputs[f"{prefix}.{e}.{name}"] = output
                y = y.index_add(0, token, down * weights[token, rank, None])
            return y

        experts.forward = forward


def squared_gradients(model, loss=None):
    model = model.double().eval()
    outputs = {}
    ids = ids_of(model)
    if model.config.model_type in EXPERTS:
        before = forward(model)
        watch_experts(model, outputs)
        assert (forward(model) - before).abs().max() < 1e-12
    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            def hook(_, __, output, name=name):
                if output.requires_grad:
                    output.retain_grad()
                    outputs[name] = output
            module.register_forward_hook(hook)
    if loss is None and model.config.model_type in ENCODERS:
        torch.nn.functional.cross_entropy(forward(model)[ASKED], ids[0, ASKED], reduction="sum").backward()
    elif loss is None:
        torch.nn.functional.cross_entropy(forward(model)[:-1], ids[0, 1:], reduction="sum").backward()
    else:
        loss(model).backward()
    outputs = {name: y for name, y in outputs.items() if re.search(r"\.\d+\.", name)}
    if model.config.model_type in WRAPPERS:
        _, loaded, stored = WRAPPERS[model.config.model_type]
        outputs = {name.replace(loaded, stored): y for name, y in outputs.items()}
    return {name: [float(f"{x:.7g}") for x in (y.grad.flatten(0, -2) ** 2).sum(0).tolist()] for name, y in outputs.items()}


def write_tokenizer():
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-\n\""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save("fixtures/pico/tokenizer.json")
    added = ["[CLS]", "[SEP]", "[MASK]"]
    tokenizer.add_special_tokens(added)
    ids = [(token, tokenizer.token_to_id(token)) for token in added[:2]]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    tokenizer.save("fixtures/pico/tokenizer-encoder.json")


def main():
    write_tokenizer()
    asked = sys.argv[1:] or FAMILIES
    for family, (fields, others) in FAMILIES.items():
        if family not in asked:
            continue
        torch.manual_seed(0)
        kind_of_model = family.split("-")[0]
        config = AutoConfig.for_model(kind_of_model, **EAGER, **fields)
        kind = AutoModelForImageTextToText if family in WRAPPERS else ENCODERS.get(family, AutoModelForCausalLM)
        model = kind.from_config(config).float()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.3 * noise if parameter.dim() >= 2 else parameter.data + 0.2 * noise
        model.tie_weights()
        folder = pathlib.Path("fixtures/pico") / family
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        saved = json.loads((folder / "config.json").read_text())
        cases = []
        for changes in [{}] + others:
            changed = {k: v for k, v in (saved | changes).items() if k != "model_type"}
            config = AutoConfig.for_model(kind_of_model, **EAGER, **changed)
            again = kind.from_config(config).float()
            again.load_state_dict(model.state_dict())
            rows = logits(again).tolist()
            cases.append({"changes": changes, "logits": [[float(f"{x:.7g}") for x in row] for row in rows]})
        size = sum(f.stat().st_size for f in folder.iterdir())
        gradients = squared_gradients(model)
        more = {}
        if family in ENCODERS:
            states, vector = pooled(model.float())
            norm = lambda model: 0.5 * (pooled(model)[1] ** 2).sum()
            rounded = lambda values: [float(f"{x:.7g}") for x in values]
            more = {"asked": ASKED, "text": TEXT, "pseudo_nll": pseudo(model), "states": [rounded(row) for row in states.tolist()], "pooled": rounded(vector.tolist()),
                    "pooled_squared_gradients": squared_gradients(model, norm)}
        expected = {"transformers": transformers.__version__, "ids": ids_of(model)[0].tolist(), "cases": cases, "squared_gradients": gradients, **more}
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        print(family, size, len(gradients))


main()
