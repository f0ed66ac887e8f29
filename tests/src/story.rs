//! The frame around every story: what it needs, its laboratory, and what to show when it goes wrong.

use crate::{Lab, Result, Tools, skip};

/// How many of the last lines of each log a failure shows.
const LINES: usize = 40;

/// Tells a story in a laboratory with these hosts. Skips it, loudly, where the machine lacks something; shows
/// all logs where it fails.
pub fn story(name: &str, hosts: &[&str], tell: impl FnOnce(&Lab, &Tools) -> Result<()>) {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(lacks) => return skip(name, &lacks),
    };
    let told = Lab::new(hosts).and_then(|lab| {
        let told = tell(&lab, &tools);
        if told.is_err() {
            lab.print_logs(LINES);
        }
        told
    });
    if let Err(error) = told {
        panic!("{name}: {error}");
    }
}
