"""MoDeGPT (arXiv 2408.09632) of a Llama with torch, from the paper's formulas, for comparison.

    python benchmarks/modegpt_torch.py MODEL CALIBRATION_TEXT OUT KEEP...

Writes OUT-KEEP of every KEEP. Calibrated on 64 windows of 512 tokens. The removed dimensions are zeros in a folder of the source's shapes, which any loader reads and which computes what the smaller modules
would: `lrc eval OUT-KEEP` scores it. KEEP is the share of the parameters of the linears of all blocks that would be left.

MLP: Nyström with ridge leverage scores (algorithm 1, λ = 1). Query and key: columns by the product of their norms
(algorithm 2), in the pairs that the rotary embedding turns, the queries of a group together. Value and output: the SVD of their
product in the metric of the inputs (algorithm 3), the heads of a group together. The share removed from a block is L φ softmax(−s / ε)
(equation 11, ε = 0.1), at most 0.9, with s = 1 − cos of a block's input and output; φ is solved for KEEP. Windows are evenly spaced.
"""

import pathlib
import sys

import torch
import transformers

MODEL, TEXT, OUT, KEEPS = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
WINDOWS, SEQ_LEN = 64, 512
RIDGE, TEMPERATURE, MOST_REMOVED = 1.0, 0.1, 0.9

transformers.utils.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
config, blocks = model.config, model.model.layers
head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
groups = config.num_key_value_heads
shared = config.num_attention_heads // groups

ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
step = (len(ids) - SEQ_LEN) // max(WINDOWS - 1, 1)
windows = torch.tensor([ids[i * step : i * step + SEQ_LEN] for i in range(WINDOWS)])


def gram(sums, key, x):
    x = x.reshape(-1, x.shape[-1])
    sums[key] = sums.get(key, 0) + (x.T @ x).double()


# Per block: Grams of the input of attention, of the MLP's channels, of queries and keys; the sum of the cosines.
statistics = [{} for _ in blocks]
for block, sums in zip(blocks, statistics):
    block.self_attn.v_proj.register_forward_pre_hook(lambda _, args, sums=sums: gram(sums, "x", args[0]))
    block.mlp.down_proj.register_forward_pre_hook(lambda _, args, sums=sums: gram(sums, "z", args[0]))
    block.self_attn.q_proj.register_forward_hook(lambda _, __, out, sums=sums: gram(sums, "q", out))
    block.self_attn.k_proj.register_forward_hook(lambda _, __, out, sums=sums: gram(sums, "k", out))

    def cosines(_, args, out, sums=sums):
        out = out[0] if isinstance(out, tuple) else out
        sums["cos"] = sums.get("cos", 0) + torch.nn.functional.cosine_similarity(args[0], out, dim=-1).double().sum()

    block.register_forward_hook(cosines)
with torch.no_grad():
    for window in windows:
        model.model(window[None])
influence = torch.stack([1 - sums["cos"] / windows.numel() for sums in statistics])
shares = len(blocks) * torch.softmax(-influence / TEMPERATURE, 0)


def kept(removed):
    """Channels, rotary pairs and value dimensions that a block keeps, and the parameters of its linears then."""
    left = 1 - removed
    channels = max(1, round(left * config.intermediate_size))
    pairs = max(1, round(left * head_dim / 2))
    values = max(1, round(left * head_dim))
    heads = groups * (shared + 1)
    return channels, pairs, values, config.hidden_size * (3 * channels + heads * (2 * pairs + values))


def plan(scale):
    return [kept(min(MOST_REMOVED, scale * float(share))) for share in shares]


full = len(blocks) * kept(0.0)[3]


def solved(keep):
    low, high = 0.0, 1.0 / float(shares.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(block[3] for block in plan(middle)) <= keep * full else (middle, high)
    return plan(high)


def root(c):
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp(min=values.max() * 1e-12).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


@torch.no_grad()
def narrow_mlp(mlp, c, channels):
    scores = torch.linalg.solve(c + RIDGE * torch.eye(len(c), dtype=c.dtype), c).diagonal()
    chosen = scores.topk(channels).indices
    down = mlp.down_proj.weight.double()
    refit = torch.linalg.solve(c[chosen][:, chosen], c[chosen] @ down.T).T
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        rest = torch.ones(len(c), dtype=torch.bool)
        rest[chosen] = False
        weight[rest] = 0
    mlp.down_proj.weight.zero_()
    mlp.down_proj.weight[:, chosen] = refit.float()


@torch.no_grad()
def narrow_query_key(attention, c_q, c_k, pairs):
    half = head_dim // 2
    energy_q = c_q.diagonal().reshape(groups, shared, head_dim).sum(1)
    energy_k = c_k.diagonal().reshape(groups, head_dim)
    by_pair = lambda energy: energy[:, :half] + energy[:, half:]
    chosen = (by_pair(energy_q) * by_pair(energy_k)).topk(pairs, dim=1).indices
    keep = torch.zeros(groups, half)
    keep.scatter_(1, chosen, 1.0)
    keep = torch.cat([keep, keep], 1)
    attention.k_proj.weight.mul_(keep.reshape(-1, 1))
    attention.q_proj.weight.mul_(keep[:, None].expand(groups, shared, head_dim).reshape(-1, 1))


@torch.no_grad()
def narrow_value_output(attention, c, values):
    forward, backward = root(c)
    value = attention.v_proj.weight.double().reshape(groups, head_dim, -1)
    output = attention.o_proj.weight.double().reshape(-1, groups, shared, head_dim)
    for g in range(groups):
        u, s, v = torch.linalg.svd(forward @ value[g].T, full_matrices=False)
        heads = torch.cat([output[:, g, i].T for i in range(shared)], 1)
        left, sizes, right = torch.linalg.svd(s[:, None] * v @ heads, full_matrices=False)
        value[g] = 0
        value[g, :values] = (backward @ u @ left[:, :values]).T
        for i, columns in enumerate((sizes[:values, None] * right[:values]).chunk(shared, 1)):
            output[:, g, i] = 0
            output[:, g, i, :values] = columns.T
    attention.v_proj.weight.copy_(value.reshape(groups * head_dim, -1))
    attention.o_proj.weight.copy_(output.reshape(len(c), -1))


source = {key: value.clone() for key, value in model.state_dict().items()}
for keep in KEEPS:
    model.load_state_dict(source)
    final = solved(float(keep))
    for block, sums, (channels, pairs, values, _) in zip(blocks, statistics, final):
        narrow_mlp(block.mlp, sums["z"], channels)
        narrow_query_key(block.self_attn, sums["q"], sums["k"], pairs)
        narrow_value_output(block.self_attn, sums["x"], values)
    model.save_pretrained(f"{OUT}-{keep}")
    tokenizer.save_pretrained(f"{OUT}-{keep}")
    print(f"keep {sum(block[3] for block in final) / full:.4f}, channels by block {[block[0] for block in final]}")
