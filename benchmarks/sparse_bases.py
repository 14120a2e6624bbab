"""Sparse and partly binary bases beside plain codes at the same bytes, linear by linear: docs/results.md, section 26.

    python benchmarks/sparse_bases.py MODEL STATISTICS BLOCKS LINEARS RESULTS
    python benchmarks/sparse_bases.py MODEL STATISTICS write FORMAT OUT [LINEARS]

MODEL is a model of the llama family in Hugging Face form, STATISTICS a file of `lrc calibrate MODEL --method kfac`; BLOCKS (`3,20`) and LINEARS
(`v,q,o,down`) are lists with commas; matrices that are in RESULTS (JSON) already are not measured again. `write` makes a model OUT in which these
linears of all blocks have the values of one format, for `lrc eval`. Errors are `tr(G E C E^T) / tr(G W C W^T)`, with 1 % of its mean diagonal added
to each form, as lrc does for codes. Every base goes through the same loop, and only its projection differs: scales by a search over clipped ranges,
GPTQ in the order of falling `C_jj`, then sweeps of coordinate descent in both forms (`cd` of lrc) with refits of all scales between them.

Bits per weight of a matrix of m rows and n columns; scales and values have 16 bits, `row` is a scale for all columns of a row:
- `int2` to `int8`: codes, and a scale a group. `binary`: signs, and a scale a group. `ternary`: 1.6 (five in a byte), and a scale a group.
- `+ p %`: the share p of entries with the largest `G_ii e_ij^2 / (C^-1)_jj`, each a value and a column of 16 bits, and 16 bits a row for their
  number.
- `2:4`: the bits of two values in every four, and one bit a weight for the places. Codes also have a scale a group. Places are SparseGPT's.
- `pb-llm s %`: the share s with the largest `G_ii w_ij^2 / (C^-1)_jj` in 8 bits with a scale a row, all others binary in groups of 128; places as
  those of `+ p %`, or one bit a weight where that is less.
- `ptq1.61`: the 20 % of channels (columns) with the largest `C_jj w_j^T G w_j` in 4 bits, the others binary; a scale of each a row, and n bits.
- `int2-g64, 10 % int4`: the same with other codes: 10 % of channels in 4 bits with a scale a row, the others in 2 bits in groups of 64.
- `pivots`: no codes; 16 bits for each of `r (m + n - r)` numbers, with r as many as 9 bits a weight allow.
- `, rank r`: with r columns and rows in int8 in groups of 32 (8.5 bits), the best for `W - Q` in both forms (EoRA's form).
Errors of plain codes at bits between two of them are log-linear in the bits. The table has medians (least to largest) over matrices: relative errors,
those of plain codes at the same bits, and their quotients, matrix by matrix: a format `wins` or `loses` if it does in all of them. The last two
columns are the quotients if the places of entries took no more than their entropy, and those over plain codes between the codes of the format and
the same with one bit more, all in groups of the same size.

Needs numpy, torch, safetensors and a C compiler (`cc`), because coordinate descent takes a step a weight.
"""

import ctypes
import functools
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

