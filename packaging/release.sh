#!/usr/bin/env bash
# Makes everything that a release consists of in FOLDER, and checks it as a newcomer would use it.
#
#   packaging/release.sh FOLDER [PROFILE]
#
# Needs `maturin` and `ziglang` from PyPI on the path of Python: zig links against an old glibc, so that the binary runs on systems of 2014 and
# later. PROFILE is `dist` (link-time optimization over all crates) unless given.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) profile=${2:-dist}
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
target=$(rustc -vV | sed -n 's/^host: //p')
name=lrc-$version-$target
step() { printf '\n== %s\n' "$*"; }

step the crate
cargo package --locked --no-verify --target-dir "$out/crate"
cp "$out/crate/package/lrc-$version.crate" "$out"

step the wheel
python3 -m maturin build --profile "$profile" --zig --compatibility manylinux2014 --out "$out"
wheel=$(ls -t "$out"/lrc-*.whl | head -1)

step "the archive $name.tar.gz"
rm -rf "$out/venv" "${out:?}/$name"
python3 -m venv "$out/venv"
"$out/venv/bin/pip" install --quiet --no-index "$wheel"
mkdir -p "$out/$name/completions"
cp "$out/venv/bin/lrc" README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$out/$name"
for shell in bash zsh fish powershell elvish; do "$out/$name/lrc" completions "$shell" > "$out/$name/completions/lrc.$shell"; done
"$out/$name/lrc" man --output "$out/$name/man"
# The same files give the same archive.
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --directory "$out" "$name" | gzip -n9 > "$out/$name.tar.gz"

step checks
"$out/venv/bin/lrc" --version
[ "$("$out/venv/bin/python" -m lrc --version)" = "$("$out/$name/lrc" --version)" ]
newest=$(grep -aoE 'GLIBC_[0-9.]+' "$out/$name/lrc" | sort -uV | tail -1)
echo "newest symbols of glibc: $newest"
[ "$(printf '%s\n' "$newest" GLIBC_2.17 | sort -V | tail -1)" = GLIBC_2.17 ]
model=$out/checked
rm -rf "$model"
"$out/venv/bin/lrc" compress fixtures/tiny-llama -o "$model" --keep 0.6 -q
"$out/venv/bin/lrc" eval "$model" --reference fixtures/tiny-llama --text fixtures/text/held-out.txt --seq-len 128 --max-windows 8 -q
# An exit code passes through Python.
code=0; "$out/venv/bin/python" -m lrc eval "$out/none" --text README.md -q 2> /dev/null || code=$?
[ "$code" = 4 ] || { echo "exit code $code instead of 4"; exit 1; }

step checksums
cd "$out" && sha256sum -- *.whl *.crate *.tar.gz | tee SHA256SUMS
