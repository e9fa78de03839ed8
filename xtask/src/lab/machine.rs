//! The emulated machine, as arguments of QEMU.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

/// The emulated machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Machine {
    /// Guest memory, as QEMU takes it
    #[arg(long, value_name = "SIZE", default_value_t = Machine::default().memory)]
    pub(crate) memory: String,
    /// Emulated processors
    #[arg(long, value_name = "N", default_value_t = Machine::default().cpus)]
    pub(crate) cpus: u32,
    /// Huge pages of 2 MiB to set aside
    #[arg(long, value_name = "N", default_value_t = Machine::default().hugepages)]
    pub(crate) hugepages: u32,
    /// Parameter of KVM's modules to load them with, such as npt=0 or tdp_mmu=0; may be given more than once
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) kvm: Vec<Parameter>,
}

impl Default for Machine {
    fn default() -> Self {
        Self { memory: "2G".to_owned(), cpus: 2, hugepages: 64, kvm: Vec::new() }
    }
}

/// A parameter of a kernel module, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    value: String,
}

impl FromStr for Parameter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.,".contains(&byte))
        };
        match text.split_once('=') {
            Some((name, value)) if plain(name) && plain(value) => {
                Ok(Self { name: name.to_owned(), value: value.to_owned() })
            }
            _ => Err(format!("{text} is no module parameter; give one such as npt=0")),
        }
    }
}

impl std::fmt::Display for Parameter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}={}", self.name, self.value)
    }
}

/// QEMU's arguments for one boot, whose files lie in `directory`.
pub(super) fn arguments(machine: &Machine, accelerator: &str, image: &Path, directory: &Path) -> Vec<String> {
    let file = |name: &str| directory.join(name).display().to_string();
    // QEMU's option syntax takes a doubled comma for one.
    let option_file = |name: &str| file(name).replace(',', ",,");
    let kernel_arguments = format!(
        "console=ttyS0 quiet panic=-1 oops=panic mitigations=off hugepages={} rdinit=/init",
        machine.hugepages
    );
    let mut arguments: Vec<String> =
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]
            .map(str::to_owned)
            .into();
    let mut pair = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    pair("-accel", accelerator.to_owned());
    pair("-cpu", "EPYC,+svm,+npt,+smep".to_owned());
    pair("-m", machine.memory.clone());
    pair("-smp", machine.cpus.to_string());
    pair("-kernel", image.display().to_string());
    pair("-initrd", file("initramfs"));
    pair("-append", kernel_arguments);
    pair("-serial", format!("file:{}", file("console")));
    pair("-device", "virtio-serial-pci".to_owned());
    pair("-chardev", "stdio,id=control,signal=off".to_owned());
    pair("-chardev", format!("file,id=stdout,path={}", option_file("stdout")));
    pair("-chardev", format!("file,id=stderr,path={}", option_file("stderr")));
    for (number, name) in ["control", "stdout", "stderr"].iter().enumerate() {
        pair("-device", format!("virtserialport,nr={},chardev={name},name={name}", number + 1));
    }
    arguments
}

/// Wraps a command so that it is killed when this process ends in whatever way, where util-linux has the means.
pub(super) fn with_parent(command: &Command) -> Command {
    if !Path::new("/usr/bin/setpriv").exists() {
        let mut plain = Command::new(command.get_program());
        plain.args(command.get_args());
        plain.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        return plain;
    }
    let mut wrapped = Command::new("/usr/bin/setpriv");
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_a_name_and_a_value() {
        assert_eq!(
            "npt=0".parse::<Parameter>().map(|parameter| parameter.to_string()),
            Ok("npt=0".to_owned())
        );
        for wrong in ["npt", "npt=", "=0", "npt=0 nested=0", "npt=$(reboot)"] {
            assert!(wrong.parse::<Parameter>().unwrap_err().contains(wrong));
        }
    }
}
