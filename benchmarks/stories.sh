#!/usr/bin/env bash
# Perplexity of stories260K and of the fixture at several budgets: the tables 1 and 2 of docs/results.md.
#   benchmarks/stories.sh MODEL CALIBRATION_TEXT EVALUATION_TEXT SEQ_LEN
set -euo pipefail
model=$1 calibration=$2 text=$3 seq_len=$4
cargo build --release --quiet
lrc=target/release/lrc
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
ppl() { "$lrc" eval "$1" --text "$text" --seq-len "$seq_len" --json -q | sed -n 's/^ *"ppl": \([0-9.]*\),$/\1/p'; }
compress() { "$lrc" compress "$model" -o "$work/out" -q --force "$@"; ppl "$work/out"; }
calibrated=(--calibration "$calibration" --samples 64 --seq-len "$seq_len")

echo "dense $(ppl "$model")"
echo "| keep | svd uniform | svd welore | svd-llm uniform | svd-llm welore |"
echo "|---|---|---|---|---|"
for keep in 0.9 0.8 0.6; do
  printf '| %s ' "$keep"
  for ranks in uniform welore; do printf '| %.4f ' "$(compress --keep "$keep" --ranks "$ranks")"; done
  for ranks in uniform welore; do printf '| %.4f ' "$(compress --keep "$keep" --ranks "$ranks" "${calibrated[@]}")"; done
  echo "|"
done
echo "keep 1.0: $(compress --keep 1.0)"
echo "full rank, svd: $(compress --ranks full)"
echo "full rank, svd-llm: $(compress --ranks full "${calibrated[@]}")"
for format in factored dense; do echo "svd-llm uniform 0.8 $format: $(compress --keep 0.8 --format "$format" "${calibrated[@]}")"; done
