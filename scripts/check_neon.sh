#!/usr/bin/env bash
# Cross-compile the kernels and their stand-alone check for 64-bit Arm (NEON) and run it in an emulator.
#
#   scripts/check_neon.sh [count]     count (default 1000) random inputs
#
# Needs clang for aarch64 and an emulator. ZIG (default: "python -m ziglang", from `pip install ziglang`) brings the
# compiler and its C library; QEMU (default: qemu-aarch64-static, from Debian's qemu-user-static) runs the program.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra zig <<< "${ZIG:-python -m ziglang}"
qemu=${QEMU:-qemu-aarch64-static}
count=${1:-1000}
command -v "$qemu" > /dev/null || { echo "check_neon: there is no $qemu: install qemu-user-static or set QEMU" >&2; exit 1; }
"${zig[@]}" version > /dev/null || { echo "check_neon: '${zig[*]}' does not run: pip install ziglang or set ZIG" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${zig[@]}" c++ -target aarch64-linux-musl -std=c++20 -O2 -Wall -Wextra -Werror -fno-trapping-math -fno-math-errno \
  -Icsrc csrc/check/check_kernels.cc csrc/cpu/kernels_*.cpp -o "$work/check_kernels"
"$qemu" "$work/check_kernels" 0 "$count"
