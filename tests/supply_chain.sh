#!/usr/bin/env bash
# What an installed srpo_core brings along, and whether its wheel can be built again. Ends with a line that says what held.
#   bash tests/supply_chain.sh
# In dist/supply/: the bill of materials (CycloneDX), the list of licenses, the advisories, the wheel with its hash.
# - Two builds of the same commit, in different folders and at different times, have one hash (SOURCE_DATE_EPOCH).
# - The packages that the core needs, and all that they need, are under licenses that allow any use.
# - pip-audit knows no advisory for them, or each is in tests/advisories.txt with the reason. Where its service cannot be
#   reached, the last line says "not audited", and with REQUIRE_AUDIT=1 that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} tools=${TOOLS:-.venv-supply} out=dist/supply
rm -rf "$out" && mkdir -p "$out"
if [[ ! -x $tools/bin/pip-audit ]]; then
  "$python" -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check build hatchling cyclonedx-bom pip-audit pip-licenses
fi

# The wheel, twice.
epoch=$(git log -1 --format=%ct)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for build in first second/deeper; do
  mkdir -p "$scratch/$build"
  git archive HEAD | tar -x -C "$scratch/$build"
  find "$scratch/$build" -exec touch -d "@$RANDOM" {} +
  SOURCE_DATE_EPOCH=$epoch "$tools/bin/python" -m build --no-isolation --outdir "$scratch/$build/dist" \
    "$scratch/$build" > "$out/build.log" 2>&1
done
(cd "$scratch/first/dist" && sha256sum ./*) > "$out/sha256.txt"
(cd "$scratch/second/deeper/dist" && sha256sum -c --quiet "$OLDPWD/$out/sha256.txt") ||
  { echo "failed: two builds of one commit differ"; exit 1; }
cp "$scratch"/first/dist/*.whl "$out/"
wheel=$(grep -o '^[0-9a-f]\{12\}.*whl' "$out/sha256.txt" | sed 's/^\(.\{12\}\).*/\1/')

# What the core needs, at the versions installed beside $python.
"$python" - > "$out/requirements.txt" << 'CLOSURE'
from importlib.metadata import distribution, requires
from packaging.requirements import Requirement

seen, waiting = {}, ["srpo-core"]
while waiting:
    name = waiting.pop()
    for text in requires(name) or []:
        needed = Requirement(text)
        key = needed.name.lower().replace("_", "-")
        if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and key not in seen:
            seen[key] = distribution(key).version.partition("+")[0]
            waiting.append(key)
for name, version in sorted(seen.items()):
    print(f"{name}=={version}")
CLOSURE
names=$(cut -d= -f1 "$out/requirements.txt")
count=$(wc -l < "$out/requirements.txt")

"$tools/bin/cyclonedx-py" requirements "$out/requirements.txt" --output-reproducible --of JSON -o "$out/bom.json"
# shellcheck disable=SC2086
"$tools/bin/pip-licenses" --python "$python" --with-system --packages $names --format=markdown --with-urls > "$out/licenses.md"
# shellcheck disable=SC2086
"$tools/bin/pip-licenses" --python "$python" --with-system --packages $names --partial-match \
  --allow-only='MIT;BSD;Apache;PSF;Python Software Foundation;ISC;Mozilla Public License 2.0;MPL-2.0;Unlicense' \
  > /dev/null || { echo "failed: a license in $out/licenses.md is not on the list of tests/supply_chain.sh"; exit 1; }

# Advisories.
ignored=()
while read -r id _; do
  [[ -z $id || $id == \#* ]] || ignored+=(--ignore-vuln "$id")
done < tests/advisories.txt
audited="no advisory for any of them beside the $((${#ignored[@]} / 2)) explained in tests/advisories.txt"
if ! "$tools/bin/pip-audit" --requirement "$out/requirements.txt" --no-deps --disable-pip --progress-spinner off \
  "${ignored[@]}" > "$out/audit.txt" 2>&1; then
  if grep -q "^Name " "$out/audit.txt"; then
    cat "$out/audit.txt"
    echo "failed: an advisory that tests/advisories.txt does not explain"
    exit 1
  fi
  [[ -z ${REQUIRE_AUDIT:-} ]] || { tail -3 "$out/audit.txt"; echo "failed: not audited"; exit 1; }
  audited="not audited (the service of advisories was not reached)"
fi
if unknown=$(grep -c "could not be audited" "$out/audit.txt"); then  # it then ends well all the same
  [[ -z ${REQUIRE_AUDIT:-} ]] || { echo "failed: $unknown packages were not audited, see $out/audit.txt"; exit 1; }
  audited="$unknown of them not audited (the index does not tell advisories)"
fi
echo "held: two builds, one wheel ($wheel...); $count packages that the core needs, all under permissive licenses;" \
  "$audited. See $out"
