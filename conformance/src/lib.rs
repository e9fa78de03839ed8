//! Scenarios run on every KVM in reach, by the same test body.
//!
//! A scenario makes a machine, does something to it, and looks at what came of it: the engine's report, the guest's
//! faults, the memory's content. It is generic over the kernel, so what holds on one must hold on the other; where
//! releases differ the scenario says what each may answer. `tests/soft.rs` runs all of them on the software KVM,
//! `tests/linux.rs` on `/dev/kvm` where that can pre-fault: in the lab, on real kernels.

#![expect(clippy::missing_panics_doc, reason = "a scenario says by a panic that something does not hold")]

pub mod fixture;
pub mod known_differences;
pub mod reach;
pub mod scenarios;
pub mod script;
pub mod storm;

/// Makes a test of each scenario, on the kernel that `$kernel()` gives, if it gives one.
#[macro_export]
macro_rules! test_every_scenario {
    ($kernel:path) => {
        $crate::test_every_scenario! { $kernel:
            background: memory_is_mapped_while_the_guest_runs,
            background: a_stop_midway_loses_nothing,
            background: a_slot_that_goes_with_its_memory_is_skipped,
            background: slots_come_and_go_under_the_guard,
            backings: every_backing_is_mapped_whole,
            backings: the_trap_is_reproduced_and_both_stages_avoid_it,
            backings: content_survives_being_mapped_twice,
            backings: reading_keeps_private_files_shared,
            gaps: a_hole_in_the_middle_is_skipped_to_the_byte,
            gaps: a_read_only_slot_is_mapped_for_reading,
            gaps: unmapped_host_memory_fails_to_the_byte,
            gaps: a_slot_removed_before_the_run_is_skipped,
            gaps: a_slot_removed_under_a_used_vcpu_never_hangs,
            gaps: dirty_logging_counts_what_was_mapped_ahead,
            limits: a_deadline_hits_midway,
            limits: a_stop_from_another_thread_hits_midway,
            limits: a_byte_budget_is_kept_and_the_rest_can_be_mapped_later,
            limits: a_signal_storm_loses_nothing,
            private: a_guest_memfd_keeps_its_content_from_the_vmm,
            private: content_survives_conversion,
            private: a_private_page_that_is_not_there_goes_back_to_the_vmm,
            private: a_closed_guest_memfd_takes_its_pages_along,
            private: private_memory_is_pre_faulted_by_small_pages,
        }
    };
    ($kernel:path: $($room:ident: $scenario:ident,)*) => {
        $(
            #[test]
            fn $scenario() {
                if let Some(kernel) = $kernel() {
                    $crate::scenarios::$room::$scenario(&kernel);
                }
            }
        )*
    };
}
