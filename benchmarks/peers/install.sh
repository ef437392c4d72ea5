#!/bin/sh
# Installs the peers that batchrun is compared with, each into an environment of its own.
#   benchmarks/peers/install.sh [vllm] [openvino] [llama]     default: all
# PYTHON chooses the interpreter, PIP_ARGS goes to every pip install.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
peers=$(cd "$here/../.." && pwd)/.peers
python=${PYTHON:-python3}
mkdir -p "$peers"
echo '*' > "$peers/.gitignore"

# Everything is pinned, so nothing is resolved: no dependency brings another build of torch.
environment() {
  [ -e "$peers/$1/.done" ] && return
  "$python" -m venv "$peers/$1"
  # shellcheck disable=SC2086
  "$peers/$1/bin/python" -m pip install --quiet --no-deps ${PIP_ARGS:-} -r "$here/$1.txt"
  touch "$peers/$1/.done"
}

# vLLM's page on CPUs asks for tcmalloc; where the system has none it is laid beside the packages.
tcmalloc() {
  ls /usr/lib/*/libtcmalloc_minimal.so.4 "$peers"/vllm/usr/lib/*/libtcmalloc_minimal.so.4 \
    > /dev/null 2>&1 && return
  work=$(mktemp -d)
  (cd "$work" && apt-get download --quiet libtcmalloc-minimal4 && dpkg -x ./*.deb "$peers/vllm") ||
    echo "warning: no tcmalloc for vLLM: it will be somewhat slower" >&2
  rm -rf "$work"
}

# llama.cpp's source comes with the source package of llama-cpp-python on PyPI, which pins it; the
# server is built from it for this machine's instructions, with cmake and a C++ compiler.
llama() {
  [ -x "$peers/llama/bin/llama-server" ] && return
  work=$peers/llama/work
  mkdir -p "$work" "$peers/llama/bin"
  # shellcheck disable=SC2086
  "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python ${PIP_ARGS:-} -d "$work" \
    -r "$here/llama.txt"
  tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
  rm -rf "$peers/llama/src"
  mv "$work"/llama_cpp_python-*/vendor/llama.cpp "$peers/llama/src"
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-deps ${PIP_ARGS:-} --target "$peers/llama/convert" \
    -r "$here/llama-convert.txt"
  cmake -S "$peers/llama/src" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
  cmake --build "$work/build" --target llama-server -j "$(nproc)"
  cp "$work/build/bin/llama-server" "$peers/llama/bin/"
  rm -rf "$work"
}

[ $# -gt 0 ] || set -- vllm openvino llama
for name; do
  case $name in
    vllm) environment vllm; tcmalloc ;;
    openvino) environment openvino ;;
    llama) llama ;;
    *) echo "error: no peer of the name $name" >&2; exit 1 ;;
  esac
done
