//! What may stand in a recipe. A peer's recipe is hostile until it passed: it must not make our QEMU read,
//! write, connect to or execute anything but the VM's own files.

use super::{
    Recipe,
    allow::{self, LONGEST_NAME, LONGEST_VALUE, check_argument_of, is_id, is_word},
};
use crate::virtio;

/// The most vCPUs, memory blocks, arguments and bytes of text that a recipe may have: each far above what
/// QEMU itself bears, each low enough that no recipe exhausts us.
const MOST_VCPUS: u32 = 1024;
const MOST_BLOCKS: usize = 64;
const MOST_ARGUMENTS: usize = 1024;
/// Each server may let us wait for some seconds.
const MOST_EXPORTS: usize = 16;
/// Reasons that are told: each takes more memory than what it is about, and nobody reads more.
const MOST_REASONS: usize = 100;
const MOST_MEMORY: u64 = 64 << 40;
/// Of a device in QEMU's object tree.
const LONGEST_PATH: usize = 256;

/// Everything that is wrong with a recipe; empty when it may be used.
pub fn check(recipe: &Recipe) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut must = |holds: bool, why: String| {
        if !holds && wrong.len() < MOST_REASONS {
            wrong.push(why);
        }
    };
    must(
        is_name(&recipe.name),
        format!("the VM's name {:?} is not usable: {NAME_RULE}", shown(&recipe.name)),
    );

    let memory_options = recipe.memory_options.as_deref();
    let texts = [&recipe.machine, &recipe.smp, &recipe.cpu].map(|text| Some(text.as_str()));
    let short = |text: Option<&str>| text.is_none_or(|text| text.len() <= LONGEST_VALUE);
    if !texts.into_iter().chain([memory_options]).all(short) {
        must(false, "the machine's options are too long".to_owned());
        return wrong;
    }
    for checked in [
        allow::machine(&recipe.machine),
        allow::smp(&recipe.smp),
        allow::cpu(&recipe.cpu),
        memory_options.map_or(Ok(()), allow::memory),
    ] {
        must(checked.is_ok(), checked.err().unwrap_or_default());
    }
    let vcpus = recipe.vcpus();
    must((1..=MOST_VCPUS).contains(&vcpus), format!("{vcpus} vCPUs are not between 1 and {MOST_VCPUS}"));

    let count = recipe.memory.len();
    must(
        (1..=MOST_BLOCKS).contains(&count),
        format!("{count} memory blocks are not between 1 and {MOST_BLOCKS}"),
    );
    let page = units::PAGE_SIZE as u64;
    for block in recipe.memory.iter().take(MOST_BLOCKS) {
        must(is_id(&block.id), format!("memory block id {:?} is not usable", shown(&block.id)));
        let whole = block.bytes > 0 && block.bytes <= MOST_MEMORY && block.bytes.is_multiple_of(page);
        must(whole, format!("memory block {} cannot be {} bytes", shown(&block.id), block.bytes));
    }
    let main = recipe.main_memory.as_ref();
    must(
        main.is_none_or(|main| recipe.memory.iter().any(|block| block.id == *main)),
        format!("the main memory {:?} is not among the memory blocks", shown(main.map_or("", |main| main))),
    );
    let ids = recipe.memory.iter().map(|block| &block.id).chain(recipe.nets.iter().map(|net| &net.id));
    let ids = ids.chain(recipe.secrets.iter().take(super::secrets::MOST).map(|secret| &secret.id));
    let unique: std::collections::BTreeSet<_> = ids.clone().collect();
    must(unique.len() == ids.count(), "two back ends have the same id".to_owned());

    must(recipe.nets.len() <= MOST_BLOCKS, format!("{} network cards are too many", recipe.nets.len()));
    for net in recipe.nets.iter().take(MOST_BLOCKS) {
        net.check().into_iter().for_each(|why| must(false, why));
    }
    recipe.tpm.iter().filter_map(super::Tpm::check).for_each(|why| must(false, why));
    super::secrets::check(&recipe.secrets).into_iter().for_each(|why| must(false, why));
    super::chardev::check(&recipe.chardevs).into_iter().for_each(|why| must(false, why));
    must(recipe.files.len() <= MOST_ARGUMENTS, format!("{} files are too many", recipe.files.len()));
    for file in recipe.files.iter().take(MOST_ARGUMENTS) {
        let path = file.path.to_string_lossy();
        // It is shown as it is: no terminal may find an order in it.
        let plain = file.path.is_absolute() && path.len() < LONGEST_VALUE && !path.contains(char::is_control);
        // By its components, so that `//proc` is /proc; and whatever begins like /dev/fd: QEMU opens
        // /dev/fdset in its own way.
        let parts: std::path::PathBuf = file.path.components().collect();
        let forbidden = ["/proc", "/sys"].iter().any(|dir| parts.starts_with(dir))
            || parts.to_string_lossy().starts_with("/dev/fd");
        let climbs = file.path.components().any(|part| part == std::path::Component::ParentDir);
        must(plain && !forbidden && !climbs, format!("file {:?} is no plain absolute path", shown(&path)));
    }
    must(recipe.exports.len() <= MOST_EXPORTS, format!("{} exports are too many", recipe.exports.len()));
    for export in recipe.exports.iter().take(MOST_EXPORTS) {
        if let Err(why) = export.check() {
            must(false, why);
        }
    }
    must(recipe.settings.len() <= MOST_ARGUMENTS, "too many settings".to_owned());
    for setting in recipe.settings.iter().take(MOST_ARGUMENTS) {
        if let Err(why) = setting.check() {
            must(false, why);
        }
    }
    must(recipe.cpu_features.len() <= MOST_ARGUMENTS, "too many CPU feature words".to_owned());
    for word in recipe.cpu_features.iter().take(MOST_ARGUMENTS) {
        must(is_word(&word.register), format!("{:?} is no CPU register", shown(&word.register)));
    }
    let all = recipe.virtio.len() <= virtio::MOST
        && recipe.virtio.iter().all(|one| one.names.len() <= virtio::MOST);
    must(all, "too many features of virtio devices".to_owned());
    for features in recipe.virtio.iter().take(virtio::MOST) {
        for name in features.names.iter().take(virtio::MOST).chain([&features.device]) {
            must(is_word(name), format!("{:?} is no virtio device or feature", shown(name)));
        }
    }
    must(
        recipe.arguments.len() <= MOST_ARGUMENTS,
        format!("{} arguments are too many", recipe.arguments.len()),
    );
    if recipe.files.len() > MOST_ARGUMENTS || recipe.exports.len() > MOST_EXPORTS {
        // Each argument is looked for among them.
        return wrong;
    }
    for argument in recipe.arguments.iter().take(MOST_ARGUMENTS) {
        if let Err(why) = check_argument_of(argument, &recipe.files, &recipe.exports)
            && wrong.len() < MOST_REASONS
        {
            wrong.push(why);
        }
    }
    wrong
}

