#!/bin/sh
# Puts a server of iSCSI beside the system's programs: `tests/tgt.sh DEST` leaves DEST/tgtd and DEST/tgtadm.
#
# It comes through apt and is only unpacked: installed, it would be started as a service. Root is not needed. Harmless
# when DEST is complete already.
set -eu

die() { echo "tgt.sh: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tests/tgt.sh DEST"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
[ ! -x "$dest/tgtadm" ] || exit 0

rm -rf "$dest/unpacked"
mkdir -p "$dest/unpacked"
(
    cd "$dest/unpacked"
    apt-get -qq -o APT::Sandbox::User=root download tgt librdmacm1 libibverbs1
    for package in *.deb; do dpkg-deb -x "$package" .; done
    rm -f ./*.deb
)
for program in tgtd tgtadm; do
    binary=$dest/unpacked/usr/sbin/$program
    [ -x "$binary" ] || die "the package tgt has no $program"
    # `exec`, so that the process is the program itself.
    cat > "$dest/$program.new" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH=$dest/unpacked/usr/lib/x86_64-linux-gnu exec $binary "\$@"
WRAPPER
    chmod 755 "$dest/$program.new"
    mv "$dest/$program.new" "$dest/$program"
done
