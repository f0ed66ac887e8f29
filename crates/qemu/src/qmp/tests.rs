use super::*;
use std::io::{BufRead, BufReader};

/// A connection to a QEMU that is ours, and what it has read.
fn pair() -> (Qmp, UnixStream, impl FnMut() -> Value) {
    let (ours, mut qemu) = UnixStream::pair().unwrap();
    let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 } });
    let greeting = json!({ "QMP": { "version": version, "capabilities": ["oob"] } });
    writeln!(qemu, "{greeting}\n{}", json!({ "return": {}, "id": 1 })).unwrap();
    let qmp = Qmp::greet(Path::new("/qmp"), ours, PATIENCE).unwrap();
    let mut lines = BufReader::new(qemu.try_clone().unwrap()).lines();
    let mut next = move || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()["execute"], "qmp_capabilities");
    (qmp, qemu, next)
}

#[test]
fn answers_without_a_number_are_to_the_questions_in_order() {
    let (mut qmp, mut qemu, mut read) = pair();
    let none = || json!({});
    let mut two = qmp.ask_all(&[("a", none()), ("b", none())], PATIENCE).unwrap();
    assert_eq!((read(), read()), (json!({ "execute": "a" }), json!({ "execute": "b" })));
    assert!(!qmp.is_answered(&two));
    // Heard while nobody waits for them, around an event.
    let event = json!({ "event": "STOP", "timestamp": { "seconds": 1, "microseconds": 2 } });
    let refusal = json!({ "error": { "class": "GenericError", "desc": "no" } });
    writeln!(qemu, "{}\n{event}\n{refusal}", json!({ "return": "to a" })).unwrap();
    qmp.hear().unwrap();
    assert!(qmp.is_answered(&two));
    assert_eq!(qmp.next_answer(&mut two).unwrap().unwrap(), "to a");
    assert!(matches!(qmp.next_answer(&mut two).unwrap(), Err(QmpError::Refused { why, .. }) if why == "no"));
    assert_eq!(qmp.heard(), 1);

    // Given up, and answered only after the next question was asked.
    drop(qmp.ask_all(&[("c", none()), ("d", none())], PATIENCE).unwrap());
    let answers = [json!({ "return": "to c" }), json!({ "return": "to d" }), json!({ "return": 7, "id": 6 })];
    for answer in answers {
        writeln!(qemu, "{answer}").unwrap();
    }
    assert_eq!(qmp.execute("e", none()).unwrap(), 7);
    assert_eq!(
        (read(), read(), read()["id"].as_u64()),
        (json!({ "execute": "c" }), json!({ "execute": "d" }), Some(6))
    );
}
