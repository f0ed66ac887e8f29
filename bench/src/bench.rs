//! Who runs when, and for how long.

use crate::{
    contender::Contender,
    footprint::{self, Footprint},
    guest::{self, Feelings, Felt, Gaps},
    options::Options,
    qemu,
    run::{Quiet, Run},
    tables, whimbrel,
};
use lab::{Doing, Error, Lab, Result, Tools};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    thread::sleep,
    time::{Duration, Instant},
};

/// How often a contender may fail in a row before it is left out.
const FAILURES: u32 = 3;
/// As long as a migration lasts, about.
const QUIET: Duration = Duration::from_millis(700);
/// How long each logs' end is that a failure shows.
const LINES: usize = 15;

/// Everything that was measured.
#[derive(Default)]
pub(crate) struct Results {
    pub(crate) runs: Vec<Run>,
    pub(crate) quiet: Vec<Quiet>,
    pub(crate) footprints: Vec<Footprint>,
    pub(crate) failures: Vec<(String, Error)>,
    /// Processes that wanted a processor before anything began: the load average of the last minute.
    pub(crate) load: f64,
}

/// Measures what `options` wants and prints it. Whether everything worked.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let tools = Tools::find()?;
    let contenders: Vec<_> = Contender::ALL.into_iter().filter(|c| options.wants(c.name())).collect();
    let memory = options.wants("memory");
    if contenders.is_empty() && !memory {
        return Err(Error::new("--only", "no contender has such a name; --help lists them"));
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().and_then(|word| word.parse().ok());
    let mut results = Results { load: load.unwrap_or_default(), ..Results::default() };
    let clock = Instant::now();
    if !contenders.is_empty() {
        compare(options, &tools, &contenders, clock, &mut results)?;
    }
    if memory {
        eprintln!("agents' memory with a guest of 5 GiB …");
        match footprint::measure(&tools, options.tls) {
            Ok(found) => results.footprints = found,
            Err(why) => failed("memory", why, &mut results),
        }
    }
    if let Some(path) = &options.out {
        fs::write(path, format!("{:#}\n", results.json())).doing(format!("write {}", path.display()))?;
    }
    let text = tables::all(options, &results);
    std::io::stdout().write_all(text.as_bytes()).doing("print")?;
    Ok(results.failures.is_empty())
}

/// Both guests, and only one of them running at a time.
fn compare(
    options: &Options,
    tools: &Tools,
    contenders: &[Contender],
    clock: Instant,
    results: &mut Results,
) -> Result<()> {
    let (here, there) = (Lab::new(&["a", "b"])?, Lab::new(&["a", "b"])?);
    for host in [&here, &there].into_iter().flat_map(Lab::hosts) {
        host.shape(options.link)?;
    }
    let start = || guest::start(&options.work);
    let (mut ours, mut theirs) = (None, None);
    if contenders.iter().any(|c| c.is_whimbrel()) {
        eprintln!("booting the guest that whimbrel moves …");
        match whimbrel::stage(&here, tools, options.tls)
            .and_then(|stage| whimbrel::Moved::boot(stage, start(), options.streams))
        {
            Ok(moved) => ours = Some(moved),
            Err(why) => {
                here.print_logs(LINES);
                failed("whimbrel", why, results);
            }
        }
    }
    if contenders.iter().any(|c| !c.is_whimbrel()) {
        if let Some(ours) = &ours {
            guest::freeze(ours.pid()?)?;
        }
        eprintln!("booting the guest that QEMU moves …");
        theirs = Some(qemu::Moved::boot(&there, tools, start())?);
        if let Some(ours) = &ours {
            guest::thaw(ours.pid()?)?;
        }
    }

    let mut wrong: BTreeMap<&str, u32> = BTreeMap::new();
    for n in 1..=options.runs {
        for contender in contenders {
            let name = contender.name();
            let absent = if contender.is_whimbrel() { ours.is_none() } else { theirs.is_none() };
            if absent || wrong.get(name) >= Some(&FAILURES) {
                continue;
            }
            if clock.elapsed() > options.limit() {
                eprintln!("{} minutes are over: no further runs", options.minutes);
                return Ok(());
            }
            let hop = turn(*contender, ours.as_ref(), theirs.as_mut());
            let at = clock.elapsed().as_secs();
            match hop {
                Ok((quiet, run)) => {
                    let run = Run { n, ..run };
                    eprintln!("[{}:{:02}] {n}/{} {}", at / 60, at % 60, options.runs, tables::line(&run));
                    wrong.remove(name);
                    results.quiet.push(quiet);
                    if let Some(harm) = run.harm.as_ref() {
                        eprintln!("HARMED the guest: {harm}");
                        if contender.is_whimbrel() {
                            failed(name, Error::new("it harmed the guest", harm), results);
                            ours = None;
                        }
                    }
                    results.runs.push(run);
                }
                Err(why) => {
                    *wrong.entry(name).or_default() += 1;
                    let lab = if contender.is_whimbrel() { &here } else { &there };
                    lab.print_logs(LINES);
                    failed(name, why, results);
                    if !contender.is_whimbrel() {
                        theirs = None; // nobody knows where its guest is now
                    }
                }
            }
        }
    }
    Ok(())
}

/// One run of one contender, while the other's guest is frozen.
fn turn(
    contender: Contender,
    ours: Option<&whimbrel::Moved>,
    theirs: Option<&mut qemu::Moved>,
) -> Result<(Quiet, Run)> {
    let other = match contender.is_whimbrel() {
        true => theirs.as_ref().map(|moved| moved.pid()),
        // A VM that is nowhere needs no freezing.
        false => ours.as_ref().and_then(|moved| moved.pid().ok()),
    };
    let frozen = other.map(guest::freeze).transpose();
    let done = frozen.and_then(|_| match (contender.is_whimbrel(), ours, theirs) {
        (true, Some(moved), _) => Ok((quiet(moved.guest())?, moved.hop(contender)?)),
        (false, _, Some(moved)) => {
            let (quiet, run) = (quiet(moved.guest())?, moved.hop(contender)?);
            if run.harm.is_some() {
                eprintln!("{}", moved.last_words());
                moved.reboot()?;
            }
            Ok((quiet, run))
        }
        _ => Err(Error::new(contender.name(), "has no guest")),
    });
    other.map(guest::thaw).transpose()?;
    done
}

/// What the guest and its client feel when nothing moves.
fn quiet(guest: &lab::Guest) -> Result<Quiet> {
    let feelings = Feelings::begin(guest)?;
    sleep(QUIET);
    match feelings.end() {
        Felt::Fine(Gaps { client, guest }) => {
            Ok(Quiet { contender: "none", client_gap_ms: client, guest_gap_ms: guest })
        }
        Felt::Harmed(why) => Err(why),
    }
}

fn failed(name: &str, why: Error, results: &mut Results) {
    eprintln!("FAILED {name}: {why}");
    results.failures.push((name.to_owned(), why));
}

impl Results {
    /// All runs, one array.
    fn json(&self) -> Value {
        let mut all: Vec<Value> = self.runs.iter().map(|run| json!(run)).collect();
        all.extend(self.quiet.iter().map(|quiet| json!(quiet)));
        all.extend(self.footprints.iter().map(|footprint| json!(footprint)));
        let failure =
            |(name, error): &(String, Error)| json!({"contender": name, "failed": error.to_string()});
        all.extend(self.failures.iter().map(failure));
        Value::Array(all)
    }
}
