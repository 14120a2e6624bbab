r"""Structures of published methods at equal parameters, by their errors in the metric of the loss and by the model that they make.

    python benchmarks/seeds.py MODEL STATISTICS TEXT WORK LRC [--keep 0.8] [--seq-len 512] [--windows 32] \
        [--blocks 0,1,...] [--roles q,k,v,o,gate,up,down] [--sweeps 200] [--steps 200] [STRUCTURE...]

MODEL is a model of the llama family in Hugging Face form, STATISTICS a file of `lrc calibrate MODEL --method kfac`. Every matrix keeps the same
share of its parameters, so that structures are compared and no allocation. Each structure (all of them, or those named by their key in STRUCTURES)
is fitted with `tr(G E C E^T)`, both forms damped by 1 % of their mean diagonal; then a checkpoint with its values in place of all matrices of the
blocks is scored by `lrc eval` on the first windows of TEXT. With --blocks or --roles only these matrices are fitted, and nothing is scored. BLAST
takes --sweeps of its least squares, MPO --steps of L-BFGS. Figures are kept in WORK, a file for each structure, and the table has all that lie
there. Parts are counted as their papers store them; indices count 16 bits.

Needs numpy, torch, scipy and safetensors.
"""

import argparse
import functools
import json
import pathlib
import shutil
import subprocess

import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import save_file

parser = argparse.ArgumentParser()
for name in ("model", "statistics", "text", "work", "lrc"):
    parser.add_argument(name, type=pathlib.Path)
for name, default in (("--keep", 0.8), ("--seq-len", 512), ("--windows", 32), ("--sweeps", 200), ("--steps", 200)):
    parser.add_argument(name, type=type(default), default=default)
