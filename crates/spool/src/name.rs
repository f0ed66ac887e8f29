use crate::Side;
use std::{fmt, str::FromStr};
use units::MigrationId;

/// A spool file's name: `whimbrel-MIGRATION-source.spool`. It tells what a file is also where its header
/// cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileName {
    /// Of which migration.
    pub migration: MigrationId,
    /// Who writes it.
    pub side: Side,
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Source => "source",
            Side::Target => "target",
        };
        write!(f, "whimbrel-{}-{side}.spool", self.migration)
    }
}

/// The name of some other file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoSpool;

impl FromStr for FileName {
    type Err = NoSpool;

    fn from_str(text: &str) -> Result<Self, NoSpool> {
        let rest =
            text.strip_prefix("whimbrel-").and_then(|rest| rest.strip_suffix(".spool")).ok_or(NoSpool)?;
        let (migration, side) = rest.split_once('-').ok_or(NoSpool)?;
        let side = match side {
            "source" => Side::Source,
            "target" => Side::Target,
            _ => return Err(NoSpool),
        };
        let name = Self { migration: migration.parse().map_err(|_| NoSpool)?, side };
        // One name a file: capital digits would be a second.
        if name.to_string() == text { Ok(name) } else { Err(NoSpool) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_being_written_and_read() {
        for side in [Side::Source, Side::Target] {
            let name = FileName { migration: MigrationId(0xabc), side };
            assert_eq!(name.to_string().parse(), Ok(name));
            assert_eq!(name.to_string().to_uppercase().parse::<FileName>(), Err(NoSpool));
        }
        for other in ["", "web1.img", "whimbrel-12-source.spool", "whimbrel-source.spool", "../whimbrel"] {
            assert_eq!(other.parse::<FileName>(), Err(NoSpool), "{other}");
        }
    }
}