folder, statistics = pathlib.Path(sys.argv[1]), safe_open(sys.argv[2], "np")
names = {name: file for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
DAMPING, SWEEPS, GAIN, PANEL, RANKS, FREE = 0.01, 5, 0.01, 32, (16, 32), 255

# Columns of the matrices are contiguous here (they are rows of the transposed ones). A part of a format has three numbers: the first level, the
# distance of levels, the last code; a value is a scale times a level. Part 255 is any f16.
SOURCE = r"""
static float f16(float x) { return (float)(_Float16)(x > 65504 ? 65504 : x < -65504 ? -65504 : x); }
static float nearest(float x, float s, unsigned char k, const float *t) {
    if (k == 255) return f16(x);
    const float *l = t + 3 * k;
    if (s == 0 || l[2] == 0) return s * l[0];
    float c = __builtin_rintf((x / s - l[0]) / l[1]);
    return s * (l[0] + l[1] * (c < 0 ? 0 : c > l[2] ? l[2] : c));
}
void feed(int n, int m, int ld, float *w, const float *u, const float *s, const unsigned char *k, const float *t, float *e) {
    for (int j = 0; j < n; j++) {
        for (int i = j * m; i < j * m + m; i++) {
            float q = nearest(w[i], s[i], k[i], t);
            e[i] = (w[i] - q) / u[j * ld + j];
            w[i] = q;
        }
        for (int l = j + 1; l < n; l++) for (int i = 0; i < m; i++) w[l * m + i] -= u[j * ld + l] * e[j * m + i];
    }
}
void sweep(int n, int m, int ld, float *v, float *p, const float *g, const float *c, const float *s, const unsigned char *k, const float *t,
           float *d) {
    for (int j = 0; j < n; j++) {
        float size = c[j * ld + j], *moved = d + j * m;
        for (int i = 0; i < m; i++) moved[i] = 0;
        for (int i = 0; i < m; i++) {
            int at = j * m + i;
            float wish = v[at] + (p[at] / size - moved[i]) / g[i * m + i], q = nearest(wish, s[at], k[at], t), step = q - v[at];
            if (__builtin_fabsf(q - wish) >= __builtin_fabsf(v[at] - wish)) continue;
            v[at] = q;
            for (int r = 0; r < m; r++) moved[r] += step * g[i * m + r];
        }
        for (int l = j + 1; l < n; l++) for (int i = 0; i < m; i++) p[l * m + i] -= c[j * ld + l] * moved[i];
    }
}
void steps(int m, const float *h, float *along, float *s, float *d) {
    for (int i = 0; i < m; i++) {
        float q = h[i * m + i] > 0 ? f16(s[i] + along[i] / h[i * m + i]) : s[i];
        d[i] = q == 0 ? 0 : q - s[i];
        s[i] += d[i];
        for (int r = i + 1; d[i] && r < m; r++) along[r] -= d[i] * h[i * m + r];
    }
}
"""
with tempfile.TemporaryDirectory() as work:
    source, library = pathlib.Path(work, "loop.c"), f"{work}/loop.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", source, "-o", library], check=True)
    loop = ctypes.CDLL(library)


def call(function, *arguments):
    function(*(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments))


def form(name, n):
    lower = torch.zeros(n, n, dtype=torch.float64)
    lower[tuple(torch.tril_indices(n, n))] = torch.tensor(statistics.get_tensor(name)).double()
    whole = (lower + lower.T - lower.diag().diag()) / lower.diag().mean()
    dead = (whole.diag() == 0).double()
    return whole + (dead + (1 - dead) * DAMPING).diag()


