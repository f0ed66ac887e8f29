//! What a doctor says: one struct, read by people and programs.

use serde::{Deserialize, Serialize};

/// A way to migrate that a requirement is needed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// Memory moves while the guest runs on the source: its writes must be seen there.
    PreCopy,
    /// Memory moves while the guest runs on the target: its missing pages must be served there.
    PostCopy,
}

/// How a requirement is met.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It is there.
    Ok,
    /// Migrations work, but something is slower or less than it could be.
    Warn,
    /// What needs it does not work here.
    Fail,
}

/// One requirement.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// Its name, the same in every version: `dirty-tracking`.
    pub name: String,
    /// How it is met.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// How to mend it; `None` when nothing needs mending.
    pub remedy: Option<String>,
    /// What does not work without it. Empty: migrations do without.
    pub needed_for: Vec<Feature>,
}

impl Check {
    /// A requirement that is met.
    pub(crate) fn ok(name: &str, needed_for: &[Feature], found: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            status: Status::Ok,
            found: found.into(),
            remedy: None,
            needed_for: needed_for.to_vec(),
        }
    }

    /// A requirement that is met badly, or an amenity that is missing.
    pub(crate) fn warn(
        name: &str,
        needed_for: &[Feature],
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { status: Status::Warn, remedy: Some(remedy.into()), ..Self::ok(name, needed_for, found) }
    }

    /// A requirement that is not met.
    pub(crate) fn fail(
        name: &str,
        needed_for: &[Feature],
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, needed_for, found, remedy) }
    }
}

/// What both ways need.
pub(crate) const BOTH: &[Feature] = &[Feature::PreCopy, Feature::PostCopy];
/// What only pre-copy needs.
pub(crate) const PRE_COPY: &[Feature] = &[Feature::PreCopy];
/// What only post-copy needs.
pub(crate) const POST_COPY: &[Feature] = &[Feature::PostCopy];

/// Requirements that could not be tried, so that each has its place in every diagnosis.
pub(crate) fn not_tried(why: &str, checks: &[(&str, &[Feature])]) -> Vec<Check> {
    let fail = |(name, needed_for): &(&str, &[Feature])| {
        Check::fail(name, needed_for, format!("not tried: {why}"), "mend that first")
    };
    checks.iter().map(fail).collect()
}

/// All of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The ways to migrate that this host is fit for.
    pub works: Vec<Feature>,
    /// The requirements, in the order in which a migration meets them.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    /// Draws the conclusion: a way works when nothing that it needs failed.
    pub fn new(checks: Vec<Check>) -> Self {
        let works = |feature: &Feature| {
            !checks.iter().any(|c| c.status == Status::Fail && c.needed_for.contains(feature))
        };
        Self { works: BOTH.iter().copied().filter(works).collect(), checks }
    }

    /// Whether no migration at all could work here.
    pub fn hopeless(&self) -> bool {
        self.works.is_empty()
    }

    /// What a command that says this ends with: 1 when no migration at all could work.
    pub fn exit_status(&self) -> u8 {
        u8::from(self.hopeless())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_works_unless_something_that_it_needs_failed() {
        use Feature::{PostCopy, PreCopy};
        let fine = Check::ok("a", BOTH, "there");
        let table = [
            (vec![fine.clone()], vec![PreCopy, PostCopy], 0),
            (vec![fine.clone(), Check::warn("b", BOTH, "slow", "…")], vec![PreCopy, PostCopy], 0),
            (vec![fine.clone(), Check::fail("b", PRE_COPY, "no", "…")], vec![PostCopy], 0),
            (vec![fine.clone(), Check::fail("b", POST_COPY, "no", "…")], vec![PreCopy], 0),
            (vec![fine.clone(), Check::fail("b", &[], "no", "…")], vec![PreCopy, PostCopy], 0),
            (vec![fine, Check::fail("b", BOTH, "no", "…")], vec![], 1),
        ];
        for (checks, works, exit) in table {
            let diagnosis = Diagnosis::new(checks);
            assert_eq!((&diagnosis.works, diagnosis.exit_status()), (&works, exit), "{:?}", diagnosis.checks);
        }
    }

    #[test]
    fn programs_read_the_same_words_in_every_version() {
        let check = Check::fail("dirty-tracking", PRE_COPY, "nothing", "newer kernel");
        let json = serde_json::to_value(Diagnosis::new(vec![check])).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "works": ["post-copy"],
                "checks": [{
                    "name": "dirty-tracking", "status": "fail", "found": "nothing",
                    "remedy": "newer kernel", "needed_for": ["pre-copy"],
                }],
            })
        );
    }
}
