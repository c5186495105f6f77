#!/usr/bin/env bash
# The model in the box, trained on with a GPU in one call of at most 9 minutes: decoder, encodings, UNet, and edits.
#
#     bash examples/demo_model/gpu.sh              # on a GPU of 80 GB, with 16 processor cores
#     STEPS=2 bash examples/demo_model/gpu.sh      # a rehearsal on a CPU: two steps of everything
#     VAE=FILE bash examples/demo_model/gpu.sh     # with an autoencoder that is trained already
#
# It needs the checkout, the photos that examples/demo_model/pack.py has packed (PACK, default runs/demo_pack.zip), python3
# and, for packages that are not there, pip, which takes its settings from the environment. What is kept of it lies in
# $OUT (default runs/demo_gpu), eight files of at most 15 MB, which are overwritten as it goes:
#
#     cat runs/demo_gpu/model.ckpt.* > model.ckpt
#
# A GPU has not seen this script: batch sizes, learning rates and the shares of the time are guesses. Each network trains
# at one learning rate for most of its time, which tells how many steps the rest has, in which the rate falls to zero.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=${OUT:-runs/demo_gpu} pack=${PACK:-runs/demo_pack.zip} vae=${VAE:-} work=$(mktemp -d) python=python3
limit=520 # seconds, of 540
trap 'kill "${publisher:-}" 2>/dev/null; rm -rf "$work"' EXIT
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD"

data=("data.source.path=$work/data/train.csv" "data.val_source.path=$work/data/held_out.csv")
often=(checkpoint.every_n_steps=100000 checkpoint.every_n_minutes=0.6 checkpoint.keep=1 checkpoint.best=false)
photos=(data.batch_size=64 data.workers=16 trainer.limit_val_batches=4)
latents=(data.batch_size=256 data.workers=16 encodings.crops=8 samples.every_n_steps=400 trainer.val_check_interval=400
    trainer.limit_val_batches=1)
if [[ -n ${STEPS:-} ]]; then
    limit=7200 often+=(trainer.log_every_n_steps=1)
    photos=(data.batch_size=2 data.workers=0 trainer.limit_val_batches=1)
    latents=(data.batch_size=2 data.workers=0 encodings.crops=1 samples.count=2 samples.edit.steps=2
        "samples.every_n_steps=$STEPS" trainer.limit_val_batches=1 "trainer.val_check_interval=$STEPS")
fi

left() { # SECONDS: of the limit, less so many for what follows
    echo $((limit - SECONDS - $1))
}

train() { # SECONDS RUN CONFIG OVERRIDES…
    local time=("trainer.max_time={seconds: $1}")
    [[ -z ${STEPS:-} ]] || time=("trainer.max_steps=$STEPS")
    timeout -k 5 "$(left 15)" "$python" tools/train.py "$3" "run=$work/$2" "${data[@]}" "${often[@]}" "${@:4}" "${time[@]}"
}

newest() { # RUN: its checkpoint
    find "$work/$1/checkpoints" -name 'step-*.ckpt' 2>/dev/null | sort | tail -n 1
}

falling() { # SECONDS SECONDS RUN: for a run of the first, what another of the second falls over
    local step=${STEPS:-}
    [[ -n $step ]] || step=$(newest "$3" | sed 's/.*step-0*//; s/.ckpt//')
    echo "optimizer.decay_steps=$((step * $2 / $1 + 1))" optimizer.warmup_steps=20
}

checkpoint() { # COMMAND FROM TO
    "$python" tools/checkpoint.py "$1" "$2" --dtype float16 --out "$3" --force >/dev/null
}

publish() { # RUN: what is there of it, in $OUT
    local from
    from=$(newest "$1")
    [[ -n $from ]] && checkpoint extract-ema "$from" "$work/model.ckpt" || return
    split --bytes=15000000 --numeric-suffixes "$work/model.ckpt" "$out/model.ckpt."
    cat "$work"/unet*/metrics.jsonl >"$out/unet.jsonl"
    cp "$(find "$work/$1/samples" -name 'step-*.png' | sort | tail -n 1)" "$out/samples.png" || true # none as yet
}

publishing() { # RUN: as it goes
    while sleep 40 >/dev/null 2>&1; do publish "$1"; done &
    publisher=$!
}

needs="torch torchvision lightning omegaconf ftfy regex tqdm"
"$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' $needs ||
    "$python" -m pip install --quiet $needs pillow || exit
"$python" -m zipfile -e "$pack" "$work/data" || exit

if [[ -z $vae ]]; then
    decoder=(configs/demo/decoder_128.yaml "${photos[@]}" training.perceptual=null) # its network is not packed
    train 80 vae-1 "${decoder[@]}" init=pbe/weights/demo.ckpt optimizer.decay_steps=null
    read -ra fall <<<"$(falling 80 40 vae-1)"
    train 40 vae "${decoder[@]}" "init=$(newest vae-1)" "${fall[@]}"
    vae=$(newest vae)
    cat "$work"/vae*/metrics.jsonl >"$out/vae.jsonl"
fi
checkpoint slim "$vae" "$out/vae.ckpt" || exit
"$python" tools/checkpoint.py set-vae pbe/weights/demo.ckpt "$vae" --out "$work/start.ckpt" >/dev/null || exit

latents+=(model.vae=null model.size=null "encodings.folder=$work/encodings" optimizer.lr=1.2e-3
    "data.donors.path=$work/data/objects.csv")
first=$(($(left 110) * 2 / 3)) # the first files of encodings, another start and the edits take the rest
publishing unet-1
train "$first" unet-1 configs/demo/unet_128.yaml "${latents[@]}" "model.init=$work/start.ckpt" optimizer.decay_steps=null
kill "$publisher"
publish unet-1 || exit
second=$(left 75)
if ((second > 20)); then
    checkpoint extract-ema "$(newest unet-1)" "$work/averages.ckpt" || exit
    read -ra fall <<<"$(falling "$first" "$second" unet-1)"
    publishing unet
    train "$second" unet configs/demo/unet_128.yaml "${latents[@]}" "model.init=$work/averages.ckpt" "${fall[@]}"
    kill "$publisher"
    publish unet
fi
edits=(--edit examples/flower.jpg examples/flower_mask.png examples/flower_red.jpg
    --edit examples/coffee.png examples/coffee_mask.png examples/cat.png)
timeout "$(left 0)" "$python" -m examples.demo_model grid --ckpt "$work/model.ckpt" --out "$out/edits.png" --count 4 "${edits[@]}"
