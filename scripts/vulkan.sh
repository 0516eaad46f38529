#!/usr/bin/env bash
# llama.cpp with its Vulkan backend, and the tests that need a GPU, from nothing.
#
#   scripts/vulkan.sh test [PYTEST OPTIONS]   what `make test-gpu` runs
#   scripts/vulkan.sh wheel [--for-gpu]       build the wheel unless it is in the cache; prints its path.
#                                             --for-gpu: with shaders for matrix units as well
#   scripts/vulkan.sh cached                  succeeds if the wheel for the tests is in the cache
#
# Missing packages are installed with apt-get (Debian, Ubuntu). On a machine without a GPU the tests run
# on lavapipe, Mesa's Vulkan driver for the CPU: slow, but every buffer, copy and shader is real.
# Run on Debian 12, x86-64.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian 12 has 1.3.239, which llama.cpp does not compile with; 1.4.309 it does. Between them lies
# Ubuntu 24.04's, the oldest that llama.cpp's own instructions count on; it was not tried.
headers_required=1.3.275
version=$(sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml)
cache=${AUTOGLM_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/autoglm-gguf}
variant=vulkan
debian13=$cache/debian13  # packages of the next release, unpacked, not installed
venv=.venv-gpu
python=$venv/bin/python

fail() {  # what is wrong, what to type next
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}

