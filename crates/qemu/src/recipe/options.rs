//! QEMU's `key=value,key=value` options, with `,,` for a comma inside a value.

/// Splits an option string; a first part without `=` gets the key `implied`, a later one means `on`.
pub fn parse(text: &str, implied: &str) -> Vec<(String, String)> {
    let mut parsed = Vec::new();
    for (n, part) in split(text).into_iter().enumerate() {
        match part.split_once('=') {
            Some((key, value)) => parsed.push((key.to_owned(), value.to_owned())),
            None if n == 0 && !implied.is_empty() => parsed.push((implied.to_owned(), part)),
            None if part.is_empty() => {}
            None => parsed.push((part, "on".to_owned())),
        }
    }
    parsed
}

/// The last value of `key`, as QEMU takes it.
pub fn get<'a>(parsed: &'a [(String, String)], key: &str) -> Option<&'a str> {
    parsed.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

/// Writes options back, commas doubled. A first key that equals `implied` is left out.
pub fn join(parsed: &[(String, String)], implied: &str) -> String {
    let mut text = String::new();
    for (n, (key, value)) in parsed.iter().enumerate() {
        if n > 0 {
            text.push(',');
        }
        // Nor can a value be taken for the key that is left out.
        if n > 0 || key != implied || value.contains('=') {
            text.push_str(key);
            text.push('=');
        }
        text.push_str(&escape(value));
    }
    text
}

/// A value as it is written into an option string.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// `off` and its synonyms.
pub fn is_off(value: &str) -> bool {
    matches!(value, "off" | "no" | "false" | "n")
}

/// `on` and its synonyms.
pub fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// Whether an option's value of this key names files that QEMU reads.
pub(crate) fn names_files(option: &str, key: &str) -> bool {
    key == "file" || option == "-acpitable" && key == "data"
}

/// The files that it names: of an ACPI table, several.
pub(crate) fn files_of<'a>(option: &str, value: &'a str) -> impl Iterator<Item = &'a str> {
    let most = if option == "-acpitable" { usize::MAX } else { 1 };
    value.splitn(most, ':')
}

fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let last = parts.len() - 1;
        if character != ',' {
            parts[last].push(character);
        } else if characters.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_being_read_and_written() {
        for text in ["q35,smm=off", "file,id=a,path=/a,,b", "virtio-blk-pci,drive=d0", "kind=a=b"] {
            assert_eq!(join(&parse(text, "kind"), "kind"), text);
        }
        assert_eq!(get(&parse("a=1,share,a=2", ""), "a"), Some("2"));
        assert_eq!(get(&parse("a=1,share", ""), "share"), Some("on"));
    }
}
