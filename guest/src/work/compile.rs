//! What compiling a program does to memory: short processes that read many files, build large trees of small
//! things, write an object each, and end; now and then everything written is linked and thrown away.

use crate::{
    content::{Content, Page, mix, next},
    job::{Job, Jobs},
    pace::Pace,
    words::Compile,
};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
    process::Command,
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
};
use units::{Bytes, PAGE_SIZE};

/// The first argument of this program where it is to be a compiler.
pub(crate) const UNIT: &str = "compile-unit";
/// The compiler's own memory, source files read for one object, and the object's size.
const HEAP: u64 = 8 << 20;
const INCLUDES: u64 = 2;
const SOURCE: Bytes = Bytes(64 << 10);
const OBJECT: Bytes = Bytes(128 << 10);
/// Objects in a program.
const OBJECTS: u64 = 64;

/// Writes the sources and starts a compiler after the other on each thread.
pub(crate) fn start(wish: &Compile, threads: usize, jobs: &Arc<Jobs>) -> Result<(), String> {
    let failed = |e: io::Error| format!("compile: {e}");
    let sources = wish.set.0 / SOURCE.0;
    fs::create_dir_all("/src").map_err(failed)?;
    for n in 0..sources {
        file(&format!("/src/{n}"), Content::Text, SOURCE, n).map_err(failed)?;
    }
    let job = jobs.add("compile");
    for mine in 0..threads {
        let (job, jobs) = (job.clone(), jobs.clone());
        thread::spawn(move || build(mine, sources, &job, &jobs));
    }
    Ok(())
}

fn file(path: &str, content: Content, size: Bytes, seed: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut page = Page::ZERO;
    for n in 0..size.0 / PAGE_SIZE as u64 {
        content.write(mix(seed) ^ n, &mut page);
        file.write_all(&page.0)?;
    }
    Ok(())
}

/// Compiles for ever. A turn is a unit; its pages are what it wrote.
fn build(mine: usize, sources: u64, job: &Job, jobs: &Jobs) -> ! {
    let out = format!("/out{mine}");
    let mut unit = 0;
    job.run(Pace::new(None, 1), |_| {
        if let Err(e) = compile(&out, unit, sources) {
            jobs.corrupt(format_args!("compile: {e}"));
        }
        unit += 1;
        job.loops.fetch_add(1, Relaxed);
    })
}

fn compile(out: &str, unit: u64, sources: u64) -> io::Result<()> {
    fs::create_dir_all(out)?;
    let object = format!("{out}/{unit}.o");
    let compiler = Command::new("/proc/self/exe")
        .args([UNIT, &object, &unit.to_string(), &sources.to_string()])
        .status()?;
    if !compiler.success() {
        return Err(io::Error::other(format!("unit {unit} ended with {compiler}")));
    }
    if (unit + 1).is_multiple_of(OBJECTS) {
        let mut program = File::create(format!("{out}.program"))?;
        for object in fs::read_dir(out)? {
            program.write_all(&fs::read(object?.path())?)?;
        }
        fs::remove_dir_all(out)?;
    }
    Ok(())
}

/// The compiler: a process of its own.
pub(crate) fn unit(arguments: &[String]) -> io::Result<()> {
    let number = |n: usize| arguments.get(n).and_then(|word| word.parse::<u64>().ok()).unwrap_or(1);
    let (object, unit, sources) = (arguments.first().map_or("/dev/null", |path| path), number(1), number(2));
    let mut seed = mix(unit) | 1;
    let mut words: HashMap<Vec<u8>, u64> = HashMap::new();
    for _ in 0..INCLUDES {
        let path = format!("/src/{}", next(&mut seed) % sources.max(1));
        for word in fs::read(Path::new(&path))?.split(|byte| *byte == b' ') {
            *words.entry(word.to_vec()).or_default() += 1;
        }
    }
    // A tree: each node points at two of those before it.
    let mut nodes: Vec<Box<[u64; 8]>> = Vec::new();
    while (nodes.len() * 8 * 8) < HEAP as usize {
        let n = nodes.len() as u64;
        let (left, right) = (next(&mut seed) % (n + 1), next(&mut seed) % (n + 1));
        nodes.push(Box::new([n, left, right, words.len() as u64, 0, unit, n & 7, 0]));
    }
    let checked = nodes.iter().enumerate().all(|(n, node)| node[0] == n as u64);
    if !checked {
        return Err(io::Error::other("a node is not what it was"));
    }
    file(object, Content::Mixed { random_percent: 30 }, OBJECT, unit)
}