apt_install() {
  local command="apt-get install -y $*" sudo=()
  command -v apt-get >/dev/null ||
    fail "missing: $* (Debian's names)" "install them with this system's package manager, then: make test-gpu"
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "missing: $*" "as root: $command"
    sudo=(sudo)
  fi
  echo "installing $*" >&2
  { "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq -o DPkg::Lock::Timeout=600 "$@"; } >&2 ||
    fail "apt-get: could not install $*" "${sudo[*]} apt-get update && ${sudo[*]} $command"
}

need() {  # what the tests need, or with --build what the compilation needs too
  local missing=()
  python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3 python3-venv)
  compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null ||
    [ -n "${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}" ] || missing+=(mesa-vulkan-drivers)
  python3 -c 'import ctypes; ctypes.CDLL("libvulkan.so.1")' 2>/dev/null || missing+=(libvulkan1)
  if [ "${1:-}" = --build ]; then
    command -v cmake >/dev/null || missing+=(cmake)
    command -v glslc >/dev/null || missing+=(glslc)
    command -v c++ >/dev/null || missing+=(g++)
    echo 'int main() {}' | c++ -x c++ - -lvulkan -o /dev/null 2>/dev/null || missing+=(libvulkan-dev)
  fi
  [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

headers_found() {  # "1.3.239", what the compiler sees; nothing where a header is missing
  local includes macros
  includes=$'#include <spirv/unified1/spirv.hpp>\n#include <vulkan/vulkan_core.h>'
  macros=$(c++ -E -dM -x c++ - <<<"$includes" 2>/dev/null) || return 0
  sed -n 's/^#define VK_HEADER_VERSION_COMPLETE .*(0, \([0-9]*\), \([0-9]*\),.*/\1.\2./p' <<<"$macros" | tr -d '\n'
  sed -n 's/^#define VK_HEADER_VERSION \([0-9]*\)$/\1/p' <<<"$macros"
}

at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -1)" = "$2" ]; }

unpack_debian13() {  # what is too old here, packages...: from the mirror this machine already uses
  local why=$1 sdk="install the Vulkan SDK and set VULKAN_SDK, then: make test-gpu" codename site work options
  shift
  # shellcheck disable=SC1091
  codename=$(. /etc/os-release && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}") || fail "$why" "$sdk"
  # shellcheck disable=SC2016
  site=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    sed -n "s/ $codename main$//p" | head -1)
  [ -n "$site" ] || fail "$why, and apt-get names no Debian mirror" "$sdk"
  echo "$why: unpacking Debian 13's $* into $debian13" >&2
  work=$(mktemp -d)
  mkdir -p "$work"/{lists,archives}/partial "$work/debs" "$debian13"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site trixie main" >"$work/sources.list"
  options=(-qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work" -o "Dir::Cache::archives=$work/archives")
  [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)  # the folder is root's alone
  { apt-get "${options[@]}" update && (cd "$work/debs" && apt-get "${options[@]}" download "$@"); } >&2 ||
    fail "apt-get: could not fetch Debian 13's $*" "look at the mirror in /etc/apt, or $sdk"
  for package in "$work"/debs/*.deb; do dpkg -x "$package" "$debian13"; done
  rm -rf "$work"
}

use_headers() {
  local found
  [ -z "${VULKAN_SDK:-}" ] || export CPLUS_INCLUDE_PATH=$VULKAN_SDK/include
  found=$(headers_found)
  ! at_least "${found:-0}" "$headers_required" || return 0
  [ -d "$debian13/usr/include/vulkan" ] ||
    unpack_debian13 "Vulkan headers: too old (found ${found:-none}, required $headers_required)" libvulkan-dev spirv-headers
  export CPLUS_INCLUDE_PATH=$debian13/usr/include
  arguments+=("-DVulkan_INCLUDE_DIR=$debian13/usr/include" "-DCMAKE_PREFIX_PATH=$debian13/usr")
}

use_matrix_shaders() {  # a compiler that knows cooperative matrices: Debian 12's does not
  local libraries wrapper=$debian13/glslc
  if printf '#version 450\n#extension GL_KHR_cooperative_matrix : require\nvoid main() {}\n' |
    glslc -fshader-stage=compute --target-env=vulkan1.3 -o /dev/null - 2>/dev/null; then return; fi
  [ -x "$debian13/usr/bin/glslc" ] ||
    unpack_debian13 "glslc: too old for matrix units" glslc libshaderc1 libc6 libstdc++6 libgcc-s1
  libraries=$debian13/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)
  # Its own C library comes along, since it is newer than this system's.
  printf '#!/bin/sh\nexec %q --library-path %q %q "$@"\n' \
    "$(compgen -G "$libraries/ld-linux*.so.*" | head -1)" "$libraries" "$debian13/usr/bin/glslc" >"$wrapper"
  chmod +x "$wrapper"
  arguments+=("-DVulkan_GLSLC_EXECUTABLE=$wrapper")
}

wheels() { echo "$cache/wheels/llama-cpp-python-$version-$variant-$(uname -m)"; }

find_wheel() { compgen -G "$(wheels)/llama_cpp_python-$version-*.whl" | head -1; }

build_wheel() {
  # Not for this CPU alone: a wheel may be carried to another machine, or kept by CI.
  local arguments=(-DGGML_VULKAN=on -DGGML_NATIVE=off) log
  need --build
  use_headers
  [ $variant = vulkan ] || use_matrix_shaders
  mkdir -p "$(wheels)"
  log=$(wheels)/build.log
  echo "compiling llama.cpp with Vulkan, once (about 15 minutes on two cores; $log)" >&2
  # --no-cache-dir: pip's own cache does not know the options a wheel was built with.
  CMAKE_ARGS="${arguments[*]}" CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
    "$python" -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps --verbose \
    --no-binary llama-cpp-python --wheel-dir "$(wheels)" "llama-cpp-python==$version" >"$log" 2>&1 || {
    tail -25 "$log" >&2
    fail "llama.cpp: does not compile with Vulkan" "read $log"
  }
}

make_venv() {
  [ ! -x "$python" ] || return 0
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "${PYTHON:-python3}: too old (required 3.11 or newer)" "make PYTHON=/path/to/python3.12 test-gpu"
  "${PYTHON:-python3}" -m venv "$venv" || {
    rm -rf "$venv"
    fail "${PYTHON:-python3}: cannot make a virtual environment" "Debian/Ubuntu: sudo apt-get install -y python3-venv"
  }
}

wheel() {
  [ "$(uname -s)" = Linux ] || fail "vulkan.sh: for Linux only" "elsewhere: make test PYTEST='-m gpu'"
  [ "${1:-}" != --for-gpu ] || variant=vulkan-matrix
  need
  make_venv
  [ -n "$(find_wheel)" ] || build_wheel
  find_wheel
}

pip() {
  "$python" -m pip --quiet --disable-pip-version-check "$@" ||
    fail "pip: could not $1 ${*: -1}" "read its words above, then: make test-gpu"
}

install() {
  local path=$1 stamp=$venv/.installed
  if [ "$stamp" -nt "$path" ] && [ "$stamp" -nt pyproject.toml ]; then return; fi
  echo "installing into $venv" >&2
  [ "$stamp" -nt "$path" ] || pip install --force-reinstall --no-deps "$path"
  pip install -e ".[dev]"
  touch "$stamp"
}

run_tests() {
  # ggml leaves out drivers that are no GPU, lavapipe among them, unless a device is named.
  export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}
  "$python" - <<'PY' || fail "Vulkan: ggml finds no device" "see what the loader says: VK_LOADER_DEBUG=all make test-gpu"
import sys
from autoglm_gguf.native.ggml import list_devices
found = [device for device in list_devices() if device.kind != "cpu"]
for device in found:
    print(f"{device.name}: {device.description}, {device.total_bytes / 2**30:.1f} GiB")
sys.exit(not found)
PY
  exec "$python" -m pytest -m gpu --max-skips 0 "$@"
}

case ${1:-} in
  test) shift; path=$(wheel); install "$path"; run_tests "$@" ;;
  wheel) wheel "${@:2}" ;;
  cached) [ -n "$(find_wheel)" ] ;;
  *) fail "vulkan.sh: unknown command '${1:-}' (test, wheel, cached)" "make test-gpu" ;;
esac
