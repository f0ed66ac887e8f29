//! A doctor on the host where the tests run.

use doctor::{Diagnosis, Feature, Status, Style, examine, render};

fn status(diagnosis: &Diagnosis, name: &str) -> Option<Status> {
    diagnosis.checks.iter().find(|c| c.name == name).map(|c| c.status)
}

#[test]
fn what_works_is_said_to_work_what_does_not_has_a_remedy() {
    let diagnosis = examine(&[]);
    let mut words = Vec::new();
    render(&diagnosis, Style::Plain, &mut words).unwrap();
    let words = String::from_utf8(words).unwrap();
    eprintln!("{words}");

    for check in &diagnosis.checks {
        assert_eq!(check.status == Status::Ok, check.remedy.is_none(), "{check:?}");
        assert!(words.contains(&check.found), "{check:?} is not shown");
    }
    // Requirements depend on each other: whoever can scan and serve has the rights for it.
    if status(&diagnosis, "dirty-tracking") == Some(Status::Ok) {
        for needed in ["ptrace", "pidfd-getfd", "userfaultfd", "write-protection"] {
            assert_eq!(status(&diagnosis, needed), Some(Status::Ok), "{needed}\n{words}");
        }
    }
    // Where the tests of whole migrations run, migrations work.
    let fit = |name| status(&diagnosis, name) == Some(Status::Ok);
    if rustix::process::geteuid().is_root() && fit("kernel") && fit("qemu") {
        assert!(diagnosis.works.contains(&Feature::PreCopy), "{words}");
        assert!(!diagnosis.hopeless());
    }
    let json = serde_json::to_string(&diagnosis).unwrap();
    assert_eq!(serde_json::from_str::<Diagnosis>(&json).unwrap(), diagnosis);
}
