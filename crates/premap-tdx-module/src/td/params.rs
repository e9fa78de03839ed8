//! TD_PARAMS: what MNG.INIT reads from the host's memory.

use crate::operand::Level;
use crate::status::{Class, Operand, Status};

/// TD_PARAMS, as far as the model looks at them: 1,024 bytes, aligned to as many. CPUID and what depends on it is not
/// modelled. Source: Intel TDX Module 1.5 ABI specification, TD_PARAMS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TdParams {
    /// ATTRIBUTES, at 0.
    pub attributes: u64,
    /// XFAM, at 8.
    pub xfam: u64,
    /// MAX_VCPUS, at 16.
    pub max_vcpus: u16,
    /// Whether the Secure-EPT has five levels: EPTP_CONTROLS at 24, bits 5:3 of which are 4 then, else 3.
    pub five_levels: bool,
    /// GPAW: the shared bit is 51 and not 47. CONFIG_FLAGS at 32, bit 0.
    pub gpaw: bool,
    /// MRCONFIGID, at 80.
    pub mrconfigid: [u8; 48],
    /// MROWNER, at 128.
    pub mrowner: [u8; 48],
    /// MROWNERCONFIG, at 176.
    pub mrownerconfig: [u8; 48],
}

/// Why the bytes are no TD_PARAMS: the field, as MNG.INIT's status names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the field {0} of TD_PARAMS is not valid")]
pub struct BadParams(pub Operand);

impl From<BadParams> for Status {
    fn from(bad: BadParams) -> Self {
        Class::OPERAND_INVALID.on(bad.0)
    }
}

impl Default for TdParams {
    /// 64 vCPUs at most, four levels, shared bit 47, nothing else.
    fn default() -> Self {
        Self {
            attributes: 0,
            xfam: 3,
            max_vcpus: 64,
            five_levels: false,
            gpaw: false,
            mrconfigid: [0; 48],
            mrowner: [0; 48],
            mrownerconfig: [0; 48],
        }
    }
}

/// Write-back: bits 2:0 of EPTP_CONTROLS.
const WRITE_BACK: u64 = 6;
const FOUR_LEVELS: u64 = 3;
const FIVE_LEVELS: u64 = 4;
/// x87 and SSE: bits of XFAM that must be set.
const XFAM_FIXED: u64 = 3;

impl TdParams {
    /// The length in bytes, and the alignment.
    pub const BYTES: usize = 1024;

    /// The bytes that MNG.INIT reads.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let levels = if self.five_levels { FIVE_LEVELS } else { FOUR_LEVELS };
        put(0, &self.attributes.to_le_bytes());
        put(8, &self.xfam.to_le_bytes());
        put(16, &self.max_vcpus.to_le_bytes());
        put(24, &(WRITE_BACK | levels << 3).to_le_bytes());
        put(32, &u64::from(self.gpaw).to_le_bytes());
        put(80, &self.mrconfigid);
        put(128, &self.mrowner);
        put(176, &self.mrownerconfig);
        bytes
    }

    /// Reads and checks the bytes.
    ///
    /// # Errors
    /// The first field that can't be right.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, BadParams> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let digest = |at: usize| std::array::from_fn(|byte| bytes[at + byte]);
        let xfam = word(8);
        if xfam & XFAM_FIXED != XFAM_FIXED {
            return Err(BadParams(Operand::XFAM));
        }
        let max_vcpus = u16::from_le_bytes([bytes[16], bytes[17]]);
        if max_vcpus == 0 {
            return Err(BadParams(Operand::MAX_VCPUS));
        }
        let five_levels = match word(24) {
            value if value == WRITE_BACK | FOUR_LEVELS << 3 => false,
            value if value == WRITE_BACK | FIVE_LEVELS << 3 => true,
            _ => return Err(BadParams(Operand::EPTP_CONTROLS)),
        };
        let gpaw = word(32) & 1 != 0;
        // A wide address needs the levels to walk it.
        if word(32) > 1 || gpaw && !five_levels {
            return Err(BadParams(Operand::EXEC_CONTROLS));
        }
        Ok(Self {
            attributes: word(0),
            xfam,
            max_vcpus,
            five_levels,
            gpaw,
            mrconfigid: digest(80),
            mrowner: digest(128),
            mrownerconfig: digest(176),
        })
    }

    pub(crate) const fn top_level(&self) -> Level {
        if self.five_levels { Level::PML5 } else { Level::PML4 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_and_bytes_convert_both_ways() {
        let params =
            TdParams { five_levels: true, gpaw: true, mrowner: [7; 48], max_vcpus: 3, ..TdParams::default() };
        assert_eq!(TdParams::from_bytes(&params.to_bytes()), Ok(params));
    }

    #[test]
    fn a_wrong_field_is_named() {
        let refused = |at: usize, byte| {
            let mut bytes = TdParams::default().to_bytes();
            bytes[at] = byte;
            TdParams::from_bytes(&bytes).unwrap_err().0
        };
        assert_eq!(refused(8, 0), Operand::XFAM);
        assert_eq!(refused(16, 0), Operand::MAX_VCPUS);
        assert_eq!(refused(24, 0), Operand::EPTP_CONTROLS);
        assert_eq!(refused(32, 1), Operand::EXEC_CONTROLS);
        assert_eq!(refused(32, 2), Operand::EXEC_CONTROLS);
    }
}
