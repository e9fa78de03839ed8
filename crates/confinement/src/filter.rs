//! Rules as filters.

use std::collections::BTreeMap;

use premap::seccomp::{Argument, Rule};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// A filter that allows what the rules say and these calls, and kills the process for every other call.
///
/// # Errors
/// What seccompiler does not take.
pub fn allow(rules: &[Rule], also: &[i64]) -> Result<BpfProgram, BackendError> {
    compile(rules, also, SeccompAction::Allow, SeccompAction::KillProcess)
}

/// A filter that answers what the rules say with an errno, and leaves every other call to the filters besides.
///
/// # Errors
/// What seccompiler does not take.
pub fn refuse(rules: &[Rule], errno: i32) -> Result<BpfProgram, BackendError> {
    compile(rules, &[], SeccompAction::Errno(errno.unsigned_abs()), SeccompAction::Allow)
}

fn compile(
    rules: &[Rule],
    also: &[i64],
    listed: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        if let Some(Argument { index, value, .. }) = rule.argument {
            let equal =
                SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into())?;
            calls.entry(rule.syscall.number).or_default().push(SeccompRule::new(vec![equal])?);
        }
    }
    // Without a condition, whatever the arguments are.
    let whole = rules.iter().filter(|rule| rule.argument.is_none()).map(|rule| rule.syscall.number);
    calls.extend(whole.chain(also.iter().copied()).map(|number| (number, Vec::new())));
    SeccompFilter::new(calls, other, listed, std::env::consts::ARCH.try_into()?)?.try_into()
}
