//! The diagnosis in words.

use crate::{Check, Diagnosis, Feature, Status};
use std::io::{self, Write};

/// How it is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// Nothing but characters: for files and pipes.
    Plain,
    /// With colours: for terminals.
    Colour,
}

/// Writes one line for each requirement, a second one for its remedy, and the conclusion.
pub fn render(diagnosis: &Diagnosis, style: Style, out: &mut impl Write) -> io::Result<()> {
    let width = diagnosis.checks.iter().map(|c| c.name.chars().count()).max().unwrap_or(0);
    for check in &diagnosis.checks {
        writeln!(out, "{} {:width$}  {}", mark(check.status, style), check.name, check.found)?;
        if let Some(remedy) = &check.remedy {
            writeln!(out, "  {:width$}  → {remedy}{}", "", without(check))?;
        }
    }
    writeln!(out)?;
    let words: Vec<_> = diagnosis.works.iter().map(|f| name(*f)).collect();
    match words.as_slice() {
        [] => writeln!(out, "No migration can work on this host until what is marked ✗ is mended."),
        [one] => writeln!(
            out,
            "This host can migrate VMs by {one} only; what is marked ✗ stands in the way of the rest."
        ),
        all => writeln!(out, "This host can migrate VMs: {}.", all.join(", ")),
    }
}

fn mark(status: Status, style: Style) -> String {
    let (mark, colour) = match status {
        Status::Ok => ("✓", 32),
        Status::Warn => ("–", 33),
        Status::Fail => ("✗", 31),
    };
    match style {
        Style::Plain => mark.to_owned(),
        Style::Colour => format!("\x1b[{colour}m{mark}\x1b[0m"),
    }
}

/// What a failure costs, when it does not cost everything.
fn without(check: &Check) -> String {
    match (check.status, check.needed_for.as_slice()) {
        (Status::Fail, [one]) => format!(" (without it: no {})", name(*one)),
        _ => String::new(),
    }
}

fn name(feature: Feature) -> &'static str {
    match feature {
        Feature::PreCopy => "pre-copy",
        Feature::PostCopy => "post-copy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnosis::{BOTH, POST_COPY};

    fn shown(checks: Vec<Check>, style: Style) -> String {
        let mut out = Vec::new();
        render(&Diagnosis::new(checks), style, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_requirement_is_one_line_and_its_remedy_another() {
        let checks = vec![
            Check::ok("kernel", BOTH, "Linux 6.18"),
            Check::warn("clock", &[], "not synchronised", "run chrony"),
            Check::fail("huge-pages", POST_COPY, "always", "write never"),
        ];
        let expected = "\
✓ kernel      Linux 6.18
– clock       not synchronised
              → run chrony
✗ huge-pages  always
              → write never (without it: no post-copy)

This host can migrate VMs by pre-copy only; what is marked ✗ stands in the way of the rest.
";
        assert_eq!(shown(checks.clone(), Style::Plain), expected);
        assert!(shown(checks, Style::Colour).starts_with("\x1b[32m✓\x1b[0m kernel"));
    }
}
