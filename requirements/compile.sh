#!/usr/bin/env bash
# Rewrites build.txt, base.txt, gpu.txt, triton.txt, trackers.txt, trl.txt and engines/*.txt with uv:
#   bash requirements/compile.sh [uv options]
#   bash requirements/compile.sh --upgrade
#   bash requirements/compile.sh --upgrade-package transformers
# uv must find the CPU wheel of torch: UV_FIND_LINKS=<folder or page that holds it>. No header and
# no address is written, so the files say nothing of the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/_functions.sh"
cd "$(dirname "${BASH_SOURCE[0]}")"
TORCH=2.13.0

compile() {
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links "$@" >/dev/null
}

echo setuptools | compile - --output-file build.txt "$@"
# Both routes share base.txt; the CPU build, which asks for nothing of CUDA, stands in for torch.
echo "torch==$TORCH+cpu" | compile ../pyproject.toml - --extra dev --constraints build.txt \
    --no-emit-package torch --no-emit-package setuptools --output-file base.txt "$@"
# The CUDA build comes from the registry, not from the folder with the CPU wheel.
printf 'torch==%s\nliger-kernel\n' "$TORCH" | UV_FIND_LINKS='' compile - --constraints base.txt \
    --constraints build.txt --no-emit-package setuptools --output-file gpu.txt "$@"
# For the tests of the Triton kernels on machines without CUDA: the version that gpu.txt has.
echo triton | compile - --constraints gpu.txt --output-file triton.txt "$@"
# For the tests of the trackers.
compile trackers.in --overrides trackers.overrides.txt --constraints base.txt \
    --constraints build.txt --no-emit-package setuptools --output-file trackers.txt "$@"
# For the comparisons of tests/parity; base.txt has all that it needs.
echo "trl==1.16.*" | compile - --no-deps --output-file trl.txt "$@"
# The environments that tests/real_engines/setup.sh makes. SGLang's wheel is for this platform only, and
# a package is left out by a marker that is never true, which --universal would keep.
for engine in sglang vllm; do
    uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
        --generate-hashes --no-header --no-emit-index-url --no-emit-find-links \
        engines/$engine.in --overrides engines/$engine.overrides.txt --no-emit-package torch \
        --output-file engines/$engine.txt "$@" >/dev/null
done
