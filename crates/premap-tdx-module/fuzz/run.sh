#!/bin/sh
# Fuzzes sequences of SEAMCALLs for so many seconds (600 by default) with libFuzzer and a stable toolchain.
# Needs a C++ compiler for libFuzzer. Findings are left in fuzz/artifacts.
set -eu
cd "$(dirname "$0")"
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
coverage="$coverage -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
coverage="$coverage -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
target=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p corpus/seamcalls artifacts
# With a target named, the flags are for the program alone and not for build scripts.
RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 $coverage" cargo build --release --target "$target"
exec "${CARGO_TARGET_DIR:-target}/$target/release/seamcalls" corpus/seamcalls \
    -max_total_time="${1:-600}" -max_len=2048 -timeout=20 -rss_limit_mb=1024 -artifact_prefix=artifacts/
