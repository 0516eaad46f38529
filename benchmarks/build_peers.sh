#!/usr/bin/env bash
# llama.cpp's programs and sources, out of the sdist of the pinned llama-cpp-python.
#
#   benchmarks/build_peers.sh            downloads 76 MB, compiles once (about 12 minutes on two cores)
#   benchmarks/build_peers.sh sources    the sources alone, for upstream's converter
#   benchmarks/build_peers.sh --dry-run  says what it would do
#
# Everything lies in out/peers (PEERS_DIR names another folder): bin/ the programs, llama.cpp/ the sources;
# a second run finds them and does nothing. Programs that are built already are taken with
# AUTOGLM_GGUF_LLAMA_TOOLS=FOLDER, sources with AUTOGLM_GGUF_UPSTREAM=FOLDER. The libraries lie beside the
# programs, and the CPU's own instructions are used, as llama-cpp-python's build does.
# Needs python3 with pip, cmake, a C++ compiler. Environment: PYTHON, PEERS_JOBS (all cores).
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml)
folder=${PEERS_DIR:-out/peers}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
jobs=${PEERS_JOBS:-$(getconf _NPROCESSORS_ONLN)}
programs=(llama-bench llama-server llama-quantize llama-imatrix llama-perplexity llama-mtmd-cli)
options=(CMAKE_BUILD_TYPE=Release GGML_CCACHE=OFF LLAMA_OPENSSL=OFF LLAMA_BUILD_TESTS=OFF LLAMA_BUILD_EXAMPLES=OFF
  LLAMA_BUILD_UI=OFF LLAMA_BUILD_TOOLS=ON LLAMA_BUILD_SERVER=ON)
need_kib=$((2 << 20))

what=all dry=
for word in "$@"; do
  case $word in
    sources) what=sources ;;
    --dry-run) dry=1 ;;
    *)
      echo "error: $word: unknown (sources, --dry-run)" >&2
      exit 2
      ;;
  esac
done

fail() {  # what is wrong, what to type next
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}

run() {
  echo "+ $*" >&2
  [ -n "$dry" ] || "$@"
}

stamp=$folder/.version
has_sources() { [ -f "$folder/llama.cpp/convert_hf_to_gguf.py" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$version" ]; }
has_programs() {
  local name
  for name in "${programs[@]}"; do [ -x "$folder/bin/$name" ] || return 1; done
}

[ -n "$version" ] || fail "pyproject.toml: no pinned llama-cpp-python" "git checkout pyproject.toml"
for tool in cmake "$python"; do
  command -v "$tool" >/dev/null || fail "$tool: not found" "Debian/Ubuntu: sudo apt-get install -y cmake g++ python3-venv"
done
mkdir -p "$folder"
free_kib=$(df -Pk "$folder" | awk 'NR == 2 {print $4}')
[ "$free_kib" -ge "$need_kib" ] || fail "$folder: not enough room ($free_kib KiB free, $need_kib required)" \
  "PEERS_DIR=/another/disk benchmarks/build_peers.sh"

if ! has_sources; then
  sdist=llama_cpp_python-$version
  run rm -rf "$folder/llama.cpp" "$folder/bin" "$folder/build" "$stamp"
  run "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$version"
  run tar -xzf "$folder/$sdist.tar.gz" -C "$folder" "$sdist/vendor/llama.cpp"
  run mv "$folder/$sdist/vendor/llama.cpp" "$folder/llama.cpp"
  run rm -rf "${folder:?}/$sdist" "$folder/$sdist.tar.gz"
  [ -n "$dry" ] || echo "$version" >"$stamp"
fi
if [ $what = all ] && ! has_programs; then
  run cmake -S "$folder/llama.cpp" -B "$folder/build" "${options[@]/#/-D}"
  run cmake --build "$folder/build" --parallel "$jobs" --target "${programs[@]}"
  run rm -rf "$folder/bin"
  run mv "$folder/build/bin" "$folder/bin"
  run rm -rf "$folder/build"
fi
echo "sources: $folder/llama.cpp"
[ $what = sources ] || echo "programs: $folder/bin"
