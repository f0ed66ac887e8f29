#!/bin/sh
# Checks docs/compatibility.md: tests that rows name are there, and the part about the twin is what its tables say (--write puts
# that in). That a refusal is what the program says is checked by tests/tests/compatibility.rs.
set -eu
cd "$(dirname "$0")/.."

doc=docs/compatibility.md
listed=tests/src/twin/listed.rs
begin='<!-- of the twin: .ci/compatibility.sh --write -->'
end='<!-- end of the twin -->'
made=$(mktemp)
trap 'rm -f "$made"' EXIT

{
    echo "$begin"
    printf '\n| what is different on the target | shown by |\n|---|---|\n'
    sed -n 's/^ .*what: "\([^"]*\)".*/| \1 | `i9_twins_stay_alike` |/p' "$listed" | awk '!seen[$0]++'
    printf '\n| after this | a move is refused, or ends, and leaves the VM as it was; the error says | shown by |\n|---|---|---|\n'
    awk '{ line = $0 }
        sub(/^ .*after: "/, "", line) { sub(/".*/, "", line); after = line; line = $0 }
        sub(/^ .*says: "/, "", line) { sub(/".*/, "", line); print "| " after " | `" line "` | `i9_twins_stay_alike` |" }' "$listed"
    printf '\n'
    echo "$end"
} >"$made"

if [ "${1:-}" = --write ]; then
    new=$(mktemp)
    awk -v begin="$begin" -v end="$end" -v made="$made" '
        $0 == begin { while ((getline line < made) > 0) print line; skip = 1 }
        !skip { print }
        $0 == end { skip = 0 }' "$doc" >"$new"
    cat "$new" >"$doc"
    rm -f "$new"
fi

wrong=0
lacks() { echo "compatibility: $*" >&2; wrong=$((wrong + 1)); }

awk -v begin="$begin" -v end="$end" '$0 == begin { on = 1 } on { print } $0 == end { on = 0 }' "$doc" | cmp -s - "$made" ||
    lacks "$doc does not say what $listed says; .ci/compatibility.sh --write puts it in"

# The last column, row by row; each name there.
awk '/^[|] / && !/shown by [|]$/ { row = $0; sub(/ *[|]$/, ""); sub(/.* [|] ?/, ""); print $0 " of: " substr(row, 1, 70) }' "$doc" >"$made"
while read -r row; do
    shown=${row%% of: *}
    case $shown in
        *'`'* | *"the same"* | *"read, not run"*) ;;
        # Known, and not tested: said each time.
        *) echo "compatibility: no test shows$row" >&2 ;;
    esac
done <"$made"
for name in $(sed 's/ of: .*//' "$made" | grep -o '`[a-z0-9_]*`' | tr -d '`' | grep '_.*_' | sort -u); do
    grep -rqs "fn $name(" crates/*/src crates/*/tests tests fuzz/src fuzz/tests || lacks "$doc names $name, which is not there"
done
[ "$wrong" = 0 ]
