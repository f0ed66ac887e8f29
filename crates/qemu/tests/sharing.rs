//! What shows that two hosts have the same file, and what does not. No QEMU, no guest: files, and hosts that
//! ask for them.

mod common;

use common::{hand::has, host, preflight_of};
use qemu::{
    Host, Recipe, VmFile, preflight,
    recipe::{Argument, Role, SeenFile, files},
    sharing::{self, Shown},
};
use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A VM with one disk, `web.img`.
struct Bed {
    folder: tempfile::TempDir,
    recipe: Recipe,
    host: Host,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("web.img");
        fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let host = host(folder.path(), "run", None);
        let text =
            format!("name = \"web\"\nmemory = \"64MiB\"\n[[disk]]\npath = {disk:?}\nformat = \"raw\"\n");
        let recipe = VmFile::parse(&text, Path::new("web.toml")).unwrap().recipe(&host).unwrap();
        Self { folder, recipe, host }
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("web.img")
    }

    fn show(&self, from: &str, migration: &str) -> Shown {
        sharing::show(&self.recipe, from, migration, &open).unwrap()
    }

    /// What this host says to a source that calls itself so.
    fn hears(&self, recipe: &Recipe, from: &str, migration: &str) -> Vec<String> {
        preflight::check(recipe, &self.host, from, migration, || {}).err().unwrap_or_default()
    }
}

fn open(file: &SeenFile, write: bool) -> Result<File, String> {
    File::options().read(true).write(write).open(&file.path).map_err(|error| error.to_string())
}

const REFUSED: &str = "is not shown to be the file that the source uses";

#[test]
fn a_disk_belongs_to_who_shows_it_while_he_shows_it() {
    let bed = Bed::new();
    let shown = bed.show("a", "1");
    assert_eq!(bed.hears(&shown.recipe, "a", "1"), Vec::<String>::new());
    assert_eq!(
        (shown.recipe.files[0].device, shown.recipe.files[0].inode),
        (0, 0),
        "the other host is not told"
    );
    // Two at once, of one file.
    let another = bed.show("a", "2");
    assert_eq!(bed.hears(&another.recipe, "a", "2"), Vec::<String>::new());
    // Who was shown it cannot pass that on as his own, nor use it again.
    for (from, migration) in [("b", "1"), ("a", "3")] {
        has(&bed.hears(&shown.recipe, from, migration), REFUSED);
    }
    let recipe = shown.recipe.clone();
    drop(shown);
    has(&bed.hears(&recipe, "a", "1"), REFUSED);
    // Nothing was left.
    let left = fs::read_dir(bed.folder.path()).unwrap().count();
    assert_eq!(left, 1);
}

#[test]
fn a_peer_that_claims_a_disk_learns_and_gets_nothing() {
    let bed = Bed::new();
    let mut recipe = bed.recipe.clone();
    let metadata = fs::metadata(bed.disk()).unwrap();
    // All that it could know of the file.
    (recipe.files[0].device, recipe.files[0].inode) = (metadata.dev(), metadata.ino());
    recipe.files[0].bytes = metadata.len();
    let there = bed.hears(&recipe, "a", "1");
    has(&there, REFUSED);
    fs::remove_file(bed.disk()).unwrap();
    assert_eq!(bed.hears(&recipe, "a", "1"), there, "whether there is one is not told");
    for secret in ["", "0", "../../x", &"00".repeat(32)] {
        fs::write(bed.disk(), "x").unwrap();
        let json = serde_json::to_string(&recipe).unwrap();
        let with = format!("{},\"proof\":{secret:?}}}", json.strip_suffix('}').unwrap());
        let recipe: Recipe = serde_json::from_str(&with).unwrap();
        has(&bed.hears(&recipe, "a", "1"), REFUSED);
    }
}

#[test]
fn who_may_only_read_a_disk_cannot_have_it_written() {
    let bed = Bed::new();
    let mut hostile = bed.recipe.clone();
    for argument in &mut hostile.arguments {
        if let Some(value) = argument.value.as_mut().filter(|value| value.starts_with("driver=file")) {
            value.push_str(",read-only=on");
        }
    }
    // Shown as one that is only read, asked for as one that is written.
    let shown = sharing::show(&hostile, "a", "1", &open).unwrap();
    assert_eq!(bed.hears(&shown.recipe, "a", "1"), Vec::<String>::new());
    let asked = Recipe { arguments: bed.recipe.arguments.clone(), ..shown.recipe.clone() };
    has(&bed.hears(&asked, "a", "1"), REFUSED);
}

#[test]
fn media_that_are_only_read_are_compared_by_content() {
    let mut bed = Bed::new();
    let (here, there) = (bed.folder.path().join("cd.iso"), bed.folder.path().join("copy.iso"));
    let content: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    fs::write(&here, &content).unwrap();
    let drive = |more: &str| {
        Argument::new("-drive", format!("file={},format=raw,if=none,id=cd{more}", here.display()))
    };
    bed.recipe.files.push(files::look(&here, Role::Disk).unwrap());
    bed.recipe.arguments.push(drive(",media=cdrom"));
    let copied = |path: &Path| if path == here { there.clone() } else { path.to_owned() };
    let mut hears = |content: &[u8], more: &str| {
        fs::write(&there, content).unwrap();
        *bed.recipe.arguments.last_mut().unwrap() = drive(more);
        preflight_of(&bed.recipe, &bed.host, copied)
    };
    assert_eq!(hears(&content, ",media=cdrom"), Vec::<String>::new());
    assert_eq!(hears(&content, ",readonly=on"), Vec::<String>::new());
    let mut other = content.clone();
    other[2_999_999] ^= 1;
    for wrong in [&other, &content[1..], b"" as &[u8]] {
        has(&hears(wrong, ",media=cdrom"), "with the source's content");
    }
    // One that the guest may write must be the same file.
    has(&hears(&content, ""), REFUSED);
}

#[test]
fn what_a_target_keeps_of_a_recipe_is_its_own() {
    let bed = Bed::new();
    let shown = bed.show("a", "1");
    let opened = preflight::check(&shown.recipe, &bed.host, "a", "1", || {}).unwrap();
    let kept = preflight::settle(shown.recipe.clone(), &opened);
    assert_eq!(kept.proof, None);
    assert_eq!(kept.files[0].identity(), Some(files::Identity::at(&bed.disk()).unwrap()));
    // Of a store of yesterday.
    let old: SeenFile =
        serde_json::from_str(r#"{"path":"/a","role":"disk","bytes":1,"inode":7,"digest":null}"#).unwrap();
    assert_eq!(old.identity(), None);
}
