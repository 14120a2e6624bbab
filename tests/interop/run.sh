#!/bin/sh
# Every written format in its real runtime, against lrc's own logits. Not part of CI: it downloads some GB of Python packages.
#
#   tests/interop/run.sh ENVIRONMENT [MODEL...] > docs/interop.md
#
# ENVIRONMENT is a folder for the virtual environment, made when it is absent. gptqmodel and llama-cpp-python are built from
# source; where that fails, their rows say so.
set -eu
environment=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install -q torch transformers accelerate peft compressed-tensors gguf numpy safetensors sentence-transformers 1>&2
    "$environment/bin/pip" install -q llama-cpp-python 1>&2 || echo "llama-cpp-python could not be installed" 1>&2
    "$environment/bin/pip" install -q optimum gptqmodel --no-build-isolation 1>&2 || echo "gptqmodel could not be installed" 1>&2
fi
cargo build -q --release --manifest-path "$root/Cargo.toml" --bin lrc --example logits
exec "$environment/bin/python" "$root/tests/interop/check.py" "$@"
