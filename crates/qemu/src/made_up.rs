//! Values that QEMU makes up when it starts, because nobody gave them: the target must be told, or its guest
//! sees others.

use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Argument, Recipe, options},
};
use serde_json::{Value, json};

/// Writes what this QEMU made up into the recipe.
pub(crate) fn carry(qmp: &mut Qmp, recipe: &mut Recipe) -> Result<(), QmpError> {
    let mut anonymous = 0;
    for argument in &mut recipe.arguments {
        let Some(mut device) = device(argument) else { continue };
        let driver = options::get(&device, "driver").unwrap_or_default().to_owned();
        // QEMU keeps devices without an id in the order in which it made them.
        let path = match options::get(&device, "id") {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => {
                anonymous += 1;
                format!("/machine/peripheral-anon/device[{}]", anonymous - 1)
            }
        };
        let said = match driver.as_str() {
            // A new generation tells the guest that it was rolled back, or copied.
            "vmgenid" => qmp.execute("query-vm-generation-id", json!({}))?["guid"].clone(),
            _ if options::get(&device, "mac").is_some() => continue,
            _ => match options::get(&device, "netdev") {
                Some(netdev) => mac(qmp, &path, netdev),
                None => continue,
            },
        };
        let (key, known) =
            if driver == "vmgenid" { ("guid", is_guid as fn(&str) -> bool) } else { ("mac", is_mac as _) };
        let Some(value) = said.as_str().filter(|value| known(value)) else { continue };
        device.retain(|(name, _)| name != key);
        device.push((key.to_owned(), value.to_owned()));
        argument.value = Some(options::join(&device, "driver"));
    }
    Ok(())
}

/// The address of the card at `path`, if it is the one on this netdev. Where it is not to be had, the card's
/// state brings it.
fn mac(qmp: &mut Qmp, path: &str, netdev: &str) -> Value {
    let mut property =
        |name: &str| qmp.execute("qom-get", json!({ "path": path, "property": name })).unwrap_or(Value::Null);
    if property("netdev").as_str() == Some(netdev) { property("mac") } else { Value::Null }
}

/// The options of a `-device`.
fn device(argument: &Argument) -> Option<Vec<(String, String)>> {
    let value =
        argument.value.as_deref().filter(|value| argument.option == "-device" && !value.starts_with('{'))?;
    Some(options::parse(value, "driver"))
}

fn is_guid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    bytes.len() == 6 && bytes.iter().all(|byte| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_values_of_known_form_are_written_down() {
        assert!(
            is_guid("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87") && !is_guid("auto") && !is_guid(&"x".repeat(36))
        );
        assert!(is_mac("52:54:00:12:34:56") && !is_mac("52:54:00:12:34") && !is_mac("52:54:00:12:34:5g"));
        assert!(device(&Argument::new("-device", "{\"driver\":\"vmgenid\"}")).is_none());
        assert!(device(&Argument::new("-drive", "vmgenid")).is_none());
    }
}
