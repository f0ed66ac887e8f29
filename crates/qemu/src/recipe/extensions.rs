//! What a qcow2 image says of its backing file's format, in an extension of its header.
//!
//! An image that says nothing would make QEMU guess from the file's content, and some formats (vmdk, for one)
//! open further files by name. <https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt>

use std::{fs::File, io, os::unix::fs::FileExt};

/// The extension that names the format.
const FORMAT: u32 = 0xe279_2aca;

/// The end of them.
const END: u32 = 0;

/// The most extensions that are read: QEMU writes five at most.
const MOST: usize = 64;

/// The longest name of a format.
const LONGEST: u32 = 15;

/// Where the extensions lie: from the header's end to the backing file's name, as QEMU reads them. `header`
/// are the image's first bytes.
fn place(header: &[u8; 104]) -> (u64, u64) {
    let half = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().expect("within the header"));
    let begin = if half(4) >= 3 { u64::from(half(100)) } else { 72 };
    let end = u64::from_be_bytes(*header[8..].first_chunk().expect("within the header"));
    (begin, end)
}

/// Which of raw and qcow2 the image says that its backing file is; else what is wrong with it.
pub(super) fn said_format(file: &File) -> io::Result<Result<&'static str, String>> {
    let mut header = [0; 104];
    // The second version's header is shorter; what follows it is not looked at then.
    file.read_exact_at(&mut header, 0)?;
    let (mut at, end) = place(&header);
    let mut said = None;
    for _ in 0..MOST {
        let mut head = [0; 8];
        if at.saturating_add(8) > end {
            break;
        }
        file.read_exact_at(&mut head, at)?;
        let word = |at: usize| u32::from_be_bytes(*head[at..].first_chunk().expect("within the extension"));
        let (kind, bytes) = (word(0), word(4));
        at += 8;
        if kind == END {
            break;
        }
        if kind == FORMAT {
            if bytes > LONGEST {
                return Ok(Err("names a format with too long a name".to_owned()));
            }
            let mut name = vec![0; bytes as usize];
            file.read_exact_at(&mut name, at)?;
            match &*name {
                b"raw" => said = Some("raw"),
                b"qcow2" => said = Some("qcow2"),
                // The last of several counts; none may be another.
                _ => {
                    let name = String::from_utf8_lossy(&name).replace(char::is_control, "?");
                    return Ok(Err(format!("is of the format {name}, and only raw and qcow2 are supported")));
                }
            }
        }
        at = at.saturating_add(u64::from(bytes).next_multiple_of(8));
    }
    Ok(said.ok_or_else(|| "is of a format that the image does not say".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// An image of version 3 whose backing file's name is at 512, with these extensions.
    fn image(extensions: &[(u32, &[u8])]) -> File {
        let mut bytes = vec![0; 104];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[8..16].copy_from_slice(&512_u64.to_be_bytes());
        bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
        for (kind, data) in extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(*data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.resize(1024, 0);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_backing_format_is_raw_or_qcow2_and_said() {
        let other = (0x6803_f857, &[7_u8; 48][..]);
        let format = |name: &'static str| (FORMAT, name.as_bytes());
        for (extensions, says) in [
            (vec![format("raw")], ""),
            (vec![other, format("qcow2"), other], ""),
            (vec![], "does not say"),
            (vec![other], "does not say"),
            (vec![(END, &[][..]), format("raw")], "does not say"),
            (vec![format("vmdk")], "format vmdk"),
            (vec![format("raw"), format("vmdk")], "format vmdk"),
            (vec![format("vmdk"), format("raw")], "format vmdk"),
            (vec![format("raw\0")], "format raw?"),
            (vec![format("")], "format ,"),
            (vec![(FORMAT, &[b'a'; 200][..])], "too long"),
            (vec![(7, &[0; 400][..]), format("raw")], "does not say"),
        ] {
            let got = said_format(&image(&extensions)).unwrap();
            let told = got.err().unwrap_or_default();
            assert!(
                if says.is_empty() { told.is_empty() } else { told.contains(says) },
                "{extensions:?}: {told}"
            );
        }
        // One that lies about its own length ends, too.
        let file = image(&[]);
        file.write_all_at(&[0, 0, 0, 7, 255, 255, 255, 255], 104).unwrap();
        assert!(said_format(&file).unwrap().is_err());
    }
}
