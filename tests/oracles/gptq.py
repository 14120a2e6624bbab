"""Codes and scales of GPTQ, column by column in f64 as the paper states it (Frantar et al. 2022, equations 2 and 3).

Act-order with static groups: columns in the order of falling diagonal, scales fixed before. Writes `gptq.json` beside itself.
"""

import json
from pathlib import Path

import numpy as np


def scales(weight, bits, group):
    """The extreme of every group is the lowest level; rounded to f16."""
    middle = 2 ** (bits - 1)
    rows = []
    for row in weight:
        runs = [row[at : at + group] for at in range(0, len(row), group)]
        extremes = [run[np.argmax(np.abs(run))] for run in runs]
        rows.append([np.float32(np.float16(np.float32(-e / np.float32(middle)))) for e in extremes])
    return np.array(rows, dtype=np.float64)


def gptq(weight, gram, bits, group, damping=0.01):
    rows, cols = weight.shape
    steps = scales(weight, bits, group)
    middle = 2 ** (bits - 1)
    order = sorted(range(cols), key=lambda j: (-gram[j, j], j))
    inverse = np.linalg.inv(gram[np.ix_(order, order)] + damping * np.mean(np.diag(gram)) * np.eye(cols))
    left = weight[:, order].astype(np.float64)
    codes = np.zeros((rows, cols), dtype=int)
    for j, column in enumerate(order):
        step = steps[:, column // group]
        code = np.clip(np.round(left[:, j] / step + middle), 0, 2 * middle - 1)
        codes[:, column] = code
        error = left[:, j] - (code - middle) * step
        # The remaining columns are shifted by the optimum, and the column is removed from the inverse.
        left[:, j + 1 :] -= np.outer(error / inverse[j, j], inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return codes, steps


def main():
    rng = np.random.default_rng(3)
    cases = []
    for rows, cols, bits, group in [(12, 40, 4, 8), (4, 140, 3, 32), (6, 48, 2, 48), (5, 33, 8, 16)]:
        weight = np.round(rng.standard_normal((rows, cols)), 4).astype(np.float32)
        inputs = rng.standard_normal((200, cols)) @ (np.eye(cols) + 0.3 * rng.standard_normal((cols, cols)))
        gram = np.round(inputs.T @ inputs / len(inputs), 3)
        codes, steps = gptq(weight, gram, bits, group)
        cases.append(
            {
                "rows": rows,
                "cols": cols,
                "bits": bits,
                "group": group,
                "weight": [round(float(v), 4) for v in weight.ravel()],
                "gram": gram.ravel().tolist(),
                "scales": [float(v) for v in steps.ravel()],
                "codes": codes.ravel().tolist(),
            }
        )
    Path(__file__).with_name("gptq.json").write_text(json.dumps(cases) + "\n")


main()
