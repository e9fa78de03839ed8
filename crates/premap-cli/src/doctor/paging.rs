//! Whether KVM maps guests by the processor's second-stage tables (TDP) or shadows the guest's own.

use std::fs;

use super::check::{Check, Status};

/// What `/sys/module` says of KVM's modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Modules {
    /// kvm_intel's `ept`.
    ept: Option<String>,
    /// kvm_amd's `npt`.
    npt: Option<String>,
    /// kvm's `tdp_mmu`.
    tdp_mmu: Option<String>,
    /// Whether kvm_pvm, which runs guests without the processor's help, is loaded.
    pvm: bool,
}

impl Modules {
    pub(super) fn read() -> Self {
        let parameter = |path: &str| {
            fs::read_to_string(format!("/sys/module/{path}")).ok().map(|text| text.trim().to_owned())
        };
        Self {
            ept: parameter("kvm_intel/parameters/ept"),
            npt: parameter("kvm_amd/parameters/npt"),
            tdp_mmu: parameter("kvm/parameters/tdp_mmu"),
            pvm: fs::exists("/sys/module/kvm_pvm").unwrap_or(false),
        }
    }
}

/// Judges what the modules say.
pub(super) fn check(modules: &Modules) -> Check {
    let name = "second-stage paging";
    let (what, parameter) = match (&modules.ept, &modules.npt) {
        (Some(ept), _) => ("EPT", (ept, "kvm_intel with ept=1")),
        (None, Some(npt)) => ("NPT", (npt, "kvm_amd with npt=1")),
        (None, None) if modules.pvm => {
            return Check::new(
                name,
                Status::Missing,
                "shadow paging: kvm_pvm runs guests without the processor's help",
            )
            .advise("use a machine whose KVM has EPT or NPT; the host stage works here all the same");
        }
        (None, None) => {
            return Check::new(name, Status::Missing, "neither kvm_intel nor kvm_amd is loaded")
                .advise("load the one of this processor");
        }
    };
    let (value, remedy) = parameter;
    if !is_on(value) {
        return Check::new(name, Status::Missing, format!("shadow paging: {what} is off or absent"))
            .advise(format!("load {remedy}, if the processor has {what}"));
    }
    match &modules.tdp_mmu {
        Some(value) if !is_on(value) => Check::new(
            name,
            Status::Limited,
            format!("{what} is on, the TDP MMU is off: mapping takes one lock"),
        )
        .advise("load kvm with tdp_mmu=1, so that vCPUs map in parallel"),
        _ => Check::good(name, format!("{what} is on")),
    }
}

fn is_on(parameter: &str) -> bool {
    matches!(parameter, "Y" | "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn judge([ept, npt, tdp_mmu]: [&str; 3], pvm: bool, status: Status, result: &str) {
        let some = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        let check = check(&Modules { ept: some(ept), npt: some(npt), tdp_mmu: some(tdp_mmu), pvm });
        assert_eq!(check.status, status, "{check:?}");
        assert!(check.result.contains(result), "{check:?}");
        assert_eq!(check.advice.is_none(), matches!(status, Status::Good), "{check:?}");
    }

    #[test]
    fn tables_of_the_processor_are_told_from_shadow_paging() {
        judge(["Y", "", "Y"], false, Status::Good, "EPT is on");
        judge(["", "Y", "Y"], false, Status::Good, "NPT is on");
        judge(["", "1", ""], false, Status::Good, "NPT is on");
        judge(["", "Y", "N"], false, Status::Limited, "TDP MMU is off");
        judge(["N", "", "Y"], false, Status::Missing, "EPT is off");
        judge(["", "0", "Y"], false, Status::Missing, "NPT is off");
        judge(["", "", "Y"], true, Status::Missing, "kvm_pvm");
        judge(["", "", ""], false, Status::Missing, "neither");
    }
}
