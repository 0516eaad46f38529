#!/usr/bin/env bash
# Builds llama.cpp's libraries and programs for arm64 phones (ABI arm64-v8a) with Android's NDK.
#
#   ANDROID_NDK=DIR examples/android/build-libs.sh LLAMA_CPP_DIR OUT_DIR [vulkan] [opencl]
#
# LLAMA_CPP_DIR is vendor/llama.cpp, at the commit of the pinned llama-cpp-python. Without more words
# the CPU alone: one library for each set of instructions, of which ggml loads the best that the phone
# has. `vulkan` needs VULKAN_HEADERS (a prefix with Vulkan-Headers and SPIRV-Headers installed: the NDK
# has no vulkan.hpp); `opencl` needs OPENCL_HEADERS and OPENCL_LIBRARY (libOpenCL.so for Android).
# What was run of this and what was not: docs/guides/android.md.
set -euo pipefail

fail() { # WHAT HINT
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}

[ $# -ge 2 ] || fail "build-libs.sh: too few arguments (found $#, required 2)" \
  "ANDROID_NDK=DIR $0 LLAMA_CPP_DIR OUT_DIR [vulkan] [opencl]"
source=$1 out=$2
shift 2
toolchain=${ANDROID_NDK:-}/build/cmake/android.toolchain.cmake
[ -f "$toolchain" ] || fail "ANDROID_NDK: no NDK there (found '${ANDROID_NDK:-}')" \
  "install the NDK (Android Studio's SDK Manager, or sdkmanager 'ndk;28.2.13676358') and name its folder"
[ -f "$source/include/llama.h" ] || fail "$source: not llama.cpp's sources (no include/llama.h)" \
  "git submodule update --init vendor/llama.cpp"
tools=$(echo "$ANDROID_NDK"/toolchains/llvm/prebuilt/*/bin)

options=(
  -DCMAKE_TOOLCHAIN_FILE="$toolchain"
  -DANDROID_ABI=arm64-v8a
  -DANDROID_PLATFORM=android-28       # the first with Vulkan 1.1
  -DANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES=ON # for pages of 16 KiB in NDK r27; r28 is always so
  -DCMAKE_BUILD_TYPE=Release
  -DBUILD_SHARED_LIBS=ON
  -DGGML_NATIVE=OFF          # this computer's instructions are not the phone's
  -DGGML_BACKEND_DL=ON       # backends are loaded when the program starts: a phone without Vulkan
  -DGGML_CPU_ALL_VARIANTS=ON # or i8mm runs the same files
  -DGGML_OPENMP=OFF          # libomp.so is not part of Android; ggml has threads of its own
  -DGGML_LLAMAFILE=OFF       # upstream: not supported on Android
  -DLLAMA_OPENSSL=OFF        # nor is OpenSSL part of it; models come by adb
  -DLLAMA_BUILD_TESTS=OFF
  -DLLAMA_BUILD_EXAMPLES=OFF
  -DLLAMA_BUILD_APP=OFF
  -DLLAMA_BUILD_UI=OFF
  -DLLAMA_USE_PREBUILT_UI=OFF # would be downloaded
)
for backend in "$@"; do
  case $backend in
    vulkan)
      [ -f "${VULKAN_HEADERS:-}/include/vulkan/vulkan.hpp" ] || fail \
        "VULKAN_HEADERS: no include/vulkan/vulkan.hpp there (found '${VULKAN_HEADERS:-}')" \
        "install Khronos' Vulkan-Headers and SPIRV-Headers with cmake --install into one prefix"
      options+=(
        -DGGML_VULKAN=ON
        -DVulkan_INCLUDE_DIR="$VULKAN_HEADERS/include"
        -DSPIRV-Headers_DIR="$VULKAN_HEADERS/share/cmake/SPIRV-Headers"
        -DVulkan_GLSLC_EXECUTABLE="$(echo "$ANDROID_NDK"/shader-tools/*/glslc)"
      )
      ;;
    opencl)
      [ -f "${OPENCL_LIBRARY:-}" ] || fail \
        "OPENCL_LIBRARY: no such file (found '${OPENCL_LIBRARY:-}')" \
        "build Khronos' OpenCL-ICD-Loader with the NDK, as upstream's docs/backend/OPENCL.md says"
      options+=(
        -DGGML_OPENCL=ON
        -DOpenCL_INCLUDE_DIR="${OPENCL_HEADERS:?}"
        -DOpenCL_LIBRARY="$OPENCL_LIBRARY"
      )
      ;;
    *) fail "$backend: not a backend (required vulkan or opencl)" "$0 $source $out vulkan" ;;
  esac
done

cmake -S "$source" -B "$out/build" -G Ninja "${options[@]}"
cmake --build "$out/build" --parallel "${JOBS:-$(nproc)}" \
  --target llama mtmd llama-cli llama-mtmd-cli llama-server llama-bench
mkdir -p "$out/arm64-v8a"
find "$out/build/bin" -maxdepth 1 \( -name 'lib*.so' -o -name llama-cli -o -name llama-mtmd-cli \
  -o -name llama-server -o -name llama-bench \) -exec cp -L {} "$out/arm64-v8a/" \;
"$tools/llvm-strip" "$out"/arm64-v8a/*

# A phone with pages of 16 KiB (Android 15 and newer) loads no library aligned to 4 KiB.
for file in "$out"/arm64-v8a/*; do
  for align in $("$tools/llvm-readelf" -lW "$file" | awk '$1 == "LOAD" { print $NF }'); do
    [ $((align)) -ge 16384 ] || fail "$file: aligned to $((align)) bytes (required 16384)" \
      "build with NDK r28 or newer"
  done
done
echo "built: $out/arm64-v8a ($(du -sh "$out/arm64-v8a" | cut -f1))"
