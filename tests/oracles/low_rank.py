"""Optimal low-rank errors by another way than the kernel's: Cholesky whitening and numpy's SVD.

    python tests/oracles/low_rank.py > tests/oracles/low_rank.json
"""

import json

import numpy as np

rng = np.random.default_rng(0)
cases = []
for m, n in [(5, 9), (9, 5), (7, 7)]:
    weight = rng.standard_normal((m, n)) @ np.diag(0.7 ** np.arange(n))
    inputs = rng.standard_normal((40, n)) @ rng.standard_normal((n, n))
    weight, inputs = (np.float32(x).astype(np.float64) for x in (weight, inputs))
    gram = inputs.T @ inputs / len(inputs)
    case = {"m": m, "n": n, "weight": weight.ravel().tolist(), "inputs": inputs.ravel().tolist(), "metrics": {}}
    for name, c in [("identity", np.eye(n)), ("gram", gram)]:
        root = np.linalg.cholesky(c)
        u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
        products = [((u[:, :r] * s[:r]) @ vt[:r] @ np.linalg.inv(root)).ravel().tolist() for r in range(1, min(m, n) + 1)]
        case["metrics"][name] = {"singular_values": s.tolist(), "products": products}
    cases.append(case)
print(json.dumps(cases))
