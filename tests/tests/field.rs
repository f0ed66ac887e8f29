//! VMs as people start them (`tests/field`): those that everybody has. `./dev field` lets all of them live.

use lab::{Stage, ensure, field, story};

#[test]
fn i9_vms_that_everybody_has_go_there_and_back() {
    story("the field", &["a", "b"], |lab, tools| {
        let stage = Stage::new(lab, tools)?;
        let cases: Vec<_> = field::cases()?.into_iter().filter(|case| case.everyday).collect();
        ensure!(cases.len() >= 9, "there are {} of them", cases.len());
        for (n, case) in cases.iter().enumerate() {
            field::live(&stage, case, n)?;
        }
        Ok(())
    });
}
