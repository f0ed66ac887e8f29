//! Names of hosts and VMs: they become parts of paths and lines of tables.

use crate::store::SELF;

/// The longest name. A unix socket's path holds 107 bytes, and the VM's name is part of it.
pub const LONGEST: usize = 48;

/// Why `name` cannot name a host or a VM; `Ok` if it can.
pub fn check(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= LONGEST && name.chars().all(fine) {
        return Ok(());
    }
    Err(format!(
        "{name:?} is no name: it must begin with a letter or digit, go on with letters, digits, '-', '_' or \
         '.', and have at most {LONGEST} characters"
    ))
}

/// Why `name` cannot name a host: where a VM is sent, one word means the host on which it is.
pub fn check_host(name: &str) -> Result<(), String> {
    match name {
        SELF => Err(format!("no host can be called {SELF}: a migration to {SELF} stays on its host")),
        _ => check(name),
    }
}

/// Those of `names` that somebody who wrote `wanted` may have meant, the nearest first.
pub fn similar<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut near: Vec<(usize, &str)> = names
        .into_iter()
        .map(|name| (strsim::levenshtein(&wanted.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(edits, name)| *edits <= 1 + name.len().min(wanted.len()) / 3)
        .collect();
    near.sort();
    near.into_iter().map(|(_, name)| name).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_within_paths_and_lines() {
        for good in ["a", "web1", "db-2.internal_x", "0"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        let long = "x".repeat(LONGEST + 1);
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ü", long.as_str()] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_host_is_called_what_means_this_one() {
        assert_eq!((check_host("self2"), check("self")), (Ok(()), Ok(())));
        assert!(check_host("self").is_err() && check_host("-x").is_err());
    }

    #[test]
    fn a_mistyped_name_finds_the_one_that_was_meant() {
        let names = ["web1", "web2", "database", "build"];
        assert_eq!(similar("wbe1", names)[0], "web1");
        assert_eq!(similar("databse", names), ["database"]);
        assert_eq!(similar("zzz", names), Vec::<&str>::new());
    }
}
