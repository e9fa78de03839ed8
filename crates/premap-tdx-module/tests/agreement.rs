//! After any sequence of calls PAMT, Secure-EPT and child counts agree, and guests read what they wrote.

mod model;

use model::{Act, Model, Op};
use proptest::prelude::*;

fn act() -> impl Strategy<Value = Act> {
    let gpa = 0_u16..8;
    prop_oneof![
        (gpa.clone(), 0_u8..2).prop_map(|(gpa, level)| Act::Accept { gpa, level }),
        gpa.clone().prop_map(|gpa| Act::Write { gpa }),
        gpa.prop_map(|gpa| Act::Removed { gpa }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let td = prop_oneof![5 => Just(0_u8), 1 => Just(1)];
    let level = prop_oneof![5 => Just(0_u8), 4 => Just(1), 1 => Just(2), 1 => Just(3)];
    let (gpa, page, vcpu) = (0_u16..8, any::<u16>(), any::<u8>());
    let on = (td.clone(), gpa.clone(), level.clone());
    let one = (td.clone(), gpa.clone());
    let with = (td.clone(), gpa.clone(), page);
    prop_oneof![
        1 => td.clone().prop_map(|td| Op::Create { td }),
        1 => td.clone().prop_map(|td| Op::KeyConfig { td }),
        1 => (td.clone(), page).prop_map(|(td, page)| Op::Addcx { td, page }),
        1 => td.clone().prop_map(|td| Op::Init { td }),
        1 => (td.clone(), page).prop_map(|(td, page)| Op::VpCreate { td, page }),
        1 => (vcpu, page).prop_map(|(vcpu, page)| Op::VpAddcx { vcpu, page }),
        1 => (vcpu, 0_u8..2).prop_map(|(vcpu, processor)| Op::VpInit { vcpu, processor }),
        1 => (vcpu, 0_u8..2).prop_map(|(vcpu, processor)| Op::VpFlush { vcpu, processor }),
        16 => (vcpu, 0_u8..2, act()).prop_map(|(vcpu, processor, act)| Op::Enter { vcpu, processor, act }),
        4 => (on.clone(), page).prop_map(|((td, gpa, level), page)| Op::SeptAdd { td, gpa, level, page }),
        4 => on.clone().prop_map(|(td, gpa, level)| Op::SeptRemove { td, gpa, level }),
        6 => with.clone().prop_map(|(td, gpa, page)| Op::Add { td, gpa, page }),
        8 => (on.clone(), page).prop_map(|((td, gpa, level), page)| Op::Aug { td, gpa, level, page }),
        5 => with.clone().prop_map(|(td, gpa, page)| Op::Relocate { td, gpa, page }),
        6 => on.clone().prop_map(|(td, gpa, _)| Op::Promote { td, gpa, level: 1 }),
        8 => (on.clone(), page).prop_map(|((td, gpa, _), page)| Op::Demote { td, gpa, level: 1, page }),
        8 => on.clone().prop_map(|(td, gpa, level)| Op::Remove { td, gpa, level }),
        8 => on.clone().prop_map(|(td, gpa, level)| Op::Block { td, gpa, level }),
        6 => on.clone().prop_map(|(td, gpa, level)| Op::Unblock { td, gpa, level }),
        12 => on.prop_map(|(td, gpa, level)| Op::Quiet { td, gpa, level }),
        6 => td.clone().prop_map(|td| Op::Track { td }),
        3 => one.prop_map(|(td, gpa)| Op::Extend { td, gpa }),
        2 => td.clone().prop_map(|td| Op::Finalize { td }),
        1 => td.clone().prop_map(|td| Op::VpFlushDone { td }),
        1 => td.clone().prop_map(|td| Op::FreeId { td }),
        2 => page.prop_map(|page| Op::Reclaim { page }),
        4 => with.prop_map(|(td, gpa, page)| Op::Fill { td, gpa, page }),
        2 => td.clone().prop_map(|td| Op::Build { td }),
        1 => td.prop_map(|td| Op::End { td }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, ..ProptestConfig::default() })]

    #[test]
    fn tables_counts_and_content_agree_after_every_call(ops in prop::collection::vec(op(), 1..160)) {
        let mut model = Model::new();
        model.apply(&Op::Build { td: 0 });
        for op in &ops {
            model.apply(op);
        }
    }
}
