//! Memory devices say where their memory is, and how it is divided. Where that is not said QEMU works it out,
//! by what else is plugged in and by what backs the memory: both may be other on the target, and the guest
//! would find its memory elsewhere.

use super::ask::{self, Device};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{
        Argument,
        options::{self, get, is_off},
    },
};
use serde_json::Value;

/// What is said of them, by what their types begin with. How much is asked of virtio-mem is what a monitor
/// has asked last.
const SAID: &[(&str, &[&str])] = &[
    ("pc-dimm", &["addr", "slot"]),
    ("virtio-mem", &["memaddr", "block-size", "requested-size", "unplugged-inaccessible"]),
];

fn said(kind: &str) -> Option<&'static [&'static str]> {
    SAID.iter().find(|(stem, _)| kind.starts_with(stem)).map(|(_, said)| *said)
}

/// Whether a device of this type is memory.
pub(super) fn is_device(kind: &str) -> bool {
    said(kind).is_some()
}

/// Has the argument of a memory device say what it is now. Returns what of it will be different on the
/// target.
pub(super) fn pin(
    qmp: &mut Qmp,
    argument: &mut Argument,
    device: &Device,
) -> Result<Option<String>, QmpError> {
    let Some(keys) = said(&device.kind) else { return Ok(None) };
    let asked: Vec<_> = keys.iter().map(|key| (device.path.clone(), *key)).collect();
    let values = ask::get(qmp, &asked)?;
    let is: Vec<_> = keys.iter().copied().zip(values.iter().filter_map(word)).collect();
    // Some value was none: what the command line says has to do.
    if is.len() < keys.len() {
        return Ok(None);
    }
    let (told, reserved) = pinned(argument.value.as_deref().unwrap_or_default(), &is);
    argument.value = Some(told);
    Ok(reserved.then(|| {
        format!(
            "memory device {}: prealloc=on does not apply on the target: pages come as they are needed",
            device.name
        )
    }))
}

fn word(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

/// The argument with these in it; and whether its pages were to be there before they are used.
fn pinned(value: &str, is: &[(&str, String)]) -> (String, bool) {
    let mut parsed = options::parse(value, "driver");
    let reserved = get(&parsed, "prealloc").is_some_and(|value| !is_off(value));
    parsed.retain(|(key, _)| key != "prealloc" && !is.iter().any(|(said, _)| said == key));
    parsed.extend(is.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    (options::join(&parsed, "driver"), reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_device_says_where_it_is_and_what_is_asked_of_it() {
        let is = [("memaddr", "4294967296".to_owned()), ("requested-size", "134217728".to_owned())];
        for (told, wanted, reserved) in [
            (
                "virtio-mem-pci,id=m,memdev=b",
                "virtio-mem-pci,id=m,memdev=b,memaddr=4294967296,requested-size=134217728",
                false,
            ),
            (
                "virtio-mem-pci,requested-size=64M,prealloc=on,memdev=b",
                "virtio-mem-pci,memdev=b,memaddr=4294967296,requested-size=134217728",
                true,
            ),
            (
                "virtio-mem-pci,memaddr=0x100000000,prealloc=off",
                "virtio-mem-pci,memaddr=4294967296,requested-size=134217728",
                false,
            ),
        ] {
            assert_eq!(pinned(told, &is), (wanted.to_owned(), reserved), "{told}");
        }
        assert!(is_device("pc-dimm") && is_device("virtio-mem-pci") && !is_device("virtio-balloon-pci"));
    }
}
