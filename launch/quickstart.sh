#!/usr/bin/env bash
# The whole method on two CPU cores in a few minutes: draw apples and oranges, pack them into shards, pretrain a
# small VQ-VAE-2, encode both domains once, learn the energy from apples to oranges, translate, and score.
#
#   bash launch/quickstart.sh [RUN]        (default: runs/quickstart)
#
# Run it again after an interruption and it continues where it stopped; run it again after the end and it
# prints the results. The programs are those that a cluster runs, with smaller numbers.
set -euo pipefail
case "${1:-}" in -*) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;; esac
run="${1:-runs/quickstart}"
case "$run" in /*) ;; *) run="$PWD/$run" ;; esac
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment figures

begun=$SECONDS
step() { echo; echo "== $1 (after $((SECONDS - begun)) s)"; }

step "1/6 drawing and packing apples and oranges"
python shards/pack.py builtin:fruit --out "$run/shards" --resolution 64 --count 1200 --test 256 --workers 2

step "2/6 pretraining the autoencoder"
python launch/pretrain.py configs/debug/vqvae2.yaml --run "$run/pretrain" \
  "data.train=[$run/shards/apple/train, $run/shards/orange/train]"

step "3/6 encoding both domains once"
for fruit in apple orange; do
  python launch/encode_latents.py --autoencoder "$run/pretrain" \
    --shards "$run/shards/$fruit/train" --out "$run/latents/$fruit"
done

step "4/6 learning the energy from apples to oranges"
python launch/train_energy.py configs/energy/fruit.yaml --run "$run/apple2orange" \
  "autoencoder=$run/pretrain" "data.source=$run/latents/apple" "data.target=$run/latents/orange"

step "5/6 translating apples that no stage has seen"
python launch/translate.py "$run/shards/apple/test" --energy "$run/apple2orange" --out "$run/translated" \
  --limit 16 --sheet --path

step "6/6 scoring against the true factors"
python eval/translation.py "$run/apple2orange" --train "$run/shards/apple/train" "$run/shards/orange/train" \
  --test "$run/shards/apple/test" --out "$run/eval" --baselines mean-shift gaussian

echo
echo "done in $((SECONDS - begun)) s"
echo "look at:  $run/eval/translation.png"
echo "          $run/translated/sheets/ (before and after)"
echo "          $run/translated/paths/  (trajectories)"
