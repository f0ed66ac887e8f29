//! What the guest was shown: its machine's versioned name, its CPU's features.

use crate::{
    qmp::{Qmp, QmpError},
    recipe::FeatureWord,
};
use serde_json::{Value, json};

/// The versioned name of the running machine: `pc-q35-7.2` where the command line said `q35`.
pub(crate) fn pinned_machine(qmp: &mut Qmp) -> Result<String, QmpError> {
    let answer = qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let name = answer.as_str().ok_or_else(|| qmp.strange("qom-get /machine type", &answer))?;
    Ok(name.strip_suffix("-machine").unwrap_or(name).to_owned())
}

/// `machine` with its options, its name replaced.
pub(crate) fn with_machine(machine: &str, name: &str) -> String {
    match machine.split_once(',') {
        Some((_, options)) => format!("{name},{options}"),
        None => name.to_owned(),
    }
}

/// The feature words of the first vCPU.
pub(crate) fn features(qmp: &mut Qmp) -> Result<Vec<FeatureWord>, QmpError> {
    let cpus = qmp.execute("query-cpus-fast", json!({}))?;
    let path = cpus[0]["qom-path"].as_str().ok_or_else(|| qmp.strange("query-cpus-fast", &cpus))?;
    let words = qmp.execute("qom-get", json!({ "path": path, "property": "feature-words" }))?;
    let words = words.as_array().ok_or_else(|| qmp.strange("qom-get feature-words", &words))?;
    let word = |value: &Value| {
        let number = |name: &str| value[name].as_u64().map(|number| number as u32);
        Some(FeatureWord {
            eax: number("cpuid-input-eax")?,
            ecx: number("cpuid-input-ecx"),
            register: value["cpuid-register"].as_str()?.to_owned(),
            bits: number("features")?,
        })
    };
    Ok(words.iter().filter_map(word).filter(|word| word.bits != 0).collect())
}

/// Follows from `-smp`, which both ends have: older versions of QEMU (7.2) show it to the guest, and not
/// here.
fn is_topology(eax: u32, register: &str, bit: u32) -> bool {
    matches!((eax, register, bit), (1, "EDX", 28) | (0x8000_0001, "ECX", 1))
}

/// Each feature that `there` has and `here` lacks, as CPUID's documentation writes it.
pub(crate) fn missing(there: &[FeatureWord], here: &[FeatureWord]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in there {
        let same = |other: &&FeatureWord| {
            (other.eax, other.ecx, &other.register) == (word.eax, word.ecx, &word.register)
        };
        let absent = word.bits & !here.iter().find(same).map_or(0, |word| word.bits);
        let lost = (0..u32::BITS).filter(|bit| absent >> bit & 1 == 1);
        for bit in lost.filter(|bit| !is_topology(word.eax, &word.register, *bit)) {
            let ecx = word.ecx.map_or(String::new(), |ecx| format!(",ECX={ecx:#x}"));
            missing.push(format!("CPUID[EAX={:#x}{ecx}].{}[bit {bit}]", word.eax, word.register));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_that_is_missing_is_named_and_one_more_does_no_harm() {
        let word = |bits| FeatureWord { eax: 7, ecx: Some(0), register: "EBX".to_owned(), bits };
        assert_eq!(missing(&[word(0b101)], &[word(0b110)]), ["CPUID[EAX=0x7,ECX=0x0].EBX[bit 0]"]);
        assert_eq!(missing(&[word(0b101)], &[word(0b111)]), Vec::<String>::new());
        assert_eq!(missing(&[word(0b1)], &[]).len(), 1);
        let threads = FeatureWord { eax: 1, ecx: None, register: "EDX".to_owned(), bits: 1 << 28 };
        assert_eq!(missing(&[threads], &[]), Vec::<String>::new(), "by -smp");
    }
}
