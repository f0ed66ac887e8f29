//! What a bare guest draws, and whether its screen shows it.

use super::{BOOT, numbers};
use crate::{Doing, Error, Qmp, Result, ensure, wait_for};

/// Where it says what it knows of its screen (`guest.s`).
const SCREEN: u64 = 0x6240;

/// How the first pixel of a line follows from how many lines were drawn before it, and each other from the
/// one before.
const A_LINE: u32 = 0x9e37_79b1;
const A_PIXEL: u32 = 0x0100_0193;

/// How often a picture is taken until enough of it stands still.
const TRIES: usize = 20;

/// A part of the screen, and how much the guest has drawn of it.
#[derive(Clone, Copy, Debug)]
struct Drawn {
    width: u64,
    lines: u64,
    /// Lines drawn so far, from the first to the last again and again.
    count: u64,
}

/// Whether it has a screen. If so, that shows what the guest has drawn, pixel by pixel.
pub(super) fn shows_what_is_drawn(qmp: &mut Qmp) -> Result<bool> {
    let whole = wait_for("a bare guest's picture", BOOT, || {
        let drawn = drawn(qmp)?;
        Ok(drawn.is_none_or(|drawn| drawn.count > drawn.lines).then_some(drawn))
    })?;
    let Some(mut before) = whole else { return Ok(false) };
    for _ in 0..TRIES {
        let bytes = qmp.picture()?;
        let picture = Picture::of(&bytes)?;
        let after = drawn(qmp)?.doing("find the screen again")?;
        ensure!(picture.fits(&after), "{after:?} of {} × {}", picture.width, picture.lines);
        // What was drawn meanwhile may be there, or not, or half.
        let stood_still = (after.count + 1).saturating_sub(after.lines)..before.count;
        for count in stood_still.clone() {
            picture.shows(count, &after)?;
        }
        if stood_still.end.saturating_sub(stood_still.start) > after.lines / 2 {
            return Ok(true);
        }
        before = after;
    }
    Err(Error::new("look at a bare guest's screen", "it is drawn faster than it can be looked at"))
}

fn drawn(qmp: &mut Qmp) -> Result<Option<Drawn>> {
    let [buffer, width, lines, count] = numbers(qmp, SCREEN, 4)?[..] else {
        return Err(Error::new("read what a bare guest knows of its screen", "it is not there"));
    };
    // Pairs of 32 bits: bytes of a line and pixels in it, lines and bytes of a pixel.
    Ok((buffer != 0).then_some(Drawn { width: width >> 32, lines: lines & 0xffff_ffff, count }))
}

/// A picture as QEMU writes it (PPM).
struct Picture<'a> {
    width: usize,
    lines: usize,
    pixels: &'a [u8],
}

impl<'a> Picture<'a> {
    fn of(bytes: &'a [u8]) -> Result<Self> {
        let what = || format!("read a picture of {} bytes", bytes.len());
        let mut parts = bytes.splitn(4, |byte| *byte == b'\n');
        let mut part = || parts.next().doing(what());
        let (kind, size, _, pixels) = (part()?, part()?, part()?, part()?);
        let size = String::from_utf8_lossy(size);
        let (width, lines) = size.split_once(' ').doing(what())?;
        let (width, lines) = (width.parse().doing(what())?, lines.parse().doing(what())?);
        ensure!(kind == b"P6" && pixels.len() >= width * lines * 3, "{}", what());
        Ok(Self { width, lines, pixels })
    }

    fn fits(&self, drawn: &Drawn) -> bool {
        drawn.lines > 0 && drawn.width as usize <= self.width && drawn.lines as usize <= self.lines
    }

    /// The line that was drawn after `count` others.
    fn shows(&self, count: u64, drawn: &Drawn) -> Result<()> {
        let line = (count % drawn.lines) as usize;
        let first = (count as u32).wrapping_mul(A_LINE);
        let here = &self.pixels[line * self.width * 3..][..drawn.width as usize * 3];
        for (n, pixel) in here.chunks(3).enumerate() {
            let [_, red, green, blue] = first.wrapping_add((n as u32).wrapping_mul(A_PIXEL)).to_be_bytes();
            ensure!(pixel == [red, green, blue], "pixel {n} of line {line}, drawn after {count}: {pixel:x?}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_shows_what_was_drawn_and_nothing_else() {
        let drawn = Drawn { width: 2, lines: 1, count: 1 };
        let mut ppm = b"P6\n3 1\n255\n".to_vec();
        ppm.extend([0, 0, 0, 0, 1, 0x93, 9, 9, 9]);
        let picture = Picture::of(&ppm).expect("a picture");
        assert!(picture.fits(&drawn) && picture.shows(0, &drawn).is_ok());
        assert!(picture.shows(1, &drawn).is_err(), "another line would be there");
        assert!(!picture.fits(&Drawn { lines: 2, ..drawn }));
        for broken in [&b"P5\n1 1\n255\n123"[..], b"P6\n2 1\n255\n123", b"P6\n1", b""] {
            assert!(Picture::of(broken).is_err());
        }
    }
}
