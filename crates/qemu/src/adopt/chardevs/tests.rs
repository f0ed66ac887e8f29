//! What becomes of character devices.

use super::*;
use crate::adopt::{cmdline, names::Names};
use std::path::Path;

/// What a QEMU with these words is on the target: its console, character devices, and the options that use
/// them.
fn read(words: &[&str]) -> (cmdline::Read, String) {
    let argv: Vec<String> =
        ["qemu", "-nodefaults"].iter().chain(words).map(|word| (*word).to_owned()).collect();
    let read = cmdline::read(&argv, &Names::In(Path::new("/")));
    let mut said: Vec<String> = vec![format!("{:?}", read.recipe.console)];
    for device in &read.recipe.chardevs {
        let more = [(device.mux, " mux"), (device.logged, " log")].into_iter().filter(|(on, _)| *on);
        let more: String = more.map(|(_, word)| word).collect();
        said.push(format!("{} {:?}{more}", device.id, device.kind));
    }
    let words = |argument: &Argument| {
        format!("{} {}", argument.option, argument.value.as_deref().unwrap_or_default())
    };
    said.extend(read.recipe.arguments.iter().map(words));
    let said = said.join("; ");
    (read, said)
}

#[test]
fn every_form_of_a_port_has_its_like_on_the_target() {
    let rows: &[(&[&str], &str)] = &[
        (&[], "None"),
        (&["-serial", "none"], "None; -serial none"),
        (&["-serial", "null"], "None; -serial null"),
        (&["-serial", "stdio"], "File"),
        (&["-serial", "mon:stdio"], "File"),
        (&["-serial", "vc:80x25"], "File"),
        (&["-serial", "file:/x"], "File"),
        (&["-serial", "pty"], "Pty"),
        (&["-serial", "unix:/x,server,nowait"], "Socket"),
        (&["-serial", "tcp::4444,server=on,wait=off"], "Socket"),
        (&["-serial", "telnet:127.0.0.1:1"], "Socket"),
        (&["-serial", "udp:1.2.3.4:5@:6"], "Socket"),
        (&["-serial", "pipe:/x"], "Socket"),
        (&["-serial", "/dev/ttyS0"], "Socket"),
        (&["-chardev", "pty,id=c", "-serial", "chardev:c"], "Pty"),
        (
            &["-serial", "stdio", "-serial", "unix:/x", "-serial", "none"],
            "File; serial1 Socket; -serial chardev:serial1; -serial none",
        ),
        (&["-parallel", "file:/x"], "None; parallel0 Log; -parallel chardev:parallel0"),
        (&["-parallel", "none"], "None; -parallel none"),
        (
            &["-debugcon", "file:/x"],
            "None; debugcon Log; -device isa-debugcon,iobase=0xe9,id=debugcon,chardev=debugcon",
        ),
        (
            &[
                "-chardev",
                r#"{"id":"s","backend":{"type":"pty","data":{"logfile":"/l"}}}"#,
                "-device",
                "isa-serial,chardev=s",
            ],
            "None; s Pty log; -device isa-serial,chardev=s",
        ),
        (
            &["-chardev", "socket,path=/x,server=on,wait=off,id=g", "-device", "virtserialport,chardev=g"],
            "None; g Socket; -device virtserialport,chardev=g",
        ),
        (
            &["-chardev", "socket,host=h,port=1,reconnect=5,id=g", "-device", "virtconsole,chardev=g"],
            "None; g Socket; -device virtconsole,chardev=g",
        ),
        (
            &["-chardev", "spicevmc,id=v,name=vdagent", "-device", "virtserialport,chardev=v"],
            "None; v Null; -device virtserialport,chardev=v",
        ),
        (&["-chardev", "ringbuf,id=r,size=64K"], "None; -chardev ringbuf,id=r,size=64K"),
        // Monitors stay behind, and what only they use.
        (&["-chardev", "socket,id=m,fd=3", "-mon", "chardev=m,mode=control"], "None"),
        (&["-qmp", "unix:/x", "-monitor", "stdio"], "None"),
        (&["-chardev", "stdio,mux=on,id=m", "-mon", "chardev=m", "-serial", "chardev:m"], "File"),
        (
            &["-chardev", "pty,mux=on,id=m", "-serial", "chardev:m", "-device", "virtconsole,chardev=m"],
            "None; m Pty mux; -device virtconsole,chardev=m; -serial chardev:m",
        ),
    ];
    for (words, said) in rows {
        let (read, found) = read(words);
        assert_eq!((found.as_str(), &read.reasons), (*said, &vec![]), "{words:?}");
        for argument in &read.recipe.arguments {
            assert_eq!(crate::recipe::check_argument(argument, &[]), Ok(()), "{words:?}");
        }
    }
    let (refused, _) = read(&["-chardev", "msmouse,id=m", "-serial", "chardev:gone", "-serial", "wctablet"]);
    assert_eq!(refused.reasons.len(), 3, "{:?}", refused.reasons);
}

