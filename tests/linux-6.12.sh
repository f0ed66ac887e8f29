#!/bin/sh
# Puts Linux 6.12 or later beside the system's own, with its modules for networks: `tests/linux-6.12.sh DEST` leaves
# DEST/vmlinuz, DEST/modules/NAME.ko, and DEST/modules/order, in which they can be loaded.
#
# On Debian 12 it comes from bookworm-backports and is only unpacked, never installed: apt works on a state directory
# of its own, so neither the system's packages nor its sources change. Root is not needed. Harmless when DEST is
# complete already.
set -eu

die() { echo "linux-6.12.sh: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tests/linux-6.12.sh DEST"
[ ! -r "$1/modules/order" ] || exit 0

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
case $codename in
    bookworm) suite=bookworm-backports ;;
    trixie | forky) suite=$codename ;;
    *) die "knows where Linux 6.12 is for Debian only; this is '$codename'" ;;
esac
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || die "needs $keyring (package debian-archive-keyring)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/parts" "$work/modules"

# The mirror is the one that this system uses.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null \
    | grep -v security | sort -u | head -n 1)
echo "deb [signed-by=$keyring] ${mirror:-http://deb.debian.org/debian} $suite main" > "$work/sources.list"
apt() {
    tool=$1
    shift
    "apt-$tool" -qq \
        -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/parts" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts="$work/parts" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}
apt get update >&2
package=$(apt cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$package" ] || die "apt knows no kernel in $suite"
(cd "$work" && apt get download "$package")

dpkg-deb --fsys-tarfile "$work"/*.deb | tar -x -C "$work" --wildcards \
    './boot/vmlinuz-*' '*/drivers/vhost/vhost*' '*/drivers/net/tun.*' '*/drivers/net/tap.*' '*/drivers/net/veth.*' \
    '*/net/bridge/bridge.*' '*/net/802/stp.*' '*/net/llc/llc.*'
# Each after what it depends on.
for name in vhost_iotlb vhost tun tap vhost_net llc stp bridge veth; do
    for path in $(find "$work" -name "$name.ko*"); do
        case $path in
            *.xz) xz -dc "$path" ;;
            *.zst) zstd -qdc "$path" ;;
            *) cat "$path" ;;
        esac >"$work/modules/$name.ko"
        echo "$name.ko" >>"$work/modules/order"
    done
done
for needed in tun vhost_net; do
    grep -q "^$needed.ko" "$work/modules/order" || die "$package has no module $needed"
done
mkdir -p "$1"
rm -rf "$1/modules"
cp "$work"/boot/vmlinuz-* "$1/vmlinuz"
cp -r "$work/modules" "$1/modules.new"
mv "$1/modules.new" "$1/modules"
