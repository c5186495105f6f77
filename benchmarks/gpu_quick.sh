#!/usr/bin/env bash
# All that a GPU must tell, in one call of at most 8 minutes: edits in float16 and training steps, beside diffusers.
#
#     bash benchmarks/gpu_quick.sh              # on a GPU of 80 GB
#     QUICK=1 bash benchmarks/gpu_quick.sh      # a rehearsal: the small model on the CPU, and six times as long
#
# It needs the checkout, python3 and, for packages that are not there, pip, which takes its settings from the environment
# (PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER without a network). The weights are seeded and made on the spot. Each figure is
# written into $OUT (default runs/gpu_quick) as it is made. What tells most comes first. A part ends when the seconds of
# all parts up to it are over, so that it may use what those before it have left.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-runs/gpu_quick} work=$(mktemp -d) python=python3
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR="$work/compiled" PYTHONUNBUFFERED=1

if [[ -n ${QUICK:-} ]]; then
    size=small edit=(--resolution 128 --steps 2) card="" train=(--resolution 64 --steps 1) batches=(1 2) device=cpu times=6
else
    size=full edit=() card=", small card" train=(--steps 3) batches=(1 16) device=cuda times=1
fi
plain=(pbe diffusers "pbe, plain upsampling")
compiled=("pbe, compiled" "diffusers, compiled without trials")

prepare() {
    python3 -c 'import torch' || { python3 -m venv "$work/venv" && python=$work/venv/bin/python; }
    mapfile -t missing < <("$python" -c '
from importlib.util import find_spec
from sys import argv
print(*(name for name in argv[1:] if not find_spec(name.replace("pillow", "PIL"))), sep="\n")
' torch torchvision lightning torchmetrics omegaconf ftfy regex tqdm pillow diffusers transformers accelerate safetensors)
    [[ -z ${missing[*]} ]] || "$python" -m pip install --quiet "${missing[@]}" || return
    "$python" -c "
from pathlib import Path
import torch
from benchmarks.arguments import seeded_weights
torch.zeros(1, device='$device')
seeded_weights('$size', Path('$work'))"
}

measure() { # SECONDS NAME SECTION ARGUMENTS…
    end=$((end + times * $1))
    local left=$((end - SECONDS)) minutes
    if ((left < 10)); then
        echo "$2 is left out: no time"
        return
    fi
    printf -v minutes %d.%02d $((left / 60)) $((left % 60 * 100 / 60))
    timeout -k 10 "$left" "$python" -m benchmarks "${@:3}" --device "$device" --ckpt "$work/$size.ckpt" \
        --diffusers "$work/$size" --minutes "$minutes" --out "$out/$2.json"
}

edits() { # SECONDS NAME BATCH PAIRS SYSTEMS…
    measure "$1" "$2" edit --dtype float16 --batch "$3" --pairs "$4" --together "${edit[@]}" --systems "${@:5}"
}

{
    end=$((times * 70))
    prepare || exit
    edits 55 edit-1 "${batches[0]}" 3 "${plain[@]}"
    edits 105 compiled-1 "${batches[0]}" 3 "${compiled[@]}"
    edits 65 edit-16 "${batches[1]}" 1 "${plain[@]}"
    measure 80 train train --dtype bfloat16 --batch 4 16 --pairs 1 "${train[@]}" --systems pbe diffusers
    edits 25 small-card "${batches[0]}" 1 "pbe$card" "diffusers$card"
    edits 65 compiled-16 "${batches[1]}" 1 "${compiled[@]}"
    "$python" -m benchmarks table "$out"/*.json >"$out/tables.md"
} 2>&1 | tee "$out/log.txt"
