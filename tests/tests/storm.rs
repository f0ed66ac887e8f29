//! A few blows of a storm; `./dev storm` has all of them.

use lab::{
    Result, ensure,
    storm::{Fate, Fault, Storm, rage},
    story,
};

/// One of each kind, where most can go wrong.
const SAMPLE: [&str; 9] = [
    "link:switchover+2",
    "source-agent:switchover+0",
    "source-agent:post-copy+40",
    "target-agent:switchover+7",
    "target-agent:post-copy+10",
    "target-qemu:moving+200",
    "source-qemu:moving+0",
    "source-agent:moving+200",
    "datastore:moving+200",
];

#[test]
fn i1_i3_i4_no_blow_loses_a_vm_or_makes_two_of_it() {
    story("storm", &["a", "b"], |lab, tools| {
        let faults = SAMPLE.iter().map(|fault| fault.parse()).collect::<Result<Vec<Fault>>>()?;
        let fates = rage(&mut Storm::new(lab, tools)?, &faults)?;
        ensure!(!fates.contains(&Fate::Missed), "each of these has something to strike: {fates:?}");
        Ok(())
    });
}

#[test]
fn a_blow_is_called_by_its_name() {
    for fault in Fault::all() {
        assert_eq!(fault.to_string().parse::<Fault>().ok(), Some(fault));
    }
    assert!("source-agent:lunch+1".parse::<Fault>().is_err());
}
