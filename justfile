# The checks of a change. `just` lists the recipes.

_default:
    @just --list

# Formatting, lints, and the build without optional features
check:
    cargo fmt --check
    cargo clippy --release --all-targets -- -D warnings
    cargo check --release --no-default-features
    cargo check --release --no-default-features --features cli

# The code for NVIDIA GPUs, which needs no GPU to compile but nvcc, for example from PyPI (nvidia-cuda-nvcc, nvidia-cuda-runtime,
# nvidia-cuda-cccl, nvidia-cuda-crt, nvidia-nvvm), with CUDA_HOME set to its folder
check-cuda:
    CUDA_COMPUTE_CAP=80 cargo check --release --features cuda

# The library's tests and the suite, or the part of the suite that NAME names: `just test eval::`
test NAME='':
    cargo test --release --lib --tests -- {{NAME}}

# Tests that need something beside the repository: a browser, models, a terminal
test-ignored NAME='':
    cargo test --release --test suite -- --ignored {{NAME}}

# Examples in the documentation; each is linked by itself
doctest:
    cargo test --release --doc

# Benchmarks of the loops that a run waits for: `just bench eigh`
bench NAME='':
    cargo bench --bench kernels -- {{NAME}}

# SECONDS of damaged input for TARGET, or for all of them
fuzz TARGET='all' SECONDS='60':
    cargo run --release --example fuzz -- {{TARGET}} {{SECONDS}}

# The documentation of the crate, as CI builds it
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# Licenses, advisories and sources of all dependencies
deny:
    cargo deny check

# Everything that CI runs
ci:
    .ci/run

# The binary that is published: one codegen unit, link-time optimization over all crates
release:
    cargo build --profile dist --locked

# Crate, wheel, archive and checksums in FOLDER, checked; needs maturin and ziglang from PyPI
package FOLDER:
    packaging/release.sh {{FOLDER}}