class Linear:
    """A matrix with its forms; all of it transposed: (inputs, outputs)."""

    def __init__(self, block, name):
        module = ("mlp." if name in ("gate", "up", "down") else "self_attn.") + f"{name}_proj"
        self.name = f"model.layers.{block}.{module}.weight"
        self.w = safe_open(names[self.name], "pt").get_tensor(self.name).float().T.contiguous()
        self.n, self.m = self.w.shape
        group = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(name, name)
        g, c = form(f"{block}.{name}_proj.output_gram", self.m), form(f"{block}.{group}.input_gram", self.n)
        self.g, self.c, self.roots = g.float(), c.float(), (torch.linalg.cholesky(c), torch.linalg.cholesky(g))
        self.inverse = torch.cholesky_inverse(self.roots[0]).diag().float()  # (C^-1)_jj
        self.order = torch.argsort(c.diag(), descending=True, stable=True)
        self.fours = torch.argsort(c.diag().view(-1, 4).sum(1), descending=True, stable=True).repeat_interleave(4) * 4
        self.fours += torch.arange(4).repeat(self.n // 4)
        self.upper = self.inverse_root(self.order)
        self.whole = self.squared(self.w)

    def inverse_root(self, order):
        """`U` of `C^-1 = U^T U` in this order of channels."""
        ordered = self.roots[0][order]
        return torch.linalg.cholesky(torch.linalg.inv(ordered @ ordered.T), upper=True).float()

    def squared(self, e):
        return (self.roots[0].T @ e.double() @ self.roots[1]).square().sum().item()

    @functools.cached_property
    def pruned(self):
        """Where SparseGPT keeps no weight: two in every four columns."""
        order, u = self.fours, self.inverse_root(self.fours)
        w, gone = self.w[order].contiguous(), torch.zeros_like(self.w, dtype=torch.bool)
        for j in range(0, self.n, 4):
            costs = (w[j : j + 4] / u.diag()[j : j + 4, None]).square()
            drop = torch.zeros_like(costs, dtype=torch.bool).scatter_(0, costs.topk(2, 0, largest=False).indices, True)
            gone[order[j : j + 4]] = drop
            errors = torch.zeros_like(costs)
            for k in range(4):
                errors[k] = torch.where(drop[k], w[j + k] / u[j + k, j + k], 0.0)
                w[j + k + 1 : j + 4] -= u[j + k, j + k + 1 : j + 4, None] * errors[k]
            w[j + 4 :] -= u[j : j + 4, j + 4 :].T @ errors
        return gone

    def spectrum(self, e):
        """What is left of the squared error of `e` at every rank, and the leading directions of its inputs."""
        left, right = self.roots
        image = left.T @ e.double() @ right
        values, vectors = torch.linalg.eigh(image @ image.T if self.n <= self.m else image.T @ image)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, : RANKS[-1]]
        first = vectors if self.n <= self.m else image @ vectors / values[: RANKS[-1]].clamp(min=1e-30).sqrt()
        return values.sum() - torch.cat([torch.zeros(1), values.cumsum(0)]), (first, first.T @ image)

    def factors(self, e):
        """The squared errors that int8 factors leave."""
        _, (first, second) = self.spectrum(e)
        size = second.norm(dim=1, keepdim=True).sqrt()
        a = torch.linalg.solve_triangular(self.roots[0].T, first * size.T, upper=True)  # (inputs, ranks)
        b = torch.linalg.solve_triangular(self.roots[1], second / size, upper=False, left=False)  # (ranks, outputs)
        a, b = int8(a.T.float()).T, int8(b.float())
        return [self.squared(e - a[:, :r] @ b[:r]) for r in RANKS]


def int8(rows):
    groups = rows.reshape(len(rows), -1, 32)
    scale = (groups.abs().amax(2, keepdim=True) / 127).half().float().clamp(min=1e-7)
    return ((groups / scale).round() * scale).reshape(rows.shape)


class Part:
    """Entries (`mask`; None: all) that are a level times a scale, one for each row's group of columns."""

    def __init__(self, levels, group, mask=None):
        self.levels, self.group, self.mask = levels, group, mask


OUTLIERS = [(bits, 64, share) for bits in (4, 3, 2) for share in (0.0025, 0.005, 0.01, 0.02)] + [(3, 128, 0.01), (2, 128, 0.01)]
COMPENSATED = ("int4-g64", "int3-g64", "int2-g64", "int3-g64 + 0.5 %", "2:4 f16", "2:4 int4-g64", "pb-llm 10 %", "ptq1.61")
INT = {bits: (-(2.0 ** (bits - 1)), 1.0, 2.0**bits - 1) for bits in (2, 3, 4, 5, 6, 8)}
BINARY, TERNARY, ZERO = (-1.0, 2.0, 1.0), (-1.0, 1.0, 2.0), (0.0, 1.0, 0.0)


