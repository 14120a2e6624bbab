"""Files of PyTorch, as `torch.save` writes them, with the values of their tensors.

Writes `pytorch.bin` with views, shared storages and every dtype, `pytorch-legacy.bin` in the form before version 1.6, and `pytorch.json`
with dtype, shape and values by name.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent
base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 4
stack = torch.arange(24).reshape(2, 3, 4).to(torch.bfloat16)
model = OrderedDict(
    {
        "embed.weight": base,
        "head.weight": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "column": base[:, 3],
        "swapped.experts": stack.transpose(1, 2),
        "half": torch.tensor([[0.5, -1.0], [65504.0, 2.0**-24]], dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.tensor([1.0, 2.0])),
        "ids": torch.arange(6).reshape(2, 3).T,
        "int32": torch.tensor([1, -2], dtype=torch.int32),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "wide": torch.tensor([1.0], dtype=torch.float64),
        "fp8": torch.tensor([1.0, -448.0], dtype=torch.float8_e4m3fn),
    }
)
model._metadata = OrderedDict({"": {"version": 1}})
torch.save(model, HERE / "pytorch.bin")
small = {"a": torch.ones(2)}
torch.save(small, HERE / "pytorch-legacy.bin", _use_new_zipfile_serialization=False)
described = {
    name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "values": tensor.double().reshape(-1).tolist()}
    for name, tensor in model.items()
}
(HERE / "pytorch.json").write_text(json.dumps(described, indent=1) + "\n")
