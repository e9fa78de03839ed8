//! What KVM makes of the module's statuses.

use premap_kvm::Errno;
use premap_kvm::tdx::TdxError;
use premap_tdx_module::{Class, Failure};

/// Whether another holds what the call needed: trying again may well succeed.
pub(super) fn is_busy(failure: &Failure) -> bool {
    matches!(
        failure.class(),
        Class::OPERAND_BUSY | Class::PREVIOUS_TLB_EPOCH_BUSY | Class::TLB_TRACKING_NOT_DONE | Class::SYS_BUSY
    )
}

/// EBUSY for what another holds, EIO for all else.
pub(super) fn refused(failure: &Failure) -> TdxError {
    let errno = if is_busy(failure) { Errno::BUSY } else { Errno::IO };
    TdxError { errno, hw_error: failure.status.raw() }
}

/// Makes a call until the module is not busy.
pub(super) fn insist<T>(mut call: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    loop {
        match call() {
            Err(failure) if is_busy(&failure) => std::thread::yield_now(),
            result => return result,
        }
    }
}
