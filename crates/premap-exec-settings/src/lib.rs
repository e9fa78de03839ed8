//! What `premap exec` and the library that it preloads agree on: the library's name, and its settings.
//!
//! The command writes the settings into one environment variable, the library reads them when the process first speaks
//! to KVM. Both come from one build, so the text inside is no interface: it may change with any version. A library
//! without the variable, preloaded by hand, takes the defaults.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The environment variable that carries the settings.
pub const VARIABLE: &str = "PREMAP_EXEC";

/// The version of the report's lines, which `docs/exec-report.md` describes. It grows when a field changes its meaning or
/// goes; fields and events may come within one version.
pub const REPORT_VERSION: u32 = 1;

/// The library's file name.
pub const LIBRARY: &str = "libpremap_preload.so";

/// How a VMM's memory is mapped ahead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Which stages are run.
    pub strategy: Strategy,
    /// How many bytes one call maps; the engine's own default unless set.
    pub chunk: Option<u64>,
    /// How long one run may hold the guest back, in nanoseconds.
    pub deadline_ns: Option<u64>,
    /// How many bytes of the host's memory mapping ahead may take. Unless set: all that the guest lacks where the host can
    /// hold it, and nothing where it can't.
    pub limit: Option<u64>,
    /// Threads that make memory present on the host, beside one for each vCPU at hand; the engine's own number unless set.
    pub host_threads: Option<usize>,
    /// For how long after a guest's start changes of its slots are followed by another run, in nanoseconds.
    pub follow_ns: u64,
    /// What to do with memory that the guest may be given later.
    pub hotplug_pools: HotplugPools,
    /// What to do in a process that is confined by seccomp.
    pub seccomp: Seccomp,
    /// Where events are written.
    pub report: Option<Report>,
    /// Whether stderr hears of what went well too.
    pub voice: Voice,
    /// The process that the command becomes: it tells where no VM was made.
    pub process: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            chunk: None,
            deadline_ns: None,
            limit: None,
            host_threads: None,
            follow_ns: 60_000_000_000,
            hotplug_pools: HotplugPools::default(),
            seccomp: Seccomp::default(),
            report: None,
            voice: Voice::default(),
            process: None,
        }
    }
}

/// Which stages are run before the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The host's pages first, then the guest's addresses mapped to them.
    #[default]
    TwoStage,
    /// The host's pages alone.
    HostOnly,
    /// The guest's addresses alone, mapped to what the host has.
    SecondOnly,
    /// Nothing is mapped; faults are counted.
    None,
}

/// What to do with memory that the guest may be given later (virtio-mem, DIMMs), or of which that can't be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HotplugPools {
    /// Leave it, and say how much it is.
    #[default]
    Leave,
    /// Map it like the guest's other memory.
    Map,
}

/// What to do in a process that is confined by seccomp, whose filter may kill it for a call that it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// Map nothing, and say what the filter would have to allow.
    #[default]
    StepAside,
    /// Go on: the user says that the filter allows it.
    Trust,
}

/// Where events are written, a JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// At the end of this file.
    #[serde(with = "path")]
    File(PathBuf),
    /// To this descriptor, which the process inherits.
    Descriptor(i32),
}

/// What stderr hears.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Voice {
    /// A line where nothing, or not all, was mapped.
    #[default]
    Failures,
    /// A line for each run too.
    Everything,
}

/// A path as text, or where it is none, as bytes.
mod path {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(PathBuf),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        let written = match path.to_str() {
            Some(_) => Written::Text(path.to_owned()),
            None => Written::Bytes(path.as_os_str().as_bytes().to_owned()),
        };
        written.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Ok(match Written::deserialize(deserializer)? {
            Written::Text(path) => path,
            Written::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

impl Settings {
    /// Writes the settings as the variable's value.
    ///
    /// # Errors
    /// None that is known: whatever settings there are can be written.
    pub fn encode(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// Reads the variable's value.
    ///
    /// # Errors
    /// Where it is not what [`encode`](Self::encode) of the same version wrote.
    pub fn decode(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_decoded() {
        let settings = Settings {
            strategy: Strategy::HostOnly,
            chunk: Some(1 << 21),
            deadline_ns: Some(1),
            limit: Some(1 << 30),
            host_threads: Some(2),
            follow_ns: 3,
            hotplug_pools: HotplugPools::Map,
            seccomp: Seccomp::Trust,
            report: Some(Report::File("a b/\"c\".json".into())),
            voice: Voice::Everything,
            process: Some(7),
        };
        assert_eq!(Settings::decode(&settings.encode().unwrap()).unwrap(), settings);
    }

    #[test]
    fn what_is_left_out_takes_its_default_and_nonsense_is_refused() {
        assert_eq!(Settings::decode("{}").unwrap(), Settings::default());
        for text in ["", "two-stage", r#"{"strategy": "three-stage"}"#] {
            assert!(Settings::decode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_need_not_be_text() {
        use std::os::unix::ffi::OsStringExt;
        for bytes in [&b"/a/\xff\xfe b"[..], b"/plain", b"7"] {
            let path = PathBuf::from(std::ffi::OsString::from_vec(bytes.to_owned()));
            let settings = Settings { report: Some(Report::File(path)), ..Settings::default() };
            assert_eq!(Settings::decode(&settings.encode().unwrap()).unwrap(), settings);
        }
    }
}
