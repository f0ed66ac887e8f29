#!/bin/sh
# Checks which crate uses which: `units ← {sys, page, policy, proto} ← engine ← {ownership, qemu, agent} ← host ← whimbrel`, that the pure
# crates stay pure, and that only `sys` may hold unsafe code. Prints every breach.
set -eu
cd "$(dirname "$0")/.."

breaches=0
breach() { echo "arrows: $*" >&2; breaches=$((breaches + 1)); }

# What a crate of ours may use of ours.
may_use() {
    case $1 in
        units) ;;
        pki) ;;
        sys | page | policy) echo units ;;
        proto) echo units page ;;
        sim) echo units page policy proto ;;
        spool) echo units sys page ;;
        engine) echo units sys page policy proto spool pki ;;
        ownership) echo units engine ;;
        qemu) echo units sys page policy proto engine ;;
        doctor) echo units sys engine qemu ;;
        agent) echo units pki engine ;;
        host) echo units sys spool pki engine ownership qemu agent ;;
        whimbrel) echo units sys pki engine doctor agent host ;;
        fuzz) echo units page proto sim spool engine qemu agent ;;
        guest) echo units ;;
        lab | bench) echo units sys page policy proto spool pki engine ownership qemu doctor agent host whimbrel lab ;;
        *) echo "?" ;;
    esac
}

tree=$(cargo tree --workspace --edges normal --depth 1 --no-dedupe --prefix depth --format ' {p}' --quiet)
ours=$(echo "$tree" | sed -n 's/^0 \([^ ]*\) .*/\1/p')
uses=$(echo "$tree" | awk '$1 == 0 { from = $2 } $1 == 1 { print from " " $2 }')

for crate in $ours; do
    allowed=$(may_use "$crate")
    if [ "$allowed" = "?" ]; then
        breach "crate $crate is new: say in .ci/arrows.sh what it may use"
        continue
    fi
    for used in $(echo "$uses" | sed -n "s/^$crate //p"); do
        case " $(echo $ours) " in *" $used "*) ;; *) continue ;; esac
        case " $allowed " in *" $used "*) ;; *) breach "$crate uses $used; it may use: ${allowed:-nothing of ours}" ;; esac
    done
done

# The pure crates know neither sockets nor files, clocks nor threads.
for crate in units page policy proto; do
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