class Base:
    """One base of a linear: parts, and places that are any f16 (`free`) or zero (`zero`)."""

    def __init__(self, linear, parts, free=None, zero=None):
        self.at, self.parts = linear, parts
        self.kinds = torch.zeros_like(linear.w, dtype=torch.uint8)
        for k, part in enumerate(parts):
            if part.mask is not None:
                self.kinds[part.mask] = k
        if free is not None:
            self.kinds[free] = FREE
        if zero is not None:
            self.kinds[zero] = len(parts)
        self.table = torch.tensor([part.levels for part in parts] + [ZERO])
        self.scales = [self.clip(k) for k in range(len(parts))]
        self.spread()

    def groups(self, k, values):
        """Those of a part, (groups, group, outputs), zeros elsewhere."""
        n, group = self.at.n, min(self.parts[k].group, self.at.n)
        values = torch.where(self.kinds == k, values, torch.zeros(()))
        return torch.nn.functional.pad(values, (0, 0, 0, -n % group)).view(-1, group, self.at.m)

    def clip(self, k):
        """The scale of the least squared error, weighted with `C_jj`, of a few clipped ranges."""
        first, step, top = self.parts[k].levels
        w = self.groups(k, self.at.w)
        weight = self.groups(k, self.at.c.diag()[:, None].expand_as(self.at.w))
        extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
        least, best = {1: 0.1, 2: 0.2, 3: 0.3, 7: 0.45, 15: 0.65}.get(int(top), 0.9), None
        for share in np.linspace(least, 1.0, 10):
            for sign in (1.0, -1.0) if top > 2 else (1.0,):
                scale = (extreme * sign * share / first).half().float()
                levels = first + step * ((w / scale.where(scale != 0, 1.0) - first) / step).round().clamp(0, top)
                error = (weight * (w - scale * levels).square()).sum(1)
                if best is None:
                    best = [error, scale[:, 0].clone()]
                else:
                    better = error < best[0]
                    best = [torch.where(better, error, best[0]), torch.where(better, scale[:, 0], best[1])]
        return best[1].contiguous()  # (groups, outputs)

    def spread(self):
        self.s = torch.zeros_like(self.at.w)
        for k, part in enumerate(self.parts):
            all_rows = self.scales[k].repeat_interleave(min(part.group, self.at.n), 0)[: self.at.n]
            self.s = torch.where(self.kinds == k, all_rows, self.s)

    def rounded(self):
        v, e = self.at.w.clone(), torch.empty_like(self.at.w)
        for j in range(self.at.n):  # one column at a time, so that nothing is moved
            call(loop.feed, 1, self.at.m, 1, v[j], torch.ones(1), self.s[j], self.kinds[j], self.table, e)
        return v

    def fed(self):
        at, order = self.at, self.at.order
        w, s, kinds, u = at.w[order].contiguous(), self.s[order].contiguous(), self.kinds[order].contiguous(), at.upper
        for j in range(0, at.n, PANEL):
            k = min(PANEL, at.n - j)
            e = torch.empty(k, at.m)
            call(loop.feed, k, at.m, at.n, w[j:], u[j:, j:], s[j:], kinds[j:], self.table, e)
            w[j + k :] -= u[j : j + k, j + k :].T @ e
        v = torch.empty_like(w)
        v[order] = w
        return v

    def descended(self, v):
        """Sweeps and refits until they gain little."""
        at, last, v = self.at, math.inf, v.clone()
        for sweep in range(SWEEPS + 1):
            e = at.w - v
            p = at.c @ e @ at.g
            error = (e * p).sum().item()
            if error > (1 - GAIN) * last or sweep == SWEEPS:
                return v
            last = error
            for j in range(0, at.n, PANEL):
                k = min(PANEL, at.n - j)
                d = torch.empty(k, at.m)
                call(loop.sweep, k, at.m, at.n, v[j:], p[j:], at.g, at.c[j:, j:], self.s[j:], self.kinds[j:], self.table, d)
                p[j + k :] -= at.c[j + k :, j : j + k] @ d
            if self.parts:
                self.refit(v)
        return v

    def refit(self, v):
        """The best scale of every group while all others stay, part by part."""
        at = self.at
        for k, part in enumerate(self.parts):
            p = at.c @ (at.w - v) @ at.g
            x = torch.where((self.kinds == k) & (self.s != 0), v / self.s.where(self.s != 0, 1.0), torch.zeros(())).round()
            for group, j in enumerate(range(0, at.n, part.group)):
                run = slice(j, min(j + part.group, at.n))
                h = at.g * (x[run].T @ at.c[run, run] @ x[run])
                along, d, s = (p[run] * x[run]).sum(0).contiguous(), torch.empty(at.m), self.scales[k][group]
                call(loop.steps, at.m, h, along, s, d)
                change = x[run] * d
                v[run] += change
                p[run.stop :] -= at.c[run.stop :, run] @ (change @ at.g)
        self.spread()


def largest(score, share):
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().topk(round(share * score.numel())).indices] = True
    return mask.view(score.shape)


def entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def outliers(linear, bits, group, share):
    """The places twice, the second time with the scales of what the first have left."""
    everywhere, free = Base(linear, [Part(INT[bits], group)]), None
    weight = linear.g.diag() / linear.inverse[:, None]
    for _ in range(2):
        base = Base(linear, [Part(INT[bits], group)], free)
        everywhere.scales = base.scales
        everywhere.spread()
        free = largest(weight * (linear.w - everywhere.rounded()).square(), share)
    return Base(linear, [Part(INT[bits], group)], free)


def formats(linear):
    """Bits per weight, the same if places took their entropy, and how the base is made, by name."""
    n, m, made = linear.n, linear.m, {}

    def add(name, bits, make, places=0.0, least=0.0):
        made[name] = (bits + places, bits + least, make)

    def add_groups(name, bits, levels, groups):
        for group in groups:
            make = functools.partial(Base, linear, [Part(levels, group or n)])
            add(f"{name}-g{group}" if group else f"{name}-row", bits + 16 / (group or n), make)

    def add_channels(name, bits, levels, group, share, more):
        energy = linear.c.diag() * ((linear.w @ linear.g) * linear.w).sum(1)
        mask = largest(energy, share)[:, None].expand_as(linear.w)
        make = functools.partial(Base, linear, [Part(levels, group), Part(INT[more], n, mask)])
        add(name, (1 - share) * bits + share * more + 16 / group + 16 / n, make, 1 / m, 1 / m)

    add_groups("binary", 1, BINARY, (None, 128))
    add_groups("ternary", 1.6, TERNARY, (None, 128))
    for bits in (2, 3, 4):
        add_groups(f"int{bits}", bits, INT[bits], (None, 128, 64, 32))
    for bits in (5, 6, 8):
        add_groups(f"int{bits}", bits, INT[bits], (64,))
    for bits, group, share in OUTLIERS:
        make = functools.partial(outliers, linear, bits, group, share)
        add(f"int{bits}-g{group} + {100 * share:g} %", bits + 16 / group + 16 * share, make, 16 * share + 16 / n, entropy(share))
    add("2:4 f16", 8, lambda: Base(linear, [], ~linear.pruned, linear.pruned), 1, math.log2(6) / 4)
    for bits in (8, 4):
        make = functools.partial(Base, linear, [Part(INT[bits], 64)], None, linear.pruned)
        add(f"2:4 int{bits}-g64", bits / 2 + 16 / 64, make, 1, math.log2(6) / 4)
    for share in (0.05, 0.1, 0.2):
        salient = largest(linear.g.diag() / linear.inverse[:, None] * linear.w.square(), share)
        make = functools.partial(Base, linear, [Part(BINARY, 128), Part(INT[8], n, salient)])
        add(f"pb-llm {100 * share:g} %", 1 - share + 8 * share + 16 / 128 + 16 / n, make, min(1, 16 * share + 16 / n), entropy(share))
    add_channels("ptq1.61", 1, BINARY, n, 0.2, 4)
    add_channels("ptq1.61-g128", 1, BINARY, 128, 0.2, 4)
    add_channels("int2-g64, 10 % int4", 2, INT[2], 64, 0.1, 4)
    add_channels("int2-g64, 20 % int4", 2, INT[2], 64, 0.2, 4)
    add_channels("int3-g64, 10 % int5", 3, INT[3], 64, 0.1, 5)
    return made


def measure(linear):
    """Bits per weight, the same if places took their entropy, and relative error, by format."""
    n, m, rows = linear.n, linear.m, {}
    for name, (bits, least, make) in formats(linear).items():
        start, base = time.process_time(), make()
        if name in ("int2-g64", "int3-g64", "int4-g64"):
            rows[f"rtn {name}"] = (bits, bits, linear.squared(linear.w - base.rounded()) / linear.whole)
        fed = base.fed()
        if name in ("int2-g64", "int3-g64", "int4-g64"):
            rows[f"gptq {name}"] = (bits, bits, linear.squared(linear.w - fed) / linear.whole)
        e = linear.w - base.descended(fed)
        rows[name] = (bits, least, linear.squared(e) / linear.whole)
        for rank, error in zip(RANKS, linear.factors(e) if name in COMPENSATED else []):
            more = 8.5 * rank * (m + n) / (m * n)
            rows[f"{name}, rank {rank}"] = (bits + more, least + more, error / linear.whole)
        print(f"  {name}: {bits:.3f} {rows[name][2]:.3e}, {time.process_time() - start:.1f} s", file=sys.stderr, flush=True)
    spectrum, _ = linear.spectrum(linear.w)
    rank = next(r for r in range(len(spectrum) - 1, -1, -1) if r * (m + n - r) * 16 <= 9 * m * n)
    bits = rank * (m + n - rank) * 16 / (m * n)
    rows["pivots"] = (bits, bits, spectrum[rank].item() / linear.whole)
    return {"weights": m * n, "rows": rows}


