#!/bin/sh
# Puts Open vSwitch beside the system's programs: `tests/ovs.sh DEST` leaves its programs and vswitch.ovsschema in DEST.
#
# It comes through apt and is only unpacked: installed, it would be started as a service. Root is not needed. Harmless
# when DEST is complete already.
set -eu

die() { echo "ovs.sh: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tests/ovs.sh DEST"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
[ ! -e "$dest/vswitch.ovsschema" ] || exit 0

rm -rf "$dest/unpacked"
mkdir -p "$dest/unpacked"
(
    cd "$dest/unpacked"
    apt-get -qq -o APT::Sandbox::User=root download openvswitch-switch openvswitch-common libunbound8 libevent-2.1-7 \
        libcap-ng0 libnuma1 libxdp1 libbpf1
    for package in *.deb; do dpkg-deb -x "$package" .; done
    rm -f ./*.deb
)
for program in usr/bin/ovs-vsctl usr/bin/ovsdb-tool usr/sbin/ovsdb-server usr/lib/openvswitch-switch/ovs-vswitchd; do
    binary=$dest/unpacked/$program
    [ -x "$binary" ] || die "the packages have no $program"
    # `exec`, so that the process is the program itself.
    cat > "$dest/$(basename "$program")" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH=$dest/unpacked/usr/lib/x86_64-linux-gnu:$dest/unpacked/lib/x86_64-linux-gnu exec $binary "\$@"
WRAPPER
    chmod 755 "$dest/$(basename "$program")"
done
"$dest/ovs-vswitchd" --version >/dev/null || die "ovs-vswitchd does not run"
cp "$dest/unpacked/usr/share/openvswitch/vswitch.ovsschema" "$dest/vswitch.ovsschema"
