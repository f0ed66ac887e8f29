//! What runs inside the guests of tests and demo: `/init` of an initramfs, alone in its machine.
//!
//! The kernel command line says what it does ([`words`]); the serial console carries one heartbeat line a
//! second ([`beat`]); a TCP port answers questions ([`ask`]). Everything it says begins with `WHIMBREL`,
//! except the line that no test wants to see, which begins with `CORRUPT`.

mod agent; // answers on a virtio port
mod ask; // the echo and the control port
mod beat; // the heartbeat on the console, and the gaps a guest can feel
mod content; // what pages are filled with
mod disc; // what is in the CD drive
mod draw; // pictures on the screen
mod hardware; // what is plugged in, and taking it into use
mod histogram; // how long things took, in a bounded number of buckets
mod job; // a workload that can be paused, and what it has counted
mod netlink; // addresses and routes, as the kernel wants to hear them
mod pace; // how much may be done by now
mod record; // pages that know whether they are right
mod setup; // mounts, modules, network: from power-on to a usable Linux
mod variables; // what firmware keeps
mod words; // the kernel command line
mod work; // the workloads

use job::Jobs;
use std::{fs, sync::Arc, thread};
use words::Wish;

/// Prints one whole line: one `write`, so that lines of several threads (and of the kernel) do not mix.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let line = format!("{}\n", format_args!($($arg)*));
        // A console that cannot be written to leaves nobody to tell.
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
    }};
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((work::compile::UNIT, rest)) =
        arguments.split_first().map(|(word, rest)| (word.as_str(), rest))
    {
        if let Err(e) = work::compile::unit(rest) {
            say!("WHIMBREL error compiling: {e}");
            std::process::exit(1);
        }
        return;
    }
    if std::process::id() != 1 {
        eprintln!(
            "this is the init of a test guest: it runs as process 1 of a virtual machine, nowhere else"
        );
        std::process::exit(2);
    }
    match start() {
        // The threads do the work; process 1 must not end.
        Ok(()) => loop {
            thread::park();
        },
        Err(complaints) => {
            for complaint in complaints {
                say!("WHIMBREL error {complaint}");
            }
            setup::power_off();
        }
    }
}

/// From power-on to `WHIMBREL ready`; otherwise every reason why not.
fn start() -> Result<(), Vec<String>> {
    setup::mounts().map_err(|e| vec![e])?;
    let line = fs::read_to_string("/proc/cmdline").map_err(|e| vec![format!("/proc/cmdline: {e}")])?;
    let wish = Wish::from_command_line(&line)?;
    setup::modules().map_err(|e| vec![e])?;
    setup::network(&wish).map_err(|e| vec![e])?;
    work::fits(&wish).map_err(|e| vec![e])?;
    let jobs = Arc::new(Jobs::default());
    let work = Arc::new(work::start(&wish, &jobs).map_err(|e| vec![e])?);
    ask::listen(&wish, &jobs, &work).map_err(|e| vec![e])?;
    if let Some(port) = &wish.agent {
        agent::start(port).map_err(|e| vec![e])?;
    }
    beat::start(&wish, &jobs);
    let cpus = setup::cpus();
    say!("WHIMBREL ready cpus={cpus} mono_ms={}", beat::mono_ms());
    Ok(())
}