def plain(rows, bits):
    """The error of plain codes at these bits; beyond the last, that of the last."""
    points = sorted(row[::2] for name, row in rows.items() if is_plain(name))
    best = [(b, e) for at, (b, e) in enumerate(points) if all(e < other for _, other in points[:at])]
    return math.exp(np.interp(bits, [b for b, _ in best], [math.log(e) for _, e in best]))


def one_bit_more(rows, name, bits):
    """The error of plain codes between those under a format and those with one bit more in the same groups, if it is between them."""
    codes = name.split()[0].strip(",")
    more = f"int{int(codes[3]) + 1}{codes[4:]}" if codes.startswith("int") else ""
    if more not in rows or not rows[codes][0] < bits < rows[more][0]:
        return math.nan
    return math.exp(np.interp(bits, [rows[codes][0], rows[more][0]], [math.log(rows[codes][2]), math.log(rows[more][2])]))


def is_plain(name):
    return name.startswith(("int", "binary", "ternary")) and " " not in name


def compare(blocks, linears, results):
    results = pathlib.Path(results)
    found = json.loads(results.read_text()) if results.exists() else {}
    keys = [(block, name) for block in blocks.split(",") for name in linears.split(",")]
    for block, name in keys:
        if f"{block}.{name}" not in found:
            print(f"{block}.{name}", file=sys.stderr)
            found[f"{block}.{name}"] = measure(Linear(block, name))
            results.write_text(json.dumps(found))
    measured = [found[f"{block}.{name}"] for block, name in keys]
    total = sum(one["weights"] for one in measured)
    print("| format | bits per weight | error, 10^-3 | plain codes | over plain codes | at equal bytes | places at entropy | same groups |")
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    for name in measured[0]["rows"]:
        own = [(one["rows"], *one["rows"][name]) for one in measured]
        cells = [f"{sum(one['weights'] * bits for one, (_, bits, *_) in zip(measured, own)) / total:.3f}"]
        cells += [median([1e3 * error for *_, error in own])]
        if not is_plain(name):
            ratios = [error / plain(rows, bits) for rows, bits, _, error in own]
            verdict = "wins" if max(ratios) < 1 else "loses" if min(ratios) > 1 else "both"
            cells += [f"{1e3 * np.median([plain(rows, bits) for rows, bits, *_ in own]):.3g}", median(ratios), verdict]
            cells += [median([error / plain(rows, least) for rows, _, least, error in own])]
            cells += [median([error / one_bit_more(rows, name, bits) for rows, bits, _, error in own])]
        print(f"| {name} | " + " | ".join(cells + [""] * (7 - len(cells))) + " |")


def median(values):
    if any(map(math.isnan, values)):
        return ""
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def write(name, out, linears="q,k,v,o,gate,up,down"):
    out, config = pathlib.Path(out), json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    bits = weights = 0
    for block in range(config["num_hidden_layers"]):
        for slot in linears.split(","):
            linear = Linear(block, slot)
            own, _, make = formats(linear)[name]
            base = make()
            tensors[linear.name] = base.descended(base.fed()).T.contiguous()
            bits, weights = bits + own * linear.w.numel(), weights + linear.w.numel()
        print(f"{block} {bits / weights:.3f} {time.process_time():.0f} s", file=sys.stderr, flush=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    print(f"{bits / weights:.3f} bits per weight")


torch.set_num_threads(1)
(write if sys.argv[3] == "write" else compare)(*sys.argv[4 if sys.argv[3] == "write" else 3 :])
