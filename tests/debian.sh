#!/bin/sh
# Makes a Debian that boots: `tests/debian.sh DEST` leaves DEST/disk.img (ext4, without partitions),
# DEST/vmlinuz, DEST/initrd.img and DEST/key, with which root may log in by ssh. Needs root, debootstrap,
# ssh-keygen and mkfs.ext4.
#
# It is an ordinary system: systemd, udev, dbus, cron, ssh, nginx, a journal on its disk. It has a repository of
# its own on that disk, with an update of the package `whimbrel-day` that it has as version 1: a service that
# adds a line a second to a chain, each with the checksum of the one before. Harmless when DEST is complete
# already.
set -eu

die() { echo "debian.sh: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tests/debian.sh DEST"
[ "$(id -u)" = 0 ] || die "needs root"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
# Raised with every change of this script.
edition=3
[ "$(cat "$dest/edition" 2>/dev/null)" != "$edition" ] || exit 0

suite=bookworm
packages=systemd-sysv,udev,dbus,cron,openssh-server,nginx-light,iproute2,procps,kmod,zstd
packages=$packages,initramfs-tools,e2fsprogs
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
    grep -v security | sort -u | head -n 1)
mirror=${mirror:-http://deb.debian.org/debian}

work=$(mktemp -d "${TMPDIR:-/tmp}/whb-debian.XXXXXX")
root=$work/root
trap 'umount "$root/proc" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# No service is started while this is made.
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" >"$work/log" 2>&1 ||
    die "debootstrap failed: $(tail -5 "$work/log")"
inside() {
    chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
        LC_ALL=C "$@" >>"$work/log" 2>&1 || die "$* failed: $(tail -5 "$work/log")"
}

# An emulated CPU takes long to unpack modules that this machine does not have.
mkdir -p "$root/etc/initramfs-tools"
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=lz4/' "$root/etc/initramfs-tools/initramfs.conf"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >"$root/etc/initramfs-tools/modules"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
mount -t proc proc "$root/proc"
inside apt-get -qq install -y --no-install-recommends lz4 linux-image-cloud-amd64

# Both versions of a package with a service.
package() {
    at=$work/package
    rm -rf "$at"
    mkdir -p "$at/DEBIAN" "$at/usr/lib/systemd/system" "$at/usr/libexec"
    cat >"$at/DEBIAN/control" <<CONTROL
Package: whimbrel-day
Version: $1
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: a chain of lines, each with the checksum of the one before
CONTROL
    cat >"$at/DEBIAN/postinst" <<'POSTINST'
#!/bin/sh
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
systemctl restart whimbrel-day
POSTINST
    cat >"$at/usr/libexec/whimbrel-day" <<CHAIN
#!/bin/sh
# Version $1.
cd /var/lib
while sleep 1; do
    echo "\$(tail -n 1 whimbrel-day | cksum) $1" >>whimbrel-day
done
CHAIN
    printf '[Service]\nExecStart=/usr/libexec/whimbrel-day\n[Install]\nWantedBy=multi-user.target\n' \
        >"$at/usr/lib/systemd/system/whimbrel-day.service"
    chmod 755 "$at/DEBIAN/postinst" "$at/usr/libexec/whimbrel-day"
    dpkg-deb --root-owner-group -b "$at" "$2" >>"$work/log"
}
mkdir -p "$root/srv/repository"
package 1 "$root/srv/one.deb"
package 2 "$root/srv/repository/two.deb"
: >"$root/var/lib/whimbrel-day"
inside dpkg -i /srv/one.deb
inside systemctl enable whimbrel-day
(
    cd "$root/srv/repository"
    dpkg-deb -f two.deb
    echo "Filename: ./two.deb"
    echo "Size: $(stat -c %s two.deb)"
    echo "SHA256: $(sha256sum two.deb | cut -d' ' -f1)"
    echo
) >"$root/srv/repository/Packages"
echo 'deb [trusted=yes] file:/srv/repository ./' >"$root/etc/apt/sources.list"
inside apt-get -qq clean
rm -rf "$root/usr/sbin/policy-rc.d" "$root"/var/lib/apt/lists/*

# Nobody but the laboratory has this key, and nobody else reaches it.
ssh-keygen -q -t ed25519 -N '' -C day -f "$work/key"
mkdir -p -m 700 "$root/root/.ssh"
cp "$work/key.pub" "$root/root/.ssh/authorized_keys"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
echo day >"$root/etc/hostname"
echo '* * * * * root date >/var/lib/cron-was-here' >"$root/etc/cron.d/day"
cat >"$root/etc/systemd/network/lan.network" <<'NETWORK'
[Match]
Driver=virtio_net
[Network]
Address=10.78.0.199/24
LinkLocalAddressing=no
IPv6AcceptRA=no
NETWORK
inside systemctl enable systemd-networkd
# They would do something at times that nobody chooses.
inside systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer

umount "$root/proc"
cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
cp "$root"/boot/initrd.img-* "$work/initrd.img"
truncate -s 1536M "$work/disk.img"
PATH=$PATH:/sbin:/usr/sbin mkfs.ext4 -q -d "$root" "$work/disk.img"
for file in disk.img vmlinuz initrd.img key; do mv "$work/$file" "$dest/$file"; done
chmod 644 "$dest/vmlinuz" "$dest/initrd.img" "$dest/disk.img"
echo "$edition" >"$dest/edition"
