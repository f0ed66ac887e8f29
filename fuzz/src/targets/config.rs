/// The text of a configuration.
pub(crate) fn run(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match agent::fuzz::config(text) {
        Ok(config) => {
            assert!(agent::name::check(&config.name).is_ok());
            assert!(config.allow.disks.iter().chain(&config.allow.boot).all(|dir| dir.is_absolute()));
            true
        }
        Err(mistake) => {
            assert!(!mistake.to_string().is_empty());
            false
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "",
        "name = \"hosta\"\nlisten = \"10.0.0.1:7471\"\n\n[peers]\nhostb = \"10.0.0.2:7471\"\n\"host.c\" = \
         \"[fe80::1]:7\"\n",
        "state-dir = \"/var/lib/w\"\nruntime-dir = \"/run/w\"\nsocket = \"/run/w/s\"\nqemu = \
         \"/opt/qemu\"\ntracker = \"synchronous\"\n\
         group = 64\ninsecure-plaintext = true\n\n[tls]\nca = \"/k/ca\"\ncert = \"/k/c\"\nkey = \
         \"/k/k\"\n\n[allow]\ndisks = [\"/shared\"]\n\
         boot = [\"/boot\"]\nbridges = [\"br0\"]\noptions = [\"-device\"]\ndevices = [\"virtio-*\"]\n",
        "group = \"auto\"\ntracker = \"auto\"\n[allow]\nbridges = []\n",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
