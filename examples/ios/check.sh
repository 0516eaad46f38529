#!/usr/bin/env bash
# Compiles the Swift sources against the pinned llama.cpp and compares what they give with Python.
# Linux or macOS, no phone and no Xcode project; on a Mac the app itself is type-checked as well.
#
#   AUTOGLM_GGUF_UPSTREAM=…/vendor/llama.cpp examples/ios/check.sh
#
# Needs swiftc (5.9 or newer), a Python with this package and Pillow, and llama.cpp's headers out of the
# sdist of the pinned llama-cpp-python (CONTRIBUTING.md says how to get them).
#   PYTHON   the interpreter (python3)
#   SWIFT    put before swiftc and the compiled program, for example to enter a container; it must see
#            the paths used here
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
upstream=${AUTOGLM_GGUF_UPSTREAM:-}
if [ ! -f "$upstream/include/llama.h" ]; then
  echo "error: AUTOGLM_GGUF_UPSTREAM: no llama.cpp sources there (found '$upstream')" >&2
  echo "hint: unpack the sdist of llama-cpp-python; CONTRIBUTING.md has the commands" >&2
  exit 1
fi
if ! ${SWIFT:-} swiftc --version >/dev/null 2>&1; then
  echo "error: no swiftc" >&2
  echo "hint: macOS: xcode-select --install; Debian 13: apt-get install swiftlang; SWIFT=… enters a container" >&2
  exit 1
fi
library=$("$python" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib")')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" "$here/check/cases.py" "$work"

# The module that the XCFramework calls llama, made of the same headers.
{
  echo "module llama {"
  for header in include/llama.h tools/mtmd/mtmd.h tools/mtmd/mtmd-helper.h ggml/include/gguf.h; do
    echo "  header \"$upstream/$header\""
  done
  echo "  export *"
  echo "}"
} > "$work/module.modulemap"
flags=(-swift-version 5 -warnings-as-errors -I "$work" -Xcc "-I$upstream/include"
  -Xcc "-I$upstream/ggml/include" -Xcc "-I$upstream/tools/mtmd")
sources=("$here"/{Prompt,Screenshot,Footprint,PhoneModel}.swift)

${SWIFT:-} swiftc -O "${flags[@]}" "${sources[@]}" "$here/check/main.swift" -o "$work/check" \
  -L "$library" -lllama -lmtmd -lggml-base -Xlinker -rpath -Xlinker "$library"
${SWIFT:-} "$work/check" "$work/cases.json" "$work/text.gguf" "$work/mmproj.gguf" 2> "$work/log" \
  || { tail -5 "$work/log" >&2; exit 1; }

if sdk=$(xcrun --sdk iphoneos --show-sdk-path 2>/dev/null); then
  swiftc -typecheck -sdk "$sdk" -target arm64-apple-ios16.4 "${flags[@]}" "${sources[@]}" "$here/App.swift"
  echo "the app's sources type-check for iOS"
fi
