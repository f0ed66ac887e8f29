# Sourced: a part of a document that is made of something else, between two marks.

# kept DOC BEGIN END MADE [--write]: whether DOC has between its lines BEGIN and END what the file MADE has, marks included; with
# --write it is put there first.
kept() {
    if [ "${5:-}" = --write ]; then
        new=$(mktemp)
        awk -v begin="$2" -v end="$3" -v made="$4" '
            $0 == begin { while ((getline line < made) > 0) print line; skip = 1 }
            !skip { print }
            $0 == end { skip = 0 }' "$1" >"$new"
        cat "$new" >"$1"
        rm -f "$new"
    fi
    awk -v begin="$2" -v end="$3" '$0 == begin { on = 1 } on { print } $0 == end { on = 0 }' "$1" | cmp -s - "$4"
}
