#!/usr/bin/env bash
# What a training run calls on a GPU, on a machine without one: a CUDA build of PyTorch over driver.c.
#
#     bash tests/gpu_stand_in/run.sh FOLDER [COMMAND ...]    # default: every_option.py; FOLDER: 6 GB, kept
#
# Says nothing of numbers or times: kernels do nothing. What it says: which calls fail, where tensors lie, what waits.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?a folder for the environment}"
folder=$(cd "$1" && pwd)
shift

if [[ ! -e $folder/installed ]]; then
    python3 -m venv "$folder"
    # Three equals signs: no local build, such as one for CPUs. The kit is for the headers of driver.c.
    "$folder/bin/pip" install --quiet torch===2.11.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4" nvidia-cuda-crt \
        pytest pytest-xdist pytest-benchmark hypothesis pyarrow scikit-learn scipy matplotlib tyro accelerate
    "$folder/bin/pip" install --quiet --no-deps --editable "$here/../.."
    touch "$folder/installed"
fi

packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# cuDNN's attention, which a Hopper GPU prefers for padded batches, would look for a real device.
echo 'import torch; torch.backends.cuda.enable_cudnn_sdp(False)' >"$packages/sitecustomize.py"
gcc -c -fPIC -O1 -w -I "$packages/nvidia/cu13/include" "$here/driver.c" -o "$folder/driver.o"
# cuBLAS has hundreds: those that PyTorch names and driver.c lacks.
nm -D "$packages"/torch/lib/libtorch_cuda*.so | grep -o ' U cublas\w*' | sed 's/ U //' | sort -u >"$folder/named"
nm "$folder/driver.o" | grep -o ' T cublas\w*' | sed 's/ T //' | sort -u >"$folder/known"
comm -23 "$folder/named" "$folder/known" | sed 's/.*/int &() { return 0; }/' >"$folder/others.c"
gcc -shared -fPIC -w "$folder/driver.o" "$folder/others.c" -o "$folder/libcuda.so.1" -Wl,-soname,libcuda.so.1

export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} TRITON_LIBCUDA_PATH=$folder
export TRITON_CACHE_DIR=$folder/triton PYTORCH_NO_CUDA_MEMORY_CACHING=1 HF_HUB_OFFLINE=1
[[ $# -gt 0 ]] || set -- "$folder/bin/python" -P "$here/every_option.py"
LD_PRELOAD=$folder/libcuda.so.1 exec "$@"
