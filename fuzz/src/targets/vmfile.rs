use qemu::{
    Host, Kvm, Recipe, VmFile,
    recipe::{Paths, check},
};
use std::path::Path;

/// The text of a VM file.
pub(crate) fn run(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let file = match VmFile::parse(text, Path::new("/etc/whimbrel/vm.toml")) {
        Ok(file) => file,
        Err(mistake) => {
            assert!(!mistake.to_string().is_empty());
            return false;
        }
    };
    // Files are looked at, and none here has anything to do with it.
    if file.kernel.is_none() && file.initrd.is_none() && file.disks.is_empty() {
        let host = Host { kvm: Some(Kvm { speed: 1, usable: true }), ..Host::new("/run/whimbrel") };
        if let Ok(recipe) = file.recipe(&host) {
            assert_eq!(check(&recipe), Vec::<String>::new());
            let json = serde_json::to_vec(&recipe).expect("it can be written");
            assert_eq!(serde_json::from_slice::<Recipe>(&json).expect("it can be read"), recipe);
            assert!(recipe.argv(&Paths::default(), true).iter().all(|word| !word.contains('\0')));
        }
    }
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "name = \"web1\"\nmemory = \"1GiB\"\n",
        "name = \"web1\"\nvcpus = 2\nmemory = \"1GiB\"\nmachine = \"q35\"\nkernel = \
         \"/boot/vmlinuz\"\ninitrd = \"initrd.img\"\n\
         cmdline = \"console=ttyS0\"\n\n[[disk]]\npath = \"/shared/web1.img\"\nformat = \
         \"raw\"\n\n[[net]]\nbridge = \"br0\"\n\
         mac = \"52:54:00:12:34:56\"\n",
        "name = \"db.2\"\nvcpus = 4\nmemory = \"512 MiB\"\nmachine = \"pc-q35-7.2\"\naccel = \"auto\"\ncpu = \
         \"host\"\n\
         memory-backend = \"file\"\nvga = \"std\"\nconsole = false\nqemu = \"/opt/qemu\"\n\
         args = [\"-rtc\", \"base=utc\", \"-no-reboot\", \"-device\", \"virtio-rng-pci\"]\nnet = [{ bridge = \
         \"br1\" }]\n",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