/// What names may look like.
pub(crate) const NAME_RULE: &str =
    "1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit";

/// Whether a VM may be called so: the name becomes part of file names and of QEMU's command line.
pub(crate) fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(inner)
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// Whether a pattern of an allow-list is meant: a trailing `*` stands for any ending.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(stem) => name.starts_with(stem),
        None => name == pattern,
    }
}

/// What may be the name or the IPv4 address of a host, and no option, path or list.
pub(crate) fn is_host(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    (1..=LONGEST_HOST).contains(&text.len())
        && text.bytes().all(inner)
        && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// Of a host (RFC 1035).
const LONGEST_HOST: usize = 253;

/// What the kernel accepts as an interface's name, and `ip` does not take for an option.
pub(crate) fn is_interface(text: &str) -> bool {
    is_word(text) && text.len() < 16 && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// Foreign text for an error message: bounded, and without what a terminal would obey.
pub(crate) fn shown(text: &str) -> String {
    let clean = |character: char| if character.is_control() { '?' } else { character };
    text.chars().take(100).map(clean).collect()
}

/// What names a drive, a node or a device in a monitor's command, its path in QEMU's object tree too. May be
/// empty.
pub(crate) fn is_plain_name(text: &str) -> bool {
    text.len() < LONGEST_PATH
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./[]#".contains(&byte))
}
