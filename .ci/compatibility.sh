#!/bin/sh
# Checks docs/compatibility.md: tests that rows name are there, and the parts about the twin and the field are what their tables say
# (--write puts that in). That a refusal is what the program says is checked by tests/tests/compatibility.rs.
set -eu
cd "$(dirname "$0")/.."
. .ci/part.sh

doc=docs/compatibility.md
listed=tests/src/twin/listed.rs
made=$(mktemp)
trap 'rm -f "$made"' EXIT

of_the_twin() {
    printf '\n| what is different on the target | shown by |\n|---|---|\n'
    sed -n 's/^ .*what: "\([^"]*\)".*/| \1 | `i9_twins_stay_alike` |/p' "$listed" | awk '!seen[$0]++'
    printf '\n| after this | a move is refused, or ends, and leaves the VM as it was; the error says | shown by |\n|---|---|---|\n'
    awk '{ line = $0 }
        sub(/^ .*after: "/, "", line) { sub(/".*/, "", line); after = line; line = $0 }
        sub(/^ .*says: "/, "", line) { sub(/".*/, "", line); print "| " after " | `" line "` | `i9_twins_stay_alike` |" }' "$listed"
    printf '\n'
}

of_the_field() {
    printf '\n| who starts VMs like this | what happens | shown by |\n|---|---|---|\n'
    for case in tests/field/*.toml; do
        field() { sed -n "s/^$1 = [\"']\{0,1\}\(.*[^\"']\)[\"']\{0,1\}\$/\1/p" "$case" | head -1; }
        name=$(basename "$case" .toml)
        shown="\`./dev field $name\`"
        [ "$(field everyday)" != true ] || shown='`i9_vms_that_everybody_has_go_there_and_back`'
        happens="there and back in every mode"
        uses=$(sed -n 's/^uses = \[\(.*\)\]$/\1/p' "$case" | tr -d '"')
        [ -z "$uses" ] || happens="$happens; Linux uses its $uses"
        [ -z "$(field refused)" ] || happens="refused, by a reason with \`$(field refused)\` in it"
        echo "| $(field who) | $happens | $shown |"
    done
    printf '\n'
}

wrong=0
lacks() { echo "compatibility: $*" >&2; wrong=$((wrong + 1)); }

# Between its two marks the document says what a part is made of; `--write` puts it there.
part() {
    begin="<!-- of the $1: .ci/compatibility.sh --write -->"
    end="<!-- end of the $1 -->"
    { echo "$begin"; "of_the_$1"; echo "$end"; } >"$made"
    kept "$doc" "$begin" "$end" "$made" "$2" ||
        lacks "$doc does not say what the $1 is made of; .ci/compatibility.sh --write puts it in"
}
part twin "${1:-}"
part field "${1:-}"

# The last column of each row: a test that is there, or why there is none.
awk '/^[|] / && !/shown by [|]$/ {
    row = $0; sub(/ *[|]$/, ""); sub(/.* [|] ?/, ""); print $0 "\t" substr(row, 1, 70) }' "$doc" >"$made"
tab=$(printf '\t')
while IFS= read -r row; do
    case ${row%%"$tab"*} in
        *'`'* | *"the same"* | *"read, not run"*) ;;
        *) lacks "no test shows ${row#*"$tab"}" ;;
    esac
done <"$made"
for name in $(cut -f1 "$made" | grep -o '`[a-z0-9_]*`' | tr -d '`' | grep '_.*_' | sort -u); do
    grep -rqs "fn $name(" crates/*/src crates/*/tests tests fuzz/src fuzz/tests || lacks "$doc names $name, which is not there"
done
[ "$wrong" = 0 ]
