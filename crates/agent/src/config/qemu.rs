//! `[qemu]`: the QEMU of this host, and as whom it runs. `qemu = "PATH"` is short for its program.

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use std::{fmt, path::PathBuf};

/// `[qemu]`.
#[derive(Clone, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    pub(super) program: Option<PathBuf>,
    pub(super) user: Option<String>,
}

/// Either way of writing it.
#[derive(Clone, Default, Debug)]
pub(super) struct Written(pub(super) Table);

impl<'d> Deserialize<'d> for Written {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'d> Visitor<'d> for Either {
            type Value = Table;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or a table with program and user")
            }

            fn visit_str<E>(self, path: &str) -> Result<Table, E> {
                Ok(Table { program: Some(path.into()), user: None })
            }

            fn visit_map<A: MapAccess<'d>>(self, map: A) -> Result<Table, A::Error> {
                Table::deserialize(MapAccessDeserializer::new(map))
            }
        }
        from.deserialize_any(Either).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Flags, tests::load};
    use std::path::Path;

    #[test]
    fn qemus_user_is_named_in_its_table() {
        for (text, program, user) in [
            ("", "qemu-system-x86_64", None),
            ("qemu = \"/opt/q\"\n", "/opt/q", None),
            ("[qemu]\nprogram = \"/opt/q\"\nuser = \"vm\"\n", "/opt/q", Some("vm")),
            ("[qemu]\nuser = \"root\"\n", "qemu-system-x86_64", Some("root")),
        ] {
            let config = load(text, Flags::default()).unwrap();
            assert_eq!(
                (config.qemu.as_path(), config.qemu_user.as_deref()),
                (Path::new(program), user),
                "{text}"
            );
        }
        for (wrong, says) in
            [("[qemu]\nuzer = \"x\"\n", "unknown field `uzer`"), ("qemu = 7\n", "a path, or a table")]
        {
            let error = load(wrong, Flags::default()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
