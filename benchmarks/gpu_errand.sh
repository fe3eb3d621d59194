#!/usr/bin/env bash
# Everything that waits for a GPU, as one errand on a machine that has torch but no network.
#   benchmarks/gpu_errand.sh prepare [PYTHON_VERSION]   here: wheels and data into device_carry/ (ignored by git)
#   benchmarks/gpu_errand.sh run [OUT]                  there: GPU tests and benchmarks; rows and logs into OUT
# The run is resumable: accuracy rows that are done are not run again. EXTRA="--variants sequential cascade" narrows it.
set -euo pipefail
cd "$(dirname "$0")/.."
CARRY=device_carry

prepare() {
    local version="${1:-3.12}" data="${DFM_SHARED_DATA:-../shared/data}"
    rm -rf "${CARRY:?}" && mkdir -p "$CARRY/wheels"
    # At most 64 MiB travel: hence this OpenCV, and this pytest, which needs no pygments. What torch's environment lacks; the pure ones without a wheel on PyPI are built here.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" -d "$CARRY/wheels" \
        pycocotools defusedxml tqdm tabulate cloudpickle yacs termcolor portalocker 'opencv-python-headless==4.10.0.84' \
        timm safetensors 'huggingface_hub<1' requests urllib3 idna certifi charset_normalizer \
        hypothesis sortedcontainers 'pytest<8.4' pytest-timeout pluggy iniconfig packaging
    python3 -m pip wheel --quiet --no-deps -w "$CARRY/wheels" 'fvcore<0.1.6' 'iopath<0.1.10'
    if [ -d "$data/bccd" ]; then tar -C "$data" -cf "$CARRY/bccd.tar" bccd; else echo "no bccd in $data: left out"; fi
    du -sh "$CARRY"
}

run() {
    local out="${1:-output/gpu_errand}" data
    mkdir -p "$out"
    python3 -m pip install --quiet --no-index --no-deps --find-links "$CARRY/wheels" "$CARRY"/wheels/*.whl
    export PYTHONPATH="$PWD:$PWD/kernels"
    data="$(mktemp -d)"
    if [ -f "$CARRY/bccd.tar" ]; then tar -C "$data" -xf "$CARRY/bccd.tar"; fi
    # A failure must not cost the measurements; each benchmark compares before it times.
    if ! python3 -m pytest -m "gpu or not slow" tests/kernels tests/modeling tests/engine/test_block_optimizer.py 2>&1 \
        | tee "$out/gpu_tests.txt"; then
        echo "GPU tests failed: $out/gpu_tests.txt" >&2
    fi
    python3 benchmarks/kernels.py --device cuda --save
    python3 benchmarks/latency.py sampler --device cuda --save
    python3 benchmarks/latency.py --device cuda --save
    python3 benchmarks/memory.py --device cuda --save --modes joint sequential sequential_step local_backbone cascade cascade_checkpoint parallel \
        cascade_checkpoint_all cascade_accumulate cascade_checkpoint_all_accumulate sequential_accumulate local_backbone_accumulate
    python3 benchmarks/memory.py demo --device cuda --save
    python3 tools/make_shapes.py --out data/shapes --train 2000 --val 300 --size 128
    # shellcheck disable=SC2086
    python3 benchmarks/accuracy.py --config configs/shapes_flow_r18.yaml --seeds 3 --device cuda --save \
        --name shapes_cuda ${EXTRA:-}
    # shellcheck disable=SC2086
    python3 benchmarks/robustness_detection.py --config configs/shapes_flow_r18.yaml --seeds 3 --device cuda --save \
        --name shapes_cuda ${EXTRA:-}
    if [ -d "$data/bccd" ]; then
        # shellcheck disable=SC2086
        python3 benchmarks/accuracy.py --config configs/bccd_flow_r18.yaml --seeds 3 --device cuda --save --name bccd_cuda \
            ${EXTRA:-} --opts DATASETS.VOC_ROOT "$data/bccd"
    fi
    cp benchmarks/results/*cuda* "$out/"
}

case "${1:-}" in
    prepare | run) "$@" ;;
    *) sed -n '2,5p' "$0" && exit 2 ;;
esac
