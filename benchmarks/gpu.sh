#!/usr/bin/env bash
# One run of at most ten minutes on a machine with a GPU that Vulkan drives and no internet.
#
#   benchmarks/gpu.sh pack FOLDER [PYTHON_VERSION]   on a machine with internet: wheels for that Python
#                                                    (3.12), llama.cpp with Vulkan, the Vulkan loader
#   benchmarks/gpu.sh run FOLDER OUT [SIZE]          there, in a copy of this repository: the tests marked
#                                                    gpu, then the layer sweep over random weights of SIZE
#                                                    (9b: AutoGLM-Phone-9B's shapes, q4_0)
#
# OUT gets devices.json, tests.log, self-test.log, sweep.json, image-cpu.json and
# image-gpu.json (`autoglm-gguf bench --compare` reads them), summary.json and run.log. 9b needs 28 GB of
# disk. Environment: GPU_LIMIT_S (570), GPU_WORK (where the model is made), GPU_PYTHON (python3).
#
# Linux x86-64. `run` has been tried with SIZE 0.4b on lavapipe, Mesa's Vulkan driver for the CPU, and
# not yet on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
limit_bytes=$((64 << 20))  # what may travel: FOLDER and the repository

fail() {  # what is wrong, what to type next
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}

# The Vulkan loader, OpenMP, and what drivers made for desktops load even where there is no screen;
# used there only where that machine has none.
libraries=(libvulkan.so.1 libgomp.so.1 libEGL.so.1 libGL.so.1 libGLX.so.0 libGLdispatch.so.0 libOpenGL.so.0
  libX11.so.6 libXext.so.6 libxcb.so.1 libXau.so.6 libXdmcp.so.6 libbsd.so.0 libmd.so.0)

find_library() { /sbin/ldconfig -p | sed -n "s/^\s*$1 (libc6,x86-64.*) => //p" | head -1; }

pack_llama_cpp() {  # wheel, archive: each library once, where the wheel has it six times
  local work library
  work=$(mktemp -d)
  python3 -m zipfile -e "$1" "$work"
  for library in "$work"/llama_cpp/lib/*.so; do
    ln -sf "${library##*/}" "$library.0"  # its soname, what the others ask for
    rm -f "$library".0.*
  done
  tar -C "$work" -cJf "$2" llama_cpp
  rm -rf "$work"
}

