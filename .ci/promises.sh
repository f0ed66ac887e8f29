#!/bin/sh
# Checks that every test and every file that docs/reliability.md names is there. Prints what is not.
set -eu
cd "$(dirname "$0")/.."

missing=0
lacks() { echo "promises: docs/reliability.md names $1, which is not there" >&2; missing=$((missing + 1)); }

named=$(grep -o '`[a-z0-9_/.]*`' docs/reliability.md | tr -d '`' | sort -u)
for name in $named; do
    case $name in
        */*.rs) [ -e "$name" ] || [ -e "crates/$name" ] || lacks "$name" ;;
        *_*_*) grep -rqs "fn $name(" crates/*/src crates/*/tests tests fuzz/tests || lacks "$name" ;;
    esac
done
[ "$missing" = 0 ]
