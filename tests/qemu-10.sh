#!/bin/sh
# Puts QEMU 10 beside the system's own: `tests/qemu-10.sh DEST` leaves DEST/bin/qemu-system-x86_64.
#
# On Debian 12 it comes from bookworm-backports and is only unpacked, never installed: apt works on a state directory
# of its own, so neither the system's packages nor its sources change. Root is not needed. Where the system's QEMU is
# already new enough, DEST/bin gets a link to it. Harmless when DEST is complete already.
set -eu

die() { echo "qemu-10.sh: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tests/qemu-10.sh DEST"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
binary=$dest/bin/qemu-system-x86_64

major() { "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p'; }

if [ -x "$binary" ] && [ "$(major "$binary")" -ge 10 ] 2>/dev/null; then
    echo "$binary"
    exit 0
fi

system=$(command -v qemu-system-x86_64 || true)
if [ -n "$system" ] && [ "$(major "$system")" -ge 10 ] 2>/dev/null; then
    mkdir -p "$dest/bin"
    ln -sf "$system" "$binary"
    echo "$binary"
    exit 0
fi

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
[ "$codename" = bookworm ] || die "knows where QEMU 10 is for Debian 12 (bookworm) only; this is '$codename'. \
Install a QEMU of version 10 or later with the system's own means"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/parts"

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || die "needs $keyring (package debian-archive-keyring)"
# The mirror is the one that this system uses.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null \
    | grep -v security | sort -u | head -n 1)
mirror=${mirror:-http://deb.debian.org/debian}
for suite in bookworm bookworm-updates bookworm-backports; do
    echo "deb [signed-by=$keyring] $mirror $suite main"
done > "$work/sources.list"

apt() {
    apt-get -qq \
        -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/parts" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts="$work/parts" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}
apt update >&2
# Not `download`: the solver then also fetches the libraries that this system lacks or has too old.
apt install --download-only --no-install-recommends --reinstall -y -t bookworm-backports \
    qemu-system-x86 qemu-system-common qemu-system-data seabios ipxe-qemu >&2

for package in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$dest"
done

mkdir -p "$dest/bin"
libs=$dest/usr/lib/x86_64-linux-gnu
# `exec`, so that the process is QEMU itself.
cat > "$binary" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH=$libs:$dest/lib/x86_64-linux-gnu QEMU_MODULE_DIR=$libs/qemu \\
    exec $dest/usr/bin/qemu-system-x86_64 -L $dest/usr/share/qemu -L $dest/usr/share/seabios -L $dest/usr/lib/ipxe/qemu "\$@"
WRAPPER
chmod 755 "$binary"

[ "$(major "$binary")" -ge 10 ] 2>/dev/null || die "unpacked into $dest, but it does not start: $("$binary" --version 2>&1)"
echo "$binary"
