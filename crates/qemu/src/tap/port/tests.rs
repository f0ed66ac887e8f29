//! What is read of a port is what is set at the next one.

use super::*;
use crate::tap::tools::understand;

/// As `ip -details -json link show` says it, with more or less left out.
fn linked(flags: &str, data: &str) -> Link {
    let text = format!(
        r#"[{{"ifname":"t0","flags":[{flags}],"mtu":9000,"master":"br0","txqlen":1000,
        "linkinfo":{{"info_kind":"tun",
        "info_slave_kind":"bridge","info_slave_data":{{"state":"forwarding","priority":32,"hairpin":false,
        "learning":true,"multicast_router":1,"group_fwd_mask":"0"{data}}}}}}}]"#
    );
    understand(&text).unwrap().remove(0)
}

fn bridge(mtu: u32, filtering: u8) -> Link {
    let text = format!(
        r#"[{{"ifname":"br0","mtu":{mtu},"linkinfo":{{"info_kind":"bridge",
        "info_data":{{"vlan_filtering":{filtering}}}}}}}]"#
    );
    understand(&text).unwrap().remove(0)
}

/// As `bridge -json vlan show` says it.
fn vlans(shown: &str) -> Vec<Vlan> {
    vlans_of("t0", understand(shown).unwrap())
}

#[test]
fn a_port_is_set_as_it_was_read() {
    let up = r#""UP""#;
    let plain = Port::read(&linked(up, ""), &bridge(9000, 0), None).unwrap();
    assert_eq!(plain, Port { mtu: 9000, bridge_mtu: 9000, ..Port::default() });
    assert_eq!(plain.after_joining("t1"), None);
    assert_eq!(
        plain.before_joining("t1", "fe:00:00:00:00:01", &bridge(9000, 0)).join(" "),
        "link set dev t1 address fe:00:00:00:00:01 mtu 9000"
    );

    let data = r#","isolated":true,"learning":false,"hairpin":true,"priority":8,"multicast_router":2"#;
    let mut tap = linked("", data);
    (tap.txqlen, tap.ifalias) = (Some(500), Some("web's".to_owned()));
    let odd = Port::read(&tap, &bridge(1500, 0), None).unwrap();
    assert!(odd.down && odd.check().is_empty());
    assert_eq!(
        odd.before_joining("t1", "fe:00:00:00:00:01", &bridge(1500, 0)).join(" "),
        "link set dev t1 address fe:00:00:00:00:01 mtu 9000 txqueuelen 500 alias web's"
    );
    assert_eq!(
        odd.after_joining("t1").unwrap().join(" "),
        "link set dev t1 type bridge_slave hairpin on isolated on learning off priority 8 mcast_router 2"
    );
    let json = serde_json::to_string(&odd).unwrap();
    assert_eq!(serde_json::from_str::<Port>(&json).unwrap(), odd);
    assert_eq!(serde_json::from_str::<Port>("{}").unwrap(), Port::default());
}

#[test]
fn a_port_leaves_its_first_vlans_and_joins_its_own() {
    let begins = vlans(r#"[{"ifname":"t0","vlans":[{"vlan":1,"flags":["PVID","Egress Untagged"]}]}]"#);
    let own = vlans(
        r#"[{"ifname":"x","vlans":[{"vlan":9}]},{"ifname":"t0","vlans":[{"vlan":20,"flags":["PVID",
        "Egress Untagged"]},{"vlan":30,"vlanEnd":39},{"vlan":50,"flags":["Egress Untagged"]}]}]"#,
    );
    let port = Port { vlans: Some(own), ..Port::default() };
    assert_eq!(port.check(), Vec::<String>::new());
    let commands: Vec<_> = port.vlan_commands("t1", &begins).iter().map(|words| words.join(" ")).collect();
    assert_eq!(
        commands,
        [
            "vlan del dev t1 vid 1",
            "vlan add dev t1 vid 20 pvid untagged",
            "vlan add dev t1 vid 30-39",
            "vlan add dev t1 vid 50 untagged"
        ]
    );
    let as_it_begins = Port { vlans: Some(begins.clone()), ..Port::default() };
    assert!(as_it_begins.vlan_commands("t1", &begins).is_empty());
    let in_none = Port { vlans: Some(vec![]), ..Port::default() };
    assert_eq!(in_none.vlan_commands("t1", &begins).len(), 1);
    assert_eq!(port.vlans_beyond(&[1..=1, 20..=40]), [50]);
    assert_eq!(port.vlans_beyond(&[1..=4094]), Vec::<u16>::new());
    assert_eq!(Port::default().vlans_beyond(&[]), Vec::<u16>::new());
}

