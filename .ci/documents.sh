#!/bin/sh
# Checks the documents: how long the first ones are, how wide lines are, and that what they point to is there:
# links between documents with their sections, files named in backquotes, documents named in code. Prints every
# breach.
set -eu
cd "$(dirname "$0")/.."

wrong=0
lacks() { echo "documents: $*" >&2; wrong=$((wrong + 1)); }

# README.md is read in three minutes, ARCHITECTURE.md in ten.
words=$(wc -w <README.md)
[ "$words" -le 700 ] || lacks "README.md has $words words; at most 700. Details belong into docs/guide.md"
bytes=$(wc -c <ARCHITECTURE.md)
[ "$bytes" -le 12288 ] || lacks "ARCHITECTURE.md has $bytes bytes; at most 12288. Details belong into docs/design"

# Tables apart, which cannot be wrapped, the output of ./dev bench, and two documents that grow with each change.
for doc in *.md docs/*.md docs/design/*.md fuzz/*.md guest/*.md; do
    case $doc in CHANGELOG.md | docs/benchmarks.md | docs/compatibility.md) continue ;; esac
    for line in $(LC_ALL=C.UTF-8 grep -nE '^[^|].{110,}' "$doc" | cut -d: -f1); do
        lacks "$doc:$line is wider than 110 columns"
    done
done

# The sections of a document, as links name them.
sections() {
    awk '/^```/ { code = !code } !code && /^#+ / { sub(/^#+ /, ""); print }' "$1" |
        LC_ALL=C.UTF-8 sed 's/\[\([^]]*\)\]([^)]*)/\1/g; s/[^[:alnum:] _-]//g; s/ /-/g' | tr '[:upper:]' '[:lower:]'
}

code="bench contrib crates fuzz guest tests"
# shellcheck disable=SC2086
docs=$(find ./*.md docs $code -name '*.md' | sed 's#^\./##' | sort)
for doc in $docs; do
    links=$(awk '/^```/ { code = !code } !code' "$doc" | sed 's/`[^`]*`//g' | grep -oE '\]\([^) ]+\)' |
        sed 's/^](//; s/)$//' | sort -u || true)
    for link in $links; do
        case $link in http://* | https://*) continue ;; esac
        file=${link%%#*}
        target=$doc
        [ -z "$file" ] || target=$(dirname "$doc")/$file
        [ -e "$target" ] || { lacks "$doc links to $link, which is not there"; continue; }
        case $link in
            *.md#* | "#"*) sections "$target" | grep -qxF -e "${link#*#}" || lacks "$doc links to $link: no such section" ;;
        esac
    done
    # Files in backquotes: as they are, beside the document, or without crates/ and src/.
    for name in $(grep -oE '`[a-z_0-9]+(/[a-z_0-9]+)+(\.rs)?`' "$doc" | tr -d '`' | sort -u); do
        rest=${name#*/}
        crate=${name%%/*}
        [ -d "crates/$crate" ] || case $name in *.rs) ;; *) continue ;; esac
        [ -e "$name" ] || [ -e "$(dirname "$doc")/$name" ] || [ -e "crates/$name" ] || [ -e "crates/$crate/src/$rest" ] ||
            lacks "$doc names $name, which is not there"
    done
done

# What the glossary says that the code still has: a rename takes it out of the table, too.
for name in $(awk -F '|' 'NF == 6 { print $5 }' docs/glossary.md | grep -oE '`[A-Za-z_]+`' | tr -d '`' | sort -u); do
    grep -rqw "$name" crates || lacks "docs/glossary.md says that the code still has $name, which it has not"
done

# Documents that code and scripts name.
# shellcheck disable=SC2086
for name in $(grep -rhoE '\b(docs/[a-z/-]+|[A-Z]{4,})\.md\b' dev .ci Cargo.toml $code | sort -u); do
    # shellcheck disable=SC2086
    [ -e "$name" ] || lacks "$name is named in $(grep -rlF "$name" dev .ci Cargo.toml $code | head -1) and is not there"
done
[ "$wrong" = 0 ]
