//! docs/compatibility.md says of each refusal what the program says: every message there is put together from
//! texts in its sources.

use std::{fs, path::Path};

/// Texts shorter than this are no evidence.
const EVIDENCE: usize = 12;

/// So many in a hundred of a message's characters are the program's own; the rest is what it is about.
const OWN: usize = 40;

#[test]
fn refusals_are_what_the_program_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let doc = fs::read_to_string(root.join("docs/compatibility.md")).expect("read the document");
    let mut texts = Vec::new();
    texts_below(&root.join("crates"), &mut texts);
    assert!(texts.len() > 1000, "{} texts in the sources", texts.len());
    let messages: Vec<&str> = doc.lines().filter(|line| line.starts_with("| ")).flat_map(messages).collect();
    assert!(messages.len() > 3, "messages in the document: {messages:?}");
    let unknown: Vec<_> = messages.iter().filter(|message| own(message, &texts) < OWN).collect();
    assert!(unknown.is_empty(), "the program does not say this:\n{unknown:#?}");
}

/// What nothing can be done about, or what the whole row says, or what says itself what is to be done.
const WITHOUT_REMEDY: [&str; 5] = [
    "is not allowed: it must be an id",
    "is not among what this host grants",
    "QEMU does not move what it is in the middle of",
    "its QEMU is the VM db already",
    "between two QEMUs of its own this host decides by itself",
];

#[test]
fn a_refusal_says_what_to_do() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let doc = fs::read_to_string(root.join("docs/compatibility.md")).expect("read the document");
    let refusals = doc.lines().filter(|line| line.starts_with("| ")).flat_map(|row| {
        let behind = row.split("refused").skip(1).filter_map(|rest| rest.split_once(": `"));
        // The row itself may go on with what to do, behind what is quoted.
        behind.map(|(_, rest)| rest.split(" | ").next().unwrap_or(rest))
    });
    // It follows a semicolon, or is a command or an advice behind a colon.
    let advises = |text: &str| {
        let words = [
            "set ",
            "ip link",
            "tc qdisc",
            "bridge fdb",
            "name ",
            "boot ",
            "useradd",
            "start ",
            "let ",
            "update ",
            "detach ",
            "run ",
            "give ",
            "its file",
        ];
        text.contains([';', '…'])
            || text.split(": ").skip(1).any(|end| words.iter().any(|word| end.starts_with(word)))
    };
    let known = |text: &str| WITHOUT_REMEDY.iter().any(|known| text.contains(known));
    let bare: Vec<_> = refusals.filter(|text| !advises(text) && !known(text)).collect();
    assert!(bare.is_empty(), "nothing is said of what to do:\n{bare:#?}");
}

/// What a row quotes behind a colon.
fn messages(row: &str) -> Vec<&str> {
    let quoted = row.split(": `").skip(1).filter_map(|rest| rest.split('`').next());
    // A few words are no evidence: they may be put together from parts.
    quoted.filter(|message| message.split(' ').count() > 4).collect()
}

/// How much of a message the program's texts make up, in a hundred.
fn own(message: &str, texts: &[Vec<String>]) -> usize {
    let mut covered = vec![false; message.len()];
    for parts in texts {
        // A row may leave out how a message begins or ends.
        for first in 0..parts.len() {
            let mut at = 0;
            let found: Vec<_> = parts[first..]
                .iter()
                .map_while(|part| {
                    let begin = at + message[at..].find(part.as_str())?;
                    at = begin + part.len();
                    Some(begin..at)
                })
                .collect();
            if found.iter().map(ExactSizeIterator::len).sum::<usize>() >= EVIDENCE {
                found.into_iter().flatten().for_each(|i| covered[i] = true);
            }
        }
    }
    let share = |covered: &[bool]| covered.iter().filter(|own| **own).count() * 100 / message.len().max(1);
    if share(&covered) < OWN {
        left_out(message, texts, &mut covered);
    }
    share(&covered)
}

/// What stands before or behind an ellipsis may be the beginning or the end of a text.
fn left_out(message: &str, texts: &[Vec<String>], covered: &mut [bool]) {
    let parts = || texts.iter().flatten().filter(|part| part.len() >= EVIDENCE);
    let mut from = 0;
    for piece in message.split('…') {
        let cuts = piece.char_indices().map(|(at, _)| at);
        let long = cuts.filter(|at| piece.len() - at >= EVIDENCE).find(|at| {
            let end = &piece[*at..];
            parts().any(|part| part.contains(end.trim_end()))
        });
        if let Some(at) = long {
            covered[from + at..from + piece.len()].fill(true);
        }
        from += piece.len() + '…'.len_utf8();
    }
}

/// All string literals of the sources, each as what stands between its placeholders.
fn texts_below(dir: &Path, texts: &mut Vec<Vec<String>>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            texts_below(&path, texts);
        } else if path.extension().is_some_and(|end| end == "rs") && path.iter().any(|part| part == "src") {
            let source = fs::read_to_string(&path).unwrap_or_default();
            texts.extend(
                literals(&source)
                    .iter()
                    .map(|literal| parts(literal))
                    .filter(|parts| parts.iter().map(String::len).sum::<usize>() >= EVIDENCE),
            );
        }
    }
}

fn literals(source: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find(['"', '/', '\'']) {
        let here = &rest[at..];
        if here.starts_with("//") {
            rest = here.split_once('\n').map_or("", |(_, rest)| rest);
        } else if here.starts_with("'\"'") || here.starts_with("'\\\"'") {
            rest = &here[3..];
        } else if let Some(begun) = here.strip_prefix('"') {
            let (literal, after) = literal(begun);
            all.push(literal);
            rest = after;
        } else {
            rest = &here[1..];
        }
    }
    all
}

/// A literal from behind its first quote, and what follows it.
fn literal(begun: &str) -> (String, &str) {
    let mut text = String::new();
    let mut chars = begun.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (text, &begun[at + 1..]),
            '\\' => match chars.next() {
                // A line that goes on: its blanks do not count.
                Some((next, '\n')) => {
                    let behind = &begun[next + 1..];
                    let skipped = behind.len() - behind.trim_start().len();
                    for _ in behind[..skipped].chars() {
                        chars.next();
                    }
                }
                Some((_, 'n')) => text.push('\n'),
                Some((_, other)) => text.push(other),
                None => {}
            },
            other => text.push(other),
        }
    }
    (text, "")
}

/// What stands between `{` and `}` is put in at run time.
fn parts(literal: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut inside = false;
    for c in literal.chars() {
        match c {
            '{' => inside = true,
            '}' if inside => {
                inside = false;
                all.push(String::new());
            }
            c if !inside => all.last_mut().expect("there is one").push(c),
            _ => {}
        }
    }
    all.retain(|part| !part.is_empty());
    all
}

#[test]
fn literals_are_found_as_they_are_said() {
    let source =
        "let a = \"the {kind} is \\\n         gone\"; // \"not this\"\nlet q = '\"'; f(\"x=\\\"{}\\\"\")";
    assert_eq!(literals(source), ["the {kind} is gone", "x=\"{}\""]);
    assert_eq!(parts("the {kind} is gone"), ["the ", " is gone"]);
    let texts = vec![parts("the {kind} is gone")];
    assert!(own("the disk is gone", &texts) > OWN);
    assert!(own("a disk has gone away", &texts) < OWN);
}
