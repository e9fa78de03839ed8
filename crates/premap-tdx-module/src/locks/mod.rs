//! Locks that are tried and never waited for: who can't have one is told OPERAND_BUSY.
//!
//! # Which there are, and their order
//!
//! | lock | shared by | alone for |
//! |---|---|---|
//! | a vCPU's (TDVPR) | | VP.ADDCX, INIT, ENTER, FLUSH |
//! | a TD's (TDR) | most calls | MNG.*, PAGE.ADD, MR.EXTEND, MR.FINALIZE |
//! | its OP_STATE | VP.CREATE and ADDCX, most MEM calls | |
//! | its Secure-EPT tree | SEPT.ADD, SEPT.RD, AUG, REMOVE, RELOCATE, PROMOTE, DEMOTE | BLOCK, UNBLOCK, SEPT.REMOVE |
//! | a Secure-EPT entry | | whoever changes it ([`sept`](crate::sept)) |
//! | a PAMT entry | | whoever changes the page's type ([`pamt`](crate::pamt)) |
//! | its TLB epoch | VP.ENTER | TRACK |
//! | the table of HKIDs (KOT) | | MNG.CREATE, VPFLUSHDONE, KEY.FREEID |
//!
//! Since none is waited for, no order among them can make a deadlock; calls take them in the table's order, as the module
//! does. Three waits exist, each for a thread that itself waits for nothing: for one that looks whether a lock is free
//! ([`Sharex`]), for a host's access to one page ([`phymem`](crate::phymem)), and for walks under way when PROMOTE gives a
//! table back ([`seamcall`](crate::seamcall)).
//!
//! **Shared holders scale.** They count themselves in a part of their thread's own, so that SEPT.ADD and AUG from several
//! threads write no common word. Who wants a lock alone reads every part.

mod sharex;

pub(crate) use sharex::{Exclusive, Shared, Sharex};
