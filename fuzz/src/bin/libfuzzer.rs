//! A target as libFuzzer runs it: which one, `WHIMBREL_FUZZ_TARGET` says. One program for all, because
//! linking takes longest.
#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<&fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("WHIMBREL_FUZZ_TARGET").unwrap_or_default();
    fuzz::target(&name).unwrap_or_else(|| {
        let names: Vec<_> = fuzz::TARGETS.iter().map(|target| target.name).collect();
        eprintln!("WHIMBREL_FUZZ_TARGET must be one of: {}", names.join(" "));
        std::process::exit(2)
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    TARGET.run(data);
});
