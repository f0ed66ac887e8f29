//! Groups of nodes that share limits (`-object throttle-group`): as they are now, whoever has made or changed
//! them.

use super::live::children;
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{Argument, is_id, options},
};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Their kind of object.
pub(crate) const GROUP: &str = "throttle-group";

/// The limits of each group, by its id.
pub(super) type Groups = BTreeMap<String, Value>;

/// Asks QEMU.
pub(super) fn ask(qmp: &mut Qmp) -> Result<Groups, QmpError> {
    let mut groups = Groups::new();
    for (id, _) in children(qmp, "/objects")?.into_iter().filter(|(id, kind)| kind == GROUP && is_id(id)) {
        let asked = json!({ "path": format!("/objects/{id}"), "property": "limits" });
        groups.insert(id, qmp.execute("qom-get", asked)?);
    }
    Ok(groups)
}

/// What is set of a group's limits. A limit of nothing is none, and a burst lasts a second unless it is said.
pub(crate) fn set(limits: &Value) -> impl Iterator<Item = (&str, u64)> {
    let named = limits.as_object().into_iter().flatten();
    let named = named.filter_map(|(name, limit)| Some((name.as_str(), limit.as_u64()?)));
    named.filter(|(name, limit)| *limit > u64::from(name.ends_with("-length")))
}

/// A group as it is made on the target.
fn argument(id: &str, limits: &Value) -> Argument {
    let mut parsed = vec![("qom-type".to_owned(), GROUP.to_owned()), ("id".to_owned(), id.to_owned())];
    // QEMU's newer word (`limits`) it takes in JSON only.
    parsed.extend(set(limits).map(|(name, limit)| (format!("x-{name}"), limit.to_string())));
    Argument::new("-object", options::join(&parsed, "qom-type"))
}

/// The arguments with these groups, and no others.
pub(super) fn follow(arguments: Vec<Argument>, groups: &Groups) -> Vec<Argument> {
    let group_of = |argument: &Argument| {
        let value = argument.value.as_deref().filter(|_| argument.option == "-object")?;
        let parsed = options::parse(value, "qom-type");
        let is_group = options::get(&parsed, "qom-type") == Some(GROUP);
        is_group.then(|| options::get(&parsed, "id").unwrap_or_default().to_owned())
    };
    let told: Vec<_> = arguments.iter().filter_map(group_of).collect();
    let new = groups.iter().filter(|(id, _)| !told.contains(id)).map(|(id, limits)| argument(id, limits));
    let kept = arguments.into_iter().filter_map(|said| match group_of(&said) {
        Some(id) => groups.get(&id).map(|limits| argument(&id, limits)),
        None => Some(said),
    });
    // QEMU makes them before all nodes, wherever they stand.
    new.chain(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_what_they_are_now() {
        let groups = Groups::from([
            (
                "g0".to_owned(),
                json!({ "iops-total": 100, "iops-total-max": 0, "iops-total-max-length": 1, "bps-read": 0 }),
            ),
            ("g1".to_owned(), json!({ "bps-write": 7, "bps-write-max": 9, "bps-write-max-length": 3 })),
        ]);
        let said = ["throttle-group,id=g0,x-iops-total=5", "throttle-group,id=gone", "iothread,id=i0"];
        let arguments = said.map(|value| Argument::new("-object", value)).into();
        let now = follow(arguments, &groups);
        let values: Vec<_> = now.iter().filter_map(|argument| argument.value.as_deref()).collect();
        assert_eq!(
            values,
            [
                "throttle-group,id=g1,x-bps-write=7,x-bps-write-max=9,x-bps-write-max-length=3",
                "throttle-group,id=g0,x-iops-total=100",
                "iothread,id=i0"
            ]
        );
        for argument in &now {
            assert_eq!(crate::recipe::check_argument(argument, &[]), Ok(()));
        }
    }
}
