#!/usr/bin/env bash
# bash training/recipes/unit-tiny-gpu/pack.sh OUT
#
# Packs what the recipes beside this file learn from, for a machine that reaches no package registry: four archives in
# OUT, each below 60 MB, unpacked by `run.sh`. Run it where `make data` has been run; takes a minute or two.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
cache=${UNIT_CACHE:-$HOME/.cache/unit}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pictures no larger than any view of them, with the captions' embeddings beside them
mkdir -p "$work/data"
"$python" -m unit_cli data shrink "$cache/data/pictures-train" "$work/data/pictures-train" --max-side 160 --quality 85
tar cf "$out/pictures.tar" -C "$work" data

# the documents of the list, in two halves
grep -v '^#' "$here/documents.txt" > "$work/documents"
split -n l/2 "$work/documents" "$work/half-"
(cd "$work" && for half in half-*; do tar cf "$out/documents-${half#half-}.tar" --transform 's,^,trees/,' -C "$cache/trees" -T "$work/$half"; done)

# what made pages are drawn from, fonts cut down to Latin, and the marks of the held-out text
mkdir -p "$work/misc/trees/miscfiles/usr/share/dict" "$work/misc/data"
cp "$cache"/trees/*.pdfs.json "$cache"/trees/fonts-*.json "$cache"/trees/prose-*.txt "$work/misc/trees"
cp "$cache/trees/miscfiles/usr/share/dict/web2" "$work/misc/trees/miscfiles/usr/share/dict"
cp "$cache"/data/validation-text-*.npy "$work/misc/data"
"$python" - "$cache/trees" "$work/misc/trees" <<'PY'
import json, logging, sys
from pathlib import Path
from fontTools import subset
logging.disable()
source, target = map(Path, sys.argv[1:])
options = subset.Options(hinting=False, layout_features=[], name_IDs=["*"])
options.drop_tables += ["GSUB", "GPOS", "DSIG", "FFTM"]
for listing in source.glob("fonts-*.json"):
    for file in (file for files in json.loads(listing.read_text()).values() for file in files):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        font = subset.load_font(str(source / file), options)
        chosen = subset.Subsetter(options)
        chosen.populate(unicodes=[*range(0x20, 0x7F), *range(0xA0, 0x100)])
        chosen.subset(font)
        subset.save_font(font, str(target / file), options)
PY
tar cJf "$out/misc.tar.xz" -C "$work/misc" .
ls -l "$out"