#[test]
fn it_is_said_what_each_is_on_the_target_and_by_which_name() {
    let (read, _) = read(
        &"-serial mon:unix:/x -chardev socket,path=/y,id=g \
         -device virtserialport,chardev=g,name=org.qemu.guest_agent.0 -chardev spicevmc,id=v \
         -vnc :0,password=on"
            .split(' ')
            .collect::<Vec<_>>(),
    );
    let recipe = Recipe { name: "web".to_owned(), ..read.recipe };
    let notes = [read.notes, notes(&recipe, &read.was)].concat();
    let says = [
        "its monitors (mon:unix:/x) stay behind",
        "the serial port (unix:/x) is a socket on the target, web:console.sock",
        "character device g of org.qemu.guest_agent.0 (socket) is a socket on the target, web:g.sock",
        "character device v (spicevmc) has nobody at its other end",
        "shown by VNC on the target, at the socket web:screen.vnc without a password",
    ];
    assert_eq!(notes.len(), says.len(), "{notes:#?}");
    for (note, says) in notes.iter().zip(says) {
        assert!(note.contains(says), "{note}");
    }
}

#[test]
fn what_others_have_changed_is_followed() {
    let (read, _) =
        read(&["-chardev", "socket,path=/y,id=g", "-chardev", "null,id=n", "-chardev", "null,mux=on,id=m"]);
    let mut recipe = read.recipe;
    let live: BTreeMap<String, String> = [
        ("g", "disconnected:unix:/y,server=on"),
        ("n", "pty:/dev/pts/3"),
        ("m", "mux"),
        ("m-base", "file"),
        ("late", "tcp:127.0.0.1:1,server=on <-> 127.0.0.1:2"),
        ("serial0", "null"),
        ("compat_monitor0", "unix:/q"),
        ("whimbrel-qmp", "unix:/q"),
        // Of `-gdb`, or of a `gdbserver` that may be over: `none` closes only its port.
        ("#chr062", "gdb"),
        ("gdb", "disconnected:tcp:127.0.0.1:1234,server=on"),
    ]
    .map(|(id, name)| (id.to_owned(), name.to_owned()))
    .into();
    assert_eq!(compare(&live, &mut recipe, &read.chardevs), Vec::<String>::new());
    let found: Vec<_> = recipe.chardevs.iter().map(|device| (device.id.as_str(), device.kind)).collect();
    use ChardevKind::{Log, Pty, Socket};
    assert_eq!(found, [("g", Socket), ("n", Pty), ("m", Log), ("late", Socket)]);
    assert_eq!(debugged(&live), None, "nobody is there");
    let connected = "tcp:127.0.0.1:1234,server=on <-> 127.0.0.1:5".to_owned();
    let why = debugged(&[("gdb".to_owned(), connected)].into()).unwrap_or_default();
    assert!(why.contains("a debugger is connected to QEMU (from 127.0.0.1:5)"), "{why}");
    let odd = [("mouse".to_owned(), "msmouse".to_owned())].into();
    assert_eq!(compare(&odd, &mut recipe, &read.chardevs).len(), 1);
}