pack() {
  local folder=${1:?} python=${2:-3.12} packed tracked tag name path
  local platforms=() requirements=()
  rm -rf "$folder"
  mkdir -p "$folder/wheels" "$folder/lib"
  pack_llama_cpp "$(scripts/vulkan.sh wheel --for-gpu)" "$folder/llama_cpp.tar.xz"
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
  mapfile -t requirements < <(.venv-gpu/bin/python - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
# llama-cpp-python's wheel is built above; what it needs itself is not in it
print(*(r for r in project["dependencies"] if "llama-cpp" not in r and "!= 'linux'" not in r), sep="\n")
print("diskcache", "typing-extensions", "pytest", sep="\n")
PY
  )
  .venv-gpu/bin/python -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
    --python-version "$python" "${platforms[@]}" --dest "$folder/wheels" "${requirements[@]}" ||
    fail "pip: no wheels of every requirement for Python $python" "benchmarks/gpu.sh pack $folder 3.11"
  for name in "${libraries[@]}"; do
    path=$(find_library "$name")
    [ -z "$path" ] || cp -L "$path" "$folder/lib/$name"
  done
  [ -f "$folder/lib/libvulkan.so.1" ] || fail "libvulkan.so.1: not found here" "make test-gpu installs it"
  packed=$(du -sb "$folder" | cut -f1)
  tracked=$(git ls-files -z | du -cb --files0-from=- | tail -1 | cut -f1)
  du -sh "$folder"/wheels/* | sort -rh | head -5
  echo "packed $((packed >> 20)) MiB in $folder, with the repository $(((packed + tracked) >> 20)) MiB"
  [ $((packed + tracked)) -le $limit_bytes ] ||
    fail "$folder: too large ($(((packed + tracked) >> 20)) MiB with the repository, at most 64)" \
      "delete wheels that the other machine has, the largest first, and carry the rest"
}

limit=${GPU_LIMIT_S:-570}

left() { echo $((limit - SECONDS)); }

step() {  # name, percent of the limit at most, file for its output, command...
  local name=$1 most=$((limit * $2 / 100)) file=$3 began=$SECONDS code=0
  shift 3
  [ "$(left)" -ge "$most" ] || most=$(left)
  echo "== $name (at most $most s)"
  # timeout 0 would wait for ever
  if [ "$most" -gt 0 ]; then
    timeout --signal INT --kill-after 10 "$most" "$@" >"$file" || code=$?
  else
    code=124
  fi
  echo "== $name: exit code $code after $((SECONDS - began)) s"
  steps+=("{\"step\": \"$name\", \"seconds\": $((SECONDS - began)), \"exit_code\": $code}")
  return $code
}

summarise() {
  local IFS=,
  echo "{\"size\": \"$size\", \"seconds\": $SECONDS, \"steps\": [${steps[*]}]}" >"$out/summary.json"
}

prepare() {  # Python's packages, libraries that are missing, the driver's manifest
  local site=$work/site manifests name
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
    --target "$site" "$folder"/wheels/*.whl ||
    fail "$folder: its packages do not install into $("$python" --version)" \
      "where there is internet: benchmarks/gpu.sh pack FOLDER VERSION"
  tar -xJf "$folder/llama_cpp.tar.xz" -C "$site"
  export PYTHONPATH=$PWD/src:$site PYTHONUNBUFFERED=1 AUTOGLM_GGUF_CACHE=$work/cache
  mkdir -p "$work/lib"
  for name in "${libraries[@]}"; do
    [ -n "$(find_library "$name")" ] || cp "$folder/lib/$name" "$work/lib" 2>/dev/null || true
  done
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$work/lib
  if [ -z "${VK_DRIVER_FILES:-}" ] && ! compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null &&
    ! compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null; then
    # A driver that a container was given from outside lies where the loader does not look.
    manifests=$(find /usr /opt -path '*vulkan/icd.d/*.json' 2>/dev/null | paste -sd: || true)
    [ -z "$manifests" ] || export VK_DRIVER_FILES=$manifests
  fi
  export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}  # unnamed, ggml leaves lavapipe out
}

devices='
import dataclasses, json, sys
from autoglm_gguf.native.ggml import list_devices
found = list_devices()
print(json.dumps([dataclasses.asdict(device) for device in found], indent=1))
sys.exit(all(device.kind == "cpu" for device in found))
'
first_gpu='
import json, sys
print(next(d["name"] for d in json.load(open(sys.argv[1])) if d["kind"] != "cpu"))
'

run() {
  folder=$(realpath "${1:?}") out=$(realpath -m "${2:?}") size=${3:-9b}
  python=${GPU_PYTHON:-python3} work=${GPU_WORK:-${TMPDIR:-/tmp}/autoglm-gguf-gpu}
  steps=()
  local device n_layers failed=0 pair=$work/gguf-$size checkpoint=$work/checkpoint-$size
  case $size in  # benchmarks/random_checkpoint.py
    9b) n_layers=40 ;;
    1.7b) n_layers=24 ;;
    0.4b) n_layers=16 ;;
    *) fail "size $size: unknown (9b, 1.7b or 0.4b)" "benchmarks/gpu.sh run FOLDER OUT 9b" ;;
  esac
  mkdir -p "$work" "$out"
  exec > >(tee "$out/run.log") 2>&1
  trap summarise EXIT
  prepare
  nvidia-smi -L 2>/dev/null || true
  step devices 10 "$out/devices.json" "$python" -c "$devices" ||
    fail "Vulkan: ggml finds no device" \
      "see what the loader says: VK_LOADER_DEBUG=all; VK_DRIVER_FILES=${VK_DRIVER_FILES:-}"
  cat "$out/devices.json"
  device=$("$python" -c "$first_gpu" "$out/devices.json")
  step tests 25 "$out/tests.log" \
    "$python" -m pytest -m gpu --max-skips 0 --durations 5 -p no:cacheprovider || failed=1
  tail -15 "$out/tests.log"
  step checkpoint 35 /dev/null "$python" benchmarks/random_checkpoint.py "$size" "$checkpoint"
  step convert 35 /dev/null "$python" -m autoglm_gguf convert "$checkpoint" --outtype q4_0 --outdir "$pair"
  rm -rf "$checkpoint"
  model=("$pair" --device "$device" --memory-budget none)
  # A device that disagrees with the CPU says so here, the vision tower included.
  step self-test 15 "$out/self-test.log" "$python" -m autoglm_gguf chat "${model[@]}" --n-gpu-layers all \
    --mmproj-offload --max-tokens 4 <<<hello || failed=1
  # All first: what is cut off by the limit is the least interesting.
  step sweep $(($(left) * 100 / limit - 18)) /dev/null "$python" -m autoglm_gguf bench "${model[@]}" --no-image --repeats 2 \
    --layers "all,$((n_layers / 2)),0,$((n_layers * 3 / 4)),$((n_layers / 4))" --save "$out/sweep.json" || failed=1
  image=(--n-gpu-layers all --max-image-tokens 1024 --prompt-n 128 --predicted-n 8 --repeats 1)
  step image-on-cpu 9 /dev/null "$python" -m autoglm_gguf bench "${model[@]}" "${image[@]}" \
    --no-mmproj-offload --save "$out/image-cpu.json" || failed=1
  step image-on-gpu 9 /dev/null "$python" -m autoglm_gguf bench "${model[@]}" "${image[@]}" \
    --mmproj-offload --save "$out/image-gpu.json" || failed=1
  return $failed
}

case ${1:-} in
  pack | run) "$@" ;;
  *) fail "gpu.sh: unknown command '${1:-}' (pack, run)" "benchmarks/gpu.sh pack FOLDER" ;;
esac
