"""Power-law fits of fixed spectra by the powerlaw package and by WeightWatcher, and figures by numpy.

    python tests/oracles/spectra.py > tests/oracles/spectra.json

The spectra are closed forms (see `spectrum` below), so that the test makes the same numbers. Needs numpy, powerlaw, weightwatcher.
"""

import contextlib
import io
import json
import sys
import warnings

import numpy as np

warnings.filterwarnings("ignore")
with contextlib.redirect_stdout(io.StringIO()):
    import powerlaw
    from weightwatcher.WW_powerlaw import pl_fit


def spectrum(kind, n):
    """Eigenvalues, ascending, as `inspect::tests` makes them."""
    i = np.arange(1, n + 1)
    # Golden-ratio points in (0, 1): spread like a uniform sample, and the same in every language.
    u = np.modf(i * 0.6180339887498949)[0]
    if kind == "pareto":  # a power law of alpha 2.5 from 1 on
        return np.sort((1 - u) ** (-1 / 1.5))
    if kind == "bulk and tail":  # half uniform below 2, half a power law of alpha 4 above it
        return np.sort(np.where(i % 2 == 0, 0.1 + 1.9 * u, 2 * (1 - u) ** (-1 / 3)))
    if kind == "exponential":
        return np.sort(-np.log1p(-u))
    raise ValueError(kind)


def hill(values):
    """1 + k / sum(log(x_i / x_k)) over the larger half, as AlphaPruning has it."""
    values = np.sort(values)
    k = len(values) // 2
    return float(1 + k / np.log(values[-k:] / values[-k - 1]).sum())


values = {}
for kind in ["pareto", "bulk and tail", "exponential"]:
    for n in [50, 300]:
        data = spectrum(kind, n)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fit = powerlaw.Fit(data, xmax=None, verbose=False)
            ww = pl_fit(data=data, xmax=None, verbose=False, distribution="power_law", pl_package="ww")
        theirs = {
            "powerlaw": [float(fit.alpha), float(fit.xmin), float(fit.D)],
            "weightwatcher": [float(ww.alpha), float(ww.xmin), float(ww.D)],
        }
        p = data / data.sum()
        values[f"{kind} {n}"] = {
            "kind": kind,
            "n": n,
            **theirs,
            "spikes": int((data > ww.xmin).sum()),
            "hill": hill(data),
            "entropy": float(-(p * np.log(p)).sum()),
            "sum": float(data.sum()),
        }
json.dump(values, sys.stdout, indent=1)
print()