#[test]
fn a_bridge_of_another_network_is_refused_with_a_remedy() {
    let port = |mtu, bridge_mtu, vlans| Port { mtu, bridge_mtu, vlans, ..Port::default() };
    let vlan = || Some(vec![Vlan { first: 20, last: 20, pvid: true, untagged: true }]);
    let table = [
        (port(0, 0, None), bridge(1500, 0), None),
        (port(0, 0, None), bridge(1500, 1), None),
        (port(1500, 1500, None), bridge(9000, 0), None),
        (port(9000, 9000, None), bridge(9000, 0), None),
        // Its own bridge was no larger: nothing is lost.
        (port(9000, 1500, None), bridge(1500, 0), None),
        (port(9000, 9000, None), bridge(1500, 0), Some("ip link set br0 mtu 9000")),
        (port(9000, 4000, None), bridge(1500, 0), Some("ip link set br0 mtu 4000")),
        (port(1500, 1500, vlan()), bridge(1500, 1), None),
        (port(1500, 1500, vlan()), bridge(1500, 0), Some("type bridge vlan_filtering 1")),
        (port(1500, 1500, None), bridge(1500, 1), Some("filters VLANs here, and not where the VM runs")),
    ];
    for (port, bridge, refused) in table {
        let reasons = port.misfits(&bridge, false);
        assert_eq!(reasons.len(), usize::from(refused.is_some()), "{reasons:?}");
        assert!(refused.is_none_or(|words| reasons[0].contains(words)), "{reasons:?}");
        // Whatever is done, the bridge's own MTU does not fall.
        assert!(port.mtu_on(&bridge) >= bridge.mtu);
    }
    // Also one that a peer does not call by what it is: it would be in all VLANs.
    let switched = Port { ovs: Some(OvsPort::default()), ..port(1500, 1500, None) };
    for (port, is_ovs, refused) in [
        (&switched, true, false),
        (&switched, false, true),
        (&port(1500, 1500, None), true, true),
        (&Port::default(), true, true),
        (&Port::default(), false, false),
    ] {
        let reasons = port.misfits(&bridge(1500, 0), is_ovs);
        assert_eq!(reasons.iter().any(|why| why.contains("make both alike")), refused, "{reasons:?}");
    }
    assert_eq!(switched.vlans_beyond(&[1..=1]).first(), Some(&2));
    assert!(switched.vlans_beyond(&[1..=4094]).is_empty());
}

#[test]
fn what_cannot_be_carried_over_is_named() {
    let table = [
        (r#","backup_port":"eth1""#, "nobackup_port"),
        (r#","vlan_tunnel":true"#, "vlan_tunnel off"),
        (r#","group_fwd_mask":"0x8""#, "group_fwd_mask 0"),
    ];
    for (data, mends) in table {
        let reasons = Port::read(&linked(r#""UP""#, data), &bridge(1500, 0), None).unwrap_err();
        assert!(reasons.len() == 1 && reasons[0].contains(mends), "{reasons:?}");
    }
    let mut filtered = linked(r#""UP""#, "");
    filtered.xdp = Some(serde_json::json!({ "mode": 2 }));
    assert!(Port::read(&filtered, &bridge(1500, 0), None).unwrap_err()[0].contains("xdp off"));
}

#[test]
fn a_hostile_port_is_refused() {
    let vlan = |first, last, pvid| Vlan { first, last, pvid, untagged: false };
    let in_vlans = |vlans: Vec<Vlan>| Port { vlans: Some(vlans), ..Port::default() };
    let flag = |name: &str| Port { flags: [(name.to_owned(), true)].into(), ..Port::default() };
    let hostile = [
        Port { mtu: 1, ..Port::default() },
        Port { bridge_mtu: u32::MAX, ..Port::default() },
        Port { txqlen: Some(u32::MAX), ..Port::default() },
        Port { alias: Some("x\n".to_owned()), ..Port::default() },
        Port { alias: Some("x".repeat(256)), ..Port::default() },
        Port { priority: Some(64), ..Port::default() },
        Port { mcast_router: Some(3), ..Port::default() },
        flag("state"),
        flag("isolated on master br1"),
        Port { ovs: Some(OvsPort { tag: Some(4095), ..OvsPort::default() }), ..Port::default() },
        in_vlans(vec![vlan(0, 0, false)]),
        in_vlans(vec![vlan(1, 4095, false)]),
        in_vlans(vec![vlan(5, 4, false)]),
        in_vlans(vec![vlan(5, 6, true)]),
        in_vlans(vec![vlan(5, 5, true), vlan(6, 6, true)]),
        in_vlans(vec![vlan(1, 4094, false); 2]),
        in_vlans(vec![vlan(1, 1, false); 5000]),
    ];
    for port in hostile {
        assert!(!port.check().is_empty(), "{port:?}");
    }
}
