//! Peers that are slow, or gone.

use super::*;
use std::{net::TcpListener, thread};

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (caller, listener.accept().unwrap().0)
}

#[test]
fn the_last_word_behind_a_ping_that_cannot_be_answered_is_heard() {
    let (mut peer, here) = pair();
    let ping = proto::encode(control::Kind::Ping(control::Ping { sent_ns: 1 }));
    let failed = control::Failed { what: "the pause".into(), why: "it was given up".into(), cancelled: true };
    let said = [ping.clone(), ping, proto::encode(control::Kind::Failed(failed.clone()))].concat();
    peer.write_all(&said).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while sys::socket::queue(&peer).unwrap().unconfirmed > 0 {
        assert!(Instant::now() < end, "it does not arrive");
        thread::yield_now();
    }
    // Ends in a reset, as a process does that has not read everything.
    SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
    let conn = Conn::new(here, Arc::default()).unwrap();
    let speaker = Speaker::new(conn.another().unwrap());
    let mut heard = Vec::new();
    let end = listen(conn, SILENCE, &speaker, &Heard::default(), |kind| heard.push(kind));
    assert_eq!(heard, [control::Kind::Failed(failed)]);
    assert_ne!(end.kind(), io::ErrorKind::InvalidData, "{end}");
}

#[test]
fn a_handshake_has_one_deadline_however_little_comes_at_a_time() {
    for (first, security) in [(22, Security::Plaintext), (proto::MAGIC[0], Security::Plaintext)] {
        let (mut peer, here) = pair();
        let trickle = thread::spawn(move || {
            let mut next = first;
            while peer.write_all(&[next]).is_ok() {
                next = *proto::MAGIC.get(1).unwrap_or(&0);
                thread::sleep(Duration::from_millis(50));
            }
        });
        let begun = Instant::now();
        welcome(here, &security, Duration::from_millis(300)).unwrap_err();
        // And a second in which it may be told why not; far less than a byte at a time would take.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        trickle.join().unwrap();
    }
}
