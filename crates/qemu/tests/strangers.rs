//! Sockets that are not what they should be.

use qemu::qmp::{Qmp, QmpError};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, \
                        \"package\": \"\"}, \"capabilities\": []}}\r\n";

/// A socket whose first client is served by `serve`.
fn socket(serve: impl FnOnce(UnixStream) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || serve(listener.accept().unwrap().0));
    (folder, path)
}

fn connect(path: &std::path::Path) -> Result<Qmp, QmpError> {
    Qmp::connect_within(path, Duration::from_millis(300))
}

/// Answers the first question, then hands over.
fn greeted(stream: &mut UnixStream) -> BufReader<UnixStream> {
    stream.write_all(GREETING.as_bytes()).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    lines.read_line(&mut String::new()).unwrap();
    stream.write_all(b"{\"return\": {}, \"id\": 1}\r\n").unwrap();
    lines
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    let error = connect(std::path::Path::new("/nonexistent/qmp")).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot connect to the QMP socket /nonexistent/qmp: No such file or directory (os error 2)"
    );
}

#[test]
fn what_does_not_greet_like_qemu_is_told_apart() {
    for said in
        ["SSH-2.0-OpenSSH_9.2\r\n", "220 mail ready", "{\"hello\": 1}\n", "{ nonsense", "\u{0}\u{1}\u{2}"]
    {
        let (_folder, path) = socket(move |mut stream| stream.write_all(said.as_bytes()).unwrap());
        let error = connect(&path).unwrap_err();
        assert!(matches!(error, QmpError::NotQemu { .. }), "{said:?}: {error}");
        assert!(error.to_string().contains("is not a QMP socket of QEMU"), "{error}");
    }
}

#[test]
fn a_silent_socket_is_said_to_be_busy_in_good_time() {
    let (_folder, path) = socket(|stream| {
        thread::sleep(Duration::from_secs(3));
        drop(stream);
    });
    let start = Instant::now();
    let error = connect(&path).unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    assert!(error.to_string().contains("serves one client at a time"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let (_folder, path) = socket(|mut stream| {
        let mut lines = greeted(&mut stream);
        lines.read_line(&mut String::new()).unwrap();
        lines.read_line(&mut String::new()).unwrap();
        let answers = "{\"return\": \"late\", \"id\": 2}\n{\"event\": \"X\", \"timestamp\": {\"seconds\": 5, \
                       \"microseconds\": 7}}\n{\"return\": \"mine\", \"id\": 3}\n";
        stream.write_all(answers.as_bytes()).unwrap();
    });
    let mut qmp = connect(&path).unwrap();
    assert_eq!(qmp.version().to_string(), "7.2.0");
    let none = serde_json::json!({});
    let late = qmp.execute_within("slow", none.clone(), Duration::from_millis(50)).unwrap_err();
    assert!(matches!(late, QmpError::Timeout { .. }), "{late}");
    assert_eq!(qmp.execute("quick", none).unwrap(), "mine");
    let event = qmp.wait_event(Duration::ZERO, |event| event.name == "X").unwrap().unwrap();
    let since = event.at.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(since, Duration::from_micros(5_000_007));
}

#[test]
fn an_endless_line_ends_in_an_error() {
    let (_folder, path) = socket(|mut stream| {
        let _lines = greeted(&mut stream);
        let junk = vec![b'x'; 1 << 20];
        while stream.write_all(&junk).is_ok() {}
    });
    let mut qmp = connect(&path).unwrap();
    let error = qmp.execute("query-status", serde_json::json!({})).unwrap_err();
    assert!(matches!(error, QmpError::TooLong { .. }), "{error}");
}

#[test]
fn an_answer_that_is_no_object_is_an_error() {
    for odd in ["[]", "7", "\"return\"", "{\"id\": 2}", "null"] {
        let (_folder, path) = socket(move |mut stream| {
            let mut lines = greeted(&mut stream);
            lines.read_line(&mut String::new()).unwrap();
            stream.write_all(format!("{odd}\n").as_bytes()).unwrap();
        });
        let mut qmp = connect(&path).unwrap();
        let error = qmp.execute("query-status", serde_json::json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Strange { .. }), "{odd}: {error}");
    }
}

#[test]
fn a_flood_of_large_events_is_not_kept() {
    const EVENTS: u32 = 200;
    let (_folder, path) = socket(|mut stream| {
        let mut lines = greeted(&mut stream);
        lines.read_line(&mut String::new()).unwrap();
        let data = "x".repeat(100 << 10);
        for n in 0..EVENTS {
            let event = format!("\n{{\"event\": \"E{n}\", \"data\": {{\"much\": \"{data}\"}}}}\n \n");
            stream.write_all(event.as_bytes()).unwrap();
        }
        stream.write_all(b"{\"return\": {}, \"id\": 2}\n").unwrap();
        // Until the other side has seen enough.
        let _ = lines.read_line(&mut String::new());
    });
    let mut qmp = connect(&path).unwrap();
    qmp.execute("query-status", serde_json::json!({})).unwrap();
    let mut kept =
        |n: u32| qmp.wait_event(Duration::from_millis(1), |event| event.name == format!("E{n}")).unwrap();
    assert!(kept(0).is_none(), "the oldest went");
    assert!(kept(EVENTS - 1).is_some() && kept(EVENTS - 2).is_some());
}

#[test]
fn a_refusal_carries_qemus_words_and_an_end_is_an_end() {
    let (_folder, path) = socket(|mut stream| {
        let mut lines = greeted(&mut stream);
        lines.read_line(&mut String::new()).unwrap();
        let answer = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command x has not been \
                      found\"}, \"id\": 2}\n";
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let mut qmp = connect(&path).unwrap();
    let error = qmp.execute("x", serde_json::json!({})).unwrap_err();
    assert!(error.is_unknown_command());
    assert_eq!(error.to_string(), "x: The command x has not been found");
    let error = qmp.execute("y", serde_json::json!({})).unwrap_err();
    assert!(error.is_gone(), "{error}");
}
