//! What monitors set of an object while it works (`qom-set`), and QEMU tells: how threads poll, and how often
//! a balloon asks its guest for statistics. Managers such as libvirt set both.

use super::live::children;
use crate::{
    qmp::{Qmp, QmpError},
    recipe::{
        Argument, Setting,
        options::{self, get},
    },
};
use serde_json::{Value, json};
use std::time::Duration;

/// How long QEMU may take for these.
const WITHIN: Duration = Duration::from_secs(5);

/// The threads that serve disks.
pub(crate) const THREAD: &str = "iothread";

/// What can be set of one, and what it is if nobody sets it.
const OF_THREADS: [(&str, u64); 6] = [
    ("poll-max-ns", 32_768),
    ("poll-grow", 0),
    ("poll-shrink", 0),
    ("aio-max-batch", 0),
    ("thread-pool-min", 0),
    ("thread-pool-max", 64),
];

/// How the types of balloons begin.
const BALLOON: &str = "virtio-balloon";

/// In seconds; nothing: it does not ask.
const INTERVAL: &str = "guest-stats-polling-interval";

/// The object and the property that are meant by a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Property {
    path: String,
    name: &'static str,
}

impl Property {
    /// It, for people.
    pub(crate) fn words(&self) -> String {
        format!("{} of {}", self.name, self.path.rsplit('/').next().unwrap_or_default())
    }

    /// The question.
    pub(crate) fn line(&self) -> (&'static str, Value) {
        ("qom-get", json!({ "path": self.path, "property": self.name }))
    }
}

/// Those of a thread.
pub(crate) fn of_thread(id: &str) -> impl Iterator<Item = Property> {
    let path = format!("/objects/{id}");
    OF_THREADS.into_iter().map(move |(name, _)| Property { path: path.clone(), name })
}

/// That of a device that is called so, if it is a balloon.
pub(crate) fn of_device(name: &str, kind: &str) -> Option<Property> {
    let folder = if name.starts_with("device[") { "peripheral-anon" } else { "peripheral" };
    let path = format!("/machine/{folder}/{name}");
    kind.starts_with(BALLOON).then_some(Property { path, name: INTERVAL })
}

/// The threads of the arguments are told what they are now.
pub(super) fn follow_threads(qmp: &mut Qmp, arguments: &mut [Argument]) -> Result<(), QmpError> {
    for argument in arguments.iter_mut().filter(|argument| argument.option == "-object") {
        let mut parsed = options::parse(argument.value.as_deref().unwrap_or_default(), "qom-type");
        let Some(id) = get(&parsed, "id").filter(|_| get(&parsed, "qom-type") == Some(THREAD)) else {
            continue;
        };
        let lines: Vec<_> = of_thread(id).map(|property| property.line()).collect();
        let answers = qmp.execute_all(&lines, WITHIN)?;
        let before = parsed.clone();
        for ((name, usual), answer) in OF_THREADS.into_iter().zip(answers) {
            // An older QEMU has not all of them.
            let Some(now) = answer.ok().and_then(|answer| answer.as_u64()) else { continue };
            let said = get(&parsed, name).map(str::parse);
            if said.unwrap_or(Ok(usual)) != Ok(now) {
                parsed.retain(|(key, _)| key != name);
                parsed.push((name.to_owned(), now.to_string()));
            }
        }
        if parsed != before {
            argument.value = Some(options::join(&parsed, "qom-type"));
        }
    }
    Ok(())
}

/// The balloon's property, where QEMU has one. There is one balloon at most.
fn of_balloon(qmp: &mut Qmp) -> Result<Option<Property>, QmpError> {
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let found = children(qmp, folder)?.into_iter().find_map(|(name, kind)| of_device(&name, &kind));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// What is to be set of a balloon on the target.
pub(super) fn of_its_balloon(qmp: &mut Qmp, arguments: &[Argument]) -> Result<Option<Setting>, QmpError> {
    let is_one = |argument: &Argument| {
        let driver = argument.value.as_deref().map(crate::recipe::device_driver).unwrap_or_default();
        argument.option == "-device" && driver.starts_with(BALLOON)
    };
    if !arguments.iter().any(is_one) {
        return Ok(None);
    }
    let Some(property) = of_balloon(qmp)? else { return Ok(None) };
    let (command, asked) = property.line();
    let answer = qmp.execute(command, asked)?;
    let seconds = answer.as_u64().and_then(|seconds| u32::try_from(seconds).ok()).filter(|set| *set > 0);
    Ok(seconds.map(|seconds| Setting::BalloonStatistics { seconds }))
}

/// Sets it there.
pub(crate) fn set_balloon(qmp: &mut Qmp, seconds: u32) -> Result<(), QmpError> {
    let Some(Property { path, name }) = of_balloon(qmp)? else { return Ok(()) };
    qmp.execute("qom-set", json!({ "path": path, "property": name, "value": seconds })).map(drop)
}
