#!/usr/bin/env bash
# bash training/recipes/unit-tiny-gpu/run.sh PACKED [MINUTES]
#
# All of it on one machine with a GPU, offline: unpacks what `pack.sh` made, builds the data on all cores while the
# teacher trains, then the three recipes after it. MINUTES for the four runs together (20), shared out as the recipes
# share them. Run the same command again to go on after a break.
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
packed=$(cd "$1" && pwd)
minutes=${2:-20}
cd "$root"
export UNIT_CACHE=${UNIT_CACHE:-$root/runs/cache} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
cores=$(nproc)
mkdir -p "$UNIT_CACHE" runs/unit-tiny-gpu
recipes=training/recipes/unit-tiny-gpu
for archive in "$packed"/*.tar "$packed"/*.tar.xz; do tar xf "$archive" -C "$UNIT_CACHE"; done

build() {
  "$python" -m unit_cli data lines --only made-lines-train blank-lines-train --workers "$((cores > 2 ? cores - 2 : 1))"
  "$python" -m unit_cli data lines --only lines-train --documents $recipes/documents.txt --pages-per-pdf 150 \
    --workers "$((cores > 2 ? cores - 2 : 1))"
  "$python" -m unit_cli data make-pages --kind sparse --rows 40000 --workers "$((cores > 2 ? cores - 2 : 1))"
  "$python" -m unit_cli data make-pages --kind large --rows 20000 --workers "$((cores > 2 ? cores - 2 : 1))"
  "$python" -m unit_cli data from-pdfs --documents $recipes/documents.txt --pages-per-pdf 40 --rows 60000 \
    --workers "$((cores > 2 ? cores - 2 : 1))"
  touch "$UNIT_CACHE/built"
}
stage() { # recipe, share of the time in percent
  "$python" -m unit_cli train "$recipes/$1.yaml" training.max_minutes="$((minutes * $2 / 10))e-1" \
    training.dataloader_num_workers="$([ "$1" = 0-teacher ] && echo 0 || echo "$((cores > 1 ? cores - 1 : 1))")" \
    2>&1 | tee "runs/unit-tiny-gpu/$1.log"
}

[ -e "$UNIT_CACHE/built" ] || build > runs/unit-tiny-gpu/build.log 2>&1 &
stage 0-teacher 31
wait
[ -e "$UNIT_CACHE/built" ] || { tail -3 runs/unit-tiny-gpu/build.log; exit 1; }
stage 1-characters 13
stage 2-intra-scale 33
stage 3-inter-scale 23
