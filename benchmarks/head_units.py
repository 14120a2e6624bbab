"""Dimensions of heads as units of narrower models, beside pivots of the same matrices, by their errors in the metric of the loss.

    python benchmarks/head_units.py MODEL STATISTICS [STEP]

MODEL is a model of the llama family in Hugging Face form, STATISTICS a file of `lrc calibrate MODEL --method kfac`; every STEP-th block is
measured (6). Errors are `tr(G E C E^T)` with both forms damped by 1 % of their mean diagonal, at the same number of parameters:

- V-O: the values of a group of heads lose dimensions, `V -> A V` and `O_i -> M_i` with M the least-squares refit over all heads, beside pivots of
  v and o whose ranks have the best split. `A` is from `decompose(I, (sum of O_i^T G O_i, sum of C_ii))` of each group, and the numbers of dimensions
  from all groups of the block together; then L-BFGS improves all `A` by the error of the refit itself, for as little of it as there may be.
- rotary pairs: the queries of a group and its keys lose pairs of dimensions that are rotated together. The error is that of the queries alone, whose
  other rows are refitted in G; pairs go one after another, the one first whose loss costs least (optimal brain surgery). Beside pivots of q and k.

Needs numpy, torch and safetensors.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors import safe_open

folder, statistics = pathlib.Path(sys.argv[1]), safe_open(sys.argv[2], "np")
step = int(sys.argv[3]) if len(sys.argv) > 3 else 6
config = json.loads((folder / "config.json").read_text())
d, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
size, shared = config.get("head_dim") or d // heads, heads // groups
names = {name: file for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
KEEPS, DAMPING, ITERATIONS = (0.9, 0.8, 0.7, 0.6, 0.5), 0.01, 150
torch.set_default_dtype(torch.float64)


def weight(block, name):
    name = f"model.layers.{block}.self_attn.{name}_proj.weight"
    return safe_open(names[name], "pt").get_tensor(name).double()


def form(name, n):
    lower = torch.zeros(n, n)
    lower[tuple(torch.tril_indices(n, n))] = torch.tensor(statistics.get_tensor(name)).double()
    whole = lower + lower.T - lower.diag().diag()
    return whole + DAMPING * whole.diag().mean() * torch.eye(n)


def pivots(w, output, inputs):
    """Parameters and squared error at every rank; the whole matrix comes last."""
    m, n = w.shape
    energies = torch.linalg.svdvals(torch.linalg.cholesky(output).T @ w @ torch.linalg.cholesky(inputs)) ** 2
    errors = np.append(np.cumsum(energies.numpy()[::-1])[::-1], 0.0)
    prices = np.array([r * (m + n - r) for r in range(len(errors))])
    prices[-1] = m * n
    return prices, errors


def both(first, second, budget):
    """The least error of two matrices under a budget."""
    (prices, errors), (others, rest) = first, second
    return min(
        errors[r] + rest[np.searchsorted(others, budget - prices[r], side="right") - 1] for r in range(len(prices)) if prices[r] <= budget
    )


def of_values(block):
    o = weight(block, "o")
    output, inputs = form(f"{block}.o_proj.output_gram", d), form(f"{block}.o.input_gram", heads * size)
    v = pivots(weight(block, "v"), form(f"{block}.v_proj.output_gram", groups * size), form(f"{block}.qkv.input_gram", d))
    separate, image = (v, pivots(o, output, inputs)), o.T @ output @ o
    bases = []
    for group in range(groups):
        parts = [slice(i * size, (i + 1) * size) for i in range(group * shared, (group + 1) * shared)]
        left = torch.linalg.cholesky(sum(image[part, part] for part in parts))
        right = torch.linalg.cholesky(sum(inputs[part, part] for part in parts))
        _, values, rows = torch.linalg.svd(left.T @ right)
        bases.append((values**2, torch.linalg.solve_triangular(right, rows, upper=False, left=False)))
    ordered = sorted(((value.item(), group) for group in range(groups) for value in bases[group][0]), reverse=True)

    def error(kept):
        s = torch.block_diag(*[kept[i // shared] for i in range(heads)])
        x = s @ inputs
        y = o @ torch.linalg.solve_triangular(torch.linalg.cholesky(x @ s.T), x, upper=False).T
        return (output * (o @ inputs @ o.T - y @ y.T)).sum()

    for keep in KEEPS:
        budget = keep * (separate[0][0][-1] + separate[1][0][-1])
        least = both(*separate, budget)
        chosen = ordered[: int(budget // (d * (1 + shared)))]
        counts = [sum(group == own for _, own in chosen) for group in range(groups)]
        kept = [basis[:count] for (_, basis), count in zip(bases, counts)]
        closed = error(kept).item()
        free = [torch.linalg.qr(a.T)[0].T.clone().requires_grad_() for a in kept if len(a)]
        if len(free) == groups:
            descent = torch.optim.LBFGS(free, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

            def closure():
                descent.zero_grad()
                loss = error(free) / least
                loss.backward()
                return loss

            descent.step(closure)
        yield keep, least, closed, min(closed, error(free).item()) if len(free) == groups else closed


def of_pairs(block):
    q = weight(block, "q")
    output, inputs = form(f"{block}.q_proj.output_gram", heads * size), form(f"{block}.qkv.input_gram", d)
    k = pivots(weight(block, "k"), form(f"{block}.k_proj.output_gram", groups * size), inputs)
    separate = (k, pivots(q, output, inputs))
    halves, all_heads = (0, size // 2), range(shared)
    units = [[(g * shared + i) * size + p + half for i in all_heads for half in halves] for g in range(groups) for p in range(size // 2)]
    price = d * 2 * (shared + 1)
    inverse, image, error, errors = torch.linalg.inv(output), q @ inputs @ q.T, 0.0, {len(units): 0.0}
    while len(units) > KEEPS[-1] * separate[0][0][-1] // price:
        costs = [torch.trace(torch.linalg.solve(inverse[u][:, u], image[u][:, u])).item() for u in units]
        u = units.pop(int(np.argmin(costs)))
        error += min(costs)
        moved = torch.linalg.solve(inverse[u][:, u], inverse[u]).T  # (rows, dropped)
        keep = torch.eye(len(q))
        keep[:, u] -= moved
        image = keep @ image @ keep.T
        inverse = inverse - moved @ inverse[u]
        errors[len(units)] = error
    for keep in KEEPS:
        budget = keep * (separate[0][0][-1] + separate[1][0][-1])
        yield keep, both(*separate, budget), errors.get(int(budget // price), float("nan"))


rows = {}
for block in range(0, config["num_hidden_layers"], step):
    for keep, least, closed, best in of_values(block):
        rows.setdefault(("V-O", keep), []).append(closed / least)
        rows.setdefault(("V-O, improved", keep), []).append(best / least)
    for keep, least, dropped in of_pairs(block):
        rows.setdefault(("rotary pairs", keep), []).append(dropped / least)
print("Error over that of pivots, least and largest of the blocks\n")
print("| unit | " + " | ".join(map(str, KEEPS)) + " |\n|---|" + "---|" * len(KEEPS))
for unit in ("V-O", "V-O, improved", "rotary pairs"):
    cells = [f"{min(rows[unit, keep]):.2f} to {max(rows[unit, keep]):.2f}" for keep in KEEPS]
    print(f"| {unit} | " + " | ".join(cells) + " |")
