//! The guest's code: real x86-64 instructions for long mode, independent of where they lie.
//!
//! | register | holds |
//! |---|---|
//! | rdi | address of the slice's first page |
//! | rsi | number of pages |
//! | rcx | steps left |
//! | rbx | x, the generator's state: a page number, to be skipped if it is not below rsi |
//! | r8, r9, r10 | the generator's multiplier, increment and mask |
//! | r11 | number of the slice's first page in the whole range, plus 1 |
//! | r12 | the odd number that makes a page's word from its number |
//! | rdx | 0 reads, else writes |
//! | rax | sum of the words read, at the end |
// UNSAFETY: machine code in a data section, and its bytes between two labels.
#![expect(unsafe_code, reason = "the guest is machine code")]

use kvm_bindings::kvm_regs;

use crate::touch::{Access, Slice, WORD};

std::arch::global_asm!(
    ".pushsection .rodata.premap_guest, \"a\", @progbits",
    // Seen by the crate's other object files, and by nobody outside the program.
    ".globl premap_guest_start, premap_guest_end",
    ".hidden premap_guest_start, premap_guest_end",
    "premap_guest_start:",
    "2:  cmp rbx, rsi",
    "    jae 4f",
    "    mov r13, rbx",
    "    shl r13, 12",
    "    test rdx, rdx",
    "    jz 3f",
    "    lea r14, [rbx + r11]",
    "    imul r14, r12",
    "    mov [rdi + r13], r14",
    "    jmp 4f",
    "3:  mov r14, [rdi + r13]",
    "    add rax, r14",
    "4:  imul rbx, r8",
    "    add rbx, r9",
    "    and rbx, r10",
    "    dec rcx",
    "    jnz 2b",
    "    hlt",
    "premap_guest_end:",
    ".popsection",
);

/// The guest's code as it lies in memory.
pub(super) fn bytes() -> &'static [u8] {
    unsafe extern "C" {
        #[link_name = "premap_guest_start"]
        static START: u8;
        #[link_name = "premap_guest_end"]
        static END: u8;
    }
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both labels are in one section of read-only data that the assembly above fills in between.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The registers with which the code runs `slice`.
pub(super) fn registers(slice: &Slice, entry: u64) -> kvm_regs {
    let sequence = slice.sequence();
    kvm_regs {
        rip: entry,
        // Bit 1 is always set; interrupts are off.
        rflags: 2,
        rdi: slice.gpa.raw(),
        rsi: slice.pages,
        rcx: sequence.steps,
        r8: sequence.multiplier,
        r9: sequence.increment,
        r10: sequence.mask,
        r11: slice.first.wrapping_add(1),
        r12: WORD,
        rdx: match slice.access {
            Access::Read => 0,
            Access::Write => 1,
        },
        ..Default::default()
    }
}
