#!/bin/sh
# Checks which crate uses which, that ARCHITECTURE.md says the same (--write puts it in), that the pure crates
# stay pure, and that only `sys` may hold unsafe code. Prints every breach.
set -eu
cd "$(dirname "$0")/.."
. .ci/part.sh

breaches=0
breach() { echo "arrows: $*" >&2; breaches=$((breaches + 1)); }

# What each crate may use of ours: the only place where this is written down. In the order of the layers.
may_use='
    units      nothing
    pki        nothing
    sys        units
    page       units
    policy     units
    proto      units page policy
    ports      units
    api        units policy ports
    attach     units sys policy ports
    spool      units sys page
    sim        units page policy proto
    engine     units sys page policy proto ports api spool pki
    ownership  units pki ports
    qemu       units sys ports attach
    agent      units sys pki ports api
    doctor     units sys qemu
    host       units sys ports api attach spool pki engine ownership qemu agent
    whimbrel   units sys pki ports api doctor agent host
    fuzz       units page proto ports api sim spool engine qemu agent
    guest      units
    lab        units sys page policy proto ports api attach spool pki engine ownership qemu agent doctor host whimbrel
    bench      units sys page policy proto ports api attach spool pki engine ownership qemu agent doctor host whimbrel lab
'

# --- the document says the same ----------------------------------------------------------------------------------

doc=ARCHITECTURE.md
begin='<!-- dependencies: .ci/arrows.sh --write -->'
end='<!-- end of the dependencies -->'
made=$(mktemp)
trap 'rm -f "$made"' EXIT
{
    echo "$begin"
    echo '```text'
    echo "$may_use" | awk 'NF {
        row = sprintf("%-10s", $1)
        for (n = 2; n <= NF; n++) {
            if (length(row) + 1 + length($n) > 110) { print row; row = sprintf("%10s", "") }
            row = row " " $n
        }
        print row
    }'
    echo '```'
    echo "$end"
} >"$made"
kept "$doc" "$begin" "$end" "$made" "${1:-}" ||
    breach "$doc lists other dependencies than .ci/arrows.sh; .ci/arrows.sh --write puts them in"

# --- the crates do so ----------------------------------------------------------------------------------------------

tree=$(cargo tree --workspace --edges normal --depth 1 --no-dedupe --prefix depth --format ' {p}' --quiet)
ours=$(echo "$tree" | sed -n 's/^0 \([^ ]*\) .*/\1/p')
uses=$(echo "$tree" | awk '$1 == 0 { from = $2 } $1 == 1 { print from " " $2 }')

for crate in $ours; do
    allowed=$(echo "$may_use" | awk -v crate="$crate" '$1 == crate { $1 = ""; print }')
    if [ -z "$allowed" ]; then
        breach "crate $crate is new: say in .ci/arrows.sh what it may use"
        continue
    fi
    for used in $(echo "$uses" | sed -n "s/^$crate //p"); do
        case " $(echo $ours) " in *" $used "*) ;; *) continue ;; esac
        case "$allowed " in *" $used "*) ;; *) breach "$crate uses $used; it may use:$allowed" ;; esac
    done
done

# The pure crates know neither sockets nor files, clocks nor threads.
for crate in units page policy proto ports; do
    for used in $(cargo tree -p "$crate" --edges normal --prefix none --format '{p}' --quiet | cut -d' ' -f1 | sort -u); do
        case $used in
            tokio | mio | socket2 | hyper | axum | rustix | nix | libc) breach "$crate is pure, but brings in $used" ;;
        esac
    done
    found=$(grep -rnE 'std::(net|fs|thread|process|os)\b|Instant::now|SystemTime::now' "crates/$crate/src" || true)
    [ -z "$found" ] || breach "$crate is pure, but:
$found"
done

# The workspace forbids unsafe code; sys alone has lints of its own.
for manifest in crates/*/Cargo.toml fuzz/Cargo.toml guest/Cargo.toml tests/Cargo.toml bench/Cargo.toml; do
    [ "$manifest" != crates/sys/Cargo.toml ] || continue
    [ "$(sed -n '/^\[lints\]/,/^\[/p' "$manifest" | grep -c '^workspace = true')" = 1 ] ||
        breach "$manifest does not take the workspace's lints, which forbid unsafe code"
done
grep -q '^unsafe_code = "forbid"' Cargo.toml || breach "Cargo.toml does not forbid unsafe code"

[ "$breaches" = 0 ] || exit 1
