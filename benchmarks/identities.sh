#!/usr/bin/env bash
# Removing nothing changes nothing, and the formats hold one model: table 3 of docs/results.md.
#   benchmarks/identities.sh MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN
set -euo pipefail
model=$1 calibration=$2 text=$3 seq_len=$4
[ -n "${LRC:-}" ] || cargo build --release --quiet
lrc=${LRC:-target/release/lrc}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
ppl() { "$lrc" eval "$1" --text "$text" --seq-len "$seq_len" --json -q | sed -n 's/^ *"ppl": \([0-9.]*\),$/\1/p'; }
compress() { "$lrc" compress "$model" -o "$work/out" -q --force "$@"; ppl "$work/out"; }
calibrated=(--calibration "$calibration" --samples 64 --seq-len "$seq_len")

echo "dense: $(ppl "$model")"
echo "keep 1.0: $(compress --keep 1.0)"
for layout in factors pivot; do
  echo "full rank, svd, $layout: $(compress --ranks full --layout "$layout")"
  for method in svd-llm kfac; do
    echo "full rank, $method, $layout: $(compress --ranks full --layout "$layout" --method "$method" "${calibrated[@]}")"
  done
  for format in factored dense; do
    echo "kfac 0.8, $layout, $format: $(compress --keep 0.8 --layout "$layout" --format "$format" "${calibrated[@]}")"
  done
done
long=$work/long
"$lrc" compress "$model" -o "$long" -q --keep 0.9 --elastic "${calibrated[@]}"
"$lrc" truncate "$long" -o "$work/short" -q --keep 0.8
echo "0.9 truncated to 0.8, elastic: $(ppl "$work/short")"
"$lrc" compress "$model" -o "$long" -q --force --keep 0.9 "${calibrated[@]}"
"$lrc" truncate "$long" -o "$work/short" -q --force --keep 0.8
echo "0.9 truncated to 0.8, diagonals: $(ppl "$work/short")"
