//! What an option of QEMU's command line may say, as an allow-list: known options, known keys in each, and a
//! known form for every value. A peer's recipe is hostile: what is not known here is refused, whatever it may
//! mean to some QEMU.
//!
//! QEMU is given what was understood, not what was sent ([`written`]): its parsers differ in small things (a
//! flag that begins with `no`, a doubled comma before the first `=`), and none of these differences may carry
//! a meaning.

mod block;
mod devices;
mod forms;
mod options;
mod peripherals;
mod properties;

pub(crate) use devices::is_vcpu;
pub(crate) use forms::is_id;
pub(super) use forms::{LONGEST_NAME, RESERVED, is_word};
pub(super) use options::{cpu, machine, memory, smp};
pub(crate) use options::{is_nic_model, is_of_user_network};

use super::{
    Argument, Export, Role, SeenFile,
    check::shown,
    options::{escape, get, names_files, parse},
    refused,
};

/// The most text that an option's value may have.
pub(super) const LONGEST_VALUE: usize = 16 << 10;

/// Options without a value.
const FLAGS: &[&str] =
    &["-no-reboot", "-no-shutdown", "-no-hpet", "-no-acpi", "-usb", "-enable-fips", "-no-fd-bootchk"];

/// Whether one option of the command line may be passed on; says why not.
pub fn check_argument(argument: &Argument, files: &[SeenFile]) -> Result<(), String> {
    check_argument_of(argument, files, &[])
}

/// The same of a VM that also has these exports.
pub(super) fn check_argument_of(
    argument: &Argument,
    files: &[SeenFile],
    exports: &[Export],
) -> Result<(), String> {
    let option = argument.option.as_str();
    let refuse = |why: String| -> Result<(), String> {
        Err(format!("{} {}: {why}", shown(option), shown(argument.value.as_deref().unwrap_or(""))))
    };
    let not_allowed = || refuse("this option is not allowed".to_owned());
    let Some(value) = argument.value.as_deref() else {
        return if FLAGS.contains(&option) { Ok(()) } else { not_allowed() };
    };
    if value.len() > LONGEST_VALUE || value.contains('\0') {
        return refuse("its value is too long or has a NUL in it".to_owned());
    }
    if value.starts_with('{') && option != "-append" {
        return refuse("options in JSON are not understood; write key=value".to_owned());
    }
    let file_of = |role: Role, path: &str| {
        files.iter().any(|file| file.role == role && file.path.to_str() == Some(path))
    };
    match option {
        // A multiboot kernel's modules are a list, cut at commas and blanks.
        "-initrd" if value.contains([',', ' ']) => {
            refuse("QEMU takes a comma or a blank in it for a list; rename the file".to_owned())
        }
        "-kernel" | "-initrd" | "-bios" if file_of(Role::Boot, value) => Ok(()),
        "-kernel" | "-initrd" | "-bios" => refuse("the file is not among the recipe's boot files".to_owned()),
        "-fw_cfg" | "-acpitable" | "-smbios"
            if parse(value, "").iter().any(|(key, _)| names_files(option, key)) =>
        {
            options::with_file(option, value, &|path| file_of(Role::Boot, path)).or_else(refuse)
        }
        "-global" => global(value).or_else(refuse),
        "-device" => device(value).or_else(refuse),
        "-blockdev" => block::blockdev(value, &file_of, exports).or_else(refuse),
        "-drive" => block::drive(value, &file_of, exports).or_else(refuse),
        _ => options::check(option, value)
            .unwrap_or_else(|| Err("this option is not allowed".to_owned()))
            .or_else(refuse),
    }
}

/// Which device a `-device` makes.
pub(crate) fn device_driver(value: &str) -> String {
    get(&parse(value, "driver"), "driver").unwrap_or_default().to_owned()
}

fn device(value: &str) -> Result<(), String> {
    let driver = device_driver(value);
    if let Some(why) = refused::why_not_made(&driver) {
        return Err(why.to_owned());
    }
    if !devices::is_known(&driver) {
        return Err(format!("device {} is not allowed", shown(&driver)));
    }
    options::fit("property", &parse(value, "driver"), |key| devices::property(&driver, key))
}

/// A device whose name has a dot in it, which only the longer form of `-global` can say to QEMU.
const DOTTED: &str = "cfi.pflash01";

/// A `-global`'s device and property.
fn split_global(name: &str) -> Option<(&str, &str)> {
    let dotted = name.strip_prefix(DOTTED).and_then(|rest| rest.strip_prefix('.'));
    dotted.map(|property| (DOTTED, property)).or_else(|| name.split_once('.'))
}

/// `driver.property=value` only: the longer form would say the same in words that are not looked at here.
fn global(value: &str) -> Result<(), String> {
    let parts = value.split_once('=').and_then(|(name, value)| Some((split_global(name)?, value)));
    let Some(((driver, property), set)) = parts else {
        return Err("only driver.property=value is allowed".to_owned());
    };
    match devices::global(driver, property) {
        Some(form) if form.fits(set) => Ok(()),
        Some(form) => Err(format!("{}.{} must be {}", shown(driver), shown(property), form.wants())),
        None => Err(format!(
            "{}.{} is not allowed: it is not among what is known to open nothing; leave it out",
            shown(driver),
            shown(property)
        )),
    }
}

/// An option's value as QEMU is given it: every key spelled out, none left to be implied or taken apart in
/// another way than it was here. For an argument that [`check_argument`] found nothing wrong with.
pub(super) fn written(argument: &Argument) -> Option<String> {
    let value = argument.value.as_deref()?;
    if argument.option == "-global"
        && let Some((name, set)) = value.split_once('=')
        && let Some((DOTTED, property)) = split_global(name)
    {
        return Some(format!("driver={DOTTED},property={property},value={}", escape(set)));
    }
    let implied = match argument.option.as_str() {
        "-device" | "-blockdev" | "-audiodev" => "driver",
        "-object" => "qom-type",
        "-netdev" => "type",
        "-chardev" => "backend",
        "-numa" => "type",
        "-boot" => "order",
        "-net" => "type",
        "-icount" => "shift",
        "-fw_cfg" => "name",
        "-drive" | "-rtc" | "-smbios" | "-overcommit" | "-action" | "-acpitable" => "",
        _ => return Some(value.to_owned()),
    };
    let pairs = parse(value, implied).into_iter();
    let written: Vec<_> = pairs.map(|(key, value)| format!("{key}={}", escape(&value))).collect();
    Some(written.join(","))
}

#[cfg(test)]
mod tests;
