//! The objects that users add, against `-object`: what was added becomes a part of the recipe, what was
//! removed leaves it. Memory has an eye of its own; secrets concern connections of this host.

use super::{live::children, throttles};
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{
        Argument, check_argument,
        options::{self, get},
    },
};
use serde_json::{Value, json};

/// Kinds that are looked at elsewhere, or stay behind.
const ELSEWHERE: &[&str] = &["memory-backend-", "secret", "tls-", "authz-", "tpm-", throttles::GROUP];

/// More properties than any object has.
const MOST_PROPERTIES: usize = 100;

/// Objects of the running QEMU are what the recipe makes.
pub(super) fn follow(
    qmp: &mut Qmp,
    arguments: &mut Vec<Argument>,
    reasons: &mut Vec<String>,
) -> Result<(), QmpError> {
    let live = children(qmp, "/objects")?;
    let told = |argument: &Argument| {
        let parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "qom-type");
        let word = |key: &str| get(&parsed, key).unwrap_or_default().to_owned();
        (argument.option == "-object").then(|| (word("id"), word("qom-type")))
    };
    arguments.retain(|argument| told(argument).is_none_or(|told| live.contains(&told)));
    let known: Vec<_> = arguments.iter().filter_map(told).collect();
    for (id, kind) in live {
        if known.contains(&(id.clone(), kind.clone())) || ELSEWHERE.iter().any(|stem| kind.starts_with(stem))
        {
            continue;
        }
        let path = format!("/objects/{id}");
        let list = qmp.execute("qom-list", json!({ "path": path }))?;
        let mut properties = Vec::new();
        for property in list.as_array().into_iter().flatten().take(MOST_PROPERTIES) {
            let name = property["name"].as_str().unwrap_or_default();
            let value = qmp.execute("qom-get", json!({ "path": path, "property": name })).unwrap_or_default();
            properties.push((name.to_owned(), value));
        }
        match argument(&id, &kind, &properties) {
            Ok(argument) => arguments.push(argument),
            Err(why) => reasons.push(format!(
                "object {id} ({kind}) was added after the start, and cannot be made again on the target: \
                 {why}; remove it (object-del) or start the VM with it"
            )),
        }
    }
    Ok(())
}

/// The `-object` that makes it; or what of it cannot be said.
fn argument(id: &str, kind: &str, properties: &[(String, Value)]) -> Result<Argument, String> {
    let mut pairs = vec![("qom-type".to_owned(), kind.to_owned()), ("id".to_owned(), id.to_owned())];
    for (name, value) in properties {
        let said = match value {
            _ if matches!(name.as_str(), "type" | "opened" | "loaded") => continue,
            Value::Number(number) => number.to_string(),
            Value::String(text) if !text.is_empty() => text.clone(),
            Value::Bool(true) => "on".to_owned(),
            Value::Object(_) => value.to_string(),
            Value::Array(list) if !list.is_empty() => value.to_string(),
            _ => continue,
        };
        pairs.push((name.clone(), said));
    }
    let argument = Argument::new("-object", options::join(&pairs, "qom-type"));
    check_argument(&argument, &[]).map(|()| argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_said_again_or_refused() {
        let all = |pairs: &[(&str, Value)]| -> Vec<(String, Value)> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
        };
        let said = |kind: &str, pairs: &[(&str, Value)]| argument("o", kind, &all(pairs));
        let thread =
            [("type", json!("iothread")), ("poll-max-ns", json!(32_768)), ("aio-max-batch", json!(0))];
        let wanted = Argument::new("-object", "iothread,id=o,poll-max-ns=32768,aio-max-batch=0");
        assert_eq!(said("iothread", &thread), Ok(wanted));
        let random = [("opened", json!(true)), ("filename", json!("/dev/urandom"))];
        assert_eq!(
            said("rng-random", &random).unwrap().value.unwrap(),
            "rng-random,id=o,filename=/dev/urandom"
        );
        assert!(said("rng-random", &[("filename", json!("/etc/shadow"))]).is_err());
        assert!(said("can-bus", &[]).unwrap_err().contains("can-bus"));
    }
}
