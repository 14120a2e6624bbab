"""Optimal low-rank errors by another way than the kernel's: Cholesky whitening of both sides and numpy's SVD.

    python tests/oracles/low_rank.py > tests/oracles/low_rank.json
"""

import json

import numpy as np

rng = np.random.default_rng(0)


def digits(array):
    """Nine digits: all of an f32."""
    return [float(f"{v:.9g}") for v in array.ravel()]


FORMS = {"identity": lambda gram: np.eye(len(gram)), "diagonal": lambda gram: np.diag(np.diag(gram)), "full": lambda gram: gram}
cases = []
for m, n in [(5, 9), (9, 5), (7, 7)]:
    weight = rng.standard_normal((m, n)) @ np.diag(0.7 ** np.arange(n))
    inputs = rng.standard_normal((40, n)) @ rng.standard_normal((n, n))
    gradients = rng.standard_normal((40, m)) @ rng.standard_normal((m, m))
    weight, inputs, gradients = (np.float32(x).astype(np.float64) for x in (weight, inputs, gradients))
    case = {"m": m, "n": n, "weight": digits(weight), "inputs": digits(inputs)}
    case |= {"gradients": digits(gradients), "metrics": []}
    for output, output_form in FORMS.items():
        for input, input_form in FORMS.items():
            left = np.linalg.cholesky(output_form(gradients.T @ gradients / 40)).T
            right = np.linalg.cholesky(input_form(inputs.T @ inputs / 40))
            u, s, vt = np.linalg.svd(left @ weight @ right, full_matrices=False)
            unwhiten = lambda x: np.linalg.inv(left) @ x @ np.linalg.inv(right)
            products = [digits(unwhiten((u[:, :r] * s[:r]) @ vt[:r])) for r in range(1, min(m, n) + 1)]
            case["metrics"].append({"output": output, "input": input, "singular_values": digits(s), "products": products})
    cases.append(case)
print(json.dumps(cases))
