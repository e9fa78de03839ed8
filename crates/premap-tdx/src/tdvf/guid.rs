//! The GUIDs that lead to the metadata, as they lie in the image.

/// A GUID's 16 bytes in memory order: the first three fields little-endian, the rest as written.
pub(super) type Guid = [u8; 16];

/// Ends the table of GUIDed structures: 96b582de-1fb2-45f7-baea-a366c55a082d.
pub(super) const TABLE_FOOTER: Guid = mixed_endian(0x96b5_82de_1fb2_45f7_baea_a366_c55a_082d);
/// Tags the table's entry about TDX: e47a6535-984a-4798-865e-4685a7bf8ec2.
pub(super) const TDX_ENTRY: Guid = mixed_endian(0xe47a_6535_984a_4798_865e_4685_a7bf_8ec2);
/// Lies before the descriptor: e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae.
pub(super) const DESCRIPTOR: Guid = mixed_endian(0xe9ea_f9f3_168e_44d5_a8eb_7f4d_8738_f6ae);

/// Turns a GUID as it is written, one hexadecimal number, into the bytes that stand for it.
const fn mixed_endian(written: u128) -> Guid {
    let b = written.to_be_bytes();
    [b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_fields_are_little_endian() {
        assert_eq!(TABLE_FOOTER[..8], [0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45]);
        assert_eq!(TABLE_FOOTER[8..], [0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d]);
    }
}
