//! Pictures on the screen.

use std::{fs::OpenOptions, io::Write, path::Path};

/// The firmware's frame buffer, where Linux knows one.
const PIXELS: &str = "/dev/fb0";

/// The screen of text.
const TEXT: &str = "/dev/tty0";

/// How many bytes of a frame buffer are written: less than any has.
const BYTES: usize = 512 << 10;

/// Of a screen of text, but for its edge: what is written there makes it scroll.
const LINES: usize = 24;
const COLUMNS: usize = 79;

/// Draws the picture with this number; says on what.
pub(crate) fn picture(number: usize) -> Result<&'static str, String> {
    // Nobody sees a cursor blink.
    write(TEXT, text(number).as_bytes())?;
    if !Path::new(PIXELS).exists() {
        return Ok("text");
    }
    let pixels: Vec<u8> = (0..BYTES).map(|n| (((n >> 2) * (number + 3)) >> 4) as u8).collect();
    write(PIXELS, &pixels).map(|()| "pixels")
}

fn text(number: usize) -> String {
    let mut text = "\x1b[?25l\x1b[2J".to_owned();
    for line in 0..LINES {
        text.push_str(&format!("\x1b[{};1H", line + 1));
        for column in 0..COLUMNS {
            let colour = (line * column + number) % 8;
            let letter = char::from(b'a' + ((line + column + number) % 26) as u8);
            text.push_str(&format!("\x1b[4{colour}m{letter}"));
        }
    }
    text + "\x1b[0m"
}

fn write(device: &str, bytes: &[u8]) -> Result<(), String> {
    let written = OpenOptions::new().write(true).open(device).and_then(|mut file| file.write_all(bytes));
    written.map_err(|e| format!("{device}: {e}"))
}
