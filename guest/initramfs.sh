#!/bin/sh
# Makes the initramfs of the test guest: its init, and the kernel modules that virtio devices need.
#
#   guest/initramfs.sh OUT KERNEL_VERSION|MODULES_DIRECTORY GUEST_BINARY
#
# Needs cpio; xz or zstd where the kernel's modules are compressed with it. The archive itself is not
# compressed: an emulated CPU takes longer to unpack it than QEMU takes to copy it.
set -eu

if [ $# -ne 3 ]; then
    echo "usage: guest/initramfs.sh OUT KERNEL_VERSION|MODULES_DIRECTORY GUEST_BINARY" >&2
    exit 2
fi
out=$1 version=$2 binary=$3

modules=
for place in "/lib/modules/$version" "/usr/lib/modules/$version" "$version"; do
    if [ -e "$place/modules.dep" ]; then modules=$place; break; fi
done
if [ -z "$modules" ]; then
    echo "guest/initramfs.sh: no modules.dep for $version; is the package of this kernel installed?" >&2
    exit 1
fi
[ -x "$binary" ] || { echo "guest/initramfs.sh: $binary is not a program" >&2; exit 1; }

root=$(mktemp -d "${TMPDIR:-/tmp}/whb-initramfs.XXXXXX")
trap 'rm -rf "$root"' EXIT
trap 'exit 1' HUP INT TERM

chmod 755 "$root"
mkdir "$root/dev" "$root/proc" "$root/sys" "$root/modules"
cp "$binary" "$root/init"
strip "$root/init" 2>/dev/null || true
chmod 755 "$root/init"

# Takes module $1 along on $list, after all that it depends on. What is built into the kernel is in no list,
# and not needed.
take() {
    line=$(grep -E "/$1\.ko(\.xz|\.zst|\.gz)?:" "$modules/modules.dep") || return 0
    # modules.dep lists the dependencies with the deepest last.
    reversed=
    for path in ${line#*:}; do reversed="$path $reversed"; done
    for path in $reversed "${line%%:*}"; do
        name=$(basename "$path")
        name=${name%%.ko*}.ko
        [ -e "$root/modules/$name" ] && continue
        case $path in
            *.xz) xz -dc "$modules/$path" >"$root/modules/$name" ;;
            *.zst) zstd -qdc "$modules/$path" >"$root/modules/$name" ;;
            *.gz) gzip -dc "$modules/$path" >"$root/modules/$name" ;;
            *) cp "$modules/$path" "$root/modules/$name" ;;
        esac
        echo "$name" >>"$root/modules/$list"
    done
}
list=order
: >"$root/modules/$list"
# q35 has its devices on PCI, microvm on virtio-mmio; the drivers of what is plugged in come last.
for module in virtio_pci virtio_mmio virtio_net virtio_blk virtio_console virtio_balloon virtio_mem; do take "$module"; done
# What only some guests ask for.
list=order.disc
for module in ata_piix virtio_scsi sr_mod; do take "$module"; done
list=order.variables
take efivarfs

# Equal input gives an equal archive.
find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc --reproducible -R 0:0) >"$out.new"
mv "$out.new" "$out"