parser.add_argument("--blocks")
parser.add_argument("--roles", default="q,k,v,o,gate,up,down")
parser.add_argument("structures", nargs="*")
options = parser.parse_intermixed_args()
statistics = safe_open(options.statistics, "pt")
config = json.loads((options.model / "config.json").read_text())
files = {name: safe_open(file, "pt") for file in options.model.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
itemsize = next(opened.get_tensor(name) for name, opened in files.items()).element_size()
blocks = [int(block) for block in options.blocks.split(",")] if options.blocks else range(config["num_hidden_layers"])
n_tokens = sum(part["tokens"] for part in json.loads(bytes(statistics.get_tensor("header").numpy()))["parts"])
SITES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
DAMPING = 0.01
torch.set_default_dtype(torch.float64)
triangular, cholesky = torch.linalg.solve_triangular, torch.linalg.cholesky


class Matrix:
    """A weight (m, n), its metric, and the parameters that it may keep."""

    def __init__(self, w, g, c, budget, mean=None):
        self.w, self.g, self.c, self.budget, self.mean = w, g, c, budget, mean

    left = functools.cached_property(lambda self: cholesky(self.g))
    right = functools.cached_property(lambda self: cholesky(self.c))
    transposed = property(lambda self: Matrix(self.w.T, self.c, self.g, self.budget))

    def error(self, approximation):
        e = self.w - approximation
        return ((self.g @ e) * (e @ self.c)).sum().item()

    def of(self, w):
        """Another target in the same metric."""
        other = Matrix(w, self.g, self.c, self.budget)
        other.left, other.right = self.left, self.right
        return other

    def centred(self):
        """The metric of a linear whose bias is free and counts."""
        return Matrix(self.w, self.g, self.c - torch.outer(self.mean, self.mean), self.budget - len(self.w))


def form(name, n):
    lower = torch.zeros(n, n)
    lower[tuple(torch.tril_indices(n, n))] = statistics.get_tensor(name).double() / n_tokens
    whole = lower + lower.T - lower.diag().diag()
    return whole + DAMPING * whole.diag().mean() * torch.eye(n)


def module(block, role):
    return f"model.layers.{block}.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj"


def matrix(block, role):
    name = module(block, role) + ".weight"
    w = files[name].get_tensor(name).double()
    site = f"{block}.{SITES[role]}"
    mean = statistics.get_tensor(f"{site}.input_sum").double() / n_tokens
    return Matrix(w, form(f"{block}.{role}_proj.output_gram", len(w)), form(f"{site}.input_gram", w.shape[1]), int(options.keep * w.numel()), mean)


def pivot_rank(m, n, budget):
    """The largest rank of r (m + n - r) parameters."""
    return int((m + n - ((m + n) ** 2 - 4 * budget) ** 0.5) / 2 + 1e-9)


def low_rank(x, rank):
    """The best `B` (m, r), whose columns are orthonormal in G or whose rows of `A` (r, n) are so in the inverse of C."""
    k = x.left.T @ x.w @ x.right
    if len(k) <= k.shape[1]:
        u = torch.linalg.eigh(k @ k.T)[1][:, len(k) - rank :]
        return triangular(x.left.T, u, upper=True), u.T @ x.left.T @ x.w
    v = torch.linalg.eigh(k.T @ k)[1][:, k.shape[1] - rank :]
    return x.w @ (x.right @ v), triangular(x.right, v.T, upper=False, left=False)


def factors(x):
    b, a = low_rank(x, x.budget // sum(x.w.shape))
    return b @ a


def pivots(x):
    b, a = low_rank(x, pivot_rank(*x.w.shape, x.budget))
    return b @ a


def slices(n, count):
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def rows_refitted(x, w, parts):
    """Slices of rows `U_i A_i` of `w`, one after another with the least squares' `U_i`; yields them as they come and updates `w`."""
    rows = slices(len(w), len(parts))
    for own, a in zip(rows, parts):
        target = w[own] + solve(x.g[own, own], x.g[own] @ (x.w - w))
        inputs = x.c @ a.T
        u = solve(a @ inputs, (target @ inputs).T).T
        w[own] = u @ a
        yield u


def solve(normal, right):
    """Of a form that may be singular within rounding."""
    ridge = (1e-12 if normal.dtype == torch.float64 else 1e-6) * normal.diag().mean()
    return torch.cholesky_solve(right, cholesky(normal + ridge * torch.eye(len(normal), dtype=normal.dtype)))


def monarch(x, sweeps=0, count=4):
    """Blocks of one rank, each fitted in its own part of the metric, as `lrc --layout monarch`; then by least squares in all of it."""
    (m, n), w = x.w.shape, torch.zeros_like(x.w)
    rank = x.budget // (count * (m + n))
    rows, columns = slices(m, count), slices(n, count)
    lefts, rights = [[None] * count for _ in rows], [[None] * count for _ in rows]
    for j, own in enumerate(rows):
        for i, other in enumerate(columns):
            lefts[j][i], rights[j][i] = low_rank(Matrix(x.w[own, other], x.g[own, own], x.c[other, other], 0), rank)
            w[own, other] = lefts[j][i] @ rights[j][i]

    for _ in range(sweeps):
        for j, u in enumerate(rows_refitted(x, w, [torch.block_diag(*rights[j]) for j in range(count)])):
            lefts[j] = u.split(rank, 1)
        given = [torch.block_diag(*[lefts[j][i].T for j in range(count)]) for i in range(count)]
        for i, v in enumerate(rows_refitted(x.transposed, w.T, given)):
            for j, part in enumerate(v.split(rank, 1)):
                rights[j][i] = part.T

    return w


def blast(x, count):
    """Blocks `U_i diag(s_ij) V_j^T` by least squares in s_i, U_i and V_j one after another, in f32, with Nesterov's extrapolation (Mitchell et al. 2020)."""
    (m, n), random = x.w.shape, torch.Generator().manual_seed(0)
    while m % count or n % count:
        count //= 2
    rank = x.budget // (m + n + count * count)
    b, a = low_rank(x, rank)
    sweep = Sweep(x, count)
    # Factors are s = 1, a saddle that sweeps hardly leave: s is drawn.
    s = torch.randn(count, count, rank, generator=random).float()
    before = now = sweep(b.float().reshape(count, -1, rank), a.T.float().reshape(count, -1, rank), s)
    since = 1
    for _ in range(options.sweeps):
        share = since / (since + 3)
        after = sweep(*(new + share * (new - old) for new, old in zip(now[:3], before[:3])))
        since += 1
        if after[3] > now[3]:
            after, since = sweep(*now[:3]), 1
        before, now = now, after
    return blast_product(*now[:3]).double()


def blast_product(u, v, s):
    return torch.cat([torch.cat([u[i] * s[i, j] @ v[j].T for j in range(len(v))], 1) for i in range(len(u))])


class Sweep:
    """The next parts, with columns of U and V of one size, and their error: the gradient `G E C` is kept up to date in slices."""

    def __init__(self, x, count):
        self.w, self.g, self.c, self.count = x.w.float(), x.g.float(), x.c.float(), count
        self.rows, self.columns = slices(len(x.w), count), slices(x.w.shape[1], count)
        self.lefts = [cholesky(self.g[own, own]) for own in self.rows]
        self.rights = [cholesky(self.c[own, own]) for own in self.columns]

    def __call__(self, u, v, s):
        (count, _, rank), u, v, s = u.shape, u.clone(), v.clone(), s.clone()
        d = self.g @ ((self.w - blast_product(u, v, s)) @ self.c)
        inputs = torch.stack([self.c[:, own] @ part for own, part in zip(self.columns, v)])  # C V_j
        between = torch.stack([torch.stack([part.T @ one[own] for one in inputs]) for own, part in zip(self.columns, v)])
        for i, own in enumerate(self.rows):
            moved = self.scaled(u[i], s[i], d[own], v, inputs, between, own)
            target = sum((d[own, other] - self.g[own, own] @ moved[:, other]) @ v[j] * s[i, j] for j, other in enumerate(self.columns))
            normal = torch.einsum("ja,jlab,lb->ab", s[i], between, s[i])
            change = solve(normal, torch.cholesky_solve(target, self.lefts[i]).T).T
            u[i] += change
            moved += change @ sum(s[i, j][:, None] * inputs[j].T for j in range(count))
            d -= self.g[:, own] @ moved
        outputs = torch.stack([self.g[:, own] @ part for own, part in zip(self.rows, u)])  # G U_i
        across = torch.stack([torch.stack([part.T @ one[own] for one in outputs]) for own, part in zip(self.rows, u)])
        for j, own in enumerate(self.columns):
            target = sum(s[i, j][:, None] * (u[i].T @ d[other, own]) for i, other in enumerate(self.rows))
            normal = torch.einsum("ia,ilab,lb->ab", s[:, j], across, s[:, j])
            change = solve(normal, torch.cholesky_solve(target.T, self.rights[j]).T).T
            v[j] += change
            d -= sum(outputs[i] * s[i, j] for i in range(count)) @ change.T @ self.c[own]
        sizes = [part.norm(dim=(0, 1)) for part in (u, v)]
        error = (d * (self.w - blast_product(u, v, s))).sum().item()
        return u / sizes[0], v / sizes[1], s * sizes[0] * sizes[1], error

    def scaled(self, u, s, d, v, inputs, between, own):
        """Adds to a row of s, `s_j` after `s_j` and twice around; returns what that adds to `B C`."""
        inner, change = u.T @ self.g[own, own] @ u, torch.zeros_like(s)
        slope = torch.stack([(u * (d[:, other] @ v[j])).sum(0) for j, other in enumerate(self.columns)])
        for j in list(range(self.count)) * 2:
            step = solve(between[j, j] * inner, slope[j][:, None])[:, 0]
            change[j] += step
            slope -= torch.stack([between[other, j] * inner @ step for other in range(self.count)])
        s += change
        return u @ sum(change[j][:, None] * inputs[j].T for j in range(self.count))


def cur(x):
    """Columns and rows of the weight by pivots of the best factors; the matrix between them by least squares."""
    total = sum(x.w.shape)
    rank = int(((total**2 + 4 * x.budget) ** 0.5 - total) / 2)
    b, a = low_rank(x, rank)
    columns, rows = (x.w[:, chosen(a, rank)], x.w[chosen(b.T, rank)])
    image, inputs = columns.T @ x.g, x.c @ rows.T
    return columns @ solve(image @ columns, image @ x.w @ inputs) @ solve(rows @ inputs, rows)


def chosen(wide, rank):
    return torch.tensor(scipy.linalg.qr(wide.numpy(), mode="r", pivoting=True)[1][:rank].copy(), dtype=torch.long)


def sites(m, n):
    """Sizes (m1, n1) of the first site for the fewest parameters of one Kronecker product."""
    pairs = [(i, j) for i in range(2, m) for j in range(2, n) if m % i == 0 and n % j == 0]
    return min(pairs, key=lambda p: (p[0] * p[1] + m * n // (p[0] * p[1]), abs(p[0] / p[1] - (m / n) ** 0.5)))


def rearranged(w, m1, n1):
    m, n = w.shape
    return w.reshape(m1, m // m1, n1, n // n1).transpose(1, 2).reshape(m1 * n1, -1)


def restored(z, m, n, m1, n1):
    return z.reshape(m1, n1, m // m1, n // n1).transpose(1, 2).reshape(m, n)


def kronecker_root(g, m1):
    """The lower root of the nearest Kronecker product of a form."""
    table, second = rearranged(g, m1, m1), torch.eye(len(g) // m1).flatten()
    for _ in range(6):
        first = table @ second / second.norm()
        second = table.T @ first / first.norm() ** 2
    return torch.kron(*(cholesky(half.reshape(int(len(half) ** 0.5), -1)) for half in (first, second)))


def mpo(x, as_pivots=False):
    """A sum of Kronecker products: the best one in the nearest Kronecker product of the metric, then L-BFGS in the metric."""
    m, n = x.w.shape
    m1, n1 = sites(m, n)
    left, right = kronecker_root(x.g, m1), kronecker_root(x.c, n1)
    k = left.T @ x.w @ right
    table = rearranged(k, m1, n1)
    rank = pivot_rank(*table.shape, x.budget) if as_pivots else x.budget // sum(table.shape)
    u, values, v = torch.linalg.svd(table, full_matrices=False)
    parts = [p.float().requires_grad_() for p in (u[:, :rank] * values[:rank].sqrt(), values[:rank, None].sqrt() * v[:rank])]
    g = triangular(left, triangular(left, x.g, upper=False).T, upper=False).float()
    c = triangular(right, triangular(right, x.c, upper=False).T, upper=False).float()
    k, scale = k.float(), 1 / x.error(pivots(x))
    descent = torch.optim.LBFGS(parts, max_iter=options.steps, line_search_fn="strong_wolfe", history_size=10)

    def closure():
        with torch.no_grad():
            e = k - restored(parts[0] @ parts[1], m, n, m1, n1)
            slope = g @ e @ c
            outer = -2 * scale * rearranged(slope, m1, n1)
            parts[0].grad, parts[1].grad = outer @ parts[1].T, parts[0].T @ outer
            return scale * (e * slope).sum()

    descent.step(closure)
    best = restored((parts[0] @ parts[1]).detach().double(), m, n, m1, n1)
    return triangular(right, triangular(left.T, best, upper=True), upper=False, left=False)


def dense_and_sparse(x, rounds=4):
    """`B` of r columns times `A` with k nonzeros a column; the best r of a few. The dense part is on the smaller side."""
    if x.w.shape[0] > x.w.shape[1]:
        return dense_and_sparse(x.transposed).T
    m, n = x.w.shape
    price = 1 + 2 / itemsize
    choices = [(int(share * m), int((x.budget - m * int(share * m)) / (price * n))) for share in (0.3, 0.45, 0.6, 0.75)]
    rank, count = min((c for c in choices if c[1] > 0), key=lambda c: x.error(sparse_fit(x, *c, 1)))
    return sparse_fit(x, rank, count, rounds)


def sparse_fit(x, rank, count, rounds):
    """Hard thresholding with the support's values by conjugate gradients, then the least squares' `B`, a few times."""
    b, a = low_rank(x, rank)
    inner = b.T @ x.g @ b
    for _ in range(rounds):
        importance = a.abs() * inner.diag().sqrt()[:, None]
        mask = torch.zeros_like(a).scatter_(0, importance.topk(min(count, rank), 0).indices, 1.0)
        kept = masked_least_squares(mask, inner, x.c, b.T @ x.g @ x.w @ x.c, a * mask)
        inputs = x.c @ kept.T
        b = solve(kept @ inputs, (x.w @ inputs).T).T
        inner = b.T @ x.g @ b
        a = kept + solve(inner, b.T @ x.g @ (x.w - b @ kept))
    return b @ kept


def masked_least_squares(mask, g, c, right, a, steps=10):
    """Values of `A` where `mask` is 1 that minimize `tr(g A c A^T) - 2 tr(A^T right)`."""
    scale = mask / torch.outer(g.diag(), c.diag())
    residual = mask * (right - g @ a @ c)
    z = scale * residual
    direction, size = z, (z * residual).sum()
    for _ in range(steps):
        image = mask * (g @ direction @ c)
        step = size / (direction * image).sum()
        a, residual = a + step * direction, residual - step * image
        z = scale * residual
        direction, size = z + (z * residual).sum() / size * direction, (z * residual).sum()
    return a


def atoms(xs):
    """S matrices for all blocks of a role and S coefficients a block, in the mean metric of the role."""
    weights = torch.stack([(x.g.trace() * x.c.trace()).sqrt() for x in xs])
    left, right = (cholesky(sum(f / f.trace() for f in forms)) for forms in ([x.g for x in xs], [x.c for x in xs]))
    rows = torch.stack([(left.T @ x.w @ right).flatten() for x in xs]) * weights[:, None]
    count = int(sum(x.budget for x in xs) / (xs[0].w.numel() + len(xs)))
    u = torch.linalg.eigh(rows @ rows.T)[1][:, len(xs) - count :]
    mixed = (u @ u.T * weights) / weights[:, None]
    return torch.einsum("ab,bmn->amn", mixed, torch.stack([x.w for x in xs]))


def tied(xs, size, rounds=20):
    """A matrix for `size` neighbouring blocks, and what is missing from each as pivots: least squares of one and the other."""
    fits = []
    n_groups = max(len(xs) // size, 1)
    for own in slices(len(xs), n_groups):
        group = xs[own]
        m, n = group[0].w.shape
        rank = pivot_rank(m, n, (sum(x.budget for x in group) - m * n) / len(group))
        weights = [x.g.trace() * x.c.trace() for x in group]
        rest, base = [torch.zeros(m, n) for _ in group], sum(w * x.w for w, x in zip(weights, group)) / sum(weights)
        for _ in range(rounds):
            base = shared_base(group, [x.w - r for x, r in zip(group, rest)], base)
            rest = [torch.matmul(*low_rank(x.of(x.w - base), rank)) for x in group]
        fits += [base + r for r in rest]
    return fits


def shared_base(group, targets, base, steps=4):
    """Conjugate gradients for the least sum of `tr(G (T - base) C (T - base)^T)`."""
    left, right = (cholesky(sum(f / f.trace() for f in forms)) for forms in ([x.g for x in group], [x.c for x in group]))
    residual = sum(x.g @ (t - base) @ x.c for x, t in zip(group, targets))
    precondition = lambda r: torch.cholesky_solve(torch.cholesky_solve(r, left).T, right).T  # noqa: E731
    z = precondition(residual)
    direction, size = z, (z * residual).sum()
    for _ in range(steps):
        image = sum(x.g @ direction @ x.c for x in group)
        step = size / (direction * image).sum()
        base, residual = base + step * direction, residual - step * image
        z = precondition(residual)
        direction, size = z + (z * residual).sum() / size * direction, (z * residual).sum()
    return base


BIASED, OF_ROLE = ("factors-bias", "pivots-bias"), ("atoms", "tied-2", "tied-all")
STRUCTURES = {
    "pivots": ("pivots", pivots),
    "factors": ("factors `B·A`", factors),
    "pivots-bias": ("pivots of centred inputs, bias (`--center`)", pivots),
    "factors-bias": ("factors of centred inputs, bias (LiteASR)", factors),
    "monarch": ("monarch, 4 × 4 blocks one by one", monarch),
    "monarch-refit": ("monarch, 4 × 4 blocks together", functools.partial(monarch, sweeps=6)),
    "cur": ("columns and rows, CUR (CURing)", cur),
    "blast-2": ("BLAST, 2 × 2 blocks", functools.partial(blast, count=2)),
    "blast-4": ("BLAST, 4 × 4 blocks", functools.partial(blast, count=4)),
    "blast-8": ("BLAST, 8 × 8 blocks", functools.partial(blast, count=8)),
    "blast-pivots": ("BLAST, 4 × 4 blocks, or pivots: whichever errs less", lambda x: min(blast(x, 4), pivots(x), key=x.error)),
    "mpo": ("two-site MPO (CompactifAI)", mpo),
    "mpo-pivots": ("two-site MPO, stored as pivots", functools.partial(mpo, as_pivots=True)),
    "sparse": ("dense × sparse (DSFormer)", dense_and_sparse),
    "atoms": ("atoms of all blocks (MASA)", atoms),
    "tied-2": ("pairs of blocks tied, pivots as residuals", functools.partial(tied, size=2)),
    "tied-all": ("all blocks tied, pivots as residuals", functools.partial(tied, size=len(blocks))),
}


def fitted(key):
    """Values of all matrices by their names in the checkpoint, and errors by block and role."""
    fit, tensors, errors = STRUCTURES[key][1], {}, {}
    for role in options.roles.split(","):
        xs = [matrix(block, role) for block in blocks] if key in OF_ROLE else (matrix(block, role) for block in blocks)
        approximations = fit(xs) if key in OF_ROLE else None
        for at, (block, x) in enumerate(zip(blocks, xs)):
            measured = x.centred() if key in BIASED else x
            w = approximations[at] if key in OF_ROLE else fit(measured)
            errors[f"{block}.{role}"] = measured.error(w)
            tensors[module(block, role) + ".weight"] = w.float().contiguous()
            if key in BIASED:
                tensors[module(block, role) + ".bias"] = ((x.w - w) @ x.mean).float()
    return tensors, errors


def scored(tensors, out):
    """The report of `lrc eval` for a checkpoint with these values."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(options.model, out, ignore=shutil.ignore_patterns("*.safetensors*"), copy_function=shutil.copyfile)
    own = config | ({"attention_bias": True, "mlp_bias": True} if any(name.endswith(".bias") for name in tensors) else {})
    (out / "config.json").write_text(json.dumps(own))
    save_file({name: opened.get_tensor(name) for name, opened in files.items()} | tensors, out / "model.safetensors", {"format": "pt"})
    scope = ["--text", options.text, "--seq-len", str(options.seq_len), "--max-windows", str(options.windows), "--json", "-q"]
    run = subprocess.run([options.lrc, "eval", out, "--reference", options.model, *scope], capture_output=True, check=True, text=True)
    shutil.rmtree(out)
    report = json.loads(run.stdout)
    return {"ppl": report["ppl"], "kl": report["kl"]["mean"]}


def row(key, figures, of_pivots):
    """Ratios by matrix, or by role where blocks share their parameters."""
    errors, units = figures["errors"], {}
    for name in errors:
        units.setdefault(name.split(".")[1] if key in OF_ROLE else name, []).append(name)
    ratios = sorted(sum(errors[name] for name in unit) / sum(of_pivots[name] for name in unit) for unit in units.values())
    whole = sum(errors.values()) / sum(of_pivots[name] for name in errors)
    better = f"{sum(ratio < 0.9999 for ratio in ratios)} of {len(ratios)}{' roles' if key in OF_ROLE else ''}"
    cells = [f"{sum(errors.values()) / 2:.3f}", f"{figures['ppl']:.3f}", f"{figures['kl']:.3f}"] if "ppl" in figures else [""] * 3
    span = f"{whole:.2f} ({ratios[0]:.2f}, {ratios[len(ratios) // 2]:.2f}, {ratios[-1]:.2f})"
    return f"| {STRUCTURES[key][0]} | {cells[0]} | {span} | {better} | {cells[1]} | {cells[2]} |"


options.work.mkdir(parents=True, exist_ok=True)
for key in options.structures or STRUCTURES:
    tensors, errors = fitted(key)
    is_whole = len(tensors) >= len(SITES) * config["num_hidden_layers"]
    scores = scored(tensors, options.work / "checkpoint") if is_whole else {}
    (options.work / f"{key}.json").write_text(json.dumps({"errors": errors} | scores))
found = {key: json.loads((options.work / f"{key}.json").read_text()) for key in STRUCTURES if (options.work / f"{key}.json").exists()}
print("| structure | estimate of the loss | errors over pivots' (least, median, largest) | better | perplexity | KL |")
print("|---|---:|---:|---:|---:|---:|")
for key, figures in found.items():
    print(row(key, figures, found["pivots"]["errors"]))
