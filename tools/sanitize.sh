#!/usr/bin/env bash
# Build the native module with AddressSanitizer and UndefinedBehaviorSanitizer and run its tests.
# Usage: tools/sanitize.sh BIN [pytest arguments], BIN being the bin folder of a prepared venv.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "$1")
shift
venv=build/sanitize/venv
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A venv of its own that sees the other's packages, but not its editable install of lamina.
"$bin/python" -m venv --without-pip "$venv"
own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" > "$own/dependencies.pth"
"$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall \
  --config-settings=cmake.define.LAMINA_SANITIZE=ON \
  --config-settings=build-dir=build/sanitize/cmake --target "$own" --upgrade .

libraries=()
for library in libasan.so libubsan.so libstdc++.so; do
  libraries+=("$(gcc -print-file-name=$library)")
done
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/contract tests/numerics/test_attention.py tests/numerics/test_dense.py
    tests/numerics/test_native_attention.py tests/unit/attention tests/unit/kv
    tests/numerics/test_shares.py tests/unit/transport tests/unit/workers/test_channels.py
    tests/unit/workers/test_serving.py)
fi
LD_PRELOAD="${libraries[*]}" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  OMP_NUM_THREADS=1 \
  "$venv/bin/python" -m pytest -q -p no:cacheprovider --capture=sys "${tests[@]}"
