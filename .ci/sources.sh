#!/bin/sh
# Checks what rustfmt does not: that no line of a Rust source is wider than 110 columns, comments, strings and macros
# included (but for an option of QEMU that is one word), that no test's name is longer than 60 characters, and that
# nobody says a word that docs/glossary.md has replaced. Prints every breach.
set -eu
cd "$(dirname "$0")/.."

sources=$(git ls-files '*.rs')
# shellcheck disable=SC2086
wide=$(LC_ALL=C.UTF-8 grep -HnE '^.{111,}' $sources | grep -vE ':[0-9]+: *(-[a-z]+ )?[^ ]+$' | cut -d: -f1,2 || true)
# shellcheck disable=SC2086
long=$(awk '
    /#\[test\]/ { test = 1 }
    test && match($0, /fn [a-z0-9_]+/) {
        name = substr($0, RSTART + 3, RLENGTH - 3)
        if (length(name) > 60) print FILENAME ":" FNR ": " name " has " length(name) " characters"
        test = 0
    }' $sources)
# What docs/glossary.md says instead: missing, outdated, encode, decode, tag, fingerprint, compressed, send, receive,
# throttle, forecast, estimate, violated, authorize, fence, aborted pause, effect, fault, planted bug.
retired='owed|owing|Owed|StillOwed|Lacking|lacking|Restorer|restorer|Sealer|sealer|seal_key|Packed|packing|Packing|Shipped|shipper'
retired="$retired|Landed|landing|RoundLanded|governor|Governor|governed|Governed|foresight|Foresight|gives_way"
retired="$retired|hurry_guest|take_time|Permit|permitted_early|Permitted|pauses_in_vain|paused_in_vain_ms|lacking_ms|look_ms"
retired="$retired|SourceAct|TargetAct|LinkAct|Blow|Weather"
said=$(git grep -nwE "$retired" -- '*.rs' '*.proto' | cut -d: -f1,2 || true)
for line in $said; do echo "sources: $line says a retired word (docs/glossary.md)" >&2; done

for line in $wide; do echo "sources: $line is wider than 110 columns" >&2; done
[ -z "$long" ] || echo "$long" | sed 's/^/sources: /; s/$/; a test has 60 at most/' >&2
[ -z "$wide$long$said" ]
