//! What guest and virtio devices have agreed on. What a device can offer depends on its host's kernel, too
//! (the offloads of a TAP), and QEMU refuses a device state with a feature that it does not offer.

use crate::qmp::{Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Where the devices with an id are. The others' names differ from QEMU to QEMU.
const PLACE: &str = "/machine/peripheral/";

/// More devices, and more features of one, than there are.
pub(crate) const MOST: usize = 512;

/// The features of one device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// The device's id.
    pub device: String,
    /// By their names in the virtio specification, such as `VIRTIO_NET_F_HOST_TSO4`.
    pub names: Vec<String>,
}

/// Which features of a device are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Which {
    /// Those that the guest has accepted; none before its driver has started.
    Accepted,
    /// Those that it may accept.
    Offered,
}

/// Features that this QEMU gives no name.
pub(crate) type Nameless = Vec<String>;

/// The features of each virtio device; and the devices that have others, too, of which this QEMU does not
/// know the names.
pub(crate) fn features(qmp: &mut Qmp, which: Which) -> Result<(Vec<Features>, Nameless), QmpError> {
    let devices = match qmp.execute("x-query-virtio", json!({})) {
        Err(error) if error.is_unknown_command() => return Ok((vec![], vec![])),
        devices => devices?,
    };
    let (mut features, mut nameless) = (Vec::new(), Vec::new());
    for device in devices.as_array().into_iter().flatten().take(MOST) {
        let path = device["path"].as_str().unwrap_or_default();
        let Some(id) = id_of(path) else { continue };
        let status = qmp.execute("x-query-virtio-status", json!({ "path": path }))?;
        let those = match which {
            Which::Accepted => &status["guest-features"],
            Which::Offered => &status["host-features"],
        };
        if those["unknown-dev-features"].as_u64().is_some_and(|bits| bits != 0) {
            nameless.push(id.to_owned());
        }
        features.push(Features { device: id.to_owned(), names: names(those) });
    }
    Ok((features, nameless))
}

/// The id of a device by where it is: that of a bus without its own devices (MMIO), or inside the card of
/// another.
fn id_of(path: &str) -> Option<&str> {
    let rest = path.strip_prefix(PLACE)?;
    let id = rest.strip_suffix("/virtio-backend").unwrap_or(rest);
    (!id.is_empty() && !id.contains('/')).then_some(id)
}

/// QEMU describes each: `VIRTIO_NET_F_MAC: Device has given MAC address`. One that begins with `VHOST_` is an
/// agreement between QEMU and its back end.
fn names(features: &Value) -> Vec<String> {
    let described = ["transports", "dev-features"].into_iter().flat_map(|kind| features[kind].as_array());
    let names = described.flatten().filter_map(|text| text.as_str()?.split(':').next());
    names.filter(|name| name.starts_with("VIRTIO_")).take(MOST).map(str::to_owned).collect()
}

/// Each feature that is `accepted` there and not `offered` here.
pub(crate) fn missing(accepted: &[Features], offered: &[Features]) -> Vec<String> {
    let mut missing = Vec::new();
    for there in accepted {
        let Some(here) = offered.iter().find(|here| here.device == there.device) else { continue };
        let lost = there.names.iter().filter(|name| !here.names.contains(name));
        missing.extend(lost.map(|name| format!("{name} of {}", there.device)));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_missing_where_it_is_accepted_and_not_offered() {
        let one = |device: &str, names: &[&str]| Features {
            device: device.to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let there =
            [one("net0", &["VIRTIO_F_VERSION_1", "VIRTIO_NET_F_HOST_TSO4"]), one("rng", &["VIRTIO_X"])];
        let rows: [(Vec<Features>, &[&str]); 4] = [
            (there.to_vec(), &[]),
            (vec![one("net0", &["VIRTIO_F_VERSION_1"])], &["VIRTIO_NET_F_HOST_TSO4 of net0"]),
            (vec![one("rng", &[])], &["VIRTIO_X of rng"]),
            (vec![], &[]),
        ];
        for (here, lost) in rows {
            assert_eq!(missing(&there, &here), lost, "{here:?}");
        }
    }

    #[test]
    fn a_device_is_known_by_its_id() {
        let rows = [
            ("/machine/peripheral/net0/virtio-backend", Some("net0")),
            ("/machine/peripheral/blk0", Some("blk0")),
            ("/machine/peripheral-anon/device[0]/virtio-backend", None),
            ("/machine/peripheral/", None),
            ("/machine/peripheral/gpu/vga/virtio-backend", None),
        ];
        for (path, id) in rows {
            assert_eq!(id_of(path), id, "{path}");
        }
    }

    #[test]
    fn names_are_taken_from_what_qemu_says_of_them() {
        let said = json!({
            "transports": ["VIRTIO_F_VERSION_1: Device compliant for v1 spec (legacy)"],
            "dev-features": [
                "VHOST_USER_F_PROTOCOL_FEATURES: Vhost-user protocol features negotiation supported",
                "VIRTIO_NET_F_MAC: Device has given MAC address",
                7,
            ],
        });
        assert_eq!(names(&said), ["VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MAC"]);
        assert_eq!(names(&json!(7)), Vec::<String>::new());
    }
}
